"""`fuse`: the layers of a traced graph on our kernels, and chains of layers in one launch each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tritonconv.fused.shared import averaged, convolved_into, excited, gated, pooled_into, separable
from tritonconv.graph.chains import fuse_chains, fuse_pads, fuse_pools, synchronize
from tritonconv.graph.formats import settle_formats
from tritonconv.graph.joins import fuse_joins
from tritonconv.graph.memory import thread_in_place
from tritonconv.graph.nodes import example, members_of
from tritonconv.graph.shared import fuse_averages, fuse_excites, fuse_gates, fuse_products, fuse_separable
from tritonconv.graph.translate import translate
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.family import call_family

__all__ = ["Fusion", "fuse_graph"]


LAUNCHES = (call_family, averaged, convolved_into, excited, gated, pooled_into, separable)


@dataclass
class Fusion:
    """What became of a graph."""

    links: int = 0
    """Nodes that joined the call before them."""
    copies: int = 0
    """Copies of values to channels-last memory, and back to torch's strides."""
    chains: int = 0
    """Calls that stand for more than one node."""


def fuse_graph(module: fx.GraphModule, backend: Backend | None = None, joins: bool = True) -> Fusion:
    """Rewrite a graph whose nodes know their values, and the graphs of higher-order operators in it.

    Args:
        backend: of the functions of torch in the graph; layers of ours have their own.
        joins: whether parts of concatenations may be written where they belong.
    """
    graph, done = module.graph, Fusion()
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            inner = fuse_graph(child, backend, joins)
            done.links += inner.links
            done.copies += inner.copies
            done.chains += inner.chains
    thread_in_place(graph)
    translate(graph, backend)
    fuse_products(graph)
    for rule in (fuse_pads, fuse_chains, fuse_pools):
        done.links += rule(graph)
    done.copies += settle_formats(graph)
    for rule in (fuse_separable, fuse_averages, fuse_excites, fuse_gates, *((fuse_joins,) if joins else ())):
        done.links += rule(graph)
    synchronize(graph)
    graph.lint()
    module.recompile()
    done.chains += sum(node.target in LAUNCHES and len(members_of(node)) > 1 for node in graph.nodes)
    return done


def check_examples(module: fx.GraphModule) -> None:
    """Raise ValueError for a graph whose nodes do not know their values."""
    if any(example(node) is None for node in module.graph.find_nodes(op="placeholder")):
        raise ValueError(
            "fuse(): the graph's nodes have no example values (node.meta['example_value'] or ['val']): expected a graph of "
            "Dynamo or torch.export, or one on which torch.fx.passes.fake_tensor_prop.FakeTensorProp ran"
        )
