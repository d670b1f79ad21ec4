"""Dynamo, torch's own tracer, with `fuse` as its backend. Private names of torch stand in this file alone.

Dynamo guards what a forward reads: sizes, modes, attributes, globals. It replays side effects at each call, and code that
it cannot trace runs between two graphs. The graphs run eagerly, with autograd through our operators.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

from tritonconv.graph.fuse import Fusion, fuse_graph
from tritonconv.graph.nodes import call_of, nodes_in
from tritonconv.ops.core.backend import Backend, constant_under_compile
from tritonconv.ops.core.family import Family, call_family, family_named

__all__ = [
    "MOST_TRACES", "Traces", "compiled", "fuse_in_other_graphs", "is_disabled", "keep_checkpoints", "run_eagerly",
    "traces_of",
]  # fmt: skip

_numbers = itertools.count()
MOST_TRACES = 64
"""Traces of one model's code that are kept: for modes, dtypes, numbers of axes."""

OPERATORS = str(Path(__file__).parent.parent / "ops") + os.sep
MEASURE = "profile_guard_manager"
Graph = Callable[..., Any]


def is_disabled() -> bool:
    """Whether the environment turns Dynamo off."""
    return os.environ.get("TORCHDYNAMO_DISABLE", "") == "1"


def compiled(
    function: Any, backend: Callable[[fx.GraphModule, Any], Graph], watcher: FrameWatcher | None = None
) -> Callable[..., Any]:
    """A function of Python's traced by Dynamo, with a backend, and with traces and limits of its own.

    Traces are kept with a function's code, and its file, line and name decide which sizes are symbols. A copy with a name
    of its own makes two models of one class independent.

    Args:
        watcher: is told of frames that are traced, and of those that are not.
    """
    import torch._dynamo

    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    # Later than torch 2.11.
    known = inspect.signature(getattr(torch._dynamo.eval_frame, "_optimize", torch._dynamo.optimize)).parameters
    options: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": MOST_TRACES}
    context: Any = torch._dynamo.optimize(backend, **{key: v for key, v in options.items() if key in known})
    context.callback = Traces(context.callback, code, function.__qualname__, watcher)
    traced: Callable[..., Any] = context(own)
    traced.traces = context.callback  # type: ignore[attr-defined]
    return traced


class FrameWatcher(Protocol):
    """Who is told of what Dynamo does with frames."""

    def enter_frame(self, frame: types.FrameType) -> None:
        """A frame may be traced now."""

    def skip_frame(self, frame: types.FrameType, reason: str) -> None:
        """It was not, and runs as it is."""


class Traces:
    """What Dynamo calls for code that it has not seen with such values, in a configuration of ours.

    Args:
        callback: Dynamo's own.
        code: of the function that is compiled.
        name: of that function.
        watcher: as for `compiled`.
    """

    count = 0
    """Traces of the function."""
    is_full = False
    """Whether there are as many as are kept, so that further ones were refused."""

    def __init__(
        self, callback: Callable[..., Any], code: types.CodeType, name: str, watcher: FrameWatcher | None
    ) -> None:  # fmt: skip
        # The name by which Dynamo looks through wrappers.
        self._torchdynamo_orig_backend = callback
        self._code, self._name, self._watcher = code, name, watcher

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
        from torch._dynamo import config, guards
        from torch._dynamo.types import ConvertFrameReturn

        if frame.f_code.co_filename.startswith(OPERATORS):
            # What calls it could not be traced. Dynamo would go on with each function that it calls, launchers among them.
            skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
            return ConvertFrameReturn(skip, apply_to_code=False)
        # What cannot be traced runs as it is, and raises its own error. The log is for those who ask for Dynamo's.
        log = logging.getLogger("torch._dynamo")
        level = log.level
        if not log.isEnabledFor(logging.INFO):
            log.setLevel(logging.ERROR)
        # For the log alone, it measures each trace's guards once, after writing all over the processor's cache.
        measure = getattr(guards, MEASURE, no_time)
        # Another thread that traces restores it.
        if measure is not no_time:
            setattr(guards, MEASURE, no_time)
        if self._watcher is not None:
            self._watcher.enter_frame(frame)
        try:
            with config.patch(suppress_errors=True), warnings.catch_warnings():
                # Made errors, they would end the trace. One is of code without a module.
                warnings.filterwarnings("ignore", module=r"torch\._dynamo\.")
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
                result = self._torchdynamo_orig_backend(frame, *args, **kwargs)
        finally:
            log.setLevel(level)
            if measure is not no_time:
                setattr(guards, MEASURE, measure)
        if result.guarded_code is not None:
            self.count += frame.f_code is self._code
        elif result.frame_exec_strategy.cur_action == _FrameAction.RUN_ONLY and not self.is_full:
            self.is_full = True
            text = f"{self._name} has {self.count} traces; for calls that need more, its layers run on their own"
            warnings.warn(f"tritonconv: {text} (tritonconv.explain tells more)", stacklevel=2)
        elif self._watcher is not None:
            # Later than torch 2.11.
            self._watcher.skip_frame(frame, getattr(result, "skip_reason", None) or "")
        return result


