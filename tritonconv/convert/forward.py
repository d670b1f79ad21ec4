"""The forward of a converted model: traced by Dynamo at its first call, fused, and run eagerly.

`FusedForward` is an instance attribute `forward`: the module keeps its class, its methods and its submodules.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn.modules import module as global_hooks

from tritonconv.convert.state import State, draws_numbers
from tritonconv.fused.call import HOOKS
from tritonconv.ops.core.backend import Backend

__all__ = ["FusedForward", "install", "tracing_with", "uninstall"]

GLOBAL_HOOKS = [getattr(global_hooks, "_global" + name) for name in HOOKS]

REPLICATE = "_replicate_for_data_parallel"
"""The method by which DataParallel copies a module: a copy of its attributes would share the forward."""

MOST_PROGRAMS = 8
"""Of one model: hooks that come and go may have each their own."""
_renewing = threading.RLock()

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state


class _Tracing(threading.local):
    def __init__(self) -> None:
        self.compile: Callable[..., Any] | None = None


_tracing = _Tracing()


@contextmanager
def tracing_with(compile: Callable[..., Any]) -> Iterator[None]:
    """Let this thread's fused forwards be traced anew, as `explain` wants it: `compile` gets their functions."""
    outer, _tracing.compile = _tracing.compile, compile
    try:
        yield
    finally:
        _tracing.compile = outer


class Program(NamedTuple):
    """A forward as Dynamo runs it."""

    run: Callable[..., Any]
    source: Any
    """The function that it was made of."""
    state: State


class FusedForward:
    """A module's forward as a fused graph, or its own where something else traces or watches it.

    Copies and pickles leave the graph out, and trace at their first call.
    """

    program: Program | None

    def __init__(self, root: torch.nn.Module, backend: Backend) -> None:
        length = len(root) if type(root).forward is torch.nn.Sequential.forward else None  # type: ignore[arg-type]
        self.__setstate__({"root": root, "backend": backend, "length": length})

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.root).forward, self.root))

    @property
    def __code__(self) -> types.CodeType:
        # torch.export asks a forward where it was written.
        return type(self.root).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            from tritonconv.graph.dynamo import fuse_in_other_graphs

            fuse_in_other_graphs()
            if self.unrolled is not None and len(self.root) == self.length:  # type: ignore[arg-type]
                return self.unrolled(self.root, *args, **kwargs)
            return type(self.root).forward(self.root, *args, **kwargs)
        root = self.root
        # Shallow copies and DataParallel's replicas share this object; who was called shows in the caller alone.
        owner = sys._getframe(1).f_locals.get("self")
        if owner is not root and isinstance(owner, torch.nn.Module) and owner.__dict__.get("forward") is self:
            root = owner
        if is_watched() or any(type(value) is fx.Proxy for value in args):
            return type(root).forward(root, *args, **kwargs)
        whole = self.unrolled is None or len(root) != self.length  # type: ignore[arg-type]
        source = type(root).forward if whole else self.unrolled
        if _tracing.compile is not None:
            return _traced(source, _tracing.compile)(root, *args, **kwargs)
        program = self.program
        if program is None or program.source is not source or not program.state.holds():
            program = self._renewed(source)
        try:
            return program.run(root, *args, **kwargs)
        except Exception:
            # Dynamo does not trace code again in which it met an error.
            self.programs.clear()
            self.program = None
            raise

    def _renewed(self, source: Any) -> Program:
        """The program for the module's present state, traced anew unless this state was seen before."""
        from tritonconv.graph.dynamo import compiled, run_eagerly

        state = State(self.root)
        with _renewing:
            known = self.programs.get((source, state.key))
            if known is None:
                if len(self.programs) >= MOST_PROGRAMS:
                    self.programs.pop(next(iter(self.programs)))
                backend = functools.partial(run_eagerly, backend=self.backend)
                run = _traced(source, lambda function: compiled(function, backend))
                known = self.programs[source, state.key] = Program(run, source, state)
            known = self.program = known._replace(state=state)
            return known

    def replicate(self) -> torch.nn.Module:
        """The module's replica for DataParallel, whose forward is its own."""
        replica: torch.nn.Module = type(self.root)._replicate_for_data_parallel(self.root)
        twin = object.__new__(FusedForward)
        twin.__dict__.update(self.__dict__, root=replica)
        replica.__dict__["forward"] = twin
        del replica.__dict__[REPLICATE]
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        twin = object.__new__(FusedForward)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, programs={}, program=None, root=copy.deepcopy(self.root, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # A GraphModule is rebuilt from its state, which must not hold it.
        root = None if isinstance(self.root, fx.GraphModule) else self.root
        return {"root": root, "backend": self.backend, "length": self.length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.root: torch.nn.Module = state["root"]
        self.backend: Backend = state["backend"]
        self.length: int | None = state["length"]
        """Modules in an nn.Sequential."""
        self.unrolled = None if self.length is None else unrolled(self.length)
        self.programs: dict[Any, Program] = {}
        self.program = None


def _traced(source: Any, compile: Callable[..., Any]) -> Any:
    from tritonconv.graph.dynamo import is_disabled

    return source if is_disabled() or not isinstance(source, types.FunctionType) else compile(source)


def is_watched() -> bool:
    """Whether a tracer, transform, mode or global hook sees what runs on this thread."""
    return (
        _trace() is not None or _transform() is not None or _dispatch_modes() > 0 or any(GLOBAL_HOOKS)
        or torch.compiler.is_compiling() or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    )  # fmt: skip


@functools.cache
def unrolled(length: int) -> types.FunctionType:
    """The forward of an nn.Sequential of so many modules without a loop.

    Where a loop holds what it cannot trace, Dynamo traces nothing of the forward.
    """
    lines = ["def forward(self, input):", *(f"    input = self[{i}](input)" for i in range(length)), "    return input"]
    scope: dict[str, Any] = {}
    exec(compile("\n".join(lines), "<tritonconv: the forward of a Sequential>", "exec"), scope)
    function: types.FunctionType = scope["forward"]
    function.__qualname__ = "Sequential.forward"
    return function


def install(model: torch.nn.Module, backend: Backend) -> None:
    """Put a FusedForward on a model, or on the parts of one that has no forward of its class's, and on each nn.Sequential.

    A module that Dynamo cannot trace ends a graph. The forward that calls it goes on after it, unless this is in a loop.
    """
    if not _install(model, backend):
        for child in model.children():
            install(child, backend)
    for module in model.modules():
        if type(module) is torch.nn.Sequential:
            _install(module, backend)


def _install(module: torch.nn.Module, backend: Backend) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is torch.nn.Module.forward:
        return False
    if "forward" in module.__dict__ or isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
        return isinstance(module.__dict__.get("forward"), FusedForward)
    if any(map(draws_numbers, module.modules())):
        return False
    forward = module.__dict__["forward"] = FusedForward(module, backend)
    module.__dict__[REPLICATE] = forward.replicate
    return True


def uninstall(model: torch.nn.Module) -> None:
    """Take every FusedForward in a model away."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.__dict__["forward"], module.__dict__[REPLICATE]
