"""Chains of a graph that one kernel computes: convolution, batch norm, residual add, activation.

A batch norm that no convolution of ours precedes begins a chain of its own. A depthwise convolution's chain that ends in a
1x1 convolution's is joined to it: one kernel may compute both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tritonconv import nn
from tritonconv.convert.averages import share_averages, share_gates
from tritonconv.convert.calls import activation_of, addition_of, is_batch_norm, module_of
from tritonconv.convert.formats import call_layers, settle_formats
from tritonconv.convert.functions import replace_functions
from tritonconv.convert.joins import share_joins
from tritonconv.convert.memory import Memory, thread_in_place
from tritonconv.convert.pools import share_pools
from tritonconv.fused.call import carries_hook, fused_call, fused_norm, fused_pair
from tritonconv.ops.core.activation import ActivationSpec

__all__ = ["Rewriting", "rewrite"]

DIMENSIONS = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
    nn.Linear: 0,
}  # fmt: skip

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Chain:
    """Nodes from a layer to the end of what its kernel can do; a batch norm may be the first."""

    nodes: tuple[fx.Node, ...]
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    add: fx.Node | None = None
    in_place: bool = False
    activation: torch.nn.Module | ActivationSpec | None = None

    @property
    def layer(self) -> fx.Node:
        return self.nodes[0]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


@dataclass
class Rewriting:
    """What became of a graph."""

    chains: int = 0
    joins: int = 0
    """Concatenations whose parts may be written where they belong."""
    functional: list[str] = field(default_factory=list)
    """Names of the nodes that call functional convolutions, in the order they run."""
    layers: int = 0
    """Calls of convolutions, with what was fused behind them."""


def rewrite(graph: fx.Graph, root: torch.nn.Module) -> Rewriting:
    """Put one call in the place of every chain, and our functions in the place of torch's functional convolutions."""
    modules = dict(root.named_modules(remove_duplicate=False))
    thread_in_place(graph, modules)
    memory = Memory(graph, modules)
    done = Rewriting()
    taken: set[fx.Node] = set()
    chains = []
    # What is left of batch norms when all layers have theirs has no convolution before it.
    for firsts in (tuple(DIMENSIONS), NORMS):
        # Where two chains meet in one addition, the later one takes it: the other's value is there by then.
        for node in reversed(graph.nodes):
            first = type(module_of(node, modules)) in firsts and node not in taken
            chain = _chain_from(node, modules, memory, taken) if first else None
            if chain is not None:
                taken.update(chain.nodes)
                chains.append(chain)
    pairs = _pairs(graph, chains, modules, memory, taken)
    joined = {id(chain) for pair in pairs for chain in pair}
    for chain in chains:
        if id(chain) not in joined:
            _replace(graph, (chain,))
    for pair in pairs:
        _replace(graph, pair)
    done.chains = len(chains) + sum(len(chain.nodes) == 1 for pair in pairs for chain in pair)
    for share in (share_pools, share_averages, share_gates):
        done.chains += share(graph, modules)
    done.joins = share_joins(graph, modules)
    done.functional = replace_functions(graph, modules)
    done.layers = call_layers(graph, modules)
    settle_formats(graph, modules)
    return done


def _chain_from(layer: fx.Node, modules: dict[str, torch.nn.Module], memory: Memory, taken: set[fx.Node]) -> Chain | None:
    """The longest chain behind this layer that may run where it ends, or None if the layer stays alone."""
    module = modules[str(layer.target)]
    if not _is_plain(layer, modules):
        return None
    source = layer.all_input_nodes[0]
    chain = Chain((layer,), norm=layer if type(module) in NORMS else None)
    for find in (_as_norm, _as_addition, _as_activation):
        users = list(chain.nodes[-1].users)
        if len(users) != 1 or users[0] in taken:
            break
        link = find(users[0], chain, modules)
        if link is None:
            continue
        longer = replace(chain, nodes=(*chain.nodes, users[0]), **link)
        # What is written before this link is written before every later one.
        if not _may_move(longer, source, memory) or not _may_save(longer, memory):
            break
        chain = longer
    return chain if len(chain.nodes) > 1 else None


