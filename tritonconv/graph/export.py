"""Fused calls as operators: graphs of torch.export hold `torch.ops` alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tritonconv.graph.fuse import check_examples, fuse_graph
from tritonconv.graph.nodes import example
from tritonconv.ops.core.backend import Backend

__all__ = ["fuse"]


def fuse(graph: Any, backend: Backend | None = None) -> Any:
    """The layers of a traced graph on our kernels, and chains of layers in one launch each.

    Chains are found by what is computed, and by sizes and strides that the trace knows: convolution, batch norm, residual
    addition and activation; depthwise and 1x1 convolution; global averages; squeeze-excite; concatenations; poolings.
    Activations are channels-last between layers; results have torch's strides. No rule adds a guard.

    Args:
        graph: a GraphModule whose nodes have `meta["example_value"]` or `meta["val"]`, as Dynamo gives it to a backend; it
            is changed in place. Or an ExportedProgram.
        backend: of the functions of torch in the graph: "auto", "triton", "hopper" or "torch"; None: that of
            `tritonconv.set_backend` at each call.

    Returns:
        The GraphModule itself, or a new ExportedProgram whose nodes are operators of torch and `torch.ops.tritonconv`.

    Raises:
        TypeError: `graph` is neither.
        ValueError: the nodes do not know their values.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    >>> program = fuse(torch.export.export(model, (torch.ones(1, 3, 8, 8),)))
    >>> program.module()(torch.ones(1, 3, 8, 8)).shape
    torch.Size([1, 8, 6, 6])
    """
    if isinstance(graph, torch.export.ExportedProgram):
        return _fuse_program(graph, backend)
    if not isinstance(graph, fx.GraphModule):
        raise TypeError(f"fuse(): argument 'graph' must be a GraphModule or ExportedProgram, not {type(graph).__name__}")
    check_examples(graph)
    fuse_graph(graph, backend)
    return graph


def _fuse_program(program: torch.export.ExportedProgram, backend: Backend | None) -> torch.export.ExportedProgram:
    module = copy.deepcopy(program.graph_module)
    # A copy renames what bears the name of a builtin, which the signature knows by its old name.
    for old, new in zip(program.graph_module.graph.nodes, module.graph.nodes, strict=True):
        new.name = old.name
    signature = copy.deepcopy(program.graph_signature)
    before = [node.name for node in module.graph.output_node().all_input_nodes]
    # Memory that concatenations share is no tensor.
    fuse_graph(module, backend, joins=False)
    lower(module)
    after = [node.name for node in module.graph.output_node().all_input_nodes]
    for old, new in zip(before, after, strict=True):
        signature.replace_all_uses(old, new)
    return program._update(module, signature, state_dict=program.state_dict, verifiers=program.verifiers)


def lower(module: fx.GraphModule) -> None:
    """Put the operators that each of our calls is made of in its place."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and (getattr(node.target, "__module__", None) or "").startswith("tritonconv."):
            _inline(module.graph, node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    """Trace a call on the values that the trace of the graph has for its arguments."""
    sources = [n for n in node.all_input_nodes if isinstance(example(n), Tensor)]
    operations = _operations(node, sources)
    found: dict[fx.Node, Any] = dict(zip(operations.find_nodes(op="placeholder"), sources, strict=True))
    with graph.inserting_before(node):
        for inner in operations.nodes:
            if inner.op == "call_function":
                found[inner] = graph.node_copy(inner, found.__getitem__)
        result: Any = fx.map_arg(operations.output_node().args[0], found.__getitem__)
    if isinstance(result, fx.Node):
        result.meta.update({key: v for key, v in node.meta.items() if key not in result.meta})
        node.replace_all_uses_with(result)
    else:
        # Of several results each is taken by an index.
        results: Any = result
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _operations(node: fx.Node, sources: list[fx.Node]) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    function: Callable[..., Any] = node.target  # type: ignore[assignment]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(sources, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given.get(n, example(n)))
        return function(*args, **kwargs)

    values = [example(n) for n in sources]
    modes = {t.fake_mode for t in pytree.tree_leaves(values) if hasattr(t, "fake_mode")}
    with torch.no_grad(), next(iter(modes)):
        traced: fx.Graph = make_fx(run, tracing_mode="real", pre_dispatch=False)(*values).graph
    return traced
