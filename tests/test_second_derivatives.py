"""Gradients of gradients: wherever torch has them, ours are the same; so are penalties and inner loops of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from matrix import every, some
from torch import Tensor, nn

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches

F = torch.nn.functional


def leaf(*shape: int, channels_last: bool = False) -> Tensor:
    t = torch.randn(shape, dtype=torch.float64)
    if channels_last and len(shape) == 4:
        t = t.contiguous(memory_format=torch.channels_last)
    return t.requires_grad_()


class Call(NamedTuple):
    name: str
    function: Callable[..., Any]
    shapes: list[Any]

    def __str__(self) -> str:
        return self.name


ONES, ZEROS = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
CALLS = [Call(*row) for row in [
    ("conv", lambda x, w, b: TF.conv2d(x, w, b, 2, 1), [(1, 2, 5, 4), (4, 2, 3, 3), (4,)]),
    ("1-d conv", lambda x, w: TF.conv1d(x, w, None, 1, "same"), [(2, 2, 5), (2, 2, 3)]),
    ("3-d conv", lambda x, w: TF.conv3d(x, w), [(1, 2, 3, 3, 2), (2, 2, 2, 2, 2)]),
    ("grouped conv", lambda x, w: TF.conv2d(x, w, None, 1, 1, 2, 2), [(1, 4, 4, 4), (4, 2, 3, 3)]),
    ("depthwise conv", lambda x, w, b: TF.conv2d(x, w, b, 1, 1, 1, 3), [(1, 3, 4, 4), (3, 1, 3, 3), (3,)]),
    ("linear", TF.linear, [(3, 4), (2, 4), (2,)]),
    ("transposed", lambda x, w, b: TF.conv_transpose2d(x, w, b, 2, 1, 1), [(1, 2, 3, 3), (2, 3, 3, 3), (3,)]),
    ("conv and batch norm, fixed", lambda x, w: TF.conv2d_bn_act(x, w, None, ZEROS, ONES, None, None, activation="tanh"),
     [(2, 2, 4, 4), (4, 2, 3, 3)]),
    ("conv and batch norm, training", lambda x, w, g, b: TF.conv2d_bn_act(
        x, w, None, None, None, g, b, training=True, activation="tanh"), [(3, 2, 3, 3), (4, 2, 2, 2), (4,), (4,)]),
    ("batch norm, training", lambda x, w, b: TF.batch_norm(x, None, None, w, b, True), [(3, 4, 2, 2), (4,), (4,)]),
    ("batch norm", lambda x, w, b: TF.batch_norm(x, ZEROS, ONES, w, b), [(2, 4, 2, 2), (4,), (4,)]),
    ("group norm", lambda x, w, b, *more: TF.group_norm(
        x, 2, w, b, **dict(zip(("scale", "shift", "residual"), more, strict=True)), activation="tanh"),
     [(2, 4, 2, 2), (4,), (4,), (2, 4), (2, 4), (2, 4, 2, 2)]),
    ("instance norm", lambda x, w: TF.instance_norm(x, weight=w), [(2, 4, 2, 3), (4,)]),
    ("layer norm", lambda x, w, b: TF.layer_norm(x, (5,), w, b), [(2, 3, 5), (5,), (5,)]),
    ("layer norm over channels", lambda x, w: TF.layer_norm_channels(x, w), [(2, 4, 2, 3), (4,)]),
    ("max pool", lambda x: TF.max_pool2d(x, 3, 2, 1, 1, True), [(1, 2, 5, 6)]),
    ("dilated max pool with indices", lambda x: TF.max_pool2d(x, 2, 1, 0, 2, return_indices=True)[0], [(1, 2, 5, 4)]),
    ("3-d max pool", lambda x: TF.max_pool3d(x, 2), [(1, 1, 4, 4, 4)]),
    ("average pool", lambda x: TF.avg_pool2d(x, 3, 2, 1), [(1, 2, 5, 6)]),
    ("Lp pool", lambda x: TF.lp_pool2d(x.exp(), 3, 2), [(1, 2, 4, 4)]),
    ("adaptive average", lambda x: TF.adaptive_avg_pool2d(x, (2, 3)), [(1, 2, 5, 4)]),
    ("adaptive maximum", lambda x: TF.adaptive_max_pool2d(x, (2, 3)), [(1, 2, 5, 4)]),
    ("max unpool", lambda x: TF.max_unpool2d(x, torch.tensor([[[[0, 3], [9, 10]]]]), 2), [(1, 1, 2, 2)]),
    ("bilinear", lambda x: TF.interpolate(x, scale_factor=1.5, mode="bilinear"), [(1, 2, 3, 4)]),
    ("nearest", lambda x: TF.interpolate(x, size=(5, 3)), [(1, 2, 3, 4)]),
    ("pixel shuffle", lambda x: TF.pixel_shuffle(x, 2), [(1, 4, 2, 3)]),
    ("channel shuffle", lambda x: TF.channel_shuffle(x, 2), [(1, 4, 2, 3)]),
    ("causal conv", lambda x, w, b: TF.causal_conv1d(x, w, b, "silu"), [(1, 2, 5), (2, 3), (2,)]),
    ("stochastic pool, eval", lambda x: TF.stochastic_pool2d(x.exp(), 2, training=False), [(1, 2, 4, 4)]),
]]  # fmt: skip


@every(call=some(CALLS, 7), channels_last=some([False, True], 1))
def test_gradients_of_gradients_are_right(call: Call, channels_last: bool) -> None:
    _, function, shapes = call
    tensors = tuple(leaf(*shape, channels_last=channels_last) for shape in shapes)
    with record_launches() as launches:
        assert torch.autograd.gradgradcheck(lambda *t: function(*t), tensors, fast_mode=True)
    assert launches


def test_a_convolution_has_a_third_derivative() -> None:
    x, w = leaf(1, 2, 4, 4), leaf(2, 2, 3, 3)

    def second(x: Tensor, w: Tensor) -> Any:
        y = TF.conv2d(x, w, padding=1).sigmoid()
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, w), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, w), fast_mode=True)


def test_drawn_elements_pass_gradients_of_gradients_on() -> None:
    x = leaf(1, 2, 4, 4)

    def draw(x: Tensor) -> Tensor:
        return TF.stochastic_pool2d(x.abs() + 1, 2, generator=torch.Generator().manual_seed(0)).square()

    assert torch.autograd.gradgradcheck(draw, (x,), fast_mode=True)


def critic() -> nn.Module:
    """Batch norm, depthwise and transposed layers, and both poolings."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
        nn.ConvTranspose2d(6, 4, 2, 2), nn.Tanh(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1),
    ).double()  # fmt: skip


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """R1: the squared gradient of the score."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def interpolated_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """WGAN-GP: between two batches the gradient's norm is to be one."""
    share = torch.linspace(0.1, 0.9, len(x), dtype=x.dtype).view(-1, 1, 1, 1)
    between = (share * x + (1 - share) * x.flip(0)).requires_grad_()
    score = model(between)
    (slope,) = torch.autograd.grad(score.sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean() + score.mean()


def after_an_inner_step(model: nn.Module, x: Tensor) -> Tensor:
    """MAML: the loss of parameters that a gradient step has moved."""
    parameters = dict(model.named_parameters())
    loss = torch.func.functional_call(model, parameters, (x,)).square().mean()
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), found, strict=True)}
    return torch.func.functional_call(model, moved, (x.flip(0),)).square().mean()


def hessian_product(model: nn.Module, x: Tensor) -> Tensor:
    """A Hessian-vector product's own product, so that its gradient is one of third order."""
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
    return sum((g * p.detach()).sum() for g, p in zip(first, parameters, strict=True))


PENALTIES = [gradient_penalty, interpolated_penalty, after_an_inner_step, hessian_product]


@every(penalty=some(PENALTIES, 2), training=some([True, False], 1))
def test_a_converted_critic_trains_as_torchs(penalty: Callable[[nn.Module, Tensor], Tensor], training: bool) -> None:
    theirs = critic().train(training)
    ours = tritonconv.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    losses = []
    for model in (theirs, ours):
        loss = penalty(model, x)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert torch.allclose(b.grad, a.grad, rtol=1e-7, atol=1e-9), name
