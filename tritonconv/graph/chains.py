"""Rules for a layer and what follows it: batch norm, residual addition, activation, and a pooling with its activation.

Each rule takes a node and gives the call that computes it together with the call before it, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from tritonconv.fused.shared import synchronized
from tritonconv.graph.elementwise import activation_of, addition_of, bind, in_place_target, name_of, one_more_than
from tritonconv.graph.memory import Memory
from tritonconv.graph.nodes import (
    CONVOLUTIONS,
    GROUP_NORMS,
    FamilyCall,
    call_of,
    insert_family,
    only_user,
    replace,
    same_size,
    tensor_of,
)
from tritonconv.ops.conv.call import PADDED
from tritonconv.ops.core.family import call_family

__all__ = ["fuse_chains", "fuse_pads", "fuse_pools", "synchronize"]

TRAINING = {"conv": "conv_bn", "conv_transpose": "conv_transpose_bn"}
# Families whose tensors end with a residual, and the position of the activation in their numbers.
ACTIVATIONS = {
    "conv": 3,
    "conv_transpose": 3,
    "matmul": 3,
    "conv_bn": 3,
    "conv_transpose_bn": 3,
    "batch_norm": 1,
    "scale_channels": 1,
    **dict.fromkeys(GROUP_NORMS, 1),
}
PADS = ("pad", "constant_pad_nd")
# The maximum of the results is the result of the maximum, to the last bit.
NEVER_FALLING = ("relu", "relu6", "hardtanh")

Rule = Callable[[fx.Node, fx.Node, FamilyCall, Memory], FamilyCall | None]


def fuse_pads(graph: fx.Graph) -> int:
    """Let convolutions pad themselves where zeros around an image are read by convolutions alone; how many images."""
    memory, count = Memory(graph), 0
    for node in list(graph.nodes):
        calls = {user: _padded(node, user, memory) for user in node.users} if name_of(node) in PADS else {}
        if not calls or None in calls.values():
            continue
        for user, call in calls.items():
            assert call is not None
            replace(graph, user, insert_family(graph, user, call, user, (node, user) if len(calls) == 1 else (user,)))
        graph.erase_node(node)
        count += 1
    return count


def _padded(node: fx.Node, user: fx.Node, memory: Memory) -> FamilyCall | None:
    """A convolution of an image with known numbers of zeros around its pixels, and none removed."""
    call, given = call_of(user), bind(node, ("input", "pad", "mode", "value"))
    if call is None or call.family != "conv" or call.input is not node or given is None or call.given().count(node) > 1:
        return None
    nd, stride, padding, *rest = call.numbers[0]
    padding = (0,) * nd if padding == "valid" else padding
    padding = (padding,) * nd if isinstance(padding, int) else tuple(padding) * (nd if len(padding) == 1 else 1)
    zeros = given["pad"]
    known = isinstance(zeros, (tuple, list)) and len(zeros) <= 2 * nd and len(padding) == nd
    if not known or not all(type(n) is int and n >= 0 for n in (*zeros, *padding)):
        return None
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        return None
    if not isinstance(given["input"], fx.Node) or not memory.may_move([given["input"]], node, user):
        return None
    # The last axis comes first.
    pairs = [*zip(zeros[::2], zeros[1::2], strict=True), *[(0, 0)] * (nd - len(zeros) // 2)][::-1]
    before = tuple(p + a for p, (a, _) in zip(padding, pairs, strict=True))
    behind = tuple(p + b for p, (_, b) in zip(padding, pairs, strict=True))
    numbers, op = (nd, stride, before if before == behind else before + behind, *rest), call.numbers[1]
    op = op if before == behind or op.startswith(PADDED) else PADDED + op
    return call._replace(tensors=(given["input"], *call.tensors[1:]), numbers=(numbers, op, *call.numbers[2:]))


def fuse_chains(graph: fx.Graph) -> int:
    """Write chains of layers as one call each; how many links there were."""
    memory, order, count = Memory(graph), {node: i for i, node in enumerate(graph.nodes)}, 0
    for rule in (_norm, _scale, _shift, _residual, _activation):
        for node in list(graph.nodes):
            # Where two chains meet in one addition, the one that it is written into takes it, else the later one: the value
            # of the other is there by then.
            target = in_place_target(node)
            for before in sorted(node.all_input_nodes, key=lambda n: (n is target, order[n]), reverse=True):
                call = call_of(before)
                found = None if call is None else _linked(rule, node, before, call, memory)
                if found is not None:
                    new = insert_family(graph, node, found, node, (before, node))
                    order[new] = order[node]
                    replace(graph, node, new)
                    graph.erase_node(before)
                    count += 1
                    break
    return count


def _linked(rule: Rule, node: fx.Node, before: fx.Node, call: FamilyCall, memory: Memory) -> FamilyCall | None:
    """The call that a rule makes of a node and the call before it, which nobody else reads and which may run later."""
    if only_user(before) != node or not memory.may_move(call.given(), before, node):
        return None
    # Running statistics are updated where the whole is computed.
    if not memory.may_move_write(memory.writes(before), before, node):
        return None
    return rule(node, before, call, memory)


def _norm(node: fx.Node, before: fx.Node, call: FamilyCall, memory: Memory) -> FamilyCall | None:  # noqa: ARG001
    """A batch norm of a convolution's result: of a batch, without a residual or activation between.

    With the batch's own statistics the convolution computes them, and the running ones are updated where the norm ran.
    """
    norm = call_of(node)
    x = tensor_of(call.input)
    if (
        call.family not in CONVOLUTIONS
        or norm is None
        or norm.family != "batch_norm"
        or norm.input is not before
        or x is None
    ):
        return None
    bare = all(t is None for t in call.tensors[3:]) and call.numbers[3] is None
    (training, momentum, eps), activation, group = norm.numbers
    if not bare or norm.tensors[5] is not None or activation is not None or x.dim() != call.numbers[0][0] + 2:
        return None
    if norm.backend != call.backend and None not in (norm.backend, call.backend):
        return None
    _, mean, var, weight, bias, _ = norm.tensors
    tensors = (*call.tensors[:3], mean, var, weight, bias, None)
    numbers, op = call.numbers[:2]
    op = op if op.endswith("_bn_act") else f"{op}_bn_act"
    backend = call.backend if call.backend is not None else norm.backend
    if not training:
        return FamilyCall(call.family, tensors, (numbers, op, eps, None), backend) if mean is not None else None
    if not isinstance(momentum, (int, float, fx.Node)):
        return None
    return FamilyCall(TRAINING[call.family], tensors, (numbers, op, eps, None, momentum, group), backend)


def _scale(node: fx.Node, before: fx.Node, call: FamilyCall, memory: Memory) -> FamilyCall | None:
    """A product of a norm's result with 1 + scale, of an image's channels (`graph.shared.fuse_products`)."""
    product = call_of(node)
    if product is None or product.family != "scale_channels" or product.input is not before or not _may_be_scaled(call):
        return None
    gate = product.tensors[1]
    scale = None if gate is None else one_more_than(gate)
    if gate is None or scale is None or call.tensors[-3] is not None or not memory.may_move([scale], gate, node):
        return None
    given, result = tensor_of(scale), tensor_of(node)
    if given is None or result is None or given.dtype != result.dtype or tuple(given.shape) != tuple(tensor_of(gate).shape):  # type: ignore[union-attr]
        return None
    return call._replace(tensors=(*call.tensors[:-3], scale, *call.tensors[-2:]))


def _shift(node: fx.Node, before: fx.Node, call: FamilyCall, memory: Memory) -> FamilyCall | None:  # noqa: ARG001
    """An addition of a number for each channel of an image to a norm's result, perhaps scaled."""
    shift = addition_of(node, before)
    y, given, result = tensor_of(before), tensor_of(shift), tensor_of(node)
    if shift is None or y is None or given is None or result is None or not _may_be_scaled(call):
        return None
    ones = (1,) * (y.dim() - 2)
    fits = same_size(given.shape, (*y.shape[:2], *ones)) and not same_size(y.shape[2:], ones)
    if not fits or given.dtype != y.dtype or result.dtype != y.dtype or given.device != y.device:
        return None
    return call._replace(tensors=(*call.tensors[:-2], shift, None))


