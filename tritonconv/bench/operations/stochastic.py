"""Stochastic pooling: drawn elements, and the gradient that goes to them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.layout import as_format, empty_output, suggests_channels_last, wide
from tritonconv.ops.stochastic import on_torch, stochastic_backward, stochastic_forward

__all__ = ["Stochastic"]


@register
class Stochastic(Operation):
    """Training. The uniform numbers are an input, so that all ways draw the same elements."""

    kind = "stochastic"
    kernels = ("stochastic_pool",)
    passes = ("fprop", "dgrad")
    products = False

    def geometry(self, case: Case) -> PoolGeometry:
        return PoolGeometry.parse(case.input_shape, case.kernel, case.stride, nd=2)

    def count(self, case: Case) -> tuple[int, int]:
        """Forward x and a number in fp32 a result in, the results out; backward dy and a byte a result in, dx out."""
        g, size = self.geometry(case), dtype_of(case).itemsize
        x, y = math.prod(g.input_shape), math.prod(g.output_shape)
        if case.pass_ == "fprop":
            return y * g.taps, x * size + y * (size + wide(dtype_of(case)).itemsize)
        return y * g.taps, x * size + y * (size + 1)

    def depth(self, case: Case) -> int:
        return self.geometry(case).taps

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        g = self.geometry(case)

        def made(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.rand(shape, device=device, dtype=kind), channels_last)

        x, u = made(g.input_shape, dtype), made(g.output_shape, wide(dtype))
        if case.pass_ == "fprop":
            return x, u
        if device == "meta":
            return made(g.output_shape, dtype), empty_output(x, g.output_shape, channels_last, torch.uint8)
        saved = stochastic_forward(x, u, g, True)[1]
        assert saved is not None
        return made(g.output_shape, dtype), saved

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        g, (first, second) = self.geometry(case), tensors
        if case.pass_ == "fprop":
            return stochastic_forward(first, second, g, False)[0]
        return stochastic_backward(first, second, None, None, g, suggests_channels_last(first))

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        g, (first, second) = self.geometry(case), tensors
        if case.pass_ == "fprop":
            return on_torch(first, second, g)
        # Windows do not overlap here: each result's element by the place that was saved.
        (r, s), (n, c, p, q) = case.kernel, g.output_shape
        taps = torch.arange(r * s, device=first.device).view(1, 1, 1, r, 1, s)
        dx = torch.where(second.view(n, c, p, 1, q, 1) == taps, first.view(n, c, p, 1, q, 1), 0)
        return dx.reshape(n, c, p * r, q * s)

    def reference(self, case: Case, *tensors: Tensor) -> Tensor:
        """In the kernel's own precision: in another one an element beside the drawn one could be meant."""
        if case.pass_ == "dgrad":
            return self.torch(case, *tensors)
        x, u = tensors
        dtype = dtype_of(case)
        return on_torch(x.to(dtype), u.to(wide(dtype)), self.geometry(case)).double()

    def checks(self) -> list[Case]:
        return [self.layer("stochastic 2x2", 2, 24, (8, 6), 2), self.layer("stochastic 3x3", 2, 17, (9, 12), 3)]

    def layer(self, name: str, batch: int, channels: int, size: tuple[int, int], window: int, **more: Any) -> Case:
        return Case(name, self.kind, batch, channels, size, channels, (window,) * 2, (window,) * 2, **more)

    def specimens(self) -> list[Specimen]:
        def seen(function: str, name: str, pass_: Any, *layer: Any, configs: int | None = None, **more: Any) -> Specimen:
            case = self.layer(name, *layer, pass_=pass_, **more)
            return Specimen("stochastic_pool", case, configs, f"{function}_kernel")

        stem, plain = (64, 128, (56, 56), 2), (64, 64, (64, 64), 2)
        found = []
        for function, pass_ in (("stochastic", "fprop"), ("stochastic_backward", "dgrad")):
            found += [
                # But for tiles of 4 channels, which are for contiguous images.
                seen(function, function, pass_, *stem, configs=3),
                seen(function, f"{function} fp64", pass_, *stem, dtype="fp64", configs=1),
                # Neighboring results' windows are apart.
                seen(function, f"{function} contiguous odd", pass_, *plain, channels_last=False),
            ]
        return found
