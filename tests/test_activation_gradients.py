"""Convolutions with an activation and a residual in training: one launch forward, and dy read through the activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix import rotate
from reference import assert_close
from torch import Tensor, nn

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import as_format


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """No call may fall back to torch."""
    with tritonconv.set_backend("triton"):
        yield


@dataclass(frozen=True)
class Layer:
    """A convolution: torch's function, sizes of its image and weight, and its numbers."""

    name: str
    function: str
    image: tuple[int, ...]
    weight: tuple[int, ...]
    numbers: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return getattr(F, self.function)(x, weight, bias, **self.numbers)

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        if self.function == "linear":
            return TF.linear_bn_act(x, weight, bias, *NO_NORM, **more)
        return getattr(TF, self.function + "_bn_act")(x, weight, bias, *NO_NORM, **self.numbers, **more)


NO_NORM = (None,) * 4
LAYERS = [
    Layer("3x3", "conv2d", (2, 8, 7, 6), (16, 8, 3, 3), dict(padding=1)),
    Layer("strided", "conv2d", (2, 8, 7, 6), (12, 8, 3, 2), dict(stride=2)),
    Layer("1x1", "conv2d", (2, 16, 5, 6), (8, 16, 1, 1), {}),
    Layer("grouped", "conv2d", (2, 8, 5, 6), (12, 4, 3, 3), dict(groups=2, dilation=2, padding=2)),
    Layer("depthwise", "conv2d", (2, 8, 7, 6), (8, 1, 3, 3), dict(groups=8)),
    Layer("1-d", "conv1d", (3, 5, 9), (7, 5, 2), {}),
    Layer("3-d", "conv3d", (1, 4, 4, 5, 3), (6, 4, 2, 1, 3), {}),
    Layer("one pixel", "conv2d", (1, 1, 1, 1), (1, 1, 1, 1), {}),
    Layer("no image", "conv2d", (0, 4, 5, 5), (6, 4, 3, 3), {}),
    Layer("transposed", "conv_transpose2d", (2, 8, 4, 5), (8, 6, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Layer("transposed depthwise", "conv_transpose2d", (2, 6, 4, 5), (6, 1, 4, 4), dict(stride=2, padding=1, groups=6)),
]  # fmt: skip
ACTIVATIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "none": (None, lambda v: v),
    "relu": ("relu", F.relu),
    "relu6": ("relu6", F.relu6),
    "leaky relu": (("leaky_relu", 0.2), lambda v: F.leaky_relu(v, 0.2)),
    "hardtanh": (("hardtanh", -1.0, 2.0), lambda v: F.hardtanh(v, -1.0, 2.0)),
}


@rotate(
    layer=LAYERS, activation=ACTIVATIONS, residual=[False, True], dtype=[torch.float32, torch.float16, torch.bfloat16],
    channels_last=[False, True], bias=[False, True],
)  # fmt: skip
def test_all_gradients(
    layer: Layer, activation: str, residual: bool, dtype: torch.dtype, channels_last: bool, bias: bool
) -> None:  # fmt: skip
    spec, act = ACTIVATIONS[activation]
    x, weight = (as_format(torch.randn(size).to(dtype), channels_last) for size in (layer.image, layer.weight))
    like = layer.plain(x.float(), weight.float(), None)
    b = torch.randn(like.shape[1]).to(dtype) if bias else None
    z = as_format(torch.randn_like(like).to(dtype), channels_last) if residual else None
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, b, z)]
    with record_launches() as log:
        y = layer.fused(*leaves[:3], residual=leaves[3], activation=spec)
    assert len([name for name in log if "average" not in name]) == (y.numel() > 0)
    wide = [None if t is None else t.double().requires_grad_() for t in (x, weight, b, z)]
    before = layer.plain(*wide[:3])
    before = before if wide[3] is None else before + wide[3]
    depth = weight[0].numel()
    assert_close(y, act(before), depth=depth, what="y")
    # Where rounding decides on which side of a kink a value lies, its gradient is that of the value as it was given.
    dy = as_format(torch.randn_like(like).to(dtype), channels_last)
    result = y.detach().double().requires_grad_()
    (through,) = torch.autograd.grad(act(result), result, dy.double())
    needed = [i for i, t in enumerate(leaves) if t is not None]
    found = torch.autograd.grad(y, [leaves[i] for i in needed], dy)
    expected = torch.autograd.grad(before, [wide[i] for i in needed], through)
    for i, ours, theirs in zip(needed, found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert_close(ours, theirs, depth=max(depth, like.numel() // max(like.shape[1], 1)), what=("x", "w", "b", "z")[i])


@rotate(layer=[layer for layer in LAYERS if layer.name not in ("one pixel", "no image")], activation=ACTIVATIONS)
def test_second_derivatives(layer: Layer, activation: str) -> None:
    spec, act = ACTIVATIONS[activation]
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (layer.image, layer.weight))
    found = []
    for y in (layer.fused(x, weight, None, activation=spec), act(layer.plain(x, weight, None))):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@rotate(needed=[(0,), (1,), (2,), (3,), (0, 1), (1, 2)], layer=LAYERS[:3] + LAYERS[-2:-1])
def test_gradients_of_some_inputs(layer: Layer, needed: tuple[int, ...]) -> None:
    tensors = [torch.randn(layer.image), torch.randn(layer.weight)]
    like = layer.plain(*tensors, None)
    tensors += [torch.randn(like.shape[1]), torch.randn_like(like)]
    for i in needed:
        tensors[i].requires_grad_()
    y = layer.fused(*tensors[:3], residual=tensors[3], activation="relu")
    expected = F.relu(layer.plain(*tensors[:3]) + tensors[3])
    dy = torch.randn_like(y)
    given = [tensors[i] for i in needed]
    for ours, theirs in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_which_kernels_run_backward() -> None:
    x, weight = torch.randn(2, 16, 5, 6).half().requires_grad_(), torch.randn(8, 16, 1, 1).half().requires_grad_()

    def backward(*needed: Tensor) -> list[str]:
        y = TF.conv2d_bn_act(x, weight, None, *NO_NORM, activation="relu")
        with record_launches() as log:
            torch.autograd.grad(y, needed, torch.ones_like(y))
        return log

    # A filter of one tap reads dy through the activation once; the weight gradient alone never writes what it reads.
    assert backward(x, weight) == ["conv_dgrad_kernel", "conv_wgrad_kernel"]
    x = torch.randn(2, 4, 6, 6)
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    assert backward(weight) == ["conv_wgrad_kernel"]


def test_a_rerun_gives_the_same_bits() -> None:
    layer = LAYERS[0]
    x, weight = (torch.randn(size, requires_grad=True) for size in (layer.image, layer.weight))
    runs = [torch.autograd.grad(layer.fused(x, weight, None, activation="relu").sum(), (x, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu", ("leaky_relu", -0.5), ("hardtanh", 0.1, 0.3)])
def test_activations_that_their_results_do_not_tell_are_torchs(activation: Any) -> None:
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    y = TF.conv2d_bn_act(x, weight, None, *NO_NORM, activation=activation)
    act = tritonconv.ops.core.activation.parse_activation(activation)
    assert act is not None
    expected = act.torch(F.conv2d(x, weight))
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.last, self.body = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def changed(net: Any, x: Tensor) -> Tensor:
    y = F.leaky_relu(net.conv(x), 0.1)
    y += 1
    return net.last(y)


def summed(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.last(F.leaky_relu(net.conv(x), 0.1)) + x)


@pytest.mark.parametrize(("body", "launches"), [(changed, 2), (summed, 2)])
def test_converted_models_train_so(body: Callable[[nn.Module, Tensor], Tensor], launches: int) -> None:
    model = Net(body)
    converted = tritonconv.convert(model)
    x, found = torch.randn(2, 4, 6, 6), []
    with record_launches() as log:
        converted(x)
    assert len(log) == launches
    for net in (model, converted):
        net(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_results_that_callers_change_keep_what_torch_saved() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.1))
    x, found = torch.randn(2, 3, 5, 5), []
    for net in (model, tritonconv.convert(model)):
        y = net(x)
        y += 1
        y.square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
