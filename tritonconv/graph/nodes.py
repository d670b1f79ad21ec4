"""Nodes of a graph: the call of a family that a node makes, and what the trace knows about its value.

A layer has one form in a graph: `call_family(name, tensors, numbers, backend)`. Layers of ours are traced to it, and
translate.py gives it to torch's functions and operators. Rules read it, and write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.family import call_family, family_named

__all__ = [
    "CONVOLUTIONS", "GROUP_NORMS", "FamilyCall", "Member", "call_of", "example", "groups_of", "insert", "insert_family",
    "members_of", "nodes_in", "only_user", "order_of", "replace", "same_size", "tensor_of",
]  # fmt: skip

CONVOLUTIONS = ("conv", "conv_transpose")
GROUP_NORMS = ("group_norm", "instance_norm", "layer_norm", "layer_norm_channels")


class FamilyCall(NamedTuple):
    """The arguments of `call_family` in a node."""

    family: str
    tensors: tuple[fx.Node | None, ...]
    numbers: tuple[Any, ...]
    backend: Backend | None = None

    @property
    def input(self) -> fx.Node:
        node = self.tensors[0]
        assert node is not None
        return node

    def given(self) -> list[fx.Node]:
        """All nodes that the call reads."""
        return [*(t for t in self.tensors if t is not None), *nodes_in(self.numbers)]


def call_of(node: Any) -> FamilyCall | None:
    """The family's call that a node makes, or None."""
    if not isinstance(node, fx.Node) or node.target is not call_family:
        return None
    return FamilyCall(*node.args)  # type: ignore[arg-type]


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """Nodes in nested tuples and lists."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from nodes_in(item)


def example(node: fx.Node) -> Any:
    """The value that the trace had at a node: fake tensors, symbolic numbers; None if it is not known."""
    return node.meta["example_value"] if "example_value" in node.meta else node.meta.get("val")


def tensor_of(value: Any) -> Tensor | None:
    """The fake tensor of a node, None for everything else."""
    found = example(value) if isinstance(value, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def same_size(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two sizes are equal for all values of symbols in them; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def order_of(t: Tensor | None) -> tuple[int, ...] | None:
    """The axes of a dense tensor from the slowest to the fastest in memory, or None if it is not known to be dense."""
    if t is None:
        return None
    for order in _orders(t):
        strides: list[Any] = [1] * t.dim()
        step: Any = 1
        for axis in reversed(order):
            strides[axis] = step
            step = step * t.shape[axis]
        if same_size(strides, t.stride()):
            return order
    return None


def _orders(t: Tensor) -> list[tuple[int, ...]]:
    axes = tuple(range(t.dim()))
    found = [axes, (0, *axes[2:], 1)] if t.dim() > 2 else [axes]
    if all(isinstance(s, int) for s in (*t.stride(), *t.shape)):
        strides = t.stride()
        found.append(tuple(sorted(axes, key=lambda d: (-strides[d], d))))
    return found


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one, or None."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def insert(
    graph: fx.Graph, before: fx.Node, function: Any, args: tuple[Any, ...], like: fx.Node, parts: Sequence[fx.Node] = (),
    calls: int = 1,
) -> fx.Node:  # fmt: skip
    """A call before a node; its value is as that of `like`.

    Args:
        parts: what the call stands for, in order; by default `like`.
        calls: how many calls of families the function makes, if each part is one.
    """
    with graph.inserting_before(before):
        node = graph.call_function(function, args)
    node.meta.update(like.meta)
    groups = tuple(members_of(part) for part in parts or (like,))
    node.meta[MEMBERS] = groups if calls > 1 else (tuple(member for group in groups for member in group),)
    return node


def insert_family(
    graph: fx.Graph, before: fx.Node, call: FamilyCall, like: fx.Node, parts: Sequence[fx.Node] = ()
) -> fx.Node:  # fmt: skip
    """A family's call before a node."""
    return insert(graph, before, call_family, tuple(call), like, parts)


class Member(NamedTuple):
    """A node as the trace had it: one of those that a call stands for."""

    name: str
    """What it called."""
    modules: tuple[str, ...]
    """Keys of the modules in whose forwards it ran, outermost first."""


MEMBERS = "tritonconv"


def groups_of(node: fx.Node) -> tuple[tuple[Member, ...], ...]:
    """The nodes of the trace that a node stands for, for each call of a family that it makes."""
    found: tuple[tuple[Member, ...], ...] = node.meta.get(MEMBERS) or (members_of(node),)
    return found


def members_of(node: fx.Node) -> tuple[Member, ...]:
    """The nodes of the trace that a node stands for."""
    groups = node.meta.get(MEMBERS)
    found: tuple[Member, ...] | None = None if groups is None else tuple(m for group in groups for m in group)
    if found is None:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", node.name)
        call = call_of(node)
        name = family_named(call.family).op(call.numbers) if call is not None else name
        found = (Member(name, tuple(node.meta.get("nn_module_stack", ()))),)
    return found


def replace(graph: fx.Graph, node: fx.Node, new: Any) -> None:
    """Let a node take the place of another, which goes."""
    node.replace_all_uses_with(new)
    graph.erase_node(node)
