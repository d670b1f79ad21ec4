"""Resampling and shuffles, 1-d to 3-d: what moves memory and little else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import Pass, ResampleGeometry
from tritonconv.geometry.resampling import Resampling
from tritonconv.ops.core.layout import as_format, suggests_channels_last
from tritonconv.ops.resample.launch import resample_gradient
from tritonconv.ops.resample.operator import interpolate
from tritonconv.ops.shuffle import operator as library_shuffle

__all__ = ["Resample", "Shuffle"]

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@register
class Resample(Operation):
    """A case's kernel is the size of the result, and the first word of its name the mode."""

    kind = "resample"
    kernels = ("resample", "resample_backward")
    passes = ("fprop", "dgrad")
    products = False

    def geometry(self, case: Case) -> ResampleGeometry:
        mode: Resampling = "linear" if self.mode(case) in LINEAR.values() else self.mode(case)  # type: ignore[assignment]
        return ResampleGeometry.parse(case.input_shape, case.kernel, None, mode)

    def mode(self, case: Case) -> str:
        return case.id.split()[0]

    def taps(self, case: Case) -> int:
        return 2**case.nd if self.mode(case) in LINEAR.values() else 1

    def count(self, case: Case) -> tuple[int, int]:
        """An operation a tap; x, or its gradient, and y, or its, once."""
        geometry = self.geometry(case)
        return geometry.results * self.taps(case), (geometry.elements + geometry.results) * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:
        geometry = self.geometry(case)
        spread = math.ceil(geometry.results / geometry.elements) if case.pass_ == "dgrad" else 1
        # Coordinates are rounded to fp32.
        return self.taps(case) * spread * 16

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        # The same numbers in both layouts.
        shapes = (case.input_shape,) if case.pass_ == "fprop" else (case.input_shape, self.geometry(case).output_shape)
        return tuple(as_format(torch.randn(shape, device=device, dtype=dtype), channels_last) for shape in shapes)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        if case.pass_ == "fprop":
            return interpolate(tensors[0], case.kernel, mode=self.mode(case))
        return resample_gradient(tensors[1], self.geometry(case), suggests_channels_last(tensors[0]))

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The gradient by torch's own kernels, which take no time for the graph around them."""
        mode = self.mode(case)
        if case.pass_ == "fprop":
            result: Tensor = torch.nn.functional.interpolate(tensors[0], case.kernel, mode=mode)
            return result
        name = f"_upsample_nearest_exact{case.nd}d" if mode == "nearest-exact" else f"upsample_{mode}{case.nd}d"
        corners = (False,) if mode in LINEAR.values() else ()
        aten: Any = torch.ops.aten
        dx: Tensor = getattr(aten, f"{name}_backward")(tensors[1], case.kernel, case.input_shape, *corners)
        return dx

    def checks(self) -> list[Case]:
        """Sizes that no block divides, up and down."""
        return [
            _resample("bilinear 13x11 to 26x22", 2, 70, (13, 11), (26, 22)),
            _resample("bilinear 9x13 to 5x7", 2, 24, (9, 13), (5, 7)),
            _resample("nearest 7x5 to 17x9", 2, 24, (7, 5), (17, 9)),
            _resample("nearest-exact 7x9 to 17x5", 1, 40, (7, 9), (17, 5)),
            _resample("linear 101 to 37", 2, 9, (101,), (37,)),
            _resample("trilinear 3x4x5 to 5x7x6", 1, 9, (3, 4, 5), (5, 7, 6)),
        ]

    def seen(
        self, name: str, batch: int, channels: int, size: tuple[int, ...], output: tuple[int, ...],
        configs: int | None = None, **more: Any,
    ) -> list[Specimen]:  # fmt: skip
        """Forward and backward."""
        passes: tuple[tuple[str, Pass], ...] = (("resample", "fprop"), ("resample_backward", "dgrad"))
        return [
            Specimen(kernel, _resample(name, batch, channels, size, output, pass_=p, **more), configs, f"{kernel}_kernel")
            for kernel, p in passes
        ]

    def specimens(self) -> list[Specimen]:
        """A decoder's layer, twice as large; contiguous rows are read by single elements."""
        layer = (8, 256, (64, 64), (128, 128))
        return [
            *self.seen("bilinear 2x", *layer, configs=3),
            *self.seen("bilinear 2x fp32", *layer, configs=1, dtype="fp32"),
            *self.seen("bilinear 2x fp64", *layer, configs=1, dtype="fp64"),
            *self.seen("bilinear 8x of 24", 8, 24, (65, 65), (513, 513), configs=1),
            *self.seen("bilinear int64", 64, 64, (512, 512), (1024, 1024), configs=1),
            *self.seen("nearest 2x", *layer, configs=2),
            *self.seen("trilinear 2x", 2, 128, (16, 32, 32), (32, 64, 64), configs=2),
            *self.seen("bilinear 2x contiguous odd", *layer, channels_last=False),
            *self.seen("nearest 2x contiguous odd", *layer, configs=1, channels_last=False),
        ]


