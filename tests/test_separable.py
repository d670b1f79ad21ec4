"""Depthwise and 1x1 convolution in one kernel: against fp64 and its two parts, every config, modules and conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import cover, rotate
from reference import assert_close
from torch import Tensor, nn
from tritonconv.kernels import separable as kernel

import tritonconv
from tritonconv.geometry import ConvGeometry
from tritonconv.nn import DepthwiseSeparableConv2d
from tritonconv.ops.conv.separable import is_worth_it, one_by_one, separable
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.tuning import device_named

ONE = ["separable_kernel"]
TWO = ["depthwise_kernel", "matmul_kernel"]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with tritonconv.set_backend("triton"):
        yield


def epilogue(channels: int, dtype: torch.dtype, activation: str | None, residual: Tensor | None = None) -> Epilogue:
    norm = BatchNorm(torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), 1e-3)
    return Epilogue(torch.randn(channels).to(dtype), norm, residual, parse_activation(activation))


class Layer:
    """Tensors of a pair, and what torch makes of them."""

    def __init__(self, shape: tuple[int, ...], filters: int, taps: Any, dtype: torch.dtype, **arguments: Any) -> None:
        c, (r, s) = shape[1], (taps, taps) if isinstance(taps, int) else taps
        self.x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
        self.w1, self.w2 = torch.randn(c, 1, r, s).to(dtype), (torch.randn(filters, c, 1, 1) * c**-0.5).to(dtype)
        self.g = ConvGeometry.parse(shape, self.w1.shape, nd=2, groups=c, **arguments)
        self.first = epilogue(c, dtype, "relu6")
        residual = torch.randn(shape[0], filters, *self.g.output[1:]).to(dtype)
        self.second, self.arguments = epilogue(filters, dtype, "silu", residual), arguments

    def run(self, function: Any) -> Tensor:
        result: Tensor = function(self.x, self.w1, self.first, self.w2, self.second, self.g)
        return result

    def reference(self) -> Tensor:
        first, second = (e.map(Tensor.double) for e in (self.first, self.second))
        conv = torch.nn.functional.conv2d
        between = first.torch(conv(self.x.double(), self.w1.double(), first.bias, groups=self.x.shape[1], **self.arguments))
        # Rounded as a layer of its own would.
        between = between.to(self.x.dtype).double()
        return second.torch(conv(between, self.w2.double(), second.bias))


LAYERS: dict[str, tuple[tuple[int, ...], int, Any, dict[str, Any]]] = {
    "3x3": ((2, 24, 9, 11), 20, 3, dict(padding=1)),
    "3x3 stride 2": ((2, 40, 9, 11), 70, 3, dict(padding=1, stride=2)),
    "5x5 dilated": ((1, 20, 10, 9), 36, 5, dict(padding=4, dilation=2)),
    "7x3 of mixed numbers": ((1, 9, 12, 9), 5, (7, 3), dict(padding=(3, 0), stride=(1, 2))),
    "one pixel": ((1, 4, 1, 1), 3, 3, dict(padding=1)),
    "empty batch": ((0, 4, 5, 5), 3, 3, dict(padding=1)),
}


@rotate(name=LAYERS, dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_it_matches_fp64_and_is_its_two_parts(name: str, dtype: torch.dtype) -> None:
    shape, filters, taps, arguments = LAYERS[name]
    layer = Layer(shape, filters, taps, dtype, **arguments)
    out = layer.run(separable)
    assert out.is_contiguous(memory_format=torch.channels_last)
    depth = shape[1] * layer.g.taps
    assert_close(out, layer.reference(), depth=depth, what=name)
    assert_close(layer.run(one_by_one), layer.reference(), depth=depth, what=name)


@rotate(config=cover(kernel.configs()), dtype=[torch.float32, torch.bfloat16])
def test_every_candidate_config(config: Any, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("a kernel of tensor-core products")
    layer = Layer((1, 72, 13, 11), 72, 3, dtype, padding=1)
    with forced(config=config):
        assert_close(layer.run(separable), layer.reference(), depth=72 * 9, what=config)


def test_nan_stays_within_the_filters_reach() -> None:
    layer = Layer((1, 9, 8, 8), 5, 3, torch.float32, padding=1)
    layer.x[0, 4, 3, 3] = float("nan")
    assert torch.equal(layer.run(separable).isfinite(), layer.reference().isfinite())


def test_which_is_worth_it_follows_from_bytes() -> None:
    gpu = device_named("H200")

    def worth(c: int, k: int, size: int = 56, batch: int = 256) -> bool:
        g = ConvGeometry.parse((batch, c, size, size), (c, 1, 3, 3), nd=2, padding=1, groups=c)
        return is_worth_it(g, k, 2, gpu)

    # What lies between is half of all bytes where C = K; each tile of 256 filters computes it again.
    assert worth(128, 128) and worth(96, 24) and worth(128, 256)
    assert not worth(512, 1024)


@rotate(batch_norm=[False, True], activation=[None, "relu6", nn.SiLU()])
def test_the_module_is_its_children_in_order(batch_norm: bool, activation: Any) -> None:
    layer = DepthwiseSeparableConv2d(8, 12, 3, stride=2, padding=1, batch_norm=batch_norm, activation=activation)
    parts: list[nn.Module] = [
        nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=not batch_norm),
        nn.Conv2d(8, 12, 1, bias=not batch_norm),
    ]
    parts[0].load_state_dict(layer.depthwise.state_dict())
    parts[1].load_state_dict(layer.pointwise.state_dict())
    act = activation if isinstance(activation, nn.Module) else nn.ReLU6() if activation else nn.Identity()
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(12)] if batch_norm else [nn.Identity(), nn.Identity()]
    plain = nn.Sequential(parts[0], norms[0], act, parts[1], norms[1], act).double()
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    for training in (True, False):
        layer.train(training)
        plain.train(training)
        ours, reference = x.clone().requires_grad_(), x.double().requires_grad_()
        y, expected = layer(ours), plain(reference)
        assert_close(y, expected, depth=100)
        dy = torch.randn_like(y)
        (dx,), (expected_dx,) = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, reference, dy.double())
        assert_close(dx, expected_dx, depth=1000)
    with torch.no_grad(), record_launches() as launches:
        assert_close(layer(x), plain(x.double()), depth=100)
    assert launches == ONE


def test_what_is_not_one_kernels_runs_as_two() -> None:
    layer = DepthwiseSeparableConv2d(8, 12, 3, padding=1, batch_norm=True).eval()
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)

    def launches(x: Tensor) -> list[str]:
        with torch.no_grad(), record_launches() as seen:
            layer(x)
        return seen

    assert launches(x) == ONE
    # A contiguous image stays so, and a width of fp64 has no tile beside its products.
    assert launches(x.contiguous()) == TWO
    layer.double()
    assert launches(x.double()) == TWO
    layer.float()
    hook = layer.depthwise.register_forward_hook(lambda *_: None)
    assert launches(x) == TWO
    hook.remove()
    layer.pointwise_bn.train()
    assert "batch_norm_combine_kernel" in launches(x)
    layer.eval()
    with tritonconv.set_backend("torch"):
        assert launches(x) == []
    with record_launches() as seen:
        layer(x.requires_grad_())
    assert "separable_kernel" not in seen


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU6(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False),
            nn.BatchNorm2d(2 * channels), nn.ReLU6(),
            nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def test_convert_joins_the_chains() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Inverted(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    ).eval()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    model = tritonconv.convert(plain)
    x = torch.randn(2, 3, 10, 9)
    expected = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad(), record_launches() as launches:
        assert_close(model(x), expected, depth=300)
    assert launches == ["conv_flat_kernel", "matmul_kernel", *ONE, *ONE]
    rows = {row["name"]: row for row in tritonconv.explain(model, x).to_dict()["layers"]}
    assert rows["1.body.3"]["reason"] == "separable, its first part, fused"
    assert rows["1.body.6"]["reason"] == "separable, its second part, fused"
    # x and the filter, the other filter, y and the residual; batch norms' numbers are counted where they were.
    between = 2 * 16 * 10 * 9 * 4
    alone = {row["name"]: row for row in tritonconv.explain(tritonconv.convert(plain, fuse=False), x).to_dict()["layers"]}
    assert rows["2"]["bytes"] < alone["2"]["bytes"] and between > 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), record_launches() as launches:
        assert_close(compiled(x), expected, depth=300)
    assert launches.count("separable_kernel") == 2


def test_convert_leaves_alone_what_others_read() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y

    class Changed(Watched):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            x.mul_(2)
            return self.b(y) + x

    for plain in (Watched().eval(), Changed().eval()):
        model, x = tritonconv.convert(plain), torch.randn(1, 8, 6, 6)
        with torch.no_grad(), record_launches() as launches:
            assert_close(model(x.clone()), copy.deepcopy(plain).double()(x.double()), depth=100)
        assert "separable_kernel" not in launches


def test_autocast(device: str) -> None:
    layer = DepthwiseSeparableConv2d(8, 12, 3, padding=1, activation="relu").eval()
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16), record_launches() as launches:
        y = layer(x)
    assert launches == ONE and y.dtype == torch.bfloat16


def test_the_operator_is_sound() -> None:
    layer = Layer((1, 4, 5, 5), 6, 3, torch.float32, padding=1)
    first, second = layer.first, layer.second
    assert first.batch_norm is not None and second.batch_norm is not None
    before = (layer.w1, first.bias, *first.batch_norm[:4])
    behind = (layer.w2, second.bias, *second.batch_norm[:4], second.residual)
    numbers = dict(
        stride=[1], padding=[1], padding_name="", dilation=[1], first_eps=1e-3, first_activation="relu6", first_a=0.0,
        first_b=0.0, eps=1e-3, activation="silu", a=0.0, b=0.0,
    )  # fmt: skip
    for image in (layer.x, layer.x.contiguous()):
        operator = torch.ops.tritonconv.separable
        torch.library.opcheck(operator, (image, *before, *behind), numbers, test_utils=("test_schema", "test_faketensor"))
