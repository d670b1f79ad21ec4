"""Which values of a graph may share memory, and what is written between two of its nodes."""

from __future__ import annotations

import operator
import types

import torch
from torch import fx

from tritonconv.convert.calls import in_place_target, module_of, overwrites, spec_of_call
from tritonconv.fused.call import BATCH_NORMS, fused_call, fused_norm, fused_pair
from tritonconv.fused.gates import fused_excite, fused_gated_call, fused_scale
from tritonconv.fused.pool import fused_pool
from tritonconv.ops.core.activation import from_module, module_types

__all__ = ["Memory", "is_new", "thread_in_place"]

OUTSIDE = None
"""Stands for the memory of everything that a graph gets: inputs, parameters, buffers."""

NEW_MODULES = {
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d, torch.nn.Linear, torch.nn.MaxPool1d, torch.nn.MaxPool2d, torch.nn.MaxPool3d,
    torch.nn.AvgPool1d, torch.nn.AvgPool2d, torch.nn.AvgPool3d, torch.nn.GroupNorm, torch.nn.LayerNorm,
    *(kind for kinds in BATCH_NORMS.values() for kind in kinds),
}  # fmt: skip
NEW_FUNCTIONS = {
    fused_call, fused_excite, fused_gated_call, fused_norm, fused_pair, fused_pool, fused_scale, operator.add, operator.sub,
    operator.mul, operator.truediv, operator.neg, operator.matmul, torch.add, torch.sub,
    torch.mul, torch.cat, torch.stack, torch.matmul, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d,
    torch.conv_transpose2d, torch.conv_transpose3d, torch.nn.functional.linear,
}  # fmt: skip
SAVING_MODULES = (
    torch.nn.modules.conv._ConvNd, torch.nn.Linear, torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.modules.pooling._MaxPoolNd,
)  # fmt: skip
SAVING_FUNCTIONS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    torch.nn.functional.linear,
}  # fmt: skip
NEW_METHODS = {"add", "sub", "mul", "div", "clone", "matmul", "sum", "mean"}


class Memory:
    """Origins of a graph's values: two values may share memory only if they share an origin."""

    def __init__(self, graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> None:
        self.modules = modules
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._nodes = list(graph.nodes)
        self._origins: dict[fx.Node, frozenset[fx.Node | None]] = {}
        self._tensors: set[fx.Node] = set()
        for node in self._nodes:
            self._origins[node] = self._find_origins(node)

    def origins(self, node: fx.Node) -> frozenset[fx.Node | None]:
        """Nodes whose memory the value may lie in; OUTSIDE among them if it may be the caller's."""
        return self._origins[node]

    def is_written(self, value: fx.Node, after: fx.Node, before: fx.Node, chain: tuple[fx.Node, ...]) -> bool:
        """Whether a node strictly between the two, and not of the chain, may write into `value` or into parameters."""
        held = self.origins(value) | {OUTSIDE}
        for node in self._nodes[self.position[after] + 1 : self.position[before]]:
            if node in chain:
                continue
            targets, parameters = overwrites(node, self.modules)
            if parameters or any(held & self.origins(target) for target in targets):
                return True
        return False

    def is_written_later(self, held: frozenset[fx.Node | None], after: fx.Node) -> bool:
        """Whether a node behind another may write into memory of these origins."""
        for node in self._nodes[self.position[after] + 1 :]:
            targets, _ = overwrites(node, self.modules)
            if any(held & self.origins(target) for target in targets):
                return True
        return False

    def is_used(self, call: fx.Node, before: fx.Node) -> bool:
        """Whether the module that a node calls is called again before another node, or a buffer of it is read."""
        module = module_of(call, self.modules)
        for node in self._nodes[self.position[call] + 1 : self.position[before]]:
            other = module_of(node, self.modules)
            if other is not None and any(m is module for m in other.modules()):
                return True
            for read in (node, *node.all_input_nodes):
                owner, _, name = str(read.target).rpartition(".")
                if read.op == "get_attr" and self.modules.get(owner) is module and name in getattr(module, "_buffers", ()):
                    return True
        return False

    def may_change(self, value: fx.Node, after: fx.Node) -> bool:
        """Whether the value may be written into behind a node although torch has saved it for no backward pass."""
        held = self.origins(value)
        if self.is_written_later(held, after):
            return True
        if saves_result(value, self.modules) or any(saves_arguments(user, self.modules) for user in value.users):
            return False
        return any(held & (self.origins(result) | {OUTSIDE}) for result in self._nodes[-1].all_input_nodes)

    def _find_origins(self, node: fx.Node) -> frozenset[fx.Node | None]:
        if node.op in ("placeholder", "get_attr"):
            return frozenset({OUTSIDE})
        if is_new(node, self.modules):
            self._tensors.add(node)
            return frozenset({node})
        target = in_place_target(node, self.modules)
        # Of a tensor the result is that tensor alone; `+=` on a tuple makes one that holds both.
        if target in self._tensors and target is not None:
            self._tensors.add(node)
            return self._origins[target] | {node}
        found: frozenset[fx.Node | None] = frozenset().union(*(self._origins[n] for n in node.all_input_nodes))
        module = module_of(node, self.modules)
        if node.op == "call_module" and (module is None or not type(module).__module__.startswith("torch.nn")):
            # The user's own code may return what it keeps.
            return found | {OUTSIDE, node}
        if node.op == "call_function" and not isinstance(node.target, types.BuiltinFunctionType):
            return found | {OUTSIDE, node}
        return found | {node}


def is_new(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the node's result is a tensor in memory that nobody else has."""
    if "out" in node.kwargs or in_place_target(node, modules) is not None:
        return False
    if node.op == "call_module":
        module = module_of(node, modules)
        kinds = {type(module), type(module).__base__}
        ours = type(module).__module__.startswith("tritonconv.")
        return type(module) in NEW_MODULES or type(module) in module_types() or (ours and bool(kinds & NEW_MODULES))
    if node.op == "call_function":
        return node.target in NEW_FUNCTIONS or spec_of_call(node) is not None
    return node.op == "call_method" and (node.target in NEW_METHODS or spec_of_call(node) is not None)


def saves_result(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether torch saves the node's result for a backward pass, so that no one can change it and train."""
    module = module_of(node, modules)
    spec = spec_of_call(node) if module is None else from_module(module)
    return spec is not None and spec.name in ("relu", "sigmoid", "tanh")


def saves_arguments(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether torch saves what the node reads, unless nothing in the layer is trained."""
    module = module_of(node, modules)
    if module is not None:
        return is_new(node, modules) and isinstance(module, SAVING_MODULES)
    return node.op == "call_function" and node.target in SAVING_FUNCTIONS


def thread_in_place(graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> None:
    """Let later readers of a tensor that is changed in place read the result of the change, which is the same tensor.

    After it, `x.relu_()` as a statement is a link of a chain like `x = x.relu_()`. Only values known to be tensors of the
    graph's own are renamed: `n += 1` on a number makes a new one.
    """
    own: set[fx.Node] = set()
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = in_place_target(node, modules)
        if is_new(node, modules):
            own.add(node)
        elif target in own and target is not None:
            own.add(node)
            for user in list(target.users):
                if position[user] > position[node]:
                    user.replace_input_with(target, node)
