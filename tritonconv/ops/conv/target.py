"""Output targets: where a convolution's results go, beside or in place of memory of their own."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import power_of_two_divisor
from tritonconv.ops.batch_norm.launch import Statistics
from tritonconv.ops.core.launch import Launch, device_of, launch
from tritonconv.ops.core.layout import empty_output, pitch_of, wide
from tritonconv.tuning.rules.blocks import average_block

__all__ = ["MOST_IMAGES", "WHOLE", "Result", "Sums", "Target", "images_of_tile", "pixel_means"]

# A tile adds up the pixels of each image that it touches, one after the other.
MOST_IMAGES = 8


class Sums(NamedTuple):
    """Sums over parts of images, for a global average."""

    values: Tensor
    """[tiles, images, C], wide; a tile's first entry is of the image that its first unit is of."""
    tile: int
    """Units (pixels, or whole blocks) of a tile."""
    units: int
    """Of an image."""


class Result(NamedTuple):
    """What a convolution gives."""

    y: Tensor | None
    """None where the sums are all that was asked for."""
    statistics: Statistics | None = None
    sums: Sums | None = None


class Target(NamedTuple):
    """Where results go."""

    out: Tensor | None = None
    """Some channels of a wider channels-last tensor, of the result's size; None: memory of its own."""
    average: Literal["", "also", "alone"] = ""
    """Whether each image's sums are kept too, or nothing but them."""
    statistics: bool = False
    """Whether a batch norm's statistics are taken."""

    @property
    def is_plain(self) -> bool:
        """Whether the epilogue does nothing but store a dense result."""
        return self.out is None and not self.average and not self.statistics

    @property
    def pitch(self) -> int | None:
        """Elements from a pixel to the next, where the result is not dense."""
        return None if self.out is None else pitch_of(self.out)

    def images(self, pixels_of_tile: int, pixels: int) -> int:
        """The kernels' POOL: images that a tile may touch, negative where their sums are all that is written."""
        if not self.average:
            return 0
        touched = images_of_tile(pixels_of_tile, pixels)
        return -touched if self.average == "alone" else touched

    def result(
        self, x: Tensor, shape: tuple[int, ...], channels_last: bool, slots: int, tile: int = 1, units: int = 1
    ) -> tuple[Result, dict[str, Any]]:
        """The result with its memory, and the kernel's arguments for it.

        Args:
            x: whose dtype and device the result has.
            shape, channels_last: of the result.
            slots: tiles of the result, each with statistics or sums of its own.
            tile, units: as `Sums` has them.
        """
        channels = shape[1]
        statistics = sums = counts = moments = y = None
        if self.average != "alone":
            y = empty_output(x, shape, channels_last, x.dtype) if self.out is None else self.out
        if self.statistics:
            counts, moments = (empty_output(x, size, False, wide(x.dtype)) for size in ((slots,), (2, slots, channels)))
            statistics = Statistics(counts, moments)
        elif self.average:
            moments = empty_output(x, (slots, images_of_tile(tile, units), channels), False, wide(x.dtype))
            sums = Sums(moments, tile, units)
        # What is not written needs no memory, but a type.
        arguments = dict(y_ptr=moments if y is None else y, counts_ptr=counts, moments_ptr=moments)
        return Result(y, statistics, sums), arguments


WHOLE = Target()


def images_of_tile(pixels_of_tile: int, pixels: int) -> int:
    """How many images of so many pixels a tile of consecutive ones may touch."""
    return (pixels_of_tile + pixels - 2) // pixels + 1


def pixel_means(sums: Sums, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Means (N, C, 1, ...) over each image's pixels from the sums of its tiles, added in a fixed order.

    Args:
        shape: of what is averaged, (N, C, *spatial).
    """
    from tritonconv.kernels.average import average_kernel

    n, c, *spatial = shape
    values = sums.values
    mean = empty_output(values, (n, c, *(1,) * len(spatial)), False, dtype)
    block_s, block_c = average_block(device_of(values.device), math.ceil(sums.units / sums.tile) + 1, c)
    arguments = dict(
        sums_ptr=values, mean_ptr=mean, C=c, UNITS=sums.units, TILE=sums.tile, COUNT=math.prod(spatial),
        IMAGES=values.shape[1], VEC=power_of_two_divisor(c), BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    launch(Launch(average_kernel, n * math.ceil(c / block_c), arguments, None, None), values.device)
    return mean
