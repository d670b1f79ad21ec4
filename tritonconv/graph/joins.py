"""Concatenations of channels whose parts our kernels write where they belong.

A part that a convolution or a pooling of ours computes goes to its channels of the wide tensor at once; any other part is
copied there. Concatenations that grow, as in a dense block (each begins with all parts of the one before), share the memory
of the widest one, and are its first channels. Whether memory is shared is decided at each call (fused/join.py); here only
which parts may: nobody may write into them, nor into the whole, later on, and callers, who might, get none but the whole.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tritonconv.fused.join import Join, joined
from tritonconv.fused.shared import convolved_into, pooled_into
from tritonconv.graph.elementwise import bind, name_of
from tritonconv.graph.memory import Memory
from tritonconv.graph.nodes import call_of, insert, replace, tensor_of

__all__ = ["fuse_joins"]

Parts = tuple[fx.Node, ...]


def fuse_joins(graph: fx.Graph) -> int:
    """Let parts of concatenations be written where they belong; how many concatenations can gain by it."""
    count, tried = 0, set[fx.Node]()
    while True:
        found = [(node, parts) for node in graph.nodes if (parts := _parts(node)) is not None]
        # The longest first: shorter ones that it begins with share its memory.
        untried = sorted((entry for entry in found if entry[0] not in tried), key=lambda entry: -len(entry[1]))
        if not untried:
            return count
        node, parts = untried[0]
        tried.add(node)
        count += _share(graph, node, parts, [(other, some) for other, some in found if some == parts[: len(some)]])


def _parts(node: fx.Node) -> Parts | None:
    """What a node concatenates along channels, if all sizes but that of the batch are images of known channels."""
    if node.op != "call_function" or name_of(node) not in ("cat", "concat", "concatenate"):
        return None
    given = bind(node, ("tensors", "dim"))
    parts = () if given is None else given.get("tensors", ())
    if given is None or given.get("dim", 0) != 1 or not isinstance(parts, (list, tuple)) or len(parts) < 2:
        return None
    images = [tensor_of(part) for part in parts]
    if any(x is None or x.dim() < 3 or not isinstance(x.shape[1], int) or x.dtype != images[0].dtype for x in images):  # type: ignore[union-attr]
        return None
    return tuple(parts)


def _share(graph: fx.Graph, node: fx.Node, parts: Parts, same: list[tuple[fx.Node, Parts]]) -> bool:
    """Let the parts of a concatenation, and of those that it begins with, share memory."""
    memory, order = Memory(graph), {each: i for i, each in enumerate(graph.nodes)}
    writers = [part for part in parts if _writes(part)]
    nodes = [*parts, *(other for other, _ in same)]
    if not writers or len(set(parts)) < len(parts):
        return False
    held = frozenset().union(*(memory.storages(part) for part in nodes if part is not node))
    first = min(nodes, key=order.__getitem__)
    if held & memory.results or any(memory.is_written_after(each, first) for each in nodes):
        return False
    # Room is made for all parts when the first one is written.
    begin = min(writers, key=order.__getitem__)
    channels = tuple(tensor_of(part).shape[1] for part in parts)  # type: ignore[union-attr]
    join = insert(graph, begin, Join, (channels,), begin)
    join.meta.pop("example_value", None)
    join.meta.pop("val", None)
    current = dict(zip(parts, parts, strict=True))
    for part in writers:
        current[part] = _redirect(graph, part, join, parts.index(part))
    for other, own in same:
        replace(graph, other, insert(graph, other, joined, (join, [current[part] for part in own]), other))
    return True


def _writes(node: fx.Node) -> bool:
    """Whether a node is a call of ours that can write its result anywhere: for a batch, and without a residual."""
    call, x = call_of(node), tensor_of(node)
    if call is None or x is None:
        return False
    if call.family == "conv":
        return call.tensors[7] is None and x.dim() == call.numbers[0][0] + 2
    # The sizes of the result are written into the call.
    pool = call.family in ("max_pool", "avg_pool") and not call.numbers[1] and x.dim() == call.numbers[0][0] + 2
    return pool and all(isinstance(n, int) for n in x.shape)


def _redirect(graph: fx.Graph, part: fx.Node, join: fx.Node, place: int) -> fx.Node:
    call = call_of(part)
    assert call is not None
    if call.family == "conv":
        args: tuple[Any, ...] = (join, place, call.tensors, call.numbers, call.backend)
        new = insert(graph, part, convolved_into, args, part)
    else:
        size = tuple(tensor_of(part).shape)  # type: ignore[union-attr]
        args = (join, place, call.family, call.tensors, call.numbers, size, call.backend)
        new = insert(graph, part, pooled_into, args, part)
    replace(graph, part, new)
    return new
