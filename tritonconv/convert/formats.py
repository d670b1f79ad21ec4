"""Memory formats in a rewritten graph: channels-last from convolution to convolution, torch's where anyone can tell.

By torch's rule a convolution's result is channels-last if its input or its weight is. `convert` makes weights
channels-last, so that results are which torch has contiguous: they have moved. Batch norms, poolings, sums, activations and
further convolutions keep what they are given. A view, a module of the user's, a hook or a caller may mind, and what these
get goes back before. Whether it has to is known when the graph runs: a result has moved unless the first input on its way,
which is as torch has it, was channels-last already.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tritonconv import nn
from tritonconv.convert.calls import IN_PLACE_OPERATORS, in_place_target, module_of, spec_of_call
from tritonconv.convert.code import minds_strides
from tritonconv.convert.functions import OURS
from tritonconv.convert.memory import Memory
from tritonconv.convert.swap import is_originally_last
from tritonconv.functional import linear
from tritonconv.fused.call import carries_hook, fused_call, fused_norm, fused_pair
from tritonconv.fused.gates import fused_average, fused_excite, fused_gated_call, fused_scale, pixel_mean
from tritonconv.fused.join import Join, joined
from tritonconv.fused.pool import fused_pool
from tritonconv.nn.format import are_contiguous, restore
from tritonconv.ops.core.activation import module_types

__all__ = ["call_layers", "settle_formats"]

F = torch.nn.functional
OWN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BLOCKS = (nn.ConvBNAct1d, nn.ConvBNAct2d, nn.ConvBNAct3d, nn.ConvBNReLU2d)
# Functions of ours, each with the positions of the layers in it.
LAYERS: dict[Any, tuple[int, ...]] = {fused_call: (0,), fused_average: (0,), fused_gated_call: (0,), fused_pair: (0, 3)}
# Results that have the format of the arguments, with values that do not depend on it.
KEEPING_FUNCTIONS = {
    *LAYERS, fused_norm, fused_pool, fused_excite, fused_scale, pixel_mean, joined, *IN_PLACE_OPERATORS, *OURS - {linear},
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul, torch.div,
    torch.cat, torch.concat, torch.concatenate, torch.abs, torch.exp, torch.square, torch.sqrt, torch.where, torch.maximum,
    torch.minimum, torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min, F.dropout, F.dropout1d, F.dropout2d,
    F.dropout3d, F.pad, F.batch_norm, F.group_norm, F.instance_norm,
}  # fmt: skip
KEEPING_METHODS = {
    "abs", "add", "add_", "amax", "amin", "bfloat16", "detach", "div", "div_", "double", "exp", "float", "half", "max",
    "mean", "min", "mul", "mul_", "neg", "requires_grad_", "sqrt", "square", "sub", "sub_", "sum", "type_as",
}  # fmt: skip
KEEPING_MODULES = (
    torch.nn.Identity, torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm,
    torch.nn.modules.conv._ConvNd, torch.nn.modules.pooling._MaxPoolNd, torch.nn.modules.pooling._AvgPoolNd,
    torch.nn.modules.pooling._MaxUnpoolNd, torch.nn.modules.pooling._LPPoolNd,
    torch.nn.modules.pooling._AdaptiveAvgPoolNd, torch.nn.modules.pooling._AdaptiveMaxPoolNd, torch.nn.Upsample,
    torch.nn.PixelShuffle, torch.nn.PixelUnshuffle, torch.nn.ChannelShuffle, torch.nn.modules.padding._ConstantPadNd,
    torch.nn.modules.padding._ReflectionPadNd, torch.nn.modules.padding._ReplicationPadNd, nn.DeformConv2d,
)  # fmt: skip
# Parts of a value, in its memory: of contiguous and of channels-last values they differ in strides for good.
PARTS = {torch.chunk, torch.split, torch.narrow, operator.getitem, "chunk", "narrow", "split"}
# What they tell of a value has no format.
NUMBERS = {
    "dim", "device", "dtype", "element_size", "get_device", "is_complex", "is_cuda", "is_floating_point", "ndim",
    "ndimension", "nelement", "numel", "requires_grad", "shape", "size",
}  # fmt: skip

Flag = frozenset[fx.Node]
"""Values that are as torch has them; a result on their way has moved if none of them is channels-last."""


def call_layers(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> int:
    """Make one form of all calls of our convolutions, alone or with their batch norms in one module; how many there are."""
    for node in list(graph.nodes):
        module: Any = module_of(node, modules)
        if type(module) not in (*OWN, *BLOCKS) or carries_hook(module) or node.kwargs or not 1 <= len(node.args) <= 2:
            continue
        target, residual = str(node.target), node.args[1] if len(node.args) > 1 else None
        if type(module) in OWN:
            # A transposed convolution's second argument is the size of its result.
            names: tuple[Any, ...] | None = (target, None, None) if residual is None else None
        else:
            act = f"{target}.act" if isinstance(module.act, torch.nn.Module) else module.act
            names = (f"{target}.conv", f"{target}.bn", act)
        if names is None:
            continue
        with graph.inserting_before(node):
            members = [graph.get_attr(name) if isinstance(name, str) and name in modules else name for name in names]
            call = graph.call_function(fused_call, (*members, node.args[0], residual, False))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return sum(node.target in LAYERS for node in graph.nodes)


def settle_formats(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> None:
    """Let every value that leaves the graph's own layers have torch's format."""
    memory = Memory(graph, modules)
    whole: set[fx.Node] = set()
    while True:
        found = _Formats(graph, modules, memory, whole)
        # A part goes back by its whole going back before it is taken.
        parts = [node for nodes in found.leaving.values() for node in nodes if node in found.parts]
        if not parts:
            break
        whole |= {each for node in parts for each in _up_to_the_whole(node, found)}
    restored: dict[fx.Node, fx.Node] = {}
    flags: dict[Flag, fx.Node] = {}

    def flag_of(flag: Flag) -> fx.Node:
        if flag not in flags:
            flags[flag] = graph.call_function(are_contiguous, tuple(restored.get(node, node) for node in flag))
        return flags[flag]

    for user in list(graph.nodes):
        with graph.inserting_before(user):
            for value in found.leaving.get(user, ()):
                if value not in restored:
                    restored[value] = graph.call_function(restore, (value, flag_of(found.flags[value])))
                user.replace_input_with(value, restored[value])
            for value, flag in found.differing.get(user, {}).items():
                back = graph.call_function(restore, (value, flag_of(found.flags[value]), flag_of(flag)))
                user.replace_input_with(value, back)
        if user in found.at_once:
            with graph.inserting_after(user):
                flag_node = flag_of(found.flags[user])
            with graph.inserting_after(flag_node if flag_node.prev is user else user):
                restored[user] = graph.call_function(restore, (user, flag_node))
            back = restored[user]
            user.replace_all_uses_with(back, delete_user_cb=lambda other, back=back: other is not back)


class _Formats:
    """Which values of a graph have moved, and where they have to go back.

    Args:
        whole: parts for which the whole goes back.
    """

    def __init__(
        self, graph: fx.Graph, modules: dict[str, torch.nn.Module], memory: Memory, whole: set[fx.Node]
    ) -> None:  # fmt: skip
        self.modules, self.memory, self.whole = modules, memory, whole
        self.flags: dict[fx.Node, Flag] = {}
        """Of values that may have moved."""
        self.parts: set[fx.Node] = set()
        self.numbers: set[fx.Node] = set()
        self.leaving: dict[fx.Node, list[fx.Node]] = {}
        """Users with those of their arguments that go back before."""
        self.differing: dict[fx.Node, dict[fx.Node, Flag]] = {}
        """Users whose arguments have moved on several ways: these go back unless the same holds for all of them."""
        for node in graph.nodes:
            self._visit(node)
        gone = {value for values in self.leaving.values() for value in values}
        # Who writes into such a value must write into what everyone reads.
        self.at_once = {value for value in gone if value not in self.parts and self._is_written(value)}

    def _visit(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if n.op != "get_attr" and n.target is not Join]
        if node.op in ("placeholder", "get_attr") or node.target is Join:
            return
        if _tells_numbers(node) or (sources and self.numbers.issuperset(sources)):
            self.numbers.add(node)
            return
        moved = [n for n in sources if n in self.flags]
        is_part = _is_part(node)
        if not (_keeps_format(node, self.modules) or (is_part and node not in self.whole)):
            if moved and not (_makes_rows(node, self.modules) and not self._is_written(node)):
                self.leaving[node] = moved
            return
        layers = self._layers(node)
        makes = node.target is joined or bool(layers) or (node.op == "call_function" and "conv" in _name(node))
        if any(map(is_originally_last, layers)):
            # So are all its results, in torch too.
            return
        if not makes and not moved:
            return
        ways = {self.flags.get(n, frozenset({n})) for n in sources if n not in self.numbers}
        flag: Flag = frozenset().union(*ways)
        if len(ways) > 1:
            self.differing[node] = {n: flag for n in moved if self.flags[n] != flag}
        self.flags[node] = flag
        target = in_place_target(node, self.modules)
        if is_part or (target is not None and target in self.parts):
            self.parts.add(node)

    def _is_written(self, value: fx.Node) -> bool:
        """Whether someone may write into the value's memory once it is computed."""
        return self.memory.is_written_later(self.memory.origins(value), value)

    def _layers(self, node: fx.Node) -> list[torch.nn.Module]:
        members = [node.args[position] for position in LAYERS.get(node.target, ())]
        return [self.modules[str(m.target)] for m in members if isinstance(m, fx.Node)]


