"""Global and adaptive pooling, 1-d to 3-d: means as in cases.csv, and maxima with the same kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import AdaptiveGeometry
from tritonconv.ops.adaptive.launch import adaptive_average_gradient, adaptive_maximum_gradient
from tritonconv.ops.adaptive.operator import adaptive_pool
from tritonconv.ops.core.layout import as_format, suggests_channels_last

__all__ = ["AdaptiveMaximum", "AdaptiveMean"]


KERNELS = {"adaptive_forward": "adaptive_pool", "adaptive_backward": "adaptive_pool_backward"}


class Adaptive(Operation):
    """The size of the result follows from kernel and stride: the last window may be cut off.

    A stride of one, which cases.csv has for the rows of this kind, stands for windows side by side: 65 pixels in windows
    of 11 are 6 bins.
    """

    kernels = ("global_pool", "adaptive_pool", "adaptive_pool_backward")
    passes = ("fprop", "dgrad")
    products = False

    def geometry(self, case: Case) -> AdaptiveGeometry:
        steps = case.kernel if set(case.stride) == {1} else case.stride
        sizes = zip(case.size, case.kernel, steps, strict=True)
        output = tuple(max(0, -(-(size - kernel) // stride)) + 1 for size, kernel, stride in sizes)
        return AdaptiveGeometry.parse(case.input_shape, output, case.nd)

    def count(self, case: Case) -> tuple[int, int]:
        """An operation an element; image and results once, in either direction, but for the places of maxima."""
        geometry = self.geometry(case)
        return geometry.elements, (geometry.elements + geometry.results) * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:
        geometry = self.geometry(case)
        bins = math.prod(geometry.longest(axis) for axis in range(3))
        return bins if case.pass_ == "fprop" else math.prod(geometry.most_bins(axis) for axis in range(3))

    def checks(self) -> list[Case]:
        """Sizes that no block divides; bins that overlap, and bins that are windows."""
        name = "maximum" if self.kind == "gmp" else "mean"
        return [
            _layer(self.kind, f"{name} of 7x7", 2, 70, (7, 7), (1, 1)),
            _layer(self.kind, f"{name} of 41x13", 2, 24, (41, 13), (1, 1)),
            _layer(self.kind, f"{name}s of 13x11", 2, 70, (13, 11), (4, 3)),
            _layer(self.kind, f"{name}s of windows", 2, 24, (9, 8), (3, 2)),
            _layer(self.kind, f"{name}s 1-d", 3, 5, (101,), (7,)),
            _layer(self.kind, f"{name}s 3-d", 2, 9, (5, 7, 6), (2, 3, 3)),
        ]

    def seen(
        self, function: str, name: str, pass_: Any, batch: int, channels: int, size: tuple[int, ...],
        output: tuple[int, ...] = (1, 1), configs: int | None = None, **more: Any,
    ) -> Specimen:  # fmt: skip
        kernel = "global_pool" if function.startswith("global") else KERNELS[function]
        case = _layer(self.kind, name, batch, channels, size, output, pass_=pass_, **more)
        return Specimen(kernel, case, configs, f"{function}_kernel")

    def seen_both(self, name: str, *layer: Any, **more: Any) -> list[Specimen]:
        """Forward and backward."""
        passes = (("adaptive_forward", "fprop"), ("adaptive_backward", "dgrad"))
        return [self.seen(function, f"{function} {name}", pass_, *layer, **more) for function, pass_ in passes]

    def bins(self, what: str, configs: int) -> list[Specimen]:
        """65x65 to 6x6: bins that overlap."""
        psp = (8, 2048, (65, 65), (6, 6))
        return [
            *self.seen_both(f"6x6{what}", *psp, configs=configs),
            # Rows of 65 pixels, by single elements.
            *self.seen_both(f"6x6{what} contiguous odd", *psp, channels_last=False, configs=2),
        ]

    def random(self, shape: tuple[int, ...], device: str, dtype: torch.dtype, channels_last: bool) -> Tensor:
        # The same numbers in both layouts.
        return as_format(torch.randn(shape, device=device, dtype=dtype), channels_last)


@register
class AdaptiveMean(Adaptive):
    """The gradient needs nothing of the input but its size."""

    kind = "gap"

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        x = self.random(case.input_shape, device, dtype, channels_last)
        if case.pass_ == "fprop":
            return (x,)
        return x, self.random(self.geometry(case).output_shape, device, dtype, channels_last)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        geometry = self.geometry(case)
        if case.pass_ == "fprop":
            result: Tensor = adaptive_pool("avg", tensors[0], geometry.output[3 - case.nd :], case.nd)
            return result
        return adaptive_average_gradient(tensors[1], geometry, suggests_channels_last(tensors[0]))

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The gradient by torch's own kernels, which take no time for the graph around them."""
        output = self.geometry(case).output[3 - case.nd :]
        if case.pass_ == "fprop":
            result: Tensor = getattr(torch.nn.functional, f"adaptive_avg_pool{case.nd}d")(tensors[0], output)
            return result
        x, dy = tensors
        aten: Any = torch.ops.aten
        if case.nd == 1:
            dx: Tensor = aten._adaptive_avg_pool2d_backward(dy.unsqueeze(2), x.unsqueeze(2)).squeeze(2)
            return dx
        dx = getattr(aten, f"_adaptive_avg_pool{case.nd}d_backward")(dy, x)
        return dx

    def specimens(self) -> list[Specimen]:
        """As in cases.csv, and images whose rows hold no vectors."""
        last, stem, windows = (256, 2048, (7, 7)), (256, 32, (112, 112)), (8, 512, (64, 64), (4, 4))
        found = []
        for function, pass_ in (("global_reduce", "fprop"), ("global_spread", "dgrad")):
            found += [
                self.seen(function, function, pass_, *last, configs=3),
                self.seen(function, f"{function} 112x112", pass_, *stem, configs=2),
                # Rows of 48 bytes.
                self.seen(function, f"{function} of 24", pass_, 256, 24, (56, 56), configs=1),
                self.seen(function, f"{function} fp32", pass_, *stem, dtype="fp32", configs=1),
                self.seen(function, f"{function} fp64", pass_, *stem, dtype="fp64", configs=1),
                # More than 2^31 elements.
                self.seen(function, f"{function} int64", pass_, 64, 64, (1024, 1024), configs=1),
            ]
        return [
            *found,
            self.seen("global_reduce", "global_reduce contiguous", "fprop", *stem, channels_last=False, configs=2),
            self.seen("global_reduce", "global_reduce contiguous odd", "fprop", *last, channels_last=False, configs=1),
            # One image: several slots.
            self.seen("global_join", "global_join", "fprop", 1, 64, (512, 512)),
            self.seen("global_spread_flat", "global_spread contiguous odd", "dgrad", *last, channels_last=False),
            *self.bins("", 4),
            *self.seen_both("fp64", 8, 2048, (65, 65), (6, 6), dtype="fp64", configs=1),
            self.seen("adaptive_forward", "windows contiguous", "fprop", *windows, channels_last=False, configs=1),
            # Ragged bins of contiguous rows go by single elements.
            *self.seen_both("contiguous odd", 8, 512, (65, 65), (6, 6), channels_last=False),
            # Written by vectors; but the pixels of a window read one number.
            self.seen("adaptive_backward", "windows contiguous odd", "dgrad", *windows, channels_last=False, configs=1),
        ]


