"""Rules for calls that share a launch: depthwise with 1x1 convolutions, averages, squeeze-excite, gates."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._ops import OpOverload

from tritonconv.fused.shared import averaged, excited, gated, separable
from tritonconv.graph.elementwise import in_place_target, name_of
from tritonconv.graph.memory import Memory
from tritonconv.graph.nodes import FamilyCall, call_of, insert, insert_family, only_user, replace, same_size, tensor_of

__all__ = ["fuse_averages", "fuse_excites", "fuse_gates", "fuse_products", "fuse_separable"]

PRODUCTS = ("mul", "imul", "multiply")


def fuse_products(graph: fx.Graph) -> int:
    """Write each product of images with one number for each channel as a call of `scale_channels`."""
    memory, count = Memory(graph), 0
    for node in list(graph.nodes):
        found = _product(node)
        if found is None:
            continue
        x, gate = found
        target = in_place_target(node)
        # What is changed in place may have other names.
        if target is not None and (only_user(target) != node or memory.storages(target) & memory.inputs):
            continue
        call = FamilyCall("scale_channels", (x, gate, None), ((), None))
        replace(graph, node, insert_family(graph, node, call, node))
        count += 1
    return count


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(images (N, C, *spatial), their gate (N, C, 1, ...)) of a product, both of the dtype of the result."""
    function = node.op == "call_function" and (
        getattr(node.target, "__module__", "") in ("_operator", None, "torch") or isinstance(node.target, OpOverload)
    )
    if not (function or node.op == "call_method") or name_of(node).removesuffix("_") not in PRODUCTS or node.kwargs:
        return None
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    x: Any
    gate: Any
    for x, gate in (node.args, node.args[::-1]):
        while gate.op == "call_method" and gate.target in ("expand", "expand_as"):
            gate = gate.args[0]
        image, factor, y = tensor_of(x), tensor_of(gate), tensor_of(node)
        if image is None or factor is None or y is None or image.dim() not in (3, 4, 5) or image.dim() != factor.dim():
            continue
        ones = (1,) * (image.dim() - 2)
        fits = same_size(factor.shape, (*image.shape[:2], *ones)) and same_size(image.shape, y.shape)
        plain = image.dtype == factor.dtype == y.dtype and y.is_floating_point() and image.device == factor.device
        if fits and plain and not same_size(image.shape[2:], ones) and x is not gate:
            return x, gate
    return None


def _pairs(graph: fx.Graph) -> Iterator[tuple[fx.Node, FamilyCall, FamilyCall]]:
    """(node, the call before it, its own call) where the node alone reads the result of the call before it, as its input.

    The call before it may run where the node does.
    """
    memory = Memory(graph)
    for node in tuple(graph.nodes):
        second = call_of(node)
        first = None if second is None else call_of(second.input)
        if first is None or second is None or only_user(second.input) != node or second.input in second.tensors[1:]:
            continue
        if memory.may_move(first.given(), second.input, node):
            yield node, first, second


def fuse_separable(graph: fx.Graph) -> int:
    """One call for each depthwise convolution whose result a 1x1 convolution alone reads, not as its residual."""
    count = 0
    for node, first, second in _pairs(graph):
        before, backends = second.input, {first.backend, second.backend} - {None}
        if not _is_depthwise(first) or not _is_pointwise(second) or len(backends) > 1:
            continue
        after = (None, *second.tensors[1:])
        args = ((first.tensors, first.numbers), (after, second.numbers), next(iter(backends), None))
        replace(graph, node, insert(graph, node, separable, args, node, (before, node), calls=2))
        graph.erase_node(before)
        count += 1
    return count


def _is_depthwise(call: FamilyCall) -> bool:
    if call.family != "conv":
        return False
    x, weight = tensor_of(call.input), tensor_of(call.tensors[1])
    if x is None or weight is None or call.tensors[7] is not None or x.dim() != 4:
        return False
    groups = call.numbers[0][4]
    return isinstance(groups, int) and groups > 1 and same_size((groups, groups, 1), (x.shape[1], *weight.shape[:2]))


