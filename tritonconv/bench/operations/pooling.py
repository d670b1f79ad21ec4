"""Pooling over windows, 1-d to 3-d: maxima and means, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.layout import as_format, empty_output, suggests_channels_last
from tritonconv.ops.pool.call import lp_pool, pool
from tritonconv.ops.pool.launch import Pool, index_dtype, pool_backward, pool_forward, unpool_backward, unpool_forward

__all__ = ["Pooling"]


@register
class Pooling(Operation):
    """The pass "dgrad" is the gradient of the input alone, from what the forward pass left."""

    kind = "pool"
    kernels = ("pool", "pool_backward", "unpool")
    passes = ("fprop", "dgrad")
    products = False

    def count(self, case: Case) -> tuple[int, int]:
        """An operation a tap; forward x in and y out, backward dy and a maximum's indices in and dx out."""
        g, itemsize, what = _geometry(case), dtype_of(case).itemsize, _what(case)
        x, y = g.elements()
        if what == "unpool":
            # What is not written is filled with zeros before.
            return y, g.bytes(itemsize, 8)
        backward = case.pass_ == "dgrad"
        size = g.bytes(itemsize, index_dtype(g, "tap").itemsize if backward and what == "max" else 0)
        return y * g.taps, size + ((x + y) * itemsize if backward and what == "lp" else 0)

    def depth(self, case: Case) -> int:
        return _geometry(case).taps

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        """x, or dy and what the forward pass left: x and indices of a maximum, x and y of a sum of powers."""
        g, what = _geometry(case), _what(case)

        def random(shape: tuple[int, ...]) -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.randn(shape, device=device, dtype=dtype), channels_last)

        backward = case.pass_ == "dgrad"
        if what == "unpool":
            # Each position once, but not in order.
            plane = math.prod(g.output)
            places = torch.arange(plane, device=device).flip(0).expand(*g.output_shape[:2], plane).reshape(g.output_shape)
            return random(g.input_shape if backward else g.output_shape), as_format(places, channels_last)
        x = random(g.input_shape)
        if what == "lp":
            x = x.abs_().add_(0.25)
        if not backward:
            return (x,)
        if device == "meta":
            found = empty_output(x, g.output_shape, channels_last, index_dtype(g, "tap")) if what == "max" else None
            y = empty_output(x, g.output_shape, channels_last, dtype)
        else:
            y, found = pool_forward(x, g, _spec(case), "tap" if what == "max" else "")
        dy = as_format(random(g.output_shape), channels_last)
        return (dy, x) if what == "avg" else (dy, x, y if found is None else found)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        g, what, backward = _geometry(case), _what(case), case.pass_ == "dgrad"
        first, *rest = tensors
        if what == "unpool":
            size = g.input_shape[2:]
            last = suggests_channels_last(first)
            return unpool_backward(first, rest[0], last) if backward else unpool_forward(first, rest[0], size)
        if not backward:
            numbers = case.kernel, _each(case, case.stride)
            if what == "lp":
                return lp_pool(case.nd, first, POWER, *numbers, False)
            padding, dilation = _padding(case), _each(case, case.dilation)
            return pool(what, first, *numbers, padding, dilation, nd=case.nd)  # type: ignore[arg-type]
        found = rest[1] if what == "max" else None
        x, y = rest if what == "lp" else (None, None)
        return pool_backward(first, g, _spec(case), suggests_channels_last(rest[0]), found, x, y)

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        g, what, backward = _geometry(case), _what(case), case.pass_ == "dgrad"
        first, *rest = tensors
        if what == "unpool":
            # In fp64 the indices are, too.
            flat = rest[0].flatten(2).long()
            if backward:
                return first.flatten(2).gather(2, flat).view(g.output_shape)
            y = first.new_zeros((*g.input_shape[:2], math.prod(g.input)))
            return y.scatter_(2, flat, first.flatten(2)).view(g.input_shape)
        if not backward:
            return _on_torch(case, first)
        x = rest[0].detach().requires_grad_()
        with torch.enable_grad():
            y = _on_torch(case, x)
        return torch.autograd.grad(y, x, first)[0]

    def checks(self) -> list[Case]:
        """Windows that overlap or not, unrolled or walked, in sizes that no block divides."""
        return [
            _layer("max 3x3 stride 2", 2, 24, (9, 8), 3, 2, 1),
            _layer("max 5x5", 2, 20, (7, 9), 5, 1, 2),
            _layer("max 7x6 dilated", 2, 9, (15, 14), (7, 6), 3, 3, dilation=(2, 1)),
            _layer("avg 2x2", 3, 17, (7, 10), 2, 2),
            _layer("avg 3-d", 2, 9, (4, 7, 6), 3, 2, 1),
            _layer("lp 3x2", 2, 9, (6, 7), (3, 2), 2),
            _layer("unpool 2x2", 2, 24, (6, 8), 2, 2),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, *layer: Any, configs: int | None = None, **more: Any) -> Specimen:
            case = _layer(name, *layer, **more)
            kernel = "unpool" if _what(case) == "unpool" else "pool_backward" if case.pass_ == "dgrad" else "pool"
            return Specimen(kernel, case, configs, f"{kernel}_kernel")

        stem, unet, sppf = (256, 64, (112, 112)), (8, 64, (512, 512)), (32, 512, (20, 20))
        back: Any = dict(pass_="dgrad")
        plain: Any = dict(channels_last=False)
        return [
            seen("max 3x3 s2", *stem, 3, 2, 1),
            seen("max 2x2 s2 contiguous", *unet, 2, 2, configs=1, **plain),
            seen("max 3x3 s2 contiguous", *stem, 3, 2, 1, configs=1, **plain),
            seen("max 5x5", *sppf, 5, 1, 2, configs=2),
            # Single elements: windows of neighboring results overlap in all places.
            seen("max 5x5 contiguous odd", *sppf, 5, 1, 2, configs=1, **plain),
            seen("max 4x4", 32, 64, (512, 512), 4, 1, 1, configs=1),
            seen("max 3-d 4x4x4 s4", 64, 256, (32, 32, 32), 4, 4, configs=1),
            seen("avg 11x11 s11", 16, 64, (2048, 2048), 11, 11, configs=1),
            seen("avg 3x3 s2 fp32", *stem, 3, 2, 1, configs=1, dtype="fp32"),
            seen("lp 2x2 s2", *unet, 2, 2, configs=1),
            # Rows of 48 bytes.
            seen("max 3x3 s2 of 24", 256, 24, (112, 112), 3, 2, 1, configs=1),
            # More than 2^31 elements.
            seen("max 2x2 s2 int64", 64, 64, (1024, 1024), 2, 2, configs=1),
            seen("max 3x3 s2", *stem, 3, 2, 1, **back),
            seen("max 3x3 s2 contiguous", *stem, 3, 2, 1, configs=1, **plain, **back),
            seen("max 5x5", *sppf, 5, 1, 2, configs=2, **back),
            seen("max 3-d 4x4x4 s4", 64, 256, (32, 32, 32), 4, 4, configs=1, **back),
            seen("avg 11x11 s11", 16, 64, (2048, 2048), 11, 11, configs=1, **back),
            seen("avg 2x2 s2 contiguous", *unet, 2, 2, configs=1, **plain, **back),
            seen("lp 2x2 s2", *unet, 2, 2, configs=1, **back),
            seen("unpool 2x2", *unet, 2, 2, configs=2),
            seen("unpool 2x2 contiguous", *unet, 2, 2, **plain),
            seen("unpool 2x2 backward", *unet, 2, 2, configs=1, **back),
        ]