@register
class AdaptiveMaximum(Adaptive):
    """With the places of maxima, which the gradient needs."""

    kind = "gmp"

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        x = self.random(case.input_shape, device, dtype, channels_last)
        if case.pass_ == "fprop":
            return (x,)
        shape = self.geometry(case).output_shape
        pool: Any = getattr(torch.nn.functional, f"adaptive_max_pool{case.nd}d_with_indices")
        index = pool(x.float(), shape[2:])[1]
        return x, self.random(shape, device, dtype, channels_last), as_format(index.int(), channels_last)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        geometry = self.geometry(case)
        if case.pass_ == "fprop":
            result: Tensor = adaptive_pool("max", tensors[0], geometry.output[3 - case.nd :], case.nd, True)[0]
            return result
        x, dy, index = tensors
        return adaptive_maximum_gradient(dy, index, geometry, suggests_channels_last(x))

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The gradient by adding into zeros at the places."""
        if case.pass_ == "fprop":
            output = self.geometry(case).output[3 - case.nd :]
            result: Tensor = getattr(torch.nn.functional, f"adaptive_max_pool{case.nd}d")(tensors[0], output)
            return result
        dy, index = (t.flatten(2) for t in tensors[1:])
        dx = dy.new_zeros(*case.input_shape[:2], math.prod(case.size))
        return dx.scatter_add_(2, index.long(), dy).reshape(case.input_shape)

    def specimens(self) -> list[Specimen]:
        last, stem = (256, 2048, (7, 7)), (256, 32, (112, 112))
        return [
            self.seen("global_reduce", "global_reduce maximum", "fprop", *last, configs=3),
            self.seen("global_reduce", "global_reduce maximum contiguous", "fprop", *stem, channels_last=False, configs=2),
            self.seen("global_join", "global_join maximum", "fprop", 1, 64, (512, 512)),
            self.seen("global_spread", "global_spread maximum", "dgrad", *last, configs=2),
            self.seen("global_spread_flat", "global_spread maximum contiguous odd", "dgrad", *last, channels_last=False),
            *self.bins(" maximum", 2),
        ]


def _layer(
    kind: str, name: str, batch: int, channels: int, size: tuple[int, ...], output: tuple[int, ...], **more: Any
) -> Case:
    kernel = tuple(-(-n // o) for n, o in zip(size, output, strict=True))
    return Case(name, kind, batch, channels, size, channels, kernel, kernel, **more)
