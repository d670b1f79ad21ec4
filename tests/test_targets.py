"""Convolutions whose results go to a global average, or into some channels of a wider tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import behind as tail
from calls import problem_of, tensors_of
from matrix import cover, rotate
from reference import assert_close, conv_reference
from torch import Tensor

import tritonconv
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv import extended
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.tuning.candidates import possible

pytestmark = pytest.mark.usefixtures("on_triton")

# Image, weight, numbers of the convolution (stride, padding, dilation, groups), and the kernel.
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...], str]] = {
    "1x1": ((5, 40, 7, 7), (72, 40, 1, 1), (1, 0, 1, 1), "matmul"),
    "3x3": ((3, 128, 9, 8), (40, 128, 3, 3), (2, 1, 1, 1), "conv_fprop"),
    "flat": ((2, 24, 13, 11), (33, 24, 3, 3), (1, 1, 1, 1), "conv_flat"),
    "packed": ((2, 16, 9, 7), (16, 4, 3, 3), (1, 1, 1, 4), "conv_flat"),
    "depthwise": ((3, 40, 9, 10), (40, 1, 3, 3), (1, 1, 1, 40), "depthwise"),
    "1-d": ((3, 24, 50), (40, 24, 1), (1, 0, 1, 1), "matmul"),
    "3-d": ((2, 16, 4, 5, 6), (16, 1, 3, 3, 3), (1, 1, 1, 16), "depthwise"),
}


def made(name: str, dtype: torch.dtype, device: str, channels_last: bool = True) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    image, weight, numbers, _ = LAYERS[name]
    x = as_format(torch.randn(image, device=device).to(dtype), channels_last)
    return x, as_format(torch.randn(weight, device=device).to(dtype), channels_last), (len(image) - 2, *numbers)


def epilogue(channels: int, dtype: torch.dtype, device: str) -> Epilogue:
    mean, var, weight, bias = (torch.rand(channels, device=device, dtype=dtype) + 0.5 for _ in range(4))
    return Epilogue(bias, BatchNorm(mean, var, weight, bias, 1e-5), None, parse_activation("silu"))


def reference(x: Tensor, w: Tensor, behind: Epilogue, numbers: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = numbers[1:]
    wide = behind.map(Tensor.double)
    assert wide.bias is not None
    y = conv_reference(x, w, None, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return wide.torch(y + wide.bias.view(-1, *(1,) * (y.dim() - 2)))


def averaged(x: Tensor, w: Tensor, behind: Epilogue, numbers: tuple[Any, ...], keep: bool, backend: Any = None) -> Any:
    """(y or None, y's mean), or None where convolution and average run on their own."""
    return extended.averaged_convolution(tensors_of(x, w, behind), (numbers, *tail("conv", behind)), backend, keep)


def into(x: Tensor, w: Tensor, behind: Epilogue, numbers: tuple[Any, ...], pitch: int, first: int, memory: Any) -> Any:
    """The result in what `memory` gives, or None."""
    return extended.convolution_into(tensors_of(x, w, behind), (numbers, *tail("conv", behind)), None, pitch, first, memory)


def gated(x: Tensor, gate: Tensor, w: Tensor, behind: Epilogue, numbers: tuple[Any, ...]) -> Tensor | None:
    return extended.gated_convolution(tensors_of(x, w, behind), gate, (numbers, *tail("conv", behind)), None)


@rotate(keep=[True, False], dtype=[torch.float32, torch.float16, torch.bfloat16, torch.float64], name=LAYERS)
def test_the_average_comes_with_the_convolution(name: str, dtype: torch.dtype, keep: bool, device: str) -> None:
    x, w, numbers = made(name, dtype, device)
    behind = epilogue(w.shape[0], dtype, device)
    with record_launches() as launches:
        found = averaged(x, w, behind, numbers, keep)
    assert found is not None and launches == [f"{LAYERS[name][3]}_kernel", "average_kernel"]
    y, mean = found
    ref = reference(x, w, behind, numbers)
    axes = tuple(range(2, x.dim()))
    assert_close(mean, ref.mean(axes, keepdim=True), depth=w[0].numel())
    assert (y is not None) == keep
    if y is not None:
        assert_close(y, ref, depth=w[0].numel())
    again = averaged(x, w, behind, numbers, keep)
    assert again is not None and torch.equal(again[1], mean)


@rotate(channels_last=[True, False], name=["1x1", "3x3", "flat", "depthwise"])
def test_every_config_averages(name: str, channels_last: bool, device: str) -> None:
    x, w, numbers = made(name, torch.float32, device, channels_last)
    behind = epilogue(w.shape[0], torch.float32, device)
    ref = reference(x, w, behind, numbers).mean((2, 3), keepdim=True)
    stride, padding, dilation, groups = numbers[1:]
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, stride=stride, padding=padding, dilation=dilation, groups=groups)
    tried = 0
    for config in cover(possible(problem_of(x, w, g))):
        with forced(config=config):
            found = averaged(x, w, behind, numbers, False)
        # Tiles of many small images are left to two launches.
        if found is not None:
            tried += 1
            assert_close(found[1], ref, depth=w[0].numel(), what=str(config))
    assert tried >= 2


