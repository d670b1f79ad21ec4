"""A model's forward as a torch.fx graph, or the reason why there is none.

A graph replaces the forward it was traced from, so whatever tracing would lose makes a forward untraceable: branches on
values or their types, switched gradients or autocast, tensors made from nothing, attributes that are set on the way.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import random
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from tritonconv.convert.calls import IN_PLACE
from tritonconv.convert.functions import FUNCTIONS
from tritonconv.convert.snapshot import IncomparableError
from tritonconv.convert.state import Kept
from tritonconv.convert.watch import check_comparable
from tritonconv.convert.witness import Witness, mentioned_names, wrong_question
from tritonconv.fused.call import carries_hook
from tritonconv.fused.squeeze_excite import SqueezeExcite
from tritonconv.ops.core.backend import current_backend

__all__ = ["Survey", "Traced", "called_children", "inlined_modules", "leaf_modules", "survey"]

CONTAINERS = (torch.nn.Module, torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict, SqueezeExcite)
LIBRARIES = ("torch.nn", "torch.ao", "torch.jit", "tritonconv.nn")

# Taken before fx patches it.
CALL = torch.nn.Module.__call__

# torch.fx patches torch.nn.Module while it traces.
_lock = threading.RLock()


class UntraceableError(Exception):
    """A forward that a graph would not reproduce."""


class _Strict:
    """What torch.fx's stand-ins for values let pass and a graph would lose."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # A stand-in has not its value's type: a branch on it would take one way for all.
        asking = sys._getframe(1)
        tracing = asking.f_globals.get("__name__", "").startswith(("torch.", "tritonconv."))
        if not tracing or asking.f_code.co_name == "is_tensor":
            raise UntraceableError("its forward asks for the type of a value")
        return type(self)

    def _refuse_text(self, *_: object) -> str:
        # Of a number the text would tell the number, of a stand-in its name.
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", "tritonconv.")):
            raise UntraceableError("its forward makes text of a value")
        return object.__repr__(self)

    __repr__ = __str__ = __format__ = _refuse_text

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise UntraceableError(f"its forward sets the attribute {name} of a value")
        object.__setattr__(self, name, value)


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name, _function in IN_PLACE.items():
    # Left to torch.fx, `a += b` would make a new tensor, and other names of `a` would keep the old one.
    setattr(_Strict, _name, _recorded(_function))


class _Attribute(_Strict, fx.proxy.Attribute):
    pass


class _Value(_Strict, fx.Proxy):
    def __getattr__(self, k: str) -> _Attribute:
        # Of a stand-in, hasattr would say that it has everything.
        if not hasattr(torch.Tensor, k):
            raise UntraceableError(f"its forward asks whether a value has {k}")
        return _Attribute(self, k)


class _Tracer(fx.Tracer):
    """Traces through containers and the user's own modules, and stops at leaves."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: Set[torch.nn.Module]) -> None:
        super().__init__()
        self._leaves = leaves
        self._modes = _modes()
        self._thread = threading.get_ident()
        self._made: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return m in self._leaves

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # torch.fx has patched every module's call, those of other threads too.
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        # Past the module's __call__, which would show the stand-ins to hooks on all modules.
        return super().call_module(m, m.forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:  # fmt: skip
        """Placeholders for what a caller must give; everything else takes its default, which the caller must then leave."""
        names, _ = parameters_of(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        self._made.append(weakref.ref(value))
        return value

    def stand_in(self, parameter: torch.nn.Parameter) -> Any:
        """What stands for a parameter that the forward did not reach by its name."""
        return parameter if threading.get_ident() != self._thread else super().getattr("", parameter, {})

    def some_survive(self) -> bool:
        """Whether stand-ins outlive the trace: someone keeps them."""
        if any(value() is not None for value in self._made):
            # A cycle may hold them, of a closure that calls itself for instance.
            gc.collect()
        return any(value() is not None for value in self._made)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise UntraceableError("its forward switches gradients, autocast, checkpoints or the backend on the way")
        node = super().create_node(kind, *args, **kwargs)
        node.type = None
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, torch.nn.Parameter):
            known = a in self.tensor_attrs or any(a is buffer for buffer in self.root.buffers())
            if not known:
                raise UntraceableError("its forward makes tensors from nothing, which tracing would take for constants")
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if not _rebuilt(a):
            raise UntraceableError(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)


def _rebuilt(value: object) -> bool:
    """Whether torch.fx makes the same of a collection or dataclass again: of a subclass it makes its base."""
    kind = type(value)
    if issubclass(kind, (dict, list, tuple)):
        return kind in (dict, list, tuple) or hasattr(kind, "_fields") or kind.__module__.startswith("torch.fx.")
    # What a constructor of the user's would compute once more, or does not take.
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return all(field.init for field in fields) and not (fields and hasattr(kind, "__post_init__"))


def _modes() -> tuple[object, ...]:
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    # Those of checkpoints, and of tensors saved elsewhere.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), depth, hooks, current_backend()


def parameters_of(forward: Callable[..., Any]) -> tuple[list[str], dict[str, object]]:
    """Names that a caller of this method must give, and the defaults of the others.

    Raises:
        UntraceableError: it takes *args, **kwargs or required keywords.
    """
    names, defaults = [], {}
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UntraceableError(f"its forward takes {parameter}")
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise UntraceableError(f"its forward takes the keyword {parameter.name}")
        else:
            names.append(parameter.name)
    return names, defaults


def is_layer(module: torch.nn.Module) -> bool:
    """Whether its forward is nobody's to trace: layers of torch and ours, their subclasses, forwards set on an instance."""
    layer = any(t.__module__.startswith(LIBRARIES) and t not in CONTAINERS for t in type(module).__mro__)
    return layer or "forward" in module.__dict__ or type(module).__call__ is not CALL


