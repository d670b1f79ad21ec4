"""What the nodes of a graph write, and which of its values share memory.

A graph that Dynamo traced is not functional: nodes write into tensors, and switch gradients and autocast. Fake tensors that
share memory share a storage, as the real ones will.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

from tritonconv.graph.elementwise import activation_of, asks_in_place, bind, in_place_target, name_of
from tritonconv.graph.nodes import CONVOLUTIONS, GROUP_NORMS, call_of, example, tensor_of

__all__ = ["Memory", "between", "is_writing", "thread_in_place"]

Storages = frozenset[int]
F = torch.nn.functional
# Functions that write what they are given as running statistics if this argument is true.
NORMS = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias")
# Packages whose functions write into arguments only if their names tell it.
KNOWN = ("torch", "_operator", "math", "tritonconv", "builtins", "einops")
# What torch saves the arguments of for a backward pass.
SAVING = {*CONVOLUTIONS, "matmul", "conv_bn", "conv_transpose_bn", "batch_norm", *GROUP_NORMS, "max_pool"}


def storages_of(value: Any) -> Storages:
    """Identities of the memory of all tensors in a traced value."""
    return frozenset(
        t.untyped_storage()._cdata for t in pytree.tree_leaves(value)
        if isinstance(t, Tensor) and t.layout == torch.strided
    )  # fmt: skip


class Memory:
    """Memory and writes of a graph's nodes; nodes may be replaced meanwhile."""

    def __init__(self, graph: fx.Graph) -> None:
        self._storages: dict[fx.Node, Storages] = {}
        self._writes: dict[fx.Node, Storages] = {}
        given = graph.find_nodes(op="placeholder") + graph.find_nodes(op="get_attr")
        self.inputs: Storages = frozenset().union(*map(self.storages, given))
        """Memory that others hold too: the caller's, parameters and buffers."""
        self.results: Storages = frozenset().union(*map(self.storages, graph.output_node().all_input_nodes))

    def storages(self, node: fx.Node) -> Storages:
        """Memory of a node's value."""
        if node not in self._storages:
            self._storages[node] = storages_of(example(node))
        return self._storages[node]

    def writes(self, node: fx.Node) -> Storages:
        """Memory that a node writes into."""
        if node not in self._writes:
            self._writes[node] = self._of(_written(node))
        return self._writes[node]

    def may_move(self, reads: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """Whether what reads these values at `first` may read them at `last`: they are the same, in the same modes."""
        held = self._of(reads)
        return not any(switches_modes(node) or self.writes(node) & held for node in between(first, last))

    def may_move_write(self, written: Storages, first: fx.Node, last: fx.Node) -> bool:
        """Whether what writes this memory at `first` may write it at `last`: nobody reads or writes it between."""
        return not written or not any(
            written & self.storages(read) for node in between(first, last) for read in node.all_input_nodes
        )

    def is_written_after(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether a node after another writes into the memory of a value."""
        held = self.storages(value)
        return any(self.writes(later) & held for later in between(node, None))

    def may_change(self, value: fx.Node, after: fx.Node) -> bool:
        """Whether someone may write into a value after a node, although torch has saved it for no backward pass."""
        if self.is_written_after(value, after):
            return True
        spec = activation_of(value)
        saved = spec is not None and spec.name in ("relu", "sigmoid", "tanh")
        if saved or any((call := call_of(user)) is not None and call.family in SAVING for user in value.users):
            return False
        return bool(self.storages(value) & (self.inputs | self.results))

    def _of(self, nodes: Iterable[Any]) -> Storages:
        return frozenset().union(*(self.storages(n) for n in nodes if isinstance(n, fx.Node)))


def between(first: fx.Node, last: fx.Node | None) -> Iterator[fx.Node]:
    """Nodes after the first and before the last one, or to the end."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def is_writing(node: fx.Node) -> bool:
    """Whether a node may write into an argument."""
    return any(isinstance(argument, fx.Node) for argument in _written(node))


def _written(node: fx.Node) -> Iterable[Any]:
    """Arguments that a node may write into."""
    call = call_of(node)
    if call is not None:
        return _written_by(call.family, call.tensors, call.numbers)
    if node.op in ("placeholder", "get_attr", "output"):
        return ()
    if isinstance(node.target, OpOverload):
        return _written_arguments(node, node.target)
    target = in_place_target(node)
    found: list[Any] = [] if target is None else [target]
    if node.op == "call_method":
        return found
    if node.target in NORMS:
        found += _statistics(node)
    name, home = name_of(node), getattr(node.target, "__module__", None) or "torch"
    if name in ("setitem", "delitem") or asks_in_place(node) or (name.endswith("_") and not name.endswith("__")):
        found += node.args[:1]
    foreign = isinstance(node.target, HigherOrderOperator) or not home.startswith(KNOWN)
    everything = foreign or node.op == "call_module" or node.kwargs.get("out") is not None
    return node.all_input_nodes if everything else found


def _written_by(family: str, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors that a family's call writes into."""
    if family in ("batch_norm", "instance_norm"):
        return tensors[1:3] if numbers[0][0] else ()
    if family.endswith("conv_bn") or family == "conv_transpose_bn":
        return tensors[3:5]
    if family == "causal_conv1d_update" or family.endswith("_pool"):
        return tensors[1:2]
    return ()


def _written_arguments(node: fx.Node, operator: OpOverload) -> list[Any]:
    names = [a.name for a in operator._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [
        given.get(a.name) for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]  # fmt: skip


def _statistics(node: fx.Node) -> list[Any]:
    training = NORMS[node.target]  # type: ignore[index]
    given = bind(node, (*NORM_ARGUMENTS, training, "momentum", "eps")) or {}
    if not given:
        return list(node.args)
    return [] if given.get(training) is False else [given.get("running_mean"), given.get("running_var")]


def switches_modes(node: fx.Node) -> bool:
    """Whether a node changes gradients, autocast or another mode for later nodes: it has neither tensors nor a value."""
    if node.op != "call_function" or isinstance(node.target, OpOverload):
        return False
    known = isinstance(example(node), (Tensor, bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, tuple, list))
    return not known and all(tensor_of(n) is None for n in node.all_input_nodes)


def thread_in_place(graph: fx.Graph) -> None:
    """Let later readers of a tensor that is changed in place read the result of the change, which is the same tensor.

    After it, `x.relu_()` as a statement is a link of a chain like `x = x.relu_()`.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = in_place_target(node)
        before, after = tensor_of(target), tensor_of(node)
        if target is None or before is None or after is None or not _is_same(before, after):
            continue
        for user in list(target.users):
            if position[user] > position[node]:
                user.replace_input_with(target, node)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (storages_of(a) == storages_of(b) and a.shape == b.shape and a.stride() == b.stride())