POWER = 2.0


def _what(case: Case) -> str:
    """max, avg, lp or unpool, as the layer's name says; maxima where it says nothing."""
    return next((what for what in ("unpool", "avg", "lp") if case.id.startswith(what) or f"_{what}" in case.id), "max")


def _spec(case: Case) -> Pool:
    what: Any = _what(case)
    return Pool(what, POWER if what == "lp" else 1.0)


def _each(case: Case, values: tuple[int, ...]) -> tuple[int, ...]:
    return values * case.nd if len(values) == 1 else values


def _padding(case: Case) -> tuple[int, ...]:
    assert case.padding != "causal"
    return _each(case, case.padding)


def _geometry(case: Case) -> PoolGeometry:
    numbers = case.kernel, _each(case, case.stride), _padding(case), _each(case, case.dilation)
    return PoolGeometry.parse(case.input_shape, *numbers, nd=case.nd)


def _on_torch(case: Case, x: Tensor) -> Tensor:
    if x.device.type == "cpu" and x.element_size() == 2:
        # Some of torch's kernels on CPUs have no half precision.
        return _on_torch(case, x.float()).to(x.dtype)
    what, kernel, stride = _what(case), case.kernel, _each(case, case.stride)
    function: Any = getattr(torch.nn.functional, f"{what}_pool{case.nd}d")
    if what == "lp":
        return function(x, POWER, kernel[0] if case.nd == 1 else kernel, stride)
    if what == "avg":
        return function(x, kernel, stride, _padding(case))
    return function(x, kernel, stride, _padding(case), _each(case, case.dilation))


def _layer(
    name: str, batch: int, channels: int, size: tuple[int, ...], window: int | tuple[int, ...], stride: int,
    padding: int = 0, **more: Any,
) -> Case:  # fmt: skip
    kernel = window if isinstance(window, tuple) else (window,) * len(size)
    return Case(name, "pool", batch, channels, size, channels, kernel, (stride,), (padding,), **more)
