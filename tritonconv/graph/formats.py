"""Memory formats in a graph: channels-last from layer to layer, torch's wherever Python code can see it.

The trace knows which strides torch gives to every value. Where torch's result of a convolution is contiguous, ours is
channels-last: it has moved. What keeps the format of its arguments moves with them; anything else gets a value with torch's
strides, which is copied once.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from tritonconv.graph.elementwise import is_pointwise, name_of
from tritonconv.graph.memory import Memory
from tritonconv.graph.nodes import CONVOLUTIONS, call_of, insert, order_of, replace, same_size, tensor_of
from tritonconv.ops.core.family import call_family
from tritonconv.ops.core.layout import same_elements, suggests_channels_last
from tritonconv.ops.core.observe import notify_copy
from tritonconv.ops.core.operator import is_traced

__all__ = ["as_channels_last", "settle_formats", "with_strides"]

FEATURES = {*CONVOLUTIONS, "conv_bn", "conv_transpose_bn"}
# Families whose results do not depend on the format of what they read, and have none.
ROWS = {"matmul", "layer_norm"}
# Functions whose results have the format of their arguments, and values that do not depend on it.
KEEPING = {
    "cat", "concat", "concatenate", "dropout", "dropout1d", "dropout2d", "dropout3d", "pad", "constant_pad_nd",
    "group_norm", "instance_norm", "mean", "sum", "amax", "amin", "var", "std", "detach", "clone", "type_as", "to", "float",
    "half", "bfloat16", "double", "requires_grad_", "where", "max", "min", "_to_copy",
}  # fmt: skip
# Functions that arrange axes anew without a copy.
ARRANGING = {
    "permute", "transpose", "swapaxes", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as",
}  # fmt: skip
# Views of some channels or pixels.
PARTS = {"chunk", "split", "narrow", "getitem", "split_with_sizes", "tensor_split", "select", "slice", "unbind"}
# Functions that copy what they read if they must: their results are contiguous.
COPYING = {"layer_norm", "linear", "addmm", "softmax"}


def as_channels_last(x: Tensor) -> Tensor:
    """x (N, C, *spatial), copied to channels-last memory if it is not there."""
    return x if suggests_channels_last(x) else _copied(x, (0, *range(2, x.dim()), 1))


def with_strides(value: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tensor with its axes in this order in memory, the slowest first; copied if it is not there."""
    strides = _strides(value, order)
    if value.stride() == strides:
        return value
    if value.numel() < 2 or same_elements(value.shape, value.stride(), strides):
        # Strides of axes of size one reach the same elements, but Python code sees them.
        return value.as_strided(value.shape, strides)
    return _copied(value, order)