def no_time(*_: Any) -> float:
    """Stands for a measurement that is not made."""
    return 0.0


def traces_of(function: Callable[..., Any]) -> Traces | None:
    """The traces of what `compiled` gave."""
    return getattr(function, "traces", None)


def run_eagerly(module: fx.GraphModule, example_inputs: Any, *, backend: Backend | None = None) -> Graph:  # noqa: ARG001
    """Dynamo's backend of converted models: the fused graph, run eagerly.

    Args:
        backend: of the functions of torch in the graph.
    """
    fuse_or_warn(module, backend)
    keep_checkpoints(module)
    _bind_numbers(module)
    return module.forward


def _bind_numbers(module: fx.GraphModule) -> None:
    """Let numbers that are known not be made again at each run."""
    for node in module.graph.find_nodes(op="call_function", target=call_family):
        name, tensors, numbers, backend = node.args
        if not any(nodes_in(numbers)):
            node.target, node.args = _bound(family_named(name), numbers, backend), tuple(tensors)
    module.recompile()


def _bound(family: Family[Any], numbers: Any, backend: Backend | None) -> Callable[..., Any]:
    def call(*tensors: Any) -> Any:
        return family(tensors, numbers, backend)

    return call


def fuse_or_warn(module: fx.GraphModule, backend: Backend | None = None) -> Fusion:
    """`fuse_graph`; a graph that cannot be rewritten is right as it is, and gives a warning."""
    original = fx.Graph()
    original.output(original.graph_copy(module.graph, {}))
    try:
        return fuse_graph(module, backend)
    except Exception as error:
        warnings.warn(f"tritonconv: a graph runs without fusion: {type(error).__name__}: {error}", stacklevel=2)
        module.graph = original
        return Fusion()


def keep_checkpoints(module: fx.GraphModule) -> None:
    """Run checkpointed regions by torch.utils.checkpoint: the operator in the graph needs AOTAutograd for its promises."""
    operators = torch.ops.higher_order
    found = [n for n in module.graph.nodes if n.target is getattr(operators, "tag_activation_checkpoint", operators)]
    for node in found:
        node.target = checkpointed
    if found:
        module.recompile()
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            keep_checkpoints(child)


def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A checkpointed region of a graph, which is computed again in the backward pass, with the same random numbers."""
    from torch.utils.checkpoint import checkpoint

    options = {key: kwargs[key] for key in ("context_fn", "determinism_check", "debug") if kwargs.get(key) is not None}
    # Buffers that the region changes must not be arguments, whose versions are checked.
    return checkpoint(lambda: function(*args), use_reentrant=False, preserve_rng_state=True, **options)


@constant_under_compile
def fuse_in_other_graphs() -> bool:
    """Let every later graph of Dynamo's with converted layers be fused before its backend gets it, whichever that is.

    Dynamo calls this while it traces a converted model for a compiler that the user chose.
    """
    from torch._dynamo.output_graph import OutputGraph

    original = OutputGraph.call_user_compiler
    if getattr(original, "_tritonconv", False):
        return True

    @functools.wraps(original)
    def call_user_compiler(self: Any, module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if not fuses_itself(self.compiler_fn) and any(map(is_converted, module.graph.nodes)):
            fuse_or_warn(module)
        return original(self, module, *args, **kwargs)

    call_user_compiler._tritonconv = True  # type: ignore[attr-defined]
    OutputGraph.call_user_compiler = call_user_compiler  # type: ignore
    return True


def is_converted(node: fx.Node) -> bool:
    """Whether a node is the call of a layer that `convert` made ours: such layers have a backend of their own."""
    call = call_of(node)
    return call is not None and call.backend is not None


def fuses_itself(backend: Any) -> bool:
    """Whether a backend of Dynamo's, without the wrappers around it, is one of ours."""
    while hasattr(backend, "_torchdynamo_orig_backend") or hasattr(backend, "_torchdynamo_orig_callable"):
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or backend._torchdynamo_orig_callable
    backend = getattr(backend, "func", backend)
    return (getattr(backend, "__module__", None) or "").startswith("tritonconv.")
