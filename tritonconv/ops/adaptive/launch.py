"""Launches of adaptive and global pooling: tensors (N, C, *spatial) whose channels or whose pixels lie side by side.

Results are dense, channels-last where the input is. Views are read in place; only a channels-last input whose channels, or
another one whose rows' elements, do not lie side by side is copied first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import AdaptiveGeometry, needs_int64, power_of_two_divisor
from tritonconv.ops.core.launch import Launch, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, readable, suggests_channels_last, wide
from tritonconv.tuning import Device
from tritonconv.tuning.rules.adaptive_pooling import (
    adaptive_pool_config,
    adaptive_pool_gradient_config,
    global_join_config,
    global_pool_config,
    global_spread_config,
)  # fmt: skip

__all__ = [
    "adaptive_average", "adaptive_average_gradient", "adaptive_maximum", "adaptive_maximum_gradient",
    "pixel_sums",
]  # fmt: skip

# Programs of 4 warps a multiprocessor that hide each other's latencies, and blocks from which a slot is worth its place;
# neither was measured.
WAVES, LEAST_BLOCKS = 8, 4
# Elements of a vector.
VECTOR = 8
SUM, MEAN, MAXIMUM = 0, 1, 2


class BinsView(NamedTuple):
    """A tensor as the kernels see it, 3-d: strides in elements, and which axis lies side by side."""

    geometry: AdaptiveGeometry
    strides: tuple[int, int, int, int, int]
    channels_last: bool
    device: Device

    @classmethod
    def of(cls, x: Tensor, geometry: AdaptiveGeometry, channels_last: bool) -> BinsView:
        """Of an x that kernels of that format read in place."""
        n, c, *spatial = x.stride()
        return cls(
            geometry, (n, c, *(0,) * (3 - geometry.nd), *spatial),  # type: ignore[arg-type]
            channels_last, device_of(x.device),
        )  # fmt: skip

    @property
    def pixel_stride(self) -> int | None:
        """From each pixel to the next through the whole image; None where rows or planes do not follow each other."""
        found, span = None, 1
        for size, stride in zip(reversed(self.geometry.input), reversed(self.strides), strict=False):
            if size > 1:
                found = stride if found is None else found
                if stride != found * span:
                    return None
                span *= size
        return 1 if found is None else found

    @property
    def reduces(self) -> bool:
        """Whether the tree over whole images reads it: contiguous, where not only a row's pixels lie side by side."""
        step = self.pixel_stride
        return self.geometry.is_global and step is not None and (self.channels_last or step == 1)

    @property
    def wide_offsets(self) -> bool:
        """Whether offsets need 64 bits, in x or in the result."""
        g = self.geometry
        sizes = (g.batch, g.channels, *g.input)
        extent = sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True))
        return needs_int64(max(extent, g.results, g.elements))


def adaptive_average(x: Tensor, geometry: AdaptiveGeometry) -> Tensor:
    """Means over bins; x and result (N, C, *spatial), of one dtype."""
    channels_last = suggests_channels_last(x)
    x = readable(x, channels_last)
    y = empty_output(x, geometry.output_shape, channels_last, x.dtype)
    view = BinsView.of(x, geometry, channels_last)
    if view.reduces:
        _reduce(x, view, y, None, MEAN)
    else:
        _pool(x, view, y, None, False)
    return y