def leaf_modules(root: torch.nn.Module) -> set[torch.nn.Module]:
    """Every module under `root` that a graph of it calls as a whole: layers, and modules that carry hooks.

    What does nothing is no layer: identities stand between others in many models, and would part them.
    """
    return {m for m in root.modules() if m is not root and ((is_layer(m) and not _is_identity(m)) or carries_hook(m))}


def _is_identity(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Identity and "forward" not in module.__dict__


def called_children(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Children that can be called: what a ModuleList or ModuleDict holds instead of itself."""
    for child in module.children():
        if type(child) in (torch.nn.ModuleList, torch.nn.ModuleDict):
            yield from called_children(child)
        else:
            yield child


def inlined_modules(root: torch.nn.Module, leaves: Set[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """`root` and everything under it that is not under a leaf nor one, by name."""
    found = {"": root}

    def visit(module: torch.nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child not in leaves and child not in found.values():
                found[prefix + name] = child
                visit(child, f"{prefix}{name}.")

    visit(root, "")
    return found


@contextmanager
def _undisturbed(root: torch.nn.Module, inlined: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Trace with these modules as in eval mode and gradients on; nothing that modules hold may change meanwhile."""
    kept = Kept(root.modules())
    trained = [module.__dict__ for module in inlined if module.training]
    for state in trained:
        state["training"] = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for state in trained:
            state["training"] = True
        changed = kept.restore()
    if changed:
        raise UntraceableError("its forward changes what modules hold")


@contextmanager
def _without_chance() -> Iterator[None]:
    """A number that is drawn while a forward is traced would be the same for ever."""
    python, numpy, torchs = random.getstate(), np.random.get_state(legacy=False), torch.random.get_rng_state()
    try:
        yield
        drawn = python != random.getstate() or not torch.equal(torchs, torch.random.get_rng_state())
        drawn = drawn or str(numpy) != str(np.random.get_state(legacy=False))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(torchs)
    if drawn:
        raise UntraceableError("its forward draws random numbers")


class Traced(NamedTuple):
    """A forward's graph."""

    graph: fx.Graph
    mentioned: frozenset[str]
    """Names of attributes that code may have read which ran in the trace; `ANY_NAME` where it computes them."""
    read: frozenset[str]
    """Paths of parameters and buffers that go to anything but torch's functions for layers."""


def trace(root: torch.nn.Module, leaves: Set[torch.nn.Module], as_is: bool = False) -> Traced:
    """The graph of root's own forward in eval mode; raises whatever a forward raises that cannot be traced.

    `as_is`: with the training flags that modules have instead.
    """
    inlined = inlined_modules(root, leaves).values()
    witness = Witness()
    with _lock, _undisturbed(root, () if as_is else inlined), _without_chance():
        with witness.watching():
            graph = _traced(root, leaves)
        # A question without a value leaves no trace, but its answer does.
        with torch.no_grad():
            without = _traced(root, leaves)
    if str(graph) != str(without):
        raise UntraceableError("its forward asks whether gradients are on")
    codes = witness.codes()
    question = wrong_question(codes)
    if question is not None:
        raise UntraceableError(f"its forward asks {question} of a value")
    mentioned = mentioned_names(codes)
    check_comparable(inlined, mentioned)
    return Traced(graph, mentioned, _read(graph))


def _read(graph: fx.Graph) -> frozenset[str]:
    return frozenset(
        str(node.target) for node in graph.nodes
        if node.op == "get_attr" and any(user.target not in FUNCTIONS for user in node.users)
    )  # fmt: skip


def _traced(root: torch.nn.Module, leaves: Set[torch.nn.Module]) -> fx.Graph:
    tracer = _Tracer(leaves)
    with _parameters_stood_for(tracer):
        graph = tracer.trace(root)
    if tracer.some_survive():
        raise UntraceableError("its forward keeps a value")
    return graph


@contextmanager
def _parameters_stood_for(tracer: _Tracer) -> Iterator[None]:
    """Let a forward that walks over parameters find stand-ins: their dtype, device and values may change."""
    original = torch.nn.Module.named_parameters

    def named_parameters(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        found = original(self, *args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.fx.", "tritonconv.")):
            return found
        return ((name, tracer.stand_in(parameter)) for name, parameter in found)

    torch.nn.Module.named_parameters = named_parameters  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.named_parameters = original  # type: ignore[method-assign]


Survey = dict[torch.nn.Module, Traced | str]


def survey(root: torch.nn.Module, leaves: Set[torch.nn.Module], found: Survey, as_is: bool = False) -> set[torch.nn.Module]:
    """Trace `root`, and where that fails its parts; `found` gets graphs, and reasons where there is none.

    Returns:
        The modules in and under `root` that cannot be traced: a graph calls them as a whole.
    """
    try:
        found[root] = trace(root, leaves, as_is)
        return set()
    # A forward may raise anything.
    except Exception as error:
        found[root] = _reason(error)
    opaque = set()
    for child in called_children(root):
        if child not in leaves and child is not root:
            opaque |= survey(child, leaves, found, as_is)
    if opaque:
        try:
            found[root] = trace(root, leaves | opaque, as_is)
            return opaque
        except Exception as error:
            found[root] = _reason(error)
    return opaque | {root}


def _reason(error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return "it has no forward"
    if isinstance(error, fx.proxy.TraceError):
        return "its forward branches on, or iterates over, a value"
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, (IncomparableError, UntraceableError)) else f"{type(error).__name__}: {text[:120]}"