@register
class Shuffle(Operation):
    """A case's stride is the factor, its groups are those of a channel shuffle, and the name begins with the function's."""

    kind = "shuffle"
    kernels = ("shuffle",)
    passes = ("fprop",)
    products = False

    def call(self, module: Any, case: Case, x: Tensor) -> Tensor:
        name = case.id.split()[0]
        result: Tensor = getattr(module, name)(x, case.groups if name == "channel_shuffle" else case.stride[0])
        return result

    def count(self, case: Case) -> tuple[int, int]:
        """No operation; everything is read and written once."""
        return 0, 2 * math.prod(case.input_shape) * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:  # noqa: ARG002
        return 1

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        return (as_format(torch.randn(case.input_shape, device=device, dtype=dtype), channels_last),)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        return self.call(library_shuffle, case, tensors[0])

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        return self.call(torch.nn.functional, case, tensors[0])

    def checks(self) -> list[Case]:
        """Powers of two, which go as a whole, and others; sizes that no block divides."""
        return [
            _shuffle("pixel_shuffle 7x5 by 2", 2, 24, (7, 5), 2),
            _shuffle("pixel_shuffle 4x5 by 3", 1, 45, (4, 5), 3),
            _shuffle("pixel_unshuffle 14x10 by 2", 2, 9, (14, 10), 2),
            _shuffle("channel_shuffle 7x7 of 2", 2, 58, (7, 7), groups=2),
            _shuffle("channel_shuffle 5x3 of 12", 2, 36, (5, 3), groups=12),
        ]

    def specimens(self) -> list[Specimen]:
        """A super-resolution head, and ShuffleNet."""
        small, large = (8, 256, (96, 96), 2), (8, 64, (192, 192), 2)
        found = [
            (_shuffle("pixel_shuffle", *small), 3),
            (_shuffle("pixel_shuffle fp32", *small, dtype="fp32"), 1),
            (_shuffle("pixel_shuffle int64", 64, 256, (512, 512), 2), 1),
            (_shuffle("pixel_shuffle contiguous", *small, channels_last=False), 3),
            (_shuffle("pixel_shuffle by 3 odd", 8, 144, (96, 96), 3), 1),
            (_shuffle("pixel_unshuffle", *large), 3),
            (_shuffle("pixel_unshuffle contiguous", *large, channels_last=False), 1),
            (_shuffle("channel_shuffle", 64, 128, (28, 28), groups=2), 3),
            (_shuffle("channel_shuffle contiguous", 64, 128, (28, 28), groups=2, channels_last=False), 1),
        ]
        return [Specimen("shuffle", case, configs, "shuffle_kernel") for case, configs in found]


def _resample(name: str, batch: int, channels: int, size: tuple[int, ...], output: tuple[int, ...], **more: Any) -> Case:
    return Case(name, "resample", batch, channels, size, channels, output, **more)


def _shuffle(name: str, batch: int, channels: int, size: tuple[int, ...], factor: int = 1, **more: Any) -> Case:
    return Case(name, "shuffle", batch, channels, size, channels, (1,) * len(size), (factor,) * len(size), **more)
