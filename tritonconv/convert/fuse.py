"""A module's forward with its chains fused, put before the module's own without replacing the module.

`FusedForward` is an instance attribute `forward`: the module keeps its class, its methods, its submodules and its
training-time control flow. It runs the graph only where that is what the module's own forward would do, and that forward
otherwise.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.nn.modules import module as global_hooks

from tritonconv.convert.chains import rewrite
from tritonconv.convert.swap import mark_of, set_mark
from tritonconv.convert.trace import (
    Survey,
    Traced,
    called_children,
    inlined_modules,
    is_layer,
    leaf_modules,
    parameters_of,
    survey,
)
from tritonconv.convert.watch import Watch
from tritonconv.fused.call import HOOKS, carries_hook
from tritonconv.ops.core.backend import constant_under_compile

__all__ = ["FusedForward", "Program", "fuse_chains", "ignoring_global_hooks", "unfuse_chains"]

# A module whose watched attributes change at every call is not worth a graph.
MOST_RENEWALS = 8

GLOBAL_HOOKS = [getattr(global_hooks, "_global" + name) for name in HOOKS]

_renewing = threading.RLock()


class _Exempt(threading.local):
    active = False


_exempt = _Exempt()


@contextmanager
def ignoring_global_hooks() -> Iterator[None]:
    """Let fused forwards run on this thread although global module hooks are there: those of `explain`."""
    outer, _exempt.active = _exempt.active, True
    try:
        yield
    finally:
        _exempt.active = outer


@dataclass(frozen=True)
class Program:
    """What was made of a graph; it knows modules by their paths."""

    function: Callable[..., Any] | None
    """Called with the module and its required arguments; None where nothing was fused."""
    names: tuple[str, ...]
    defaults: dict[str, object]
    how: Literal["fx", "sequential"]
    """Whether the whole module traced, or children of an nn.Sequential were walked."""
    chains: int
    functional: tuple[str, ...]
    """Names of functional convolutions in the order they run."""
    inlined: tuple[str, ...]
    """Paths of the modules whose own forwards the function stands for."""
    training: tuple[bool, ...]
    """Their training flags, as they were taken for granted."""
    hooked: tuple[str, ...]
    """Paths of modules that carried a hook and were kept out of every chain for it."""
    mentioned: frozenset[str]
    """Names of attributes that the traced code may read."""


def _watch(root: torch.nn.Module, program: Program) -> Watch:
    inlined = [root.get_submodule(path) for path in program.inlined]
    hooked = [root.get_submodule(path) for path in program.hooked]
    return Watch(root, inlined, program.training, hooked, program.mentioned)


class _Mode:
    """What was made of a forward in training or in eval mode."""

    def __init__(self, program: Program | None = None, watch: Watch | None = None) -> None:
        self.program, self.watch, self.renewals = program, watch, 0


class FusedForward:
    """The forward of one module, fused where that is the same and its own everywhere else.

    There is a graph for eval mode, and one for training, which is traced at the first call there. It looks before every
    call whether hooks, submodules or attributes have changed since the module was traced, and traces it again if so. Copies
    and pickles leave the generated code out, and make it at their first call: much may change before it.
    """

    def __init__(self, root: torch.nn.Module, program: Program, beneath: bool) -> None:
        self.root = root
        self.beneath = beneath
        self.modes = (_Mode(program, _watch(root, program)), _Mode())

    @property
    def program(self) -> Program | None:
        """That of the module's present mode."""
        return self.modes[self.root.training].program

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.root).forward, self.root))

    @property
    def __code__(self) -> types.CodeType:
        # torch.export asks a forward where it was written.
        return type(self.root).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root = self.root
        if torch.compiler.is_compiling():
            program = self._compiled()
        else:
            # Shallow copies and DataParallel's replicas share this object; who was called shows in the caller alone.
            owner = sys._getframe(1).f_locals.get("self")
            if owner is not root and isinstance(owner, torch.nn.Module) and owner.__dict__.get("forward") is self:
                return type(owner).forward(owner, *args, **kwargs)
            program = self._current()
        if program is not None and program.function is not None:
            given = args if not kwargs and len(args) == len(program.names) else _positional(program, args, kwargs)
            # Others who trace with torch.fx see the layers, as they do in the original.
            if given is not None and not any(value is None or type(value) is fx.Proxy for value in given):
                return program.function(root, *given)
        return type(root).forward(root, *args, **kwargs)

    def _current(self) -> Program | None:
        """The program, renewed if need be; None where the module's own forward must run."""
        if any(GLOBAL_HOOKS) and not _exempt.active:
            return None
        mode = self.modes[self.root.training]
        watch = mode.watch
        if watch is None or not watch.holds():
            return self._renewed()
        return mode.program

    def _compiled(self) -> Program | None:
        """The same under torch.compile and torch.export, which guard what they read themselves."""
        # Before anything is read, for what it changes would break the compiler's guards.
        _prepare(self)
        mode = self.modes[self.root.training]
        watch = mode.watch
        if watch is None or not watch.has_mode() or not watch.hooks_hold():
            return None
        return mode.program

    def _renewed(self) -> Program | None:
        with _renewing:
            root = self.root
            training = root.training
            mode = self.modes[training]
            if mode.renewals >= MOST_RENEWALS:
                return None
            if mode.watch is not None:
                if mode.watch.holds():
                    return mode.program
                # A part of a model in eval mode that is trained is seldom trained for long.
                if not training and not mode.watch.has_mode():
                    return None
                # Hooks may come and go as they like.
                mode.renewals += mode.watch.hooks_hold()
            elif not training and any(m.training for m in inlined_modules(root, leaf_modules(root)).values()):
                return None
            # torch.export has patched the modules itself; its model is whole without fusing.
            if torch.compiler.is_exporting():
                return None
            if training:
                self._trace_training(mode)
            else:
                unfuse_chains(root, keep=self)
                _install(root, self.beneath, {}, self)
            return mode.program

    def _trace_training(self, mode: _Mode) -> None:
        """The graph that the module's forward has with the training flags as they are now."""
        root = self.root
        # What could not be traced in eval mode has its own parts fused.
        fused = {m for m in root.modules() if m is not root and isinstance(m.__dict__.get("forward"), FusedForward)}
        found: Survey = {}
        leaves = leaf_modules(root) | fused
        opaque = survey(root, leaves, found, as_is=True)
        traced = found[root]
        if isinstance(traced, str):
            mode.program = mode.watch = None
            mode.renewals = MOST_RENEWALS
            return
        inlined = inlined_modules(root, leaves | opaque)
        program = _compile(traced, root, inlined, "fx", tuple(module.training for module in inlined.values()))
        mode.program, mode.watch = program, _watch(root, program)

    def refill(self, program: Program | None) -> None:
        """Take another program for eval mode, None for none; that for training is made anew."""
        mode, trained = self.modes
        mode.program, mode.watch = program, None if program is None else _watch(self.root, program)
        if program is None:
            mode.renewals = MOST_RENEWALS
        trained.program = trained.watch = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        twin = object.__new__(FusedForward)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, modes=(_Mode(), _Mode()), root=copy.deepcopy(self.root, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # A GraphModule is rebuilt from its state, which must not hold it.
        state = {**self.__dict__, "modes": (_Mode(), _Mode())}
        return state | {"root": None} if isinstance(self.root, fx.GraphModule) else state


@constant_under_compile
def _prepare(fused: FusedForward) -> None:
    """Bring a forward up to date outside of the compiler that looks at it."""
    fused._renewed()


def _positional(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The required arguments in order if the others are left at their defaults, else None."""
    names = (*program.names, *program.defaults)
    if len(args) > len(names) or kwargs.keys() - set(names[len(args) :]):
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    if any(given.pop(name, default) is not default for name, default in program.defaults.items()):
        return None
    return tuple(given[name] for name in program.names) if len(given) == len(program.names) else None


def fuse_chains(model: torch.nn.Module) -> Survey:
    """Put a FusedForward on `model` if it traces, else on the parts of it that do; what was found of each on the way."""
    found: Survey = {}
    if is_layer(model):
        _install_in(called_children(model), False, found)
    else:
        _install(model, False, found, None)
    return found


def unfuse_chains(model: torch.nn.Module, keep: FusedForward | None = None) -> None:
    """Take every FusedForward in `model` away, but `keep`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward) and module.__dict__["forward"] is not keep:
            del module.__dict__["forward"]


def _install(root: torch.nn.Module, beneath: bool, found: Survey, fused: FusedForward | None) -> None:
    """Trace `root`, install or refill its FusedForward, and go on where its graph stops.

    Args:
        beneath: whether a module above it did not trace.
        found: graphs and reasons of the modules traced so far.
        fused: the forward to refill.
    """
    if "forward" in root.__dict__ and fused is None:
        _install_in(called_children(root), beneath, found)
        return
    leaves = leaf_modules(root)
    opaque = survey(root, leaves, found) if root not in found else {m for m, g in found.items() if isinstance(g, str)}
    traced = found[root]
    if isinstance(traced, str):
        if fused is not None:
            fused.refill(None)
        set_mark(root, untraceable=traced)
        _install_in(called_children(root), True, found)
        return
    if mark_of(root) is not None:
        set_mark(root, untraceable="")
    inlined = inlined_modules(root, leaves | opaque)
    walked = type(root) is torch.nn.Sequential and (beneath or bool(opaque & set(root.modules())))
    program = _compile(traced, root, inlined, "sequential" if walked else "fx", (False,) * len(inlined))
    if fused is not None:
        fused.refill(program)
    elif program.function is not None or program.hooked:
        root.__dict__["forward"] = FusedForward(root, program, beneath)
    stops = [child for module in inlined.values() for child in called_children(module) if child in leaves | opaque]
    _install_in(stops, beneath, found)


def _install_in(children: Any, beneath: bool, found: Survey) -> None:
    """Treat each child as a root of its own; layers of torch have none, but may hold the user's modules."""
    for child in dict.fromkeys(children):
        if isinstance(child.__dict__.get("forward"), FusedForward):
            continue
        if is_layer(child):
            _install_in(called_children(child), beneath, found)
        else:
            _install(child, beneath, found, None)


def _reach_members(graph: fx.Graph, root: torch.nn.Module) -> None:
    """Take the members of chains from the dictionaries that hold them, once a call: a module's attribute takes 1 us."""
    modules = dict(root.named_modules(remove_duplicate=False))
    members = [node for node in graph.nodes if node.op == "get_attr" and str(node.target) in modules]
    held: dict[str, fx.Node] = {}

    def children(path: str) -> fx.Node:
        if path not in held:
            held[path] = graph.call_function(getattr, (module(path), "_modules")) if path else graph.get_attr("_modules")
        return held[path]

    def module(path: str) -> fx.Node:
        parent, _, name = path.rpartition(".")
        return graph.call_function(operator.getitem, (children(parent), name))

    # Before everything, for a chain's members are read where the chain runs.
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        reached = {path: module(path) for path in dict.fromkeys(str(node.target) for node in members)}
    for node in members:
        node.replace_all_uses_with(reached[str(node.target)])
        graph.erase_node(node)


def _compile(
    traced: Traced, root: torch.nn.Module, inlined: dict[str, torch.nn.Module], how: Literal["fx", "sequential"],
    training: tuple[bool, ...],
) -> Program:  # fmt: skip
    """Rewrite the graph and make a function of it; `training`: the flags of `inlined` that it was traced with."""
    names, defaults = parameters_of(type(root).forward)
    graph = traced.graph
    done = rewrite(graph, root)
    function = None
    # Between two layers activations stay channels-last.
    if done.chains or done.joins or done.functional or done.layers > 1:
        _reach_members(graph, root)
        code = graph.python_code("self")
        file = f"<tritonconv: {type(root).__name__}.forward, fused>"
        linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
        scope = dict(code.globals)
        exec(compile(code.src, file, "exec"), scope)
        function = scope["forward"]
    hooked = {
        f"{prefix}.{name}".strip(".")
        for prefix, module in inlined.items() for name, child in module.named_children() if carries_hook(child)
    }  # fmt: skip
    return Program(
        function,
        tuple(names),
        defaults,
        how,
        done.chains,
        tuple(done.functional),
        tuple(inlined),
        training,
        tuple(hooked),
        traced.mentioned,
    )
