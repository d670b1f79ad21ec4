"""Modules and converted models with group, instance and layer norms: what follows a norm is part of its pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import rotate
from reference import assert_close
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.launch import record_launches

F = torch.nn.functional


class Conditioned(nn.Module):
    """A block of a diffusion U-Net: the embedding scales and shifts the channels of each image."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.embed = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.embed(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        y = self.conv1(F.silu(self.norm1(x)))
        y = F.silu(self.norm2(y) * (1 + scale) + shift)
        return x + self.conv2(y)


class Volume(nn.Module):
    """nnU-Net's block, with a residual."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True, **options)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True, **options)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(y)) + x)


def tracked() -> nn.Module:
    return Volume(track_running_stats=True)


class ChannelsFirst(nn.LayerNorm):
    """torchvision's LayerNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 12, 2, 2), ChannelsFirst(12))
        self.depthwise, self.norm = nn.Conv2d(12, 12, 7, padding=3, groups=12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def randomized(make: Callable[[], nn.Module], device: str) -> nn.Module:
    model = make().to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def norms_of(launches: list[str]) -> int:
    return sum(name in ("group_norm_kernel", "batch_norm_normalize_kernel") for name in launches)


# Per model its norms, and how many convolutions and linear layers: nothing else launches.
MODELS = [(Conditioned, 2, 3), (Volume, 2, 2), (tracked, 2, 2), (ConvNeXt, 2, 4)]


@rotate({"make, norms, others": MODELS}, training=[False, True], channels_last=[False, True])
def test_a_converted_model_computes_the_same_in_as_many_launches(
    make: Callable[[], nn.Module], norms: int, others: int, training: bool, channels_last: bool, device: str
) -> None:
    model = randomized(make, device).train(training)
    converted = tritonconv.convert(model, backend="triton")
    x = torch.randn(2, 8, 6, 10, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    results, strides = [], []
    for m in (copy.deepcopy(model).double(), converted, copy.deepcopy(model)):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        with record_launches() as launches:
            y = m(leaf)
        if m is converted:
            counted = [name for name in launches if not name.startswith(("group_norm_running", "global_"))]
        strides.append(y.stride())
        y.square().mean().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()))
    assert norms_of(counted) == norms and len(counted) == norms + others, counted
    assert strides[1] == strides[2]
    for ref, ours, _ in zip(*results, strict=True):
        assert ref is not None and ours is not None
        assert ours.dtype == torch.int64 or (ours.double() - ref).norm() <= 2e-5 * ref.norm() + 1e-6


def test_explain_names_what_joins_a_norm(device: str) -> None:
    model = tritonconv.convert(Conditioned().to(device), backend="triton")
    report = tritonconv.explain(model, torch.randn(2, 8, 6, 6, device=device)).to_dict()["layers"]
    rows = {row["name"]: row for row in report}
    assert rows["norm1"]["fused"] == ["silu"] and rows["norm2"]["fused"] == ["mul", "add", "silu"]
    assert rows["norm1"]["kind"] == "GroupNorm" and rows["norm1"]["backend"] == "triton"
    # Read once, written once.
    assert rows["norm1"]["bytes"] == 4 * (2 * 2 * 8 * 36 + 2 * 8)