def _may_be_scaled(call: FamilyCall) -> bool:
    """Whether a call is a norm over channels on axis 1, by the input's own statistics, that nothing but a scale follows."""
    if call.family not in GROUP_NORMS or call.family == "layer_norm" or call.numbers[1] is not None:
        return False
    own = call.family != "instance_norm" or call.numbers[0][0] is True
    return own and call.tensors[-2] is None and call.tensors[-1] is None


def _residual(node: fx.Node, before: fx.Node, call: FamilyCall, memory: Memory) -> FamilyCall | None:  # noqa: ARG001
    """An addition of a tensor of the result's size and dtype, to a call that has neither residual nor activation yet.

    An addition into the tensor in place is one of values, if the tensor is a call's result that nobody else reads. The
    number zero, with which sums in loops begin, adds nothing.
    """
    position, other = ACTIVATIONS.get(call.family), addition_of(node, before)
    if type(other) in (int, float) and other == 0:
        return call
    if (
        position is None
        or not isinstance(other, fx.Node)
        or call.tensors[-1] is not None
        or call.numbers[position] is not None
    ):
        return None
    if in_place_target(node) is other and (call_of(other) is None or only_user(other) is not node):
        return None
    y, z, result = tensor_of(before), tensor_of(other), tensor_of(node)
    if y is None or z is None or result is None or y.dtype != z.dtype or y.device != z.device:
        return None
    if not same_size(y.shape, z.shape) or result.dtype != y.dtype:
        return None
    return call._replace(tensors=(*call.tensors[:-1], other))


