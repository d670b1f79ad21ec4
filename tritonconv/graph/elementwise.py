"""Activations and additions in a graph: functions of torch, methods and operators of aten."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from tritonconv.ops.core.activation import ActivationSpec, make_spec, table

__all__ = [
    "activation_of", "addition_of", "asks_in_place", "bind", "in_place_target", "is_pointwise", "name_of",
    "one_more_than",
]  # fmt: skip

F = torch.nn.functional
METHODS = {"relu": ("relu",), "sigmoid": ("sigmoid",), "tanh": ("tanh",), "clamp": ("hardtanh",), "clip": ("hardtanh",)}
IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
                 "itruediv", "ixor")
}  # fmt: skip


def name_of(node: fx.Node) -> str:
    """What a method, function or operator of aten is called, without its overload."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", "")


def bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """A call's arguments by name, if it has no others; aten's `self` is "input"."""
    if len(node.args) > len(names):
        return None
    given = dict(zip(names, node.args, strict=False))
    for name, value in node.kwargs.items():
        given["input" if name == "self" else name] = value
    return given if given.keys() <= set(names) else None


@functools.cache
def _functions() -> dict[Callable[..., Any], tuple[str, ...]]:
    """Functions of torch, each with the rows of the activation table that it can stand for."""
    found: dict[Callable[..., Any], tuple[str, ...]] = {}
    for name, row in table().items():
        homes = ((F, row.function), (F, row.function + "_"), (torch, name), (torch, name + "_"))
        functions = {getattr(module, spelling) for module, spelling in homes if hasattr(module, spelling)}
        for function in functions:
            found[function] = (*found.get(function, ()), name)
    clamps = (torch.clamp, torch.clamp_, torch.clip, torch.clip_)
    return found | dict.fromkeys(clamps, ("hardtanh",))


def _rows(node: fx.Node) -> tuple[str, ...]:
    """Rows of the activation table that a node may compute."""
    if node.op == "call_method":
        return METHODS.get(str(node.target).removesuffix("_"), ())
    if node.op != "call_function":
        return ()
    if isinstance(node.target, OpOverload):
        if node.target.namespace != "aten":
            return ()
        name = name_of(node).removesuffix("_")
        function = getattr(F, name, None) or getattr(torch, name, None)
        return _functions().get(function, ())  # type: ignore[arg-type]
    return _functions().get(node.target, ())  # type: ignore[arg-type]


def activation_of(node: fx.Node, value: fx.Node | None = None) -> ActivationSpec | None:
    """The activation that a node applies to its only tensor (which is `value`, if that is given), or None."""
    rows = _rows(node)
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not rows or node.all_input_nodes != [source] or (value is not None and source is not value):
        return None
    clamp = name_of(node).startswith("cl")
    for name in rows:
        spec = _spec(node, name, clamp)
        if spec is not None:
            return spec
    return None


def _spec(node: fx.Node, name: str, clamp: bool) -> ActivationSpec | None:
    """The named activation with the call's numbers, or None if its arguments are others."""
    row = table()[name]
    parameters = (("min", None), ("max", None)) if clamp else row.parameters
    names = ("input", *(p for p, _ in parameters), *(key for key, _ in row.fixed))
    given = bind(node, names if clamp or isinstance(node.target, OpOverload) else (*names, "inplace"))
    if given is None:
        return None
    given.pop("input", None)
    given.pop("inplace", None)
    if any(given.pop(key, default) != value for (key, value), default in zip(row.fixed, ("none",), strict=False)):
        return None
    numbers = [given.pop(p, default) for p, default in parameters]
    if given or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        return None
    # clamp has a meaning for crossed limits, hardtanh has none.
    return None if clamp and not numbers[0] <= numbers[1] else make_spec(name, tuple(numbers))


def addition_of(node: fx.Node, value: fx.Node) -> Any:
    """What a node adds to `value`, a node or a number; None if it is no such addition."""
    function = node.op == "call_function" and (
        node.target in (operator.add, operator.iadd, torch.add)
        or (isinstance(node.target, OpOverload) and node.target.namespace == "aten" and name_of(node) in ("add", "add_"))
    )
    if not function and not (node.op == "call_method" and node.target in ("add", "add_")):
        return None
    alpha = node.kwargs.get("alpha", 1)
    if len(node.args) != 2 or node.kwargs.keys() - {"alpha"} or isinstance(alpha, fx.Node) or alpha != 1:
        return None
    left, right = node.args
    other = right if left is value else left
    return None if other is value else other


def one_more_than(node: fx.Node) -> fx.Node | None:
    """The tensor that has one added to it in a tensor of its own, or None if the node does something else."""
    value = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
    if value is None or in_place_target(node) is not None:
        return None
    one = addition_of(node, value)
    return value if isinstance(one, (int, float)) and one == 1 else None


@functools.cache
def _position_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


def asks_in_place(node: fx.Node) -> bool:
    """Whether a function is told by its argument `inplace` to write into its input."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _position_of_inplace(node.target) if callable(node.target) else None
    return position is not None and len(node.args) > position and node.args[position] is not False


def in_place_target(node: fx.Node) -> fx.Node | None:
    """The argument that a node writes into and returns, if it is known to do both."""
    name = name_of(node)
    if node.op == "call_method":
        known = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        suffixed = name.endswith("_") and not name.endswith("__")
        overload = isinstance(node.target, OpOverload) and node.target.namespace == "aten" and suffixed
        known = overload or node.target in IN_PLACE_OPERATORS or (bool(_rows(node)) and (suffixed or asks_in_place(node)))
    else:
        known = False
    target = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return target if known and isinstance(target, fx.Node) else None


@functools.cache
def _is_pointwise_name(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes every element of its result from elements at the same place, of torch's functions."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload):
        return torch.Tag.pointwise in node.target.tags
    home = getattr(node.target, "__module__", None) or "torch"
    if node.op == "call_function" and not home.startswith(("torch", "_operator")):
        return False
    name = name_of(node)
    alias = {"truediv": "div", "itruediv": "div_", "iadd": "add_", "isub": "sub_", "imul": "mul_", "radd": "add"}
    return bool(_rows(node)) or _is_pointwise_name(alias.get(name, name))