def _pairs(
    graph: fx.Graph, chains: list[Chain], modules: dict[str, torch.nn.Module], memory: Memory, taken: set[fx.Node]
) -> list[tuple[Chain, Chain]]:
    """Chains of a depthwise convolution that end in those of a 1x1 convolution; either may be the layer alone."""
    starts = {chain.layer: chain for chain in chains}
    alone = {
        node: Chain((node,)) for node in graph.nodes
        if type(module_of(node, modules)) is nn.Conv2d and node not in taken and _is_plain(node, modules)
    }  # fmt: skip
    found = []
    for node, first in (starts | alone).items():
        conv = modules[str(node.target)]
        users = list(first.end.users)
        if not _is_depthwise(conv) or first.residual is not None or len(users) != 1:
            continue
        second = starts.get(users[0]) or alone.get(users[0])
        if second is None or not _is_pointwise(modules[str(users[0].target)]) or second.residual is first.end:
            continue
        whole = replace(second, nodes=first.nodes + second.nodes)
        ordered = first.norm is None or not memory.is_used(first.norm, second.end)
        if ordered and _may_move(whole, node.all_input_nodes[0], memory):
            found.append((first, second))
    return found


def _is_plain(layer: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether a layer is called with its input alone, and no one watches it."""
    if carries_hook(modules[str(layer.target)]) or len(layer.all_input_nodes) != 1:
        return False
    source = layer.all_input_nodes[0]
    # A transposed convolution may also be given the size of its output.
    return (layer.args, layer.kwargs) in (((source,), {}), ((), {"input": source}))


def _is_depthwise(conv: Any) -> bool:
    return type(conv) is nn.Conv2d and conv.groups == conv.in_channels == conv.out_channels > 1


def _is_pointwise(conv: Any) -> bool:
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.kernel_size == conv.stride == (1, 1)


def _as_norm(node: fx.Node, chain: Chain, modules: dict[str, torch.nn.Module]) -> dict[str, Any] | None:
    layer, norm = chain.nodes[0], module_of(node, modules)
    if chain.norm is not None:
        return None
    fits = norm is not None and is_batch_norm(norm, DIMENSIONS[type(modules[str(layer.target)])]) and not carries_hook(norm)
    return {"norm": node} if fits and node.all_input_nodes == [layer] else None


def _as_addition(node: fx.Node, chain: Chain, modules: dict[str, torch.nn.Module]) -> dict[str, Any] | None:  # noqa: ARG001
    added = addition_of(node, chain.nodes[-1])
    return None if added is None else {"add": node, "residual": added[0], "in_place": added[1]}


def _as_activation(node: fx.Node, chain: Chain, modules: dict[str, torch.nn.Module]) -> dict[str, Any] | None:
    activation = activation_of(node, chain.nodes[-1], modules)
    hooked = isinstance(activation, torch.nn.Module) and carries_hook(activation)
    return None if activation is None or hooked else {"activation": activation}


def _may_move(chain: Chain, source: fx.Node, memory: Memory) -> bool:
    """Whether the layer may read its input, and the sum its residual, only where the chain ends."""
    first, last = chain.nodes[0], chain.nodes[-1]
    if memory.is_written(source, first, last, chain.nodes):
        return False
    # In training a batch norm changes its statistics where it runs.
    if chain.norm is not None and memory.is_used(chain.norm, last):
        return False
    if chain.residual is None or chain.add is None:
        return True
    return not memory.is_written(chain.residual, chain.add, last, chain.nodes)


def _may_save(chain: Chain, memory: Memory) -> bool:
    """Whether the residual may be saved for a backward pass, as that of a batch norm, sum and activation in one needs it.

    Torch saves the sum's activation instead, and lets the residual be changed in place afterwards.
    """
    if chain.norm is None or chain.residual is None or chain.activation is None:
        return True
    return not memory.may_change(chain.residual, chain.nodes[-1])


def _replace(graph: fx.Graph, chains: tuple[Chain, ...]) -> None:
    """Put one call in the place of a chain, or of a pair of them."""
    layer, last = chains[0].layer, chains[-1].end
    with graph.inserting_before(last):
        members = [member for chain in chains for member in _members(graph, chain)]
        chain = chains[-1]
        residual = None
        if chain.add is not None:
            # Read from the graph: the residual may be the end of another chain, which has been replaced by now.
            added = addition_of(chain.add, chain.nodes[chain.nodes.index(chain.add) - 1])
            residual = added and added[0]
        function = fused_pair if len(chains) > 1 else fused_norm if chain.norm is layer else fused_call
        fused = graph.call_function(function, (*members, layer.all_input_nodes[0], residual, chain.in_place))
    last.replace_all_uses_with(fused)
    for node in reversed([node for chain in chains for node in chain.nodes]):
        graph.erase_node(node)


def _members(graph: fx.Graph, chain: Chain) -> list[Any]:
    """Layer, batch norm and activation, the last as a module or as it is named."""
    members: list[Any] = [graph.get_attr(str(chain.layer.target))]
    if chain.norm is not chain.layer:
        members.append(graph.get_attr(str(chain.norm.target)) if chain.norm else None)
    activation = chain.activation
    members.append(graph.get_attr(str(chain.end.target)) if isinstance(activation, torch.nn.Module) else activation)
    return members
