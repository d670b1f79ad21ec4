"""What a node of a torch.fx graph calls: an activation, an addition, or something that writes into its arguments."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tritonconv.fused.call import BATCH_NORMS
from tritonconv.ops.core.activation import ActivationSpec, from_module, make_spec, module_types, table

__all__ = [
    "IN_PLACE",
    "activation_of",
    "addition_of",
    "in_place_target",
    "is_batch_norm",
    "module_of",
    "overwrites",
    "spec_of_call",
]

F = torch.nn.functional

METHODS = {"relu": ("relu",), "sigmoid": ("sigmoid",), "tanh": ("tanh",), "clamp": ("hardtanh",), "clip": ("hardtanh",)}


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """operator.<name> under another name: torch.fx writes `a += b` for the operator, which would rename a number."""
    operation = getattr(operator, name)

    def write(a: Any, b: Any) -> Any:
        return operation(a, b)

    write.__name__ = write.__qualname__ = f"in_place_{name}"
    return write


IN_PLACE = {
    f"__{name}__": _in_place(name)
    for name in ("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
                 "itruediv", "ixor")
}  # fmt: skip
"""What a traced `a += b` calls, by the method that Python looks up for it."""

IN_PLACE_OPERATORS = {*IN_PLACE.values(), *(getattr(operator, method) for method in IN_PLACE)}


def module_of(node: fx.Node, modules: dict[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The module that a call_module node calls."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def is_batch_norm(module: torch.nn.Module | None, nd: int) -> bool:
    """Whether it is a batch norm that fits behind a convolution of `nd` dimensions."""
    return type(module) in BATCH_NORMS.get(nd, ())


@functools.cache
def _functions() -> dict[Callable[..., Any], tuple[str, ...]]:
    """Functions of torch, each with the rows of the activation table that it can stand for."""
    found: dict[Callable[..., Any], tuple[str, ...]] = {}
    for name, row in table().items():
        for module, spelling in ((F, row.function), (F, row.function + "_"), (torch, name), (torch, name + "_")):
            function = getattr(module, spelling, None)
            if function is not None:
                found[function] = (*found.get(function, ()), name)
    clamps = (torch.clamp, torch.clamp_, torch.clip, torch.clip_)
    return found | dict.fromkeys(clamps, ("hardtanh",))


def spec_of_call(node: fx.Node) -> ActivationSpec | None:
    """The activation that a function or method applies to the node's only tensor, or None."""
    if node.op == "call_function":
        rows = _functions().get(node.target, ())  # type: ignore[arg-type]
        clamp = getattr(node.target, "__name__", "").startswith("cl")
    elif node.op == "call_method":
        method = str(node.target).removesuffix("_")
        rows, clamp = METHODS.get(method, ()), method.startswith("cl")
    else:
        return None
    for name in rows:
        spec = _bind(node, name, clamp)
        if spec is not None:
            return spec
    return None


def _bind(node: fx.Node, name: str, clamp: bool) -> ActivationSpec | None:
    """The named activation with the call's numbers, or None if its arguments are others."""
    row = table()[name]
    parameters = (("min", None), ("max", None)) if clamp else row.parameters
    names = ("input", *(p for p, _ in parameters), *(() if clamp else ("inplace",)))
    if len(node.args) > len(names):
        return None
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    given.pop("input", None)
    given.pop("inplace", None)
    if any(given.pop(key, default) != value for (key, value), default in zip(row.fixed, ("none",), strict=False)):
        return None
    numbers = [given.pop(p, default) for p, default in parameters]
    if given or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        return None
    # clamp has a meaning for crossed limits, hardtanh has none.
    return None if clamp and not numbers[0] <= numbers[1] else make_spec(name, tuple(numbers))


def activation_of(
    node: fx.Node, value: fx.Node, modules: dict[str, torch.nn.Module]
) -> torch.nn.Module | ActivationSpec | None:
    """The activation that the node applies to `value`, and to nothing else."""
    if node.all_input_nodes != [value] or _first(node) is not value:
        return None
    module = module_of(node, modules)
    if module is None:
        return spec_of_call(node)
    return module if from_module(module) is not None else None


def addition_of(node: fx.Node, value: fx.Node) -> tuple[fx.Node, bool] | None:
    """What the node adds to `value`, and whether it does so in place; None if it is no such addition."""
    if node.op == "call_function" and node.target in (operator.add, operator.iadd, IN_PLACE["__iadd__"], torch.add):
        in_place = node.target in IN_PLACE_OPERATORS
    elif node.op == "call_method" and node.target in ("add", "add_"):
        in_place = node.target == "add_"
    else:
        return None
    alpha = node.kwargs.get("alpha", 1)
    if len(node.args) != 2 or node.kwargs.keys() - {"alpha"} or isinstance(alpha, fx.Node) or alpha != 1:
        return None
    left, right = node.args
    other = right if left is value else left
    if not isinstance(other, fx.Node) or other is value or (in_place and left is not value):
        return None
    return other, in_place


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


@functools.cache
def _position_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


def _asks_in_place(node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _position_of_inplace(node.target) if callable(node.target) else None
    return position is not None and len(node.args) > position and node.args[position] is not False


def in_place_target(node: fx.Node, modules: dict[str, torch.nn.Module]) -> fx.Node | None:
    """The argument that the node writes into and returns, where it is known to do both."""
    module = module_of(node, modules)
    if module is not None:
        known = type(module) in module_types() and getattr(module, "inplace", False) is True
    elif node.op == "call_method":
        known = str(node.target).endswith("_") and not str(node.target).endswith("__")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        known = node.target in IN_PLACE_OPERATORS or (
            node.target in _functions() and (name.endswith("_") or _asks_in_place(node))
        )
    else:
        known = False
    target = _first(node)
    return target if known and isinstance(target, fx.Node) else None


def overwrites(node: fx.Node, modules: dict[str, torch.nn.Module]) -> tuple[list[fx.Node], bool]:
    """Values that the node may write into, and whether it may also write into parameters and buffers."""
    nothing: tuple[list[fx.Node], bool] = ([], False)
    anything = (node.all_input_nodes, True)
    first = _first(node)
    into_first = [first] if isinstance(first, fx.Node) else node.all_input_nodes
    if node.op == "call_module":
        module = module_of(node, modules)
        if module is None or not type(module).__module__.startswith(("torch.nn.modules", "tritonconv.")):
            return anything
        if any(module.__dict__.get(hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            return anything
        return (into_first, False) if getattr(module, "inplace", False) else nothing
    if node.op == "call_method":
        return (into_first, False) if str(node.target).endswith("_") else nothing
    if node.op != "call_function":
        return nothing
    name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or "torch"
    if node.target in IN_PLACE_OPERATORS or node.target in (operator.setitem, operator.delitem):
        return into_first, False
    libraries = ("torch", "_operator", "math", "tritonconv")
    known = isinstance(node.target, types.BuiltinFunctionType) or home.startswith(libraries)
    if not known or home.startswith("torch._ops"):
        return anything
    if "out" in node.kwargs:
        return anything
    return (into_first, False) if name.endswith("_") or _asks_in_place(node) else nothing