def adaptive_maximum(
    x: Tensor, geometry: AdaptiveGeometry, index_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Maxima over bins and, in `index_dtype`, each one's place in its image (row by row); None: no one asks for it."""
    channels_last = suggests_channels_last(x)
    x = readable(x, channels_last)
    y = empty_output(x, geometry.output_shape, channels_last, x.dtype)
    index = None if index_dtype is None else empty_output(x, geometry.output_shape, channels_last, index_dtype)
    view = BinsView.of(x, geometry, channels_last)
    if view.reduces:
        _reduce(x, view, y, index, MAXIMUM)
    else:
        _pool(x, view, y, index, True)
    return y, index


def adaptive_average_gradient(dy: Tensor, geometry: AdaptiveGeometry, channels_last: bool) -> Tensor:
    """The input's gradient, dense in that format; dy of the result's size, with any strides."""
    return _gradient(dy, None, geometry, channels_last)


def adaptive_maximum_gradient(dy: Tensor, index: Tensor, geometry: AdaptiveGeometry, channels_last: bool) -> Tensor:
    """The same for maxima, by the places that `adaptive_maximum` gave."""
    return _gradient(dy, index, geometry, channels_last)


def pixel_sums(x: Tensor) -> Tensor:
    """Sums of each channel over all images and pixels, (C,); x dense and channels-last."""
    n, c, *spatial = x.shape
    pixels = n * math.prod(spatial)
    row = x.as_strided((1, c, pixels), (c * pixels, 1, c))
    sums = empty_output(x, (1, c, 1), False, x.dtype)
    _reduce(row, BinsView.of(row, AdaptiveGeometry.parse(row.shape, 1, 1), True), sums, None, SUM)
    return sums.view(c)


# Whole images.


def _reduce(x: Tensor, view: BinsView, y: Tensor, index: Tensor | None, kind: int) -> None:
    """Launch the tree over whole images; y (N, C, ...) has one number an image and channel, in this order."""
    from tritonconv.kernels.global_pool import global_reduce_kernel

    g, pixel = view.geometry, view.pixel_stride
    assert pixel is not None
    pixels = math.prod(g.input)
    config = forced_config("BLOCK_P") or global_pool_config(g.channels, pixels, view.channels_last, view.device, True)
    block_p, tiles = config.kwargs["BLOCK_P"], math.ceil(g.channels / config.kwargs["BLOCK_C"])
    blocks = math.ceil(pixels / block_p)
    wanted = math.ceil(WAVES * view.device.multiprocessors / (tiles * g.batch))
    size = max(LEAST_BLOCKS, math.ceil(blocks / wanted))
    slots = math.ceil(blocks / size)
    n, c, *_ = view.strides
    parts, part_index = y, index
    if slots > 1:
        parts = empty_output(x, (g.batch, slots, g.channels), False, wide(x.dtype))
        part_index = None if index is None else empty_output(x, (g.batch, slots, g.channels), False, torch.int32)
    side = (g.channels, n, pixel) if view.channels_last else (pixels, n, c)
    arguments = dict(
        x_ptr=x, stride_n=n, stride_c=c, stride_p=pixel, values_ptr=parts, index_ptr=part_index, SLOTS=slots,
        RANGE=size * block_p, P=pixels, C=g.channels, KIND=kind if slots == 1 else (kind if kind == MAXIMUM else SUM),
        CHANNELS_LAST=view.channels_last, VEC=power_of_two_divisor(*side), INDEX_64=view.wide_offsets,
        STAGES=config.num_stages, **config.kwargs,
    )  # fmt: skip
    launch(Launch(global_reduce_kernel, g.batch * slots * tiles, arguments, None, config), x.device)
    if slots > 1:
        _join(parts, part_index, y, index, g, pixels, kind)


def _join(
    parts: Tensor, part_index: Tensor | None, y: Tensor, index: Tensor | None, g: AdaptiveGeometry, pixels: int, kind: int
) -> None:
    from tritonconv.kernels.global_pool import global_join_kernel

    slots = parts.shape[1]
    config = global_join_config(g.channels, slots, device_of(parts.device))
    arguments = dict(
        parts_ptr=parts, part_index_ptr=part_index, y_ptr=y, index_ptr=index, SLOTS=slots, P=pixels, C=g.channels,
        KIND=kind, STAGES=config.num_stages, **config.kwargs,
    )  # fmt: skip
    programs = g.batch * math.ceil(g.channels / config.kwargs["BLOCK_C"])
    launch(Launch(global_join_kernel, programs, arguments, None, config), parts.device)


# Bins.


def _pool(x: Tensor, view: BinsView, y: Tensor, index: Tensor | None, maximum: bool) -> None:
    from tritonconv.kernels.adaptive_pool import adaptive_forward_kernel

    g = view.geometry
    longest = g.longest(2)
    config = forced_config("BLOCK_K") or adaptive_pool_config(g, longest, view.channels_last, view.device)
    (n, c, d, h, w), (_, _, width), tiles = view.strides, g.input, config.kwargs
    even = g.even(2)
    if view.channels_last:
        vec = power_of_two_divisor(g.channels, n, d, h, w)
    else:
        # Lanes that read a vector lie in one bin.
        vec = power_of_two_divisor(n, c, d, h, width // g.output[2]) if even else 1
    programs = (
        g.batch * g.output[0] * g.output[1] * math.ceil(g.output[2] / tiles["BLOCK_O"])
        * math.ceil(g.channels / tiles["BLOCK_C"])
    )  # fmt: skip
    arguments = dict(
        x_ptr=x, stride_n=n, stride_c=c, stride_d=d, stride_h=h, stride_w=w, y_ptr=y, index_ptr=index, C=g.channels,
        D=g.input[0], H=g.input[1], W=g.input[2], MOST_W=longest, OD=g.output[0], OH=g.output[1], OW=g.output[2],
        MAX=maximum, CHANNELS_LAST=view.channels_last, EVEN_W=even, VEC=vec, INDEX_64=view.wide_offsets,
        STAGES=config.num_stages, **tiles,
    )  # fmt: skip
    launch(Launch(adaptive_forward_kernel, programs, arguments, None, config), x.device)


# Gradients.


def _gradient(dy: Tensor, index: Tensor | None, g: AdaptiveGeometry, channels_last: bool) -> Tensor:
    dx = empty_output(dy, (g.batch, g.channels, *g.input[3 - g.nd :]), channels_last, dy.dtype)
    dy = as_format(dy, channels_last)
    index = None if index is None else as_format(index, channels_last)
    if g.is_global:
        _spread(dy, index, dx, g, channels_last)
    else:
        _gather(dy, index, dx, g, channels_last)
    return dx


def _spread(dy: Tensor, index: Tensor | None, dx: Tensor, g: AdaptiveGeometry, channels_last: bool) -> None:
    """Every pixel takes its image's number, or one of them."""
    from tritonconv.kernels.global_pool import global_spread_flat_kernel, global_spread_kernel

    pixels, rows, device = math.prod(g.input), g.batch * g.channels, device_of(dy.device)
    shared = dict(dy_ptr=dy, index_ptr=index, dx_ptr=dx, P=pixels, INDEX_64=needs_int64(g.elements))
    if channels_last:
        config = forced_config("BLOCK_P") or global_pool_config(g.channels, pixels, True, device, False)
        tiles = config.kwargs
        programs = g.batch * math.ceil(pixels / tiles["BLOCK_P"]) * math.ceil(g.channels / tiles["BLOCK_C"])
        arguments = dict(shared, C=g.channels, VEC=power_of_two_divisor(g.channels), **tiles)
        launch(Launch(global_spread_kernel, programs, arguments, None, config), dy.device)
        return
    config = global_spread_config(g.elements, device)
    block = config.kwargs["BLOCK"]
    vector = min(VECTOR, 1 << (pixels.bit_length() - 1), block)
    arguments = dict(shared, ROWS=rows, EVEN=g.elements % vector == 0, VEC=vector, BLOCK=block)
    launch(Launch(global_spread_flat_kernel, math.ceil(g.elements / block), arguments, None, config), dy.device)


def _gather(dy: Tensor, index: Tensor | None, dx: Tensor, g: AdaptiveGeometry, channels_last: bool) -> None:
    """Every pixel asks the bins that cover it."""
    from tritonconv.kernels.adaptive_pool_backward import adaptive_backward_kernel

    device, (depth, height, width) = device_of(dy.device), g.input
    config = forced_config("BLOCK_P") or adaptive_pool_gradient_config(g, channels_last, device)
    tiles = config.kwargs
    lines = (
        g.batch * depth * math.ceil(width / tiles["BLOCK_P"]) * math.ceil(g.channels / tiles["BLOCK_C"])
    )  # fmt: skip
    # Long walks compute less; but every multiprocessor wants its share.
    size = math.ceil(height / max(1, math.ceil(WAVES * device.multiprocessors / lines)))
    arguments = dict(
        dy_ptr=dy, index_ptr=index, dx_ptr=dx, C=g.channels, D=depth, H=height, W=width, RANGE=size, OD=g.output[0],
        OH=g.output[1], OW=g.output[2], COVER_W=g.most_bins(2), CHANNELS_LAST=channels_last,
        VEC=power_of_two_divisor(g.channels if channels_last else width),
        INDEX_64=needs_int64(max(g.elements, g.results)), **tiles,
    )  # fmt: skip
    programs = lines * math.ceil(height / size)
    launch(Launch(adaptive_backward_kernel, programs, arguments, None, config), dy.device)


def geometry_of(sizes: Sequence[int], output_size: Sequence[int]) -> AdaptiveGeometry:
    """Of an operator's arguments."""
    return _geometry(tuple(sizes), tuple(output_size))


@functools.lru_cache(maxsize=4096)
def _geometry(sizes: tuple[int, ...], output_size: tuple[int, ...]) -> AdaptiveGeometry:
    return AdaptiveGeometry.parse(sizes, output_size, len(sizes) - 2)
