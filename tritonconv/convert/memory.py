"""Which values of a graph may share memory, and what is written between two of its nodes."""

from __future__ import annotations

import operator
import types

import torch
from torch import fx

from tritonconv.convert.calls import in_place_target, module_of, overwrites, spec_of_call
from tritonconv.nn.fused import BATCH_NORMS
from tritonconv.ops.activation import module_types

__all__ = ["Memory", "thread_in_place"]

OUTSIDE = None
"""Stands for the memory of everything that a graph gets: inputs, parameters, buffers."""

NEW_MODULES = {
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d, torch.nn.Linear, torch.nn.MaxPool1d, torch.nn.MaxPool2d, torch.nn.MaxPool3d,
    torch.nn.AvgPool1d, torch.nn.AvgPool2d, torch.nn.AvgPool3d, torch.nn.GroupNorm, torch.nn.LayerNorm,
    *(kind for kinds in BATCH_NORMS.values() for kind in kinds),
}  # fmt: skip
NEW_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.matmul, torch.add, torch.sub,
    torch.mul, torch.cat, torch.stack, torch.matmul, torch.conv1d, torch.conv2d, torch.conv3d, torch.nn.functional.linear,
}  # fmt: skip
NEW_METHODS = {"add", "sub", "mul", "div", "clone", "matmul", "sum", "mean"}


class Memory:
    """Origins of a graph's values: two values may share memory only if they share an origin."""

    def __init__(self, graph: fx.Graph, modules: dict[str, torch.nn.Module]) -> None:
        self.modules = modules
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._nodes = list(graph.nodes)
        self._origins: dict[fx.Node, frozenset[fx.Node | None]] = {}
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

    def _find_origins(self, node: fx.Node) -> frozenset[fx.Node | None]:
        if node.op in ("placeholder", "get_attr"):
            return frozenset({OUTSIDE})
        if is_new(node, self.modules):
            return frozenset({node})
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
