"""Chains of a graph that one kernel computes: convolution, batch norm, residual add, activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from tritonconv import functional, nn
from tritonconv.convert.calls import activation_of, addition_of, is_batch_norm, module_of
from tritonconv.convert.memory import Memory, thread_in_place
from tritonconv.nn.fused import carries_hook, fused_call
from tritonconv.ops.activation import ActivationSpec

__all__ = ["Rewriting", "rewrite"]

DIMENSIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.Linear: 0}

FUNCTIONS = {
    torch.conv1d: functional.conv1d,
    torch.conv2d: functional.conv2d,
    torch.conv3d: functional.conv3d,
    torch.nn.functional.linear: functional.linear,
}


@dataclass
class Chain:
    """Nodes from a layer to the end of what its kernel can do."""

    nodes: list[fx.Node]
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    add: fx.Node | None = None
    in_place: bool = False
    activation: torch.nn.Module | ActivationSpec | None = None

    def prefixes(self) -> Iterator[Chain]:
        """The chain, and what is left of it without its last links, while more than the layer remains."""
        chain = self
        while len(chain.nodes) > 1:
            yield chain
            *nodes, last = chain.nodes
            chain = Chain(
                nodes, chain.norm if last is not chain.norm else None,
                chain.residual if chain.add in nodes else None, chain.add if chain.add in nodes else None,
                chain.in_place and chain.add in nodes,
            )  # fmt: skip


@dataclass
class Rewriting:
    """What became of a graph."""

    chains: int = 0
    functional: list[str] = field(default_factory=list)
    """Names of the nodes that call functional convolutions, in the order they run."""


def rewrite(graph: fx.Graph, root: torch.nn.Module) -> Rewriting:
    """Put one call in the place of every chain, and our functions in the place of torch's functional convolutions."""
    modules = dict(root.named_modules(remove_duplicate=False))
    thread_in_place(graph, modules)
    memory = Memory(graph, modules)
    done = Rewriting()
    taken: set[fx.Node] = set()
    chains = []
    # Where two chains meet in one addition, the later one takes it: the other's value is there by then.
    for node in reversed(graph.nodes):
        if type(module_of(node, modules)) in DIMENSIONS:
            chain = _chain_from(node, modules, memory, taken)
            if chain is not None:
                taken.update(chain.nodes)
                chains.append(chain)
    for chain in chains:
        _replace(graph, chain)
    done.chains = len(chains)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
            done.functional.append(node.name)
    return done


def _chain_from(layer: fx.Node, modules: dict[str, torch.nn.Module], memory: Memory, taken: set[fx.Node]) -> Chain | None:
    """The longest chain behind this layer that may run where it ends, or None if the layer stays alone."""
    module = modules[str(layer.target)]
    if carries_hook(module) or len(layer.all_input_nodes) != 1:
        return None
    source = layer.all_input_nodes[0]
    if layer.args != (source,) and layer.kwargs != {"input": source}:
        return None
    chain = Chain([layer])

    def follower() -> fx.Node | None:
        """The only user of the chain's value."""
        users = list(chain.nodes[-1].users)
        return users[0] if len(users) == 1 and users[0] not in taken else None

    node = follower()
    if node is not None and node.all_input_nodes == [layer]:
        norm = module_of(node, modules)
        if norm is not None and is_batch_norm(norm, DIMENSIONS[type(module)]) and not carries_hook(norm):
            chain.norm = node
            chain.nodes.append(node)
            node = follower()
    added = addition_of(node, chain.nodes[-1]) if node is not None else None
    if node is not None and added is not None:
        chain.residual, chain.in_place = added
        chain.add = node
        chain.nodes.append(node)
        node = follower()
    if node is not None:
        chain.activation = activation_of(node, chain.nodes[-1], modules)
        hooked = isinstance(chain.activation, torch.nn.Module) and carries_hook(chain.activation)
        if chain.activation is not None and not hooked:
            chain.nodes.append(node)
        else:
            chain.activation = None
    return next((c for c in chain.prefixes() if _may_move(c, source, memory)), None)


def _may_move(chain: Chain, source: fx.Node, memory: Memory) -> bool:
    """Whether the layer may read its input, and the sum its residual, only where the chain ends."""
    first, last = chain.nodes[0], chain.nodes[-1]
    if memory.is_written(source, first, last, chain.nodes):
        return False
    if chain.residual is None or chain.add is None:
        return True
    return not memory.is_written(chain.residual, chain.add, last, chain.nodes)


def _replace(graph: fx.Graph, chain: Chain) -> None:
    layer, last = chain.nodes[0], chain.nodes[-1]
    with graph.inserting_before(last):
        members = [graph.get_attr(str(layer.target)), graph.get_attr(str(chain.norm.target)) if chain.norm else None]
        activation = chain.activation
        if isinstance(activation, torch.nn.Module):
            members.append(graph.get_attr(str(last.target)))
        elif activation is not None:
            members.append(activation)  # type: ignore[arg-type]
        else:
            members.append(None)
        residual = None
        if chain.add is not None:
            # Read from the graph: the residual may be the end of another chain, which has been replaced by now.
            added = addition_of(chain.add, chain.nodes[chain.nodes.index(chain.add) - 1])
            residual = added and added[0]
        arguments = (*members, layer.all_input_nodes[0], residual, chain.in_place)
        fused = graph.call_function(fused_call, arguments)
    last.replace_all_uses_with(fused)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
