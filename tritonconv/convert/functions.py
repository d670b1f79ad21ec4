"""Functions of torch in a graph, and ours in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tritonconv import functional
from tritonconv.convert.calls import addition_of, module_of, spec_of_call
from tritonconv.convert.deform import replace_deform_call
from tritonconv.fused.call import fused_call, fused_norm, fused_pair
from tritonconv.fused.gates import all_pixels, fused_gated_call, fused_scale, pixel_mean
from tritonconv.fused.pool import fused_pool

__all__ = ["FUNCTIONS", "mean_of_pixels", "replace_functions"]

NAMES = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    *(f"{kind}{nd}d" for kind in ("max_pool", "adaptive_max_pool") for nd in (1, 2, 3)),
    *(f"{kind}{nd}d_with_indices" for kind in ("max_pool", "adaptive_max_pool") for nd in (1, 2, 3)),
    "interpolate", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    *(f"{kind}{nd}d" for kind in ("avg_pool", "lp_pool", "max_unpool", "adaptive_avg_pool") for nd in (1, 2, 3)),
)  # fmt: skip


# Of these names torch has a function that returns more than the one in torch.nn.functional.
TUPLES = {"adaptive_max_pool1d": "adaptive_max_pool1d_with_indices"}


def _functions() -> dict[Callable[..., Any], Callable[..., Any]]:
    found = {}
    for name in NAMES:
        # Some have the same arguments under either name, others are one object.
        for home, ours in ((torch, TUPLES.get(name, name)), (torch.nn.functional, name)):
            theirs = getattr(home, name, None)
            if theirs is not None:
                found[theirs] = getattr(functional, ours)
    return found | {torch.native_channel_shuffle: functional.channel_shuffle}


FUNCTIONS = _functions()
"""Torch's functions, each with ours of the same arguments and results."""
OURS = {*FUNCTIONS.values(), functional.deform_conv2d}
# Nodes whose result has as many axes as the argument at this position, in a graph that was rewritten.
SAME_RANK: dict[Any, int] = {
    fused_call: 3, fused_norm: 2, fused_pair: 6, fused_pool: 3, fused_gated_call: 3, fused_scale: 0,
    torch.nn.functional.dropout: 0,
}  # fmt: skip


def replace_functions(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> list[str]:
    """Call our functions where the graph calls torch's; names of the nodes that call ours, in the order they run."""
    names = []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
            names.append(node.name)
        elif (found := mean_of_pixels(node, modules)) is not None:
            source, dim, keepdim = found
            with graph.inserting_before(node):
                call = graph.call_function(pixel_mean, (source, dim, keepdim))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            names.append(call.name)
        elif node.op == "call_function" and node.target in OURS:
            names.append(node.name)
        elif (replaced := replace_deform_call(graph, node)) is not None:
            names.append(replaced.name)
    return names


def mean_of_pixels(
    node: fx.Node, modules: dict[str, torch.nn.Module]
) -> tuple[fx.Node, tuple[int, ...], bool] | None:  # fmt: skip
    """(what, axes, keepdim) of a mean over all axes of an image but the first two; `pixel_mean` proves it at each call."""
    method = node.op == "call_method" and node.target == "mean"
    if not method and not (node.op == "call_function" and node.target is torch.mean):
        return None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    source, dim, keepdim = given.pop("input", None), given.pop("dim", None), given.pop("keepdim", False)
    if given or type(keepdim) is not bool or not isinstance(dim, (tuple, list)) or not all(type(d) is int for d in dim):
        return None
    axes = tuple(dim)
    if not isinstance(source, fx.Node) or spatial_axes(source, modules) != len(axes) or not all_pixels(axes, len(axes) + 2):
        return None
    return source, axes, keepdim


def spatial_axes(value: Any, modules: dict[str, torch.nn.Module]) -> int | None:
    """How many axes of pixels a value has where the layer that it comes from is given a batch; None: not known."""
    while isinstance(value, fx.Node):
        module, at = module_of(value, modules), SAME_RANK.get(value.target)
        first = value.args[0] if value.args else None
        if module is None and at is not None and isinstance(first, fx.Node) and first.op == "get_attr":
            # A fused call, whose first argument is its layer.
            module = modules.get(str(first.target))
        if module is not None and not type(module).__module__.startswith(("torch.nn.modules", "tritonconv.nn")):
            return None
        name = type(module).__name__
        if isinstance(module, torch.nn.modules.conv._ConvNd) or name.endswith(("1d", "2d", "3d")):
            return int(name[-2])
        if at is None and (module is not None or spec_of_call(value) is not None or _is_sum(value)):
            at = 0
        value = value.args[at] if at is not None and len(value.args) > at else None
    return None


def _is_sum(node: fx.Node) -> bool:
    return isinstance(node.args[0] if node.args else None, fx.Node) and addition_of(node, node.args[0]) is not None  # type: ignore[arg-type]