def _activation(node: fx.Node, before: fx.Node, call: FamilyCall, memory: Memory) -> FamilyCall | None:
    """An activation of the result of a call that has none yet.

    Of a norm, sum and activation in one the backward pass needs the residual: torch saves the sum's activation instead,
    and lets the residual be changed in place afterwards. Without a norm it needs the result, which torch saves for ReLU
    alone, and lets others be changed in place.
    """
    position = ACTIVATIONS.get(call.family)
    spec = activation_of(node, before)
    if position is None or spec is None or call.numbers[position] is not None:
        return None
    residual = call.tensors[-1]
    has_norm = call.family in ("batch_norm", *GROUP_NORMS) or (
        call.family != "scale_channels" and call.tensors[3] is not None
    )
    has_norm = has_norm or call.family.endswith("_bn")
    if residual is not None and has_norm and memory.may_change(residual, node):
        return None
    y = tensor_of(node)
    saves = call.family in (*CONVOLUTIONS, "matmul") and not has_norm and spec.name != "relu"
    if saves and y is not None and y.requires_grad and memory.may_change(node, node):
        return None
    numbers = (*call.numbers[:position], spec, *call.numbers[position + 1 :])
    return call._replace(numbers=numbers)


def synchronize(graph: fx.Graph) -> None:
    """Let convolutions with a batch norm over a process group be called in a way that no process can miss."""
    for node in graph.find_nodes(op="call_function", target=call_family):
        call = call_of(node)
        if call is not None and call.family in TRAINING.values() and call.numbers[5]:
            node.target = synchronized


def fuse_pools(graph: fx.Graph) -> int:
    """Write each pooling with an activation before or after it as one call; how many there are."""
    memory, count = Memory(graph), 0
    for node in list(graph.nodes):
        call = call_of(node)
        if call is None or call.family not in ("max_pool", "avg_pool") or call.numbers[1] or call.numbers[2] is not None:
            continue
        count += _pool_then_activation(graph, node, call, memory) or _activation_then_pool(graph, node, call, memory)
    return count


def _pool_then_activation(graph: fx.Graph, node: fx.Node, call: FamilyCall, memory: Memory) -> bool:
    """An activation of the pooled values, which nobody else reads."""
    after = only_user(node)
    spec = None if after is None else activation_of(after, node)
    if after is None or spec is None or not memory.may_move(call.given(), node, after):
        return False
    replace(graph, after, insert_family(graph, after, _with(call, call.input, spec), after, (node, after)))
    graph.erase_node(node)
    return True


def _activation_then_pool(graph: fx.Graph, node: fx.Node, call: FamilyCall, memory: Memory) -> bool:
    """An activation before a maximum, which nobody else reads: it never falls, and every window meets a pixel.

    The taps of a dilated window may all lie in the padding. A LeakyReLU of slope 0 makes NaN of an infinity, which the
    maximum would not take.
    """
    source = call.input
    spec = activation_of(source)
    if call.family != "max_pool" or spec is None or only_user(source) != node:
        return False
    rises = spec.name in NEVER_FALLING or (spec.name == "leaky_relu" and spec.a > 0)
    dilation: Any = call.numbers[0][4]
    dilated = any(size != 1 for size in (dilation if isinstance(dilation, (tuple, list)) else (dilation,)))
    earlier = source.all_input_nodes[0]
    # What an activation changes in place may have other names.
    aliased = in_place_target(source) is not None and (
        bool(memory.storages(earlier) & memory.inputs) or only_user(earlier) is not source
    )
    if not rises or dilated or aliased or not memory.may_move([earlier], source, node):
        return False
    replace(graph, node, insert_family(graph, node, _with(call, earlier, spec), node, (node, source)))
    graph.erase_node(source)
    return True


def _with(call: FamilyCall, source: fx.Node, spec: Any) -> FamilyCall:
    return call._replace(tensors=(source, *call.tensors[1:]), numbers=(*call.numbers[:2], spec, *call.numbers[3:]))