class Scaled(nn.Module):
    """A group norm, and any function of its result and of a number for each channel."""

    def __init__(self, body: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.body = nn.GroupNorm(2, 4), body

    def forward(self, x: Tensor, s: Tensor) -> Any:
        return self.body(self.norm(x), s)


def changed_between(y: Tensor, s: Tensor) -> Tensor:
    factor = 1 + s
    s.mul_(2)
    return y * factor + s


# Bodies, and the names that join the norm.
BODIES: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
    "product and sum": (lambda y, s: y * (1 + s) + s, 2),
    "the other way round": (lambda y, s: s + (s + 1) * y, 2),
    "torch's functions": (lambda y, s: torch.add(torch.mul(y, torch.add(s, 1)), s), 2),
    "sum alone": (lambda y, s: (y + s).relu(), 2),
    "two and a scale": (lambda y, s: y * (2 + s), 0),
    "a scale alone": (lambda y, s: y * s, 0),
    "a scale for all images": (lambda y, s: y * (1 + s[:1]), 0),
    "activated before": (lambda y, s: y.relu() * (1 + s) + s, 1),
    "the norm's result too": (lambda y, s: (y, y * (1 + s)), 0),
    "changed between": (changed_between, 0),
    "one added in place": (lambda y, s: y * s.add_(1), 0),
    "shift, then scale": (lambda y, s: (y + s) * (1 + s), 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_only_a_scale_and_a_shift_of_the_channels_join(name: str, device: str) -> None:
    body, joined = BODIES[name]
    model = Scaled(body).to(device)
    x, s = torch.randn(2, 4, 5, 3, device=device), torch.randn(2, 4, 1, 1, device=device)
    converted = tritonconv.convert(model, backend="triton")
    with torch.no_grad():
        expected, found = model(x, s.clone()), converted(x, s.clone())
    torch.testing.assert_close(found, expected)
    rows = tritonconv.explain(converted, x, s.clone()).to_dict()["layers"]
    (norm,) = [row for row in rows if row["name"] == "norm"]
    assert len(norm["fused"]) == joined, norm


MODULES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.GroupNorm(3, 6, affine=False), (2, 6, 5)),
    (lambda: nn.GroupNorm(2, 6), (4, 6)),
    (lambda: nn.InstanceNorm1d(6), (2, 6, 5)),
    (lambda: nn.InstanceNorm2d(6, affine=True, momentum=0.3, track_running_stats=True), (2, 6, 5, 4)),
    (lambda: nn.InstanceNorm3d(6, momentum=None, track_running_stats=True), (2, 6, 2, 3, 4)),
    (lambda: nn.InstanceNorm2d(6, affine=True), (6, 5, 4)),
    (lambda: nn.LayerNorm(6), (2, 3, 6)),
    (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 3, 3, 6)),
    (lambda: nn.LayerNorm(6, bias=False), (2, 6)),
]


@pytest.mark.parametrize(("make", "shape"), MODULES)
def test_modules_are_exchanged_and_put_back(make: Callable[[], nn.Module], shape: tuple[int, ...], device: str) -> None:
    model = randomized(make, device)
    converted = tritonconv.convert(model, backend="triton", fuse=False)
    assert type(converted).__module__.startswith("tritonconv.nn") and isinstance(converted, type(model))
    assert converted.state_dict().keys() == model.state_dict().keys() and repr(converted) == repr(model)
    for training in (True, False):
        x = torch.randn(shape, device=device)
        with record_launches() as launches, torch.no_grad():
            ours, theirs = converted.train(training)(x), copy.deepcopy(model).double().train(training)(x.double())
        assert_close(ours, theirs)
        assert launches and ours.shape == x.shape
        model.train(training)(x)
        for out, ref in zip(converted.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(out, ref)
    assert type(tritonconv.revert(converted)) is type(model)


def test_layer_norm_of_images_is_torchs_in_the_other_order(device: str) -> None:
    for shape in ((2, 6, 5), (2, 6, 5, 4), (2, 6, 2, 3, 4)):
        layer = tritonconv.nn.LayerNorm2d(6, eps=1e-3).to(device)
        torch.nn.init.normal_(layer.weight)
        x = torch.randn(shape, device=device)
        ref = F.layer_norm(x.movedim(1, -1), (6,), layer.weight, layer.bias, 1e-3).movedim(-1, 1)
        torch.testing.assert_close(layer(x), ref)


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(decomposed: bool, device: str) -> None:
    model = randomized(ConvNeXt, device).eval()
    x = torch.randn(2, 8, 6, 10, device=device)
    for m in (model, randomized(Conditioned, device).eval()):
        program = torch.export.export(m, (x,))
        if decomposed:
            program = program.run_decompositions()
        with tritonconv.set_backend("triton"):
            fused = tritonconv.fuse(program).module()
            with record_launches() as launches, torch.no_grad():
                y = fused(x)
        assert norms_of(launches) == 2, launches
        torch.testing.assert_close(y, m(x), rtol=1e-4, atol=1e-5)


def test_under_torch_compile(device: str) -> None:
    model = tritonconv.convert(randomized(Conditioned, device), backend="triton")
    x = torch.randn(2, 8, 6, 6, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for m in (model, compiled):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.square().mean().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(*results)
