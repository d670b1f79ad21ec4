"""Batch norms that no convolution precedes: what follows them is part of their pass, in eval mode and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from matrix import rotate
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.launch import record_launches


class PreActivation(nn.Module):
    """A block of arXiv:1603.05027: both activations stand before the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        result: Tensor = self.conv2(self.relu(self.bn2(y))) + x
        return result


class Pooled(nn.Module):
    """Pooling, batch norm, sum and activation, with a residual of another shape if asked for."""

    def __init__(self, broadcast: bool = False) -> None:
        super().__init__()
        self.pool, self.bn = nn.AvgPool2d(2), nn.BatchNorm2d(8)
        self.broadcast = broadcast

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        residual = y.mean((2, 3), keepdim=True) if self.broadcast else y
        return nn.functional.silu(self.bn(y) + residual)


def pooled_broadcast() -> nn.Module:
    return Pooled(broadcast=True)


def one_d() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8 * 36), nn.GELU(), nn.BatchNorm1d(8 * 36))


CHAINS = [(PreActivation, 1), (Pooled, 1), (pooled_broadcast, 1), (one_d, 2)]


@rotate({"make, normalized": CHAINS}, training=[False, True])
def test_the_same_is_computed(make: Callable[[], nn.Module], normalized: int, training: bool, device: str) -> None:
    model = make().to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.train(training)
    converted = tritonconv.convert(model, backend="triton")
    x = torch.randn(4, 8, 6, 6, device=device)
    results = []
    for m in (model, converted):
        leaf = x.clone().requires_grad_()
        with record_launches() as launches:
            y = m(leaf)
        y.square().mean().backward()
        results.append((y, leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()))
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert launches.count("batch_norm_normalize_kernel") >= normalized


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_what_follows_is_one_pass(training: bool, device: str) -> None:
    model = tritonconv.convert(PreActivation().to(device).train(training), backend="triton")
    rows = tritonconv.explain(model, torch.randn(2, 8, 6, 6, device=device)).to_dict()["layers"]
    fused = {row["name"]: row["fused"] for row in rows}
    assert fused == {"bn1": ["relu"], "conv1": ["bn2", "relu"], "conv2": ["add"]}


def test_a_hooked_batch_norm_runs_its_parts(device: str) -> None:
    model = Pooled().to(device).eval()
    converted = tritonconv.convert(copy.deepcopy(model))
    x, seen = torch.randn(2, 8, 6, 6, device=device), []
    expected = converted(x)
    converted.bn.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(converted(x), expected, atol=1e-6) and seen == [1]
    tritonconv.revert(converted)
    assert torch.allclose(converted(x), expected, atol=1e-6) and seen == [1, 1]


def test_a_batch_norm_of_another_dimension_raises_as_torch_does(device: str) -> None:
    model = tritonconv.convert(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()).to(device))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model(torch.randn(2, 8, 6, 6, device=device))
