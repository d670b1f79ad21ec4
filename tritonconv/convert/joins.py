"""Concatenations of channels whose parts our kernels write where they belong.

A part that a convolution or a pooling of ours computes goes to its channels of the wide tensor at once; any other part is
copied there. Concatenations that grow, as in a dense block (each begins with all parts of the one before), share the widest
one's memory and are its first channels. It is decided at each call whether memory is shared (fused/join.py); here only
which parts may: nobody may write into them, nor into the whole, later on, and callers, who might, get none but the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tritonconv import nn
from tritonconv.convert.calls import module_of
from tritonconv.convert.memory import Memory
from tritonconv.convert.pools import pool_of
from tritonconv.fused.call import carries_hook, fused_call, fused_norm
from tritonconv.fused.gates import fused_scale
from tritonconv.fused.join import Join, joined
from tritonconv.fused.pool import fused_pool
from tritonconv.ops.core.activation import module_types

__all__ = ["share_joins"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
Parts = tuple[fx.Node, ...]


def share_joins(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> int:
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
        same = [(other, shorter) for other, shorter in found if shorter == parts[: len(shorter)]]
        count += _share(graph, modules, node, parts, same)


def _share(
    graph: fx.Graph, modules: dict[str, torch.nn.Module], node: fx.Node, parts: Parts, same: list[tuple[fx.Node, Parts]]
) -> int:
    """Let the parts of a concatenation, and of those that it begins with, share memory; how many concatenations do."""
    writers = [part for part in parts if _writes(part, modules)]
    nodes = [*parts, *(other for other, _ in same)]
    if not writers or len(set(parts)) < len(parts) or _is_written(nodes, node, graph, Memory(graph, modules)):
        return 0
    channels = [_channels(part, modules) for part in parts]
    # Room is made for all parts when the first one is written.
    order = {each: i for i, each in enumerate(graph.nodes)}
    begin = min(writers, key=order.__getitem__)
    if any(isinstance(known, fx.Node) and order[known] >= order[begin] for known in channels):
        return 0
    with graph.inserting_before(begin):
        join = graph.call_function(Join, (tuple(channels),))
    _replace(graph, modules, join, same, parts, writers)
    return len(same)


def _parts(node: fx.Node) -> Parts | None:
    """What a node concatenates along channels."""
    if node.op != "call_function" or node.target not in CONCATENATIONS or not node.args:
        return None
    if node.kwargs.keys() - {"dim", "axis"}:
        return None
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if dim != 1 or not isinstance(parts, (list, tuple)) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    return tuple(parts) if len(parts) > 1 else None  # type: ignore[arg-type]


def _writes(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether a node is a call of ours that can write its result anywhere."""
    if node.op == "call_module":
        module = module_of(node, modules)
        plain = (node.args, node.kwargs) == ((*node.all_input_nodes,), {}) and len(node.args) == 1
        if type(module) in CONVOLUTIONS and module is not None:
            return not carries_hook(module) and plain
    if node.target is fused_call:
        # A residual would have to lie as the result does.
        return type(_member(node, 0, modules)) in CONVOLUTIONS and node.args[4] is None and not node.kwargs
    return (node.target is fused_pool and not node.kwargs) or pool_of(node, modules) is not None


def _member(node: fx.Node, position: int, modules: dict[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The module that a fused call has at a position."""
    at = node.args[position]
    return modules.get(str(at.target)) if isinstance(at, fx.Node) else None


def _channels(node: Any, modules: dict[str, torch.nn.Module]) -> int | fx.Node:
    """Channels of a value, as far as the layers that it comes from tell; else a value that has as many."""
    parts = _parts(node)
    if parts is not None or node.target is joined:
        each = (
            [_channels(part, modules) for part in parts] if parts is not None else node.args[0].args[0][: len(node.args[1])]
        )
        return sum(each) if all(isinstance(known, int) for known in each) else node
    module: Any = module_of(node, modules)
    if node.target in (fused_call, fused_norm):
        module = _member(node, 0, modules)
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return int(module.out_channels)
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return int(module.num_features)
    if pool_of(node, modules) is not None or type(module) in module_types() or node.target is fused_scale:
        return _channels(node.args[0], modules)
    result: int | fx.Node = _channels(node.args[3], modules) if node.target is fused_pool else node
    return result


def _is_written(nodes: list[fx.Node], whole: fx.Node, graph: fx.Graph, memory: Memory) -> bool:
    """Whether someone may write into any of these values once it is computed; callers may, but for the whole."""
    first = min(nodes, key=memory.position.__getitem__)
    given = {origin for result in graph.output_node().all_input_nodes for origin in (result, *memory.origins(result))}
    if given & {node for node in nodes if node is not whole}:
        return True
    held = frozenset(origin for node in nodes for origin in (node, *memory.origins(node)) if origin is not None)
    return memory.is_written_later(held, first)


def _replace(
    graph: fx.Graph, modules: dict[str, torch.nn.Module], join: fx.Node, same: list[tuple[fx.Node, Parts]], parts: Parts,
    writers: list[fx.Node],
) -> None:  # fmt: skip
    # A cat's own parts may be replaced on the way.
    current = dict(zip(parts, parts, strict=True))
    for part in writers:
        into: dict[str, Any] = {"into": (join, parts.index(part))}
        if part.target in (fused_call, fused_pool):
            part.kwargs = {**part.kwargs, **into}
            continue
        pool = pool_of(part, modules)
        with graph.inserting_before(part):
            layer: Any = graph.get_attr(str(part.target)) if part.op == "call_module" else pool
            if pool is None:
                call = graph.call_function(fused_call, (layer, None, None, part.args[0], None, False), into)
            else:
                call = graph.call_function(fused_pool, (layer, None, False, part.args[0]), into)
        part.replace_all_uses_with(call)
        graph.erase_node(part)
        current[part] = call
    for node, own in same:
        with graph.inserting_before(node):
            call = graph.call_function(joined, (join, [current[part] for part in own]))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