def test_an_average_behind_a_residual(device: str) -> None:
    x, w, numbers = made("1x1", torch.float32, device)
    residual = as_format(torch.randn(5, 72, 7, 7, device=device), True)
    behind = Epilogue(None, None, residual, parse_activation("relu"))
    found = averaged(x, w, behind, numbers, False)
    assert found is not None
    assert_close(found[1], (conv_reference(x, w) + residual).relu().mean((2, 3), keepdim=True), depth=40)


def test_what_is_not_finite_stays_in_its_image_and_channel(device: str) -> None:
    for name in ("1x1", "depthwise"):
        x, w, numbers = made(name, torch.float32, device)
        x[1, 3, 2, 2] = float("nan")
        found = averaged(x, w, Epilogue(), numbers, False)
        assert found is not None
        stride, padding, dilation, groups = numbers[1:]
        ref = conv_reference(x, w, stride=stride, padding=padding, dilation=dilation, groups=groups)
        assert torch.equal(found[1].isnan(), ref.mean((2, 3), keepdim=True).isnan())


@pytest.mark.parametrize("name", ["1x1", "3x3", "flat", "packed", "depthwise", "1-d", "3-d"])
def test_results_go_into_channels_of_a_wider_tensor(name: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w, numbers = made(name, dtype, device)
        behind = epilogue(w.shape[0], dtype, device)
        ref = reference(x, w, behind, numbers)
        wide = as_format(torch.full((ref.shape[0], w.shape[0] + 23, *ref.shape[2:]), 7.0, device=device).to(dtype), True)
        out = wide[:, 16 : 16 + w.shape[0]]
        assert into(x, w, behind, numbers, wide.shape[1], 16, lambda *_, out=out: out) is out
        assert_close(out, ref, depth=w[0].numel())
        out.fill_(7.0)
        assert (wide == 7.0).all()


def test_every_config_writes_into_a_wider_tensor(device: str) -> None:
    for name in ("1x1", "3x3", "flat", "depthwise"):
        x, w, numbers = made(name, torch.float32, device)
        stride, padding, dilation, groups = numbers[1:]
        arguments = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        g = ConvGeometry.parse(x.shape, w.shape, nd=2, **arguments)
        ref = conv_reference(x, w, **arguments)
        for config in cover(possible(problem_of(x, w, g))):
            wide = as_format(torch.zeros(ref.shape[0], w.shape[0] + 9, *ref.shape[2:], device=device), True)
            with forced(config=config):
                into(x, w, Epilogue(), numbers, wide.shape[1], 9, lambda *_, wide=wide: wide[:, 9:])
            assert_close(wide[:, 9:], ref, depth=w[0].numel(), what=str(config))
            assert not wide[:, :9].any()


def test_what_does_not_fit_is_not_written(device: str) -> None:
    x, w, numbers = made("1x1", torch.float32, device)
    residual = as_format(torch.randn(5, 72, 7, 7, device=device), True)
    asked = []

    def memory(*what: Any) -> None:
        asked.append(what)

    assert into(x, w, Epilogue(), numbers, 90, 0, memory) is None
    assert asked == [((5, 72, 7, 7), x.dtype, x.device)]
    # Contiguous results and residuals have no place there.
    assert into(x.contiguous(), w.contiguous(), Epilogue(), numbers, 90, 0, memory) is None
    assert into(x, w, Epilogue(residual=residual), numbers, 90, 0, memory) is None
    assert len(asked) == 1


def test_gradients_torch_and_small_images_run_on_their_own(device: str) -> None:
    x, w, numbers = made("1x1", torch.float32, device)
    given = (numbers, *tail("conv", Epilogue()), True)
    assert extended.AVERAGED.resolve(tensors_of(x, w, Epilogue()), given, None) is not None
    assert averaged(x, w, Epilogue(), numbers, True, "triton") is not None
    with torch.enable_grad():
        assert averaged(x.requires_grad_(), w, Epilogue(), numbers, True) is None
        assert extended.AVERAGED.resolve(tensors_of(x, w, Epilogue()), given, None) is None
    with tritonconv.set_backend("torch"):
        assert averaged(x.detach(), w, Epilogue(), numbers, True) is None
    # On its own a layer may ask for torch only where nothing else was asked for.
    with tritonconv.set_backend("auto"):
        assert averaged(x.detach(), w, Epilogue(), numbers, True, "torch") is None
    small = as_format(torch.randn(64, 40, 2, 2, device=device), True)
    assert averaged(small, w, Epilogue(), numbers, True) is None
    assert averaged(small[:0], w, Epilogue(), numbers, True) is None
    assert device_of(x.device).multiprocessors > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_a_gate_before_the_convolution(dtype: torch.dtype, device: str) -> None:
    for c, k, pixels in ((40, 72, 7), (128, 24, 9), (17, 5, 3)):
        x = as_format(torch.randn(5, c, pixels, pixels, device=device).to(dtype), True)
        w, gate = torch.randn(k, c, 1, 1, device=device).to(dtype), torch.rand(5, c, 1, 1, device=device).to(dtype)
        behind = epilogue(k, dtype, device)
        with record_launches() as launches:
            y = gated(x, gate, w, behind, (2, 1, 0, 1, 1))
        assert y is not None and launches == ["matmul_kernel"]
        # The product is rounded to its type, as torch's is.
        ref = reference((x.double() * gate.double()).to(dtype), w, behind, (2, 1, 0, 1, 1))
        assert_close(y, ref, depth=c)


def test_every_config_takes_a_gate(device: str) -> None:
    x, gate = as_format(torch.randn(3, 96, 8, 9, device=device), True), torch.rand(3, 96, 1, 1, device=device)
    w = torch.randn(40, 96, 1, 1, device=device)
    g = ConvGeometry.parse(x.shape, w.shape, nd=2)
    for config in cover(possible(problem_of(x, w, g, gate.flatten(1)))):
        with forced(config=config):
            y = gated(x, gate, w, Epilogue(), (2, 1, 0, 1, 1))
        assert y is not None
        assert_close(y, conv_reference(x * gate, w), depth=96, what=str(config))


def test_a_gate_only_for_single_pixels(device: str) -> None:
    x, w, numbers = made("3x3", torch.float32, device)
    gate = torch.rand(3, 128, 1, 1, device=device)
    assert gated(x, gate, w, Epilogue(), numbers) is None
    x, w, numbers = made("1x1", torch.float32, device)
    for wrong in (gate, torch.rand(5, 40, 1, 1, device=device).double(), torch.rand(5, 1, 1, 1, device=device)):
        assert gated(x, wrong, w, Epilogue(), numbers) is None
