"""Where a kernel's results go: memory of their own, some channels of a wider tensor, or a global average alone."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import power_of_two_divisor
from tritonconv.ops.core.cache import Dense
from tritonconv.ops.core.launch import Launch, device_of, launch
from tritonconv.ops.core.layout import empty_output
from tritonconv.tuning.rules.blocks import average_block

__all__ = ["MOST_IMAGES", "WHOLE", "Sink", "average", "images_of_tile"]

# A tile adds up the pixels of each image that it touches, one after the other.
MOST_IMAGES = 8


class Sink(NamedTuple):
    """Where results go."""

    pitch: int | None = None
    """Elements from a pixel to the next, where the result is some channels of a wider channels-last tensor."""
    average: Literal["", "also", "alone"] = ""
    """Whether each image's sums are kept too, or nothing but them."""

    def output(self, shape: tuple[int, ...], channels_last: bool) -> Dense:
        """What the kernel writes; as many elements if it only adds them up."""
        if self.pitch is None:
            return Dense.of(shape, channels_last)
        step, strides = self.pitch, [1] * len(shape)
        for d in (*range(len(shape) - 1, 1, -1), 0):
            strides[d] = step
            step *= shape[d]
        return Dense(shape, tuple(strides))

    def images(self, pixels_of_tile: int, pixels: int) -> int:
        """The kernels' POOL: images that a tile may touch, negative where their sums are all that is written."""
        if not self.average:
            return 0
        touched = images_of_tile(pixels_of_tile, pixels)
        return -touched if self.average == "alone" else touched


WHOLE = Sink()


def images_of_tile(pixels_of_tile: int, pixels: int) -> int:
    """How many images of so many pixels a tile of consecutive ones may touch."""
    return (pixels_of_tile + pixels - 2) // pixels + 1


def average(sums: Tensor, shape: tuple[int, ...], tile: int, pixels: int, images: int, dtype: torch.dtype) -> Tensor:
    """Means (N, C, 1, ...) over each image's pixels from the sums of its tiles, added in a fixed order.

    Args:
        sums: [tiles, images, C], wide: of tiles of `tile` units (pixels or blocks), of which an image has `pixels`; a
            tile's first entry is of the image that its first unit is of.
        shape: of what is averaged, (N, C, *spatial).
    """
    from tritonconv.kernels.average import average_kernel

    n, c, *spatial = shape
    ones = (1,) * len(spatial)
    mean = empty_output(sums, (n, c, *ones), False, dtype)
    block_s, block_c = average_block(device_of(sums.device), math.ceil(pixels / tile) + 1, c)
    arguments = dict(
        sums_ptr=sums, mean_ptr=mean, C=c, UNITS=pixels, TILE=tile, COUNT=math.prod(spatial), IMAGES=images,
        VEC=power_of_two_divisor(c), BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    launch(Launch(average_kernel, n * math.ceil(c / block_c), arguments, None, None), sums.device)
    return mean
