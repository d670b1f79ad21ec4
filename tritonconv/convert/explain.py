"""One run of a model under observation, written down as a report."""

from __future__ import annotations

import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from tritonconv.convert.forward import FusedForward, tracing_with
from tritonconv.convert.recorder import Recorder
from tritonconv.convert.report import Report
from tritonconv.convert.swap import mark_of

__all__ = ["explain", "restored"]

HARMLESS = ("frame is in the Dynamo skipfiles list", "no tensor-related objects", "frame is a namedtuple")
"""Why Dynamo leaves out code that needs no trace."""


def explain(model: torch.nn.Module, *example_inputs: Any, training: bool = False, **named_inputs: Any) -> Report:
    """What every layer of the model costs, who runs it and why, found by one run of it on example inputs.

    The run is without gradients, in the model's mode and the caller's autocast. It is traced and fused as the model's calls
    are. Our operators compute through torch meanwhile and say what they would have launched. Buffers and random generators
    are as before afterwards.

    Args:
        model: any module, converted or not.
        example_inputs, named_inputs: what the model is called with; shapes, dtypes and devices decide the answers.
        training: run a forward and a backward pass too, on the kernels, and report who computed the gradients of each layer
            and how many bytes were saved for that. Gradients of parameters stay as they are.

    Returns:
        A report: `print` gives a table, `.to_dict()` plain data, `.plot(path)` a figure.

    Raises:
        TypeError: `model` is no module.
        ValueError: `training`, and no result needs a gradient.

    >>> row = explain(torch.nn.Conv2d(1, 2, 3), torch.ones(1, 1, 5, 5)).to_dict()["layers"][0]
    >>> row["kind"], row["macs"], row["receptive_field"], row["reason"]
    ('Conv2d', 162, 3, 'not converted')
    """
    from tritonconv.convert.gradients import Gradients
    from tritonconv.graph.dynamo import compiled, is_disabled

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    fused = {name: forward for name, forward in forwards.items() if isinstance(forward, FusedForward)}
    backend = next(iter(fused.values())).backend if fused else None
    recorder = Recorder(model, converted=bool(fused) or any(mark_of(m) for m in model.modules()))
    tracing = _Tracing(model, recorder, backend, bool(fused))

    def run(trace: Callable[..., Any], watcher: _Tracing | None = None) -> Any:
        def compile(function: Any) -> Any:
            return compiled(function, trace, watcher)

        with tracing_with(compile):
            return (_call if is_disabled() else compile(_call))(model, example_inputs, named_inputs)

    recorder.follow((example_inputs, named_inputs))
    with restored(model), torch.no_grad(), recorder.recording() if is_disabled() else nullcontext():
        run(tracing.trace, tracing)
    if is_disabled():
        tracing.add("not traced", "TORCHDYNAMO_DISABLE is set")
    for name, forward in fused.items():
        tracing.add_traces(name, forward)
    gradients = Gradients(model, bool(fused), backend)
    if training:
        with restored(model), torch.enable_grad():
            with gradients.saving():
                result = run(gradients.trace)
            gradients.backward(result)
    return Report(type(model).__name__, recorder.finished(), tracing.fusion, gradients.rows, gradients.saved)


def _call(model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


class _Tracing:
    """Dynamo's backend of one explained run: graphs are fused as the model's are, and interpreted under observation."""

    def __init__(self, model: torch.nn.Module, recorder: Recorder, backend: Any, fuses: bool) -> None:
        self.model, self.recorder, self.backend, self.fuses = model, recorder, backend, fuses
        self.fusion: list[dict[str, Any]] = []
        self.owner: Any = None

    def trace(self, module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:  # noqa: ARG002
        from tritonconv.graph.dynamo import fuse_or_warn, keep_checkpoints

        reason = getattr(module, "compile_subgraph_reason", None)
        if self.fuses:
            self.add("graph", chains=fuse_or_warn(module, self.backend).chains)
        keep_checkpoints(module)
        if reason is not None and reason.graph_break:
            where = traceback.StackSummary.from_list(reason.user_stack)[-1] if reason.user_stack else None
            at = (
                ""
                if where is None
                else f"{where.filename}:{where.lineno}, in {self._function(where.filename, where.lineno)}: "
            )
            self.add("graph break", at + _first_line(str(reason.reason)))
        # A layer's own forward has no module around it in its graph.
        owner = self.owner
        return lambda *args: self.recorder.run(module, args, owner)

    def enter_frame(self, frame: types.FrameType) -> None:
        """Dynamo is going to trace a function: a method of this object."""
        self.owner = frame.f_locals.get("self")

    def skip_frame(self, frame: types.FrameType, reason: str) -> None:
        """Dynamo gave a function up: a line, if it is one of the model's classes."""
        file, line = frame.f_code.co_filename, frame.f_code.co_firstlineno
        name = self._function(file, line)
        if name and not reason.startswith(HARMLESS):
            self.add(
                "not traced", f"{file}:{line}, in {name}: its calls have graphs of their own (TORCH_LOGS=graph_breaks)"
            )

    def add(self, how: str, reason: str = "", chains: int = 0, root: str = "") -> None:
        entry = dict(root=root, how=how, chains=chains, reason=reason)
        if how != "not traced" or entry not in self.fusion:
            self.fusion.append(entry)

    def add_traces(self, name: str, forward: FusedForward) -> None:
        """What the calls before this one found."""
        from tritonconv.graph.dynamo import traces_of

        known = [
            traces for traces in (traces_of(program.run) for program in forward.programs.values()) if traces is not None
        ]
        count = sum(traces.count for traces in known)
        if any(traces.is_full for traces in known):
            self.add("traces", f"{count} traces, and calls that needed more: their layers ran on their own", root=name)
        elif count > 1:
            self.add("traces", f"{count} traces since it was converted", root=name)

    def _function(self, file: str | None, line: int | None) -> str:
        """The name of the function of one of the model's classes in which a line stands, or ""."""
        found = [
            (function.__code__.co_firstlineno, function.__qualname__)
            for kind in {kind for module in self.model.modules() for kind in type(module).__mro__}
            for function in vars(kind).values()
            if isinstance(function, types.FunctionType) and function.__code__.co_filename == file
        ]
        return max((start, name) for start, name in [(0, ""), *found] if start <= (line or 0))[1]


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Give buffers and random generators back as they were."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None
    ]  # fmt: skip
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    if not buffer.is_meta and not torch.equal(buffer, saved):
                        buffer.copy_(saved)
