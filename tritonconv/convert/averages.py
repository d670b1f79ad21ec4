"""Global averages with the convolution before them, and squeeze-excite blocks, recognized by what they compute.

    x -> average -> small layer -> activation -> small layer -> gate -> product with x

whatever classes and names a model gives them: the average may be a module, a function or a mean over the image, the layers
1x1 convolutions or linear ones. The average is taken by the convolution that makes x, the gate is one launch, and the
product goes into the 1x1 convolution behind it, or takes an addition and an activation along. fused/gates.py decides at
each call, and runs the parts one by one where it must.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from tritonconv import nn
from tritonconv.convert.calls import activation_of, addition_of, module_of
from tritonconv.convert.functions import mean_of_pixels
from tritonconv.convert.memory import Memory
from tritonconv.fused.call import carries_hook, fused_call, fused_pair
from tritonconv.fused.gates import fused_average, fused_excite, fused_gated_call, fused_scale, pixel_mean
from tritonconv.ops.core.activation import ActivationSpec

__all__ = ["share_averages", "share_gates"]

CONVOLUTIONS: dict[type[torch.nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
POOLS: dict[type[torch.nn.Module], int] = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
POOLING: dict[Any, int] = {
    torch.adaptive_avg_pool1d: 1, torch.nn.functional.adaptive_avg_pool2d: 2, torch.nn.functional.adaptive_avg_pool3d: 3,
}  # fmt: skip
PRODUCTS = {operator.mul, torch.mul, torch.multiply}
EXPANSIONS = {"expand_as", "expand"}
RESHAPED = EXPANSIONS | {"view", "reshape", "unsqueeze", "flatten", "squeeze"}


class Average(NamedTuple):
    """A node that averages over all pixels of an image."""

    source: fx.Node
    axes: int
    """Of pixels."""
    dim: tuple[int, ...] | None
    """They, as a mean has them; None for a pooling."""
    keepdim: bool
    pool: fx.Node | None
    """Itself, where it calls a module."""


def share_averages(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> int:
    """Let convolutions take the average of their results; how many were alone before."""
    memory = Memory(graph, modules)
    fresh = 0
    for node in list(graph.nodes):
        average = _average(node, modules)
        if average is None:
            continue
        source = average.source
        conv = _conv_of(source, modules)
        # The average is computed where the convolution is.
        if conv is None or CONVOLUTIONS[type(conv)] != average.axes or memory.is_written(source, source, node, ()):
            continue
        fresh += source.op == "call_module"
        _take_average(graph, average, node)
        memory = Memory(graph, modules)
    return fresh


def _average(node: fx.Node, modules: dict[str, torch.nn.Module]) -> Average | None:
    """The global average that a node computes, if what it averages is a batch of images: that is known at each call."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.all_input_nodes != [source]:
        return None
    module: Any = module_of(node, modules)
    if type(module) in POOLS:
        single = _is_one(module.output_size) and not carries_hook(module) and len(node.args) == 1 and not node.kwargs
        return Average(source, POOLS[type(module)], None, True, node) if single else None
    if node.target in POOLING and node.op == "call_function":
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return Average(source, POOLING[node.target], None, True, None) if _is_one(size) else None
    mean = mean_of_pixels(node, modules)
    if mean is None:
        return None
    source, dim, keepdim = mean
    return Average(source, len(dim), dim, keepdim, None)


def _is_one(size: object) -> bool:
    sizes = size if isinstance(size, (tuple, list)) else (size,)
    return all(type(n) is int and n == 1 for n in sizes)