def _is_pointwise(call: FamilyCall) -> bool:
    """Whether a call is a convolution of one tap, one group and no padding, of a batch."""
    if call.family != "conv":
        return False
    x, weight = tensor_of(call.input), tensor_of(call.tensors[1])
    if x is None or weight is None or x.dim() != weight.dim():
        return False
    nd, stride, padding, _, groups = call.numbers[0]
    steps = stride if isinstance(stride, (tuple, list)) else (stride,)
    pads = padding if isinstance(padding, (tuple, list)) else (padding,)
    plain = all(s == 1 for s in steps) and all(p in (0, "valid", "same") for p in pads) and groups == 1
    return plain and x.dim() == nd + 2 and same_size(weight.shape[2:], (1,) * nd)


def _is_average(call: FamilyCall) -> bool:
    """Whether a call averages over all pixels of a batch of images."""
    x = tensor_of(call.input)
    if x is None or call.family not in ("global_average", "adaptive_avg_pool"):
        return False
    if call.family == "global_average":
        return True
    size, nd = call.numbers[0]
    sizes = size if isinstance(size, (tuple, list)) else (size,)
    return x.dim() == nd + 2 and all(type(n) is int and n == 1 for n in sizes)


def fuse_averages(graph: fx.Graph) -> int:
    """Let a convolution take the average of its result, which is computed where the convolution is."""
    memory, count = Memory(graph), 0
    for node in list(graph.nodes):
        average = call_of(node)
        if average is None or not _is_average(average):
            continue
        source = average.input
        conv = call_of(source)
        x = None if conv is None else tensor_of(conv.input)
        if conv is None or conv.family != "conv" or x is None or x.dim() != conv.numbers[0][0] + 2:
            continue
        if average.backend != conv.backend and None not in (average.backend, conv.backend):
            continue
        if not memory.may_move([source], source, node):
            continue
        keep = len(source.users) > 1
        args = (conv.tensors, conv.numbers, conv.backend, keep, (average.family, average.numbers))
        both = insert(graph, source, averaged, args, source, (source, node), calls=2)
        both.meta["example_value"] = both.meta["val"] = (tensor_of(source), tensor_of(node))
        replace(graph, node, insert(graph, source, operator.getitem, (both, 1), node))
        if keep:
            replace(graph, source, insert(graph, source, operator.getitem, (both, 0), source))
        else:
            graph.erase_node(source)
        count += 1
    return count


def fuse_excites(graph: fx.Graph) -> int:
    """One call for the two products that make the gate of a squeeze-excite block from a number for each channel."""
    count = 0
    for node, first, second in _pairs(graph):
        before, same = second.input, (first.family, first.backend) == (second.family, second.backend)
        if second.family not in ("conv", "matmul") or not same or second.numbers[3] is None:
            continue
        if not _is_single(first) or not _is_single(second) or not _gates_images(node):
            continue
        parts = ((first.tensors[1:], first.numbers), (second.tensors[1:], second.numbers))
        args = (first.family, first.input, *parts, first.backend)
        replace(graph, node, insert(graph, node, excited, args, node, (before, node), calls=2))
        graph.erase_node(before)
        count += 1
    return count


def _is_single(call: FamilyCall) -> bool:
    """Whether a call is a product with a vector for each image, without batch norm and residual."""
    x = tensor_of(call.input)
    if x is None or any(t is not None for t in call.tensors[3:]):
        return False
    if call.family == "matmul":
        return x.dim() == 2
    return _is_pointwise(call) and same_size(x.shape[2:], (1,) * (x.dim() - 2))


def _gates_images(node: fx.Node) -> bool:
    """Whether images are multiplied by the result, or by a view of it."""
    for user in node.users:
        call = call_of(user)
        if call is not None and call.family == "scale_channels" and call.tensors[1] is node:
            return True
        if user.target is gated and user.args[1] is node:
            return True
        if name_of(user) in ("view", "reshape", "unsqueeze", "getitem") and _gates_images(user):
            return True
    return False


def fuse_gates(graph: fx.Graph) -> int:
    """Let a 1x1 convolution take the product with a gate that it alone reads."""
    count = 0
    for node, scale, conv in _pairs(graph):
        if scale.family != "scale_channels" or not _is_pointwise(conv):
            continue
        before = conv.input
        if scale.tensors[2] is not None or scale.numbers[1] is not None:
            continue
        args: Any = ((scale.input, *conv.tensors[1:]), scale.tensors[1], conv.numbers, conv.backend)
        replace(graph, node, insert(graph, node, gated, args, node, (node, before), calls=2))
        graph.erase_node(before)
        count += 1
    return count
