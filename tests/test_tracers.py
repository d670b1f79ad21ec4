"""Other tracers than ours: functions and converted models take torch.fx's proxies, as torch's own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from zoo import SEResNet

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches

W = torch.randn(4, 4, 3, 3)
ONES = torch.ones(4)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "conv2d": lambda x: TF.conv2d(x, W, padding=1),
    "conv_transpose2d": lambda x: TF.conv_transpose2d(x, W, stride=2),
    "conv2d_bn_act": lambda x: TF.conv2d_bn_act(x, W, None, ONES, ONES, ONES, ONES, activation=("leaky_relu", 0.2)),
    "linear": lambda x: TF.linear(x, torch.ones(2, 6)),
    "batch_norm": lambda x: TF.batch_norm(x, ONES, ONES),
    "group_norm": lambda x: TF.group_norm(x, 2, ONES, activation="silu"),
    "instance_norm": lambda x: TF.instance_norm(x, weight=ONES),
    "layer_norm": lambda x: TF.layer_norm(x, (6,), residual=x),
    "layer_norm_channels": lambda x: TF.layer_norm_channels(x, ONES),
    "max_pool2d": lambda x: TF.max_pool2d(x, 2, return_indices=True)[0],
    "avg_pool2d": lambda x: TF.avg_pool2d(x, 3, 1, 1),
    "lp_pool2d": lambda x: TF.lp_pool2d(x, 2, 2),
    "adaptive_avg_pool2d": lambda x: TF.adaptive_avg_pool2d(x, 2),
    "interpolate": lambda x: TF.interpolate(x, scale_factor=2, mode="bilinear"),
    "pixel_shuffle": lambda x: TF.pixel_shuffle(x, 2),
    "channel_shuffle": lambda x: TF.channel_shuffle(x, 2),
    "causal_conv1d": lambda x: TF.causal_conv1d(x[:, :, 0], torch.ones(4, 3), activation="silu"),
    "deform_conv2d": lambda x: TF.deform_conv2d(x, torch.zeros(2, 18, 3, 4), W),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_are_nodes_of_a_graph(name: str) -> None:
    call, x = CALLS[name], torch.randn(2, 4, 5, 6)
    graph = fx.symbolic_trace(call)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert getattr(TF, name) in targets
    with record_launches() as launches:
        result = graph(x)
    assert launches and torch.equal(result, call(x))


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("name", CALLS)
def test_subclasses_of_tensors_pass(name: str) -> None:
    call, x = CALLS[name], torch.randn(2, 4, 5, 6)
    found = call(x.as_subclass(Tagged))
    assert torch.allclose(found.as_subclass(torch.Tensor), call(x), atol=1e-6)


def test_a_converted_model_has_the_graph_of_the_original() -> None:
    model = SEResNet().eval()
    expected = fx.symbolic_trace(model)
    converted = tritonconv.convert(model)
    graph = fx.symbolic_trace(converted)
    assert [(n.op, str(n.target)) for n in graph.graph.nodes] == [(n.op, str(n.target)) for n in expected.graph.nodes]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), record_launches() as launches:
        assert torch.allclose(graph(x), model(x), atol=1e-4)
    assert launches
    assert "__module__" not in vars(next(m for m in tritonconv.revert(converted).modules() if isinstance(m, nn.Conv2d)))


class Features(fx.Interpreter):
    """What torchvision's create_feature_extractor keeps: the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, names: list[str]) -> None:
        super().__init__(graph)
        self.names, self.found = names, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value
        return value


def test_features_of_a_converted_model_are_the_originals() -> None:
    model = SEResNet().eval()
    x, found = torch.randn(1, 3, 32, 32), []
    for each in (model, tritonconv.convert(model)):
        graph = fx.symbolic_trace(each)
        layers = [n.name for n in graph.graph.nodes if n.op == "call_module"][::3]
        features = Features(graph, layers)
        with torch.no_grad():
            features.run(x)
        found.append(features.found)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 3
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-4), name
