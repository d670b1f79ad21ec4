"""Functions of torch in a graph, and ours in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tritonconv import functional
from tritonconv.convert.calls import module_of
from tritonconv.convert.deform import replace_deform_call
from tritonconv.ops.library_adaptive import global_average

__all__ = ["FUNCTIONS", "replace_functions", "spatial_axes"]

NAMES = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    *(f"{kind}{nd}d" for kind in ("max_pool", "adaptive_max_pool") for nd in (1, 2, 3)),
    *(f"{kind}{nd}d_with_indices" for kind in ("max_pool", "adaptive_max_pool") for nd in (1, 2, 3)),
    "interpolate", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    *(f"{kind}{nd}d" for kind in ("avg_pool", "lp_pool", "max_unpool", "adaptive_avg_pool") for nd in (1, 2, 3)),
)  # fmt: skip


def _functions() -> dict[Callable[..., Any], Callable[..., Any]]:
    found = {}
    for name in NAMES:
        ours = getattr(functional, name)
        # Some have the same arguments under either name, others are one object.
        for home in (torch.nn.functional, torch):
            theirs = getattr(home, name, None)
            if theirs is not None:
                found[theirs] = ours
    return found | {torch.native_channel_shuffle: functional.channel_shuffle}


FUNCTIONS = _functions()
"""Torch's functions, each with ours of the same arguments."""
OURS = {*FUNCTIONS.values(), functional.deform_conv2d}


def replace_functions(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> list[str]:
    """Call our functions where the graph calls torch's; names of the nodes that call ours, in the order they run."""
    names = []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
            names.append(node.name)
        elif (found := mean_of_pixels(node)) is not None and found[1] == spatial_axes(found[0], modules):
            source, _, keepdim = found
            with graph.inserting_before(node):
                call = graph.call_function(global_average, (source, keepdim))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            names.append(call.name)
        elif node.op == "call_function" and node.target in OURS:
            names.append(node.name)
        elif (replaced := replace_deform_call(graph, node)) is not None:
            names.append(replaced.name)
    return names


def mean_of_pixels(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """(what, over how many axes, keepdim) of a mean over all but the first two axes, as far as it says itself."""
    method = node.op == "call_method" and node.target == "mean"
    if not method and not (node.op == "call_function" and node.target is torch.mean):
        return None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    source, dim, keepdim = given.pop("input", None), given.pop("dim", None), given.pop("keepdim", False)
    if given or type(keepdim) is not bool or not isinstance(dim, (tuple, list)) or not dim:
        return None
    n = len(dim)
    if not isinstance(source, fx.Node) or not all(type(d) is int for d in dim):
        return None
    return (source, n, keepdim) if sorted(dim) in (list(range(2, 2 + n)), list(range(-n, 0))) else None


def spatial_axes(value: Any, modules: dict[str, torch.nn.Module]) -> int | None:
    """How many axes of pixels a value has, as far as the layers that it comes from tell."""
    while isinstance(value, fx.Node) and value.args:
        module = module_of(value, modules)
        if module is None and isinstance(value.args[0], fx.Node) and value.args[0].op == "get_attr":
            # A fused call, whose first argument is its layer.
            module = modules.get(str(value.args[0].target))
        name = type(module).__name__
        if isinstance(module, torch.nn.modules.conv._ConvNd) or name.endswith(("2d", "3d")):
            return int(name[-2])
        value = value.args[0][0] if isinstance(value.args[0], (list, tuple)) and value.args[0] else value.args[0]
    return None