def _strides(value: Tensor, order: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [1] * value.dim(), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(value.shape[axis], 1)
    return tuple(strides)


def _copied(value: Tensor, order: tuple[int, ...]) -> Tensor:
    notify_copy()
    if is_traced((value,)):
        # Without a write, which a functional graph may not have.
        return value.permute(order).contiguous().permute([order.index(axis) for axis in range(value.dim())])
    strides = _strides(value, order)
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def settle_formats(graph: fx.Graph) -> int:
    """Make the graph's layers channels-last, and give every value that leaves them torch's strides; how many copies."""
    _keep_formats(graph)
    memory = Memory(graph)
    fixed: set[fx.Node] = set()
    while True:
        found = _Formats(graph, memory, fixed)
        # A part of a value that moved cannot get torch's strides back: the whole keeps them.
        if not found.refused:
            break
        fixed |= found.refused
    return _insert_copies(graph, found)


class _Formats:
    """Which values of a graph have moved, and where they have to go back.

    Args:
        fixed: values that must have torch's strides.
    """

    def __init__(self, graph: fx.Graph, memory: Memory, fixed: set[fx.Node]) -> None:
        self.memory, self.fixed = memory, fixed
        self.moved: dict[fx.Node, fx.Node] = {}
        """Values that may have other strides than torch's, each with the value whose memory it is in."""
        self.leaving: dict[fx.Node, list[fx.Node]] = {}
        """Nodes with the values that go back before them."""
        self.entering: set[fx.Node] = set()
        """Calls whose input becomes channels-last."""
        self.refused: set[fx.Node] = set()
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        sources = [n for n in node.all_input_nodes if n in self.moved]
        if _makes_features(node):
            if not sources and _wants_last(node):
                self.entering.add(node)
            if node not in self.fixed:
                self.moved[node] = node
            return
        if not sources or _tells_numbers(node):
            return
        if _copies(node) and not any(self.memory.is_written_after(n, node) for n in (node, *sources)):
            return
        if node in self.fixed or not (_keeps_format(node) or _is_part(node)):
            self._leave(node, sources)
            return
        self.moved[node] = self.moved[sources[0]] if _is_view(node) or order_of(tensor_of(node)) is None else node

    def _leave(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Let values go back before a node, if nobody writes into them then: a copy would not see it."""
        self.leaving[node] = sources
        for source in sources:
            written = self.memory.writes(node) & self.memory.storages(source) or self.memory.is_written_after(source, node)
            if written or order_of(tensor_of(source)) is None:
                self.refused.add(self.moved[source])


def _insert_copies(graph: fx.Graph, found: _Formats) -> int:
    last: dict[fx.Node, fx.Node] = {}
    back: dict[fx.Node, fx.Node] = {}
    gone: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node in found.entering:
            source = node.args[1][0]
            if source not in last:
                last[source] = insert(graph, node, as_channels_last, (source,), source)
            node.args = (node.args[0], (last[source], *node.args[1][1:]), *node.args[2:])
        for leaving in found.leaving.get(node, ()):
            source = gone.get(leaving, leaving)
            if source not in back:
                back[source] = _restored(graph, node, source)
            node.replace_input_with(source, back[source])
        if node in found.fixed and _makes_features(node):
            back[node] = _restored(graph, node.next, node)
            node.replace_all_uses_with(back[node], delete_user_cb=lambda user, new=back[node]: user is not new)
        elif node in found.moved and _gives_its_input(node):
            source = node.args[0]
            gone[node] = gone.get(source, source)
            replace(graph, node, source)
    return len(last) + len(back)


def _restored(graph: fx.Graph, before: fx.Node, value: fx.Node) -> fx.Node:
    return insert(graph, before, with_strides, (value, order_of(tensor_of(value))), value)


def _keep_formats(graph: fx.Graph) -> None:
    """Let instance norms keep the format of what they read, where torch's give contiguous results."""
    for node in graph.find_nodes(op="call_function", target=call_family):
        call = call_of(node)
        if call is not None and call.family == "instance_norm":
            node.args = tuple(call._replace(numbers=(*call.numbers[:2], True)))


def _makes_features(node: fx.Node) -> bool:
    """Whether a node is a convolution or an instance norm of a batch, whose result torch has contiguous."""
    call, y = call_of(node), tensor_of(node)
    if call is None or y is None or call.family not in (*FEATURES, "instance_norm"):
        return False
    if call.family in FEATURES and y.dim() != call.numbers[0][0] + 2:
        return False
    return order_of(y) == tuple(range(y.dim()))


def _wants_last(node: fx.Node) -> bool:
    """Whether a convolution's input becomes channels-last for it: its weight is not so already."""
    call = call_of(node)
    weight = None if call is None or call.family not in FEATURES else tensor_of(call.tensors[1])
    return weight is not None and not suggests_channels_last(weight)


def _tells_numbers(node: fx.Node) -> bool:
    """Whether a node has no tensor in its value: what it tells is the same in every format."""
    value = tensor_of(node)
    return (
        value is None and node.op != "output" and name_of(node) in ("size", "dim", "numel", "getattr", "sym_size", "ndim")
    )


def _gives_its_input(node: fx.Node) -> bool:
    """Whether a node changes nothing once formats are ours: a copy to contiguous memory, or a view of the same size.

    A view of a single image would give its first axis another stride, which kernels would not take for channels-last.
    """
    if node.op == "call_method" and node.target == "contiguous":
        return True
    x, y = tensor_of(node.args[0]) if node.args else None, tensor_of(node)
    if name_of(node) not in ("view", "reshape") or x is None or y is None:
        return False
    # A view as another dtype is something else.
    return x.dtype == y.dtype and same_size(x.shape, y.shape)


def _is_view(node: fx.Node) -> bool:
    return _is_part(node) or name_of(node) in ARRANGING or name_of(node) in ("view", "reshape", "flatten", "detach")


def _is_part(node: fx.Node) -> bool:
    if name_of(node) not in PARTS:
        return False
    if node.target is not operator.getitem:
        return True
    index = node.args[1]
    if isinstance(index, int):
        return not isinstance(node.args[0], fx.Node) or tensor_of(node.args[0]) is None
    return all(isinstance(i, slice) or i is Ellipsis for i in (index if isinstance(index, tuple) else (index,)))


def _keeps_format(node: fx.Node) -> bool:
    """Whether a node's result has the format of its arguments, and values do not depend on the format."""
    call = call_of(node)
    if call is not None:
        return call.family not in ROWS
    if node.op not in ("call_function", "call_method"):
        return False
    name, first = name_of(node), node.args[0] if node.args else None
    home = getattr(node.target, "__module__", None) or "torch"
    if (
        node.op == "call_function"
        and not isinstance(node.target, OpOverload)
        and not home.startswith(("torch", "_operator"))
    ):
        return False
    if name == "contiguous":
        source = tensor_of(first)
        return (
            len(node.args) == 1
            and not node.kwargs
            and source is not None
            and order_of(source) == tuple(range(source.dim()))
        )
    if name in ("view", "reshape", "flatten"):
        return _joins_pixels(tensor_of(first), tensor_of(node))
    return is_pointwise(node) or name in KEEPING or name in ARRANGING


def _joins_pixels(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether a view costs nothing in any format: it joins all pixels of each channel, or there is one pixel an image."""
    if x is None or y is None or x.dim() < 3:
        return False
    joins = y.dim() == 3 and same_size(x.shape[:2], y.shape[:2])
    return joins or same_size(x.shape[2:], (1,) * (x.dim() - 2))


def _copies(node: fx.Node) -> bool:
    """Whether a node's result is contiguous whatever the format of its input is: it copies the input if it must."""
    call, name = call_of(node), name_of(node)
    if call is not None:
        return call.family in ROWS
    if name in ("reshape", "flatten"):
        x, y = tensor_of(node.args[0]), tensor_of(node)
        rows = x is not None and y is not None and y.dim() == 2 and x.dim() > 2 and same_size(x.shape[:1], y.shape[:1])
        return rows and order_of(x) == tuple(range(x.dim()))  # type: ignore[union-attr]
    if name == "stack":
        # Values side by side on the axis before their pixels would be a channels-last video.
        x, dim = tensor_of(node.all_input_nodes[0]), (node.args[1:] or (node.kwargs.get("dim", 0),))[0]
        return x is not None and isinstance(dim, int) and dim % (x.dim() + 1) < 2
    return name in COPYING and node.op == "call_function"