def _up_to_the_whole(node: fx.Node, found: _Formats) -> list[fx.Node]:
    way = [node]
    while isinstance(way[-1].args[0], fx.Node) and way[-1].args[0] in found.parts:
        way.append(way[-1].args[0])
    return way


def _name(node: fx.Node) -> str:
    """What a method or function is called."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _tells_numbers(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in NUMBERS
    return node.op == "call_function" and node.target is getattr and node.args[1] in NUMBERS


def _is_part(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in PARTS or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is not operator.getitem:
        return True
    source, index = node.args
    if isinstance(index, int):
        # One of several results, and not of an axis.
        return isinstance(source, fx.Node) and source.target in PARTS - {operator.getitem}
    return all(isinstance(i, slice) or i is Ellipsis for i in (index if isinstance(index, tuple) else (index,)))


def _keeps_format(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the result has the format of the arguments, and values do not depend on it."""
    module = module_of(node, modules)
    if module is not None:
        known = isinstance(module, KEEPING_MODULES) or type(module) in module_types()
        return known and not carries_hook(module) and not minds_strides(type(module))
    if node.target is fused_call:
        # A linear layer counts the last axis.
        return hasattr(modules.get(str(getattr(node.args[0], "target", ""))), "kernel_size")
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        # One of two results.
        return node.args[0].target is fused_average or _name(node.args[0]) in ("max", "min")
    if node.op == "call_method":
        return node.target in KEEPING_METHODS or spec_of_call(node) is not None
    return node.op == "call_function" and (node.target in KEEPING_FUNCTIONS or spec_of_call(node) is not None)


def _makes_rows(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the result is a row an image, contiguous whatever the image's format is: it is copied there if need be."""
    module = module_of(node, modules)
    if isinstance(module, torch.nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1) and not carries_hook(module)
    flatten = node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten")
    return flatten and node.args[1:] == (1,) and not node.kwargs