def _conv_of(node: fx.Node, modules: dict[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The convolution of ours whose result a node is, alone or with what follows it."""
    if node.op == "call_module":
        module = module_of(node, modules)
        plain = len(node.args) == 1 and not node.kwargs and module is not None and not carries_hook(module)
    else:
        at = node.args[0] if node.target is fused_call else None
        module, plain = (modules.get(str(at.target)), True) if isinstance(at, fx.Node) else (None, False)
    return module if plain and type(module) in CONVOLUTIONS else None


def _take_average(graph: fx.Graph, average: Average, node: fx.Node) -> None:
    source = average.source
    keep = len(source.users) > 1
    with graph.inserting_before(source):
        if source.op == "call_module":
            members: tuple[Any, ...] = (graph.get_attr(str(source.target)), None, None, source.args[0], None, False)
        else:
            members = source.args
        pool = graph.get_attr(str(average.pool.target)) if average.pool is not None else None
        both = graph.call_function(fused_average, (*members, keep, average.dim, average.keepdim, pool))
        y = graph.call_function(operator.getitem, (both, 0)) if keep else None
        mean = graph.call_function(operator.getitem, (both, 1))
    node.replace_all_uses_with(mean)
    graph.erase_node(node)
    if y is not None:
        source.replace_all_uses_with(y)
    graph.erase_node(source)


def share_gates(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> int:
    """Make one launch of each squeeze-excite block's gate, and let the product with it go along with what follows."""
    count = 0
    for node in list(graph.nodes):
        found = _gated(node, modules) if node in graph.nodes else None
        if found is None:
            continue
        x, gate, first, second = found
        with graph.inserting_before(second):
            members = (first.args[0], first.args[2], second.args[0], second.args[2], first.args[3])
            whole = graph.call_function(fused_excite, members)
        second.replace_all_uses_with(whole)
        graph.erase_node(second)
        graph.erase_node(first)
        count += 1
        _take_product(graph, node, x, whole if gate is second else gate, modules, Memory(graph, modules))
    return count


def _gated(node: fx.Node, modules: dict[str, torch.nn.Module]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """(x, gate, the gate's two layers) of a squeeze-excite block's product."""
    function = node.op == "call_function" and node.target in PRODUCTS
    if not function and not (node.op == "call_method" and node.target == "mul"):
        return None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for x, gate in (node.args, node.args[::-1]):
        layers = _two_layers(gate, modules)
        if layers is not None and layers[1] is not x:
            return x, gate, *layers  # type: ignore[return-value]
    return None


def _two_layers(gate: Any, modules: dict[str, torch.nn.Module]) -> tuple[fx.Node, fx.Node] | None:
    """The fused calls of the two layers that a gate comes from, behind a global average."""
    second = gate
    while isinstance(second, fx.Node) and second.op == "call_method" and second.target in RESHAPED:
        second = second.args[0]
    if not isinstance(second, fx.Node) or second.target is not fused_call:
        return None
    first = second.args[3]
    if not isinstance(first, fx.Node) or first.target is not fused_call or len(first.users) > 1:
        return None
    # No batch norm and no residual between; something must bound the gate.
    if any(call.args[1] is not None or call.args[4] is not None for call in (first, second)) or second.args[2] is None:
        return None
    root = first.args[3]
    while isinstance(root, fx.Node) and (
        (root.op == "call_method" and root.target in RESHAPED) or root.target in (torch.flatten, operator.getitem)
    ):
        root = root.args[0]
    if not isinstance(root, fx.Node):
        return None
    averages = root.target in (fused_average, pixel_mean) or _average(root, modules) is not None
    return (first, second) if averages else None


def _take_product(
    graph: fx.Graph, node: fx.Node, x: fx.Node, gate: fx.Node, modules: dict[str, torch.nn.Module], memory: Memory
) -> None:
    """The product in the 1x1 convolution behind it, or with an addition and an activation behind it."""
    while gate.op == "call_method" and gate.target in EXPANSIONS:
        gate = gate.args[0]  # type: ignore[assignment]
    users = list(node.users)
    follower = users[0] if len(users) == 1 else None
    if follower is not None and _is_single(follower, node, modules) and not memory.is_written(x, node, follower, ()):
        with graph.inserting_before(follower):
            if follower.op == "call_module":
                layer = graph.get_attr(str(follower.target))
                call = graph.call_function(fused_gated_call, (layer, None, None, x, gate))
            else:
                members, behind = follower.args[:3], follower.args[4:]
                call = graph.call_function(fused_gated_call, (*members, x, gate, *behind))
        follower.replace_all_uses_with(call)
        graph.erase_node(follower)
        graph.erase_node(node)
        return
    last, residual, in_place = node, None, False
    activation: torch.nn.Module | ActivationSpec | None = None
    added = addition_of(follower, node) if follower is not None else None
    if follower is not None and added is not None and not memory.is_written(x, node, follower, ()):
        (residual, in_place), last = added, follower
    users = list(last.users)
    if len(users) == 1:
        activation = activation_of(users[0], last, modules)
        hooked = isinstance(activation, torch.nn.Module) and carries_hook(activation)
        between = [value for value in (x, residual) if value is not None]
        if hooked or any(memory.is_written(value, node, users[0], (last,)) for value in between):
            activation = None
    end = last if activation is None else users[0]
    with graph.inserting_before(end):
        act: Any = graph.get_attr(str(end.target)) if isinstance(activation, torch.nn.Module) else activation
        call = graph.call_function(fused_scale, (x, gate, residual, act, in_place))
    end.replace_all_uses_with(call)
    for old in dict.fromkeys((end, last, node)):
        graph.erase_node(old)


def _is_single(node: fx.Node, value: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether a node is a 1x1 convolution of this value, and reads it once."""
    conv: Any = _conv_of(node, modules)
    if conv is None or node.target is fused_pair:
        return False
    source, residual = (node.args[0], None) if node.op == "call_module" else (node.args[3], node.args[4])
    ones = (1,) * len(conv.kernel_size)
    return source is value and residual is not value and conv.groups == 1 and conv.kernel_size == conv.stride == ones
