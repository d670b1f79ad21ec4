"""Poolings with an activation behind them, or before them where a maximum may come first."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tritonconv.convert.calls import activation_of, in_place_target, module_of
from tritonconv.convert.memory import Memory, is_new
from tritonconv.fused.call import carries_hook
from tritonconv.fused.pool import Window, fused_pool, window_of
from tritonconv.ops.core.activation import ActivationSpec, from_module

__all__ = ["pool_of", "share_pools"]

F = torch.nn.functional
MAXIMA = {getattr(home, f"max_pool{nd}d"): nd for nd in (1, 2, 3) for home in (F, torch)}
AVERAGES = {getattr(F, f"avg_pool{nd}d"): nd for nd in (1, 2, 3)}
NUMBERS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
AVERAGE_NUMBERS = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
# The maximum of the results is the result of the maximum, to the last bit.
NEVER_FALLING = ("relu", "relu6", "hardtanh")


def share_pools(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> int:
    """One call for each pooling with an activation next to it; how many there are."""
    count = 0
    for node in list(graph.nodes):
        pool = pool_of(node, modules)
        if pool is None:
            continue
        memory = Memory(graph, modules)
        source = node.args[0]
        users = list(node.users)
        behind = users[0] if len(users) == 1 else None
        activation, before, end = None, False, node
        if behind is not None:
            activation = _activation(behind, node, modules)
            end = node if activation is None or memory.is_written(source, node, behind, (node,)) else behind
            activation = None if end is node else activation
        if activation is None and pool.kind == "max" and len(source.users) == 1 and source.args:
            earlier = source.args[0]
            activation = _activation(source, earlier, modules) if isinstance(earlier, fx.Node) else None
            spec = from_module(activation) if isinstance(activation, torch.nn.Module) else activation
            # A slope of 0 makes NaN of an infinity that the maximum would not take.
            falls = spec is None or not (spec.name in NEVER_FALLING or (spec.name == "leaky_relu" and spec.a > 0))
            # Of a window without a pixel the maximum is -inf, whatever the activation would make of it.
            falls = falls or not always_meets_pixels(pool)
            # Of what an activation changes in place there may be other names, the caller's among them.
            falls = falls or (in_place_target(source, modules) is not None and not is_new(earlier, modules))
            if falls or memory.is_written(earlier, source, node, (source,)):
                activation = None
            before = activation is not None
        if activation is None:
            continue
        count += 1
        with graph.inserting_before(end):
            layer = graph.get_attr(str(node.target)) if node.op == "call_module" else pool
            act: Any = activation
            if isinstance(activation, torch.nn.Module):
                act = graph.get_attr(str((source if before else end).target))
            call = graph.call_function(fused_pool, (layer, act, before, source.args[0] if before else source))
        end.replace_all_uses_with(call)
        for old in dict.fromkeys((end, node, *((source,) if before else ()))):
            graph.erase_node(old)
    return count


def always_meets_pixels(pool: Window) -> bool:
    """Whether every window has a pixel, whatever the image's size: the taps of a dilated one may all lie in the padding.

    Torch lets padding be half a window at most, and begins no window behind the image.
    """
    sizes = pool.dilation if isinstance(pool.dilation, (tuple, list)) else (pool.dilation,)
    return all(size == 1 for size in sizes)


def _activation(
    node: fx.Node, value: fx.Node, modules: dict[str, torch.nn.Module]
) -> torch.nn.Module | ActivationSpec | None:
    found = activation_of(node, value, modules)
    return None if isinstance(found, torch.nn.Module) and carries_hook(found) else found


def pool_of(node: fx.Node, modules: dict[str, torch.nn.Module]) -> Window | None:
    """The pooling that a node calls, with numbers that are known."""
    module = module_of(node, modules)
    window = None
    if module is not None:
        window = window_of(module) if not carries_hook(module) and len(node.args) == 1 and not node.kwargs else None
    elif node.op == "call_function" and (node.target in MAXIMA or node.target in AVERAGES):
        window = _bound(node)
    return window if node.args and isinstance(node.args[0], fx.Node) else None


def _bound(node: fx.Node) -> Window | None:
    maximum = node.target in MAXIMA
    names = NUMBERS if maximum else AVERAGE_NUMBERS
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    given.pop("input", None)
    indices = given.pop("return_indices", False)
    if indices is not False or len(node.args) > len(names) or "kernel_size" not in given:
        return None
    # Sizes that follow from a tensor's are not known before.
    flat = [n for value in given.values() for n in (value if isinstance(value, (list, tuple)) else (value,))]
    if any(isinstance(n, fx.Node) for n in flat):
        return None
    kernel, stride = given.pop("kernel_size"), given.pop("stride", None)
    # Some functions write no stride as an empty one.
    stride = stride if stride else None
    padding, dilation, ceil_mode = given.pop("padding", 0), given.pop("dilation", 1), given.pop("ceil_mode", False)
    divisor, include_pad = given.pop("divisor_override", None), given.pop("count_include_pad", True)
    nd = (MAXIMA if maximum else AVERAGES)[node.target]
    kind: Any = "max" if maximum else "avg"
    return None if given else Window(kind, nd, kernel, stride, padding, dilation, ceil_mode, divisor, include_pad)
