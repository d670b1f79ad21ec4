"""Configs and patches of pooling, of its gradient, of max unpooling and of stochastic pooling."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from tritonconv.geometry import PoolGeometry, power
from tritonconv.tuning.devices import INTERPRETER, Device
from tritonconv.tuning.rules.blocks import outside_first

__all__ = [
    "PoolPatch", "pool_gradient_patch", "pool_patch", "stochastic_pool_config", "unpool_config",
]  # fmt: skip

# What a thread holds: results of 8 channels in fp32, fewer where each has an index too.
MOST_RESULTS, MOST_INDEXED = 8, 4
# Elements that a patch reads: beyond that registers spill. Fewer in the loop over planes, and of single elements, each of
# which has an address of its own.
MOST_READ, MOST_READ_OF_PLANES, MOST_SINGLE = 48, 32, 32
# Pixels of the gradient that a thread holds; of strides whose cells are larger each pixel looks for itself.
MOST_PIXELS = 16
# Windows that a patch of several cells reads, and pairs of a window and a pixel that it covers.
MOST_WINDOWS, MOST_PAIRS = 30, 50
MOST_TAPS_FLAT = 16


class PoolPatch(NamedTuple):
    """A config, and the patch that is launched with it: the config's, as far as it fits."""

    config: Any
    down: int
    """Results, or pixels of a gradient, in a column."""
    across: int
    apart: bool
    """Forward: whether a window's rows are walked one by one; backward: whether each pixel looks for itself."""


def _of_patch(configs: list[Any], wanted: tuple[int, int]) -> Any:
    return next(c for c in configs if (c.kwargs["PATCH_P"], c.kwargs["PATCH_Q"]) == wanted)


def pool_patch(g: PoolGeometry, channels_last: bool, indexed: bool, config: Any = None) -> PoolPatch:
    """Of a forward pass.

    Args:
        indexed: whether indices are written too.
        config: the forced one.
    """
    from tritonconv.kernels import pool as kernels

    (_, r, s), (_, stride_h, stride_w) = g.kernel, g.stride
    walked = r * s > kernels.WHOLE
    overlap = r > stride_h
    if config is None:
        if not channels_last:
            wanted = ((4, 1) if stride_w == 1 else (2, 1)) if overlap else (1, 1)
        elif walked or r == 1:
            wanted = (1, 4) if s > stride_w else (1, 2)
        else:
            wanted = ((4, 2) if stride_h == 1 else (2, 2)) if overlap else (1, 2)
        config = _of_patch(kernels.configs(), wanted)
    # None of a gradient's that was forced, which goes pixel by pixel.
    down, across = max(1, config.kwargs["PATCH_P"]), max(1, config.kwargs["PATCH_Q"])
    if not channels_last:
        # Lanes have neighboring results. Of strides they hold whole ones, and more rows spill.
        down, across = (down if stride_w == 1 else min(down, 2)), 1
    if walked:
        # Rows that are walked one by one share nothing.
        down = 1
    most = MOST_INDEXED if indexed else MOST_RESULTS
    read = MOST_SINGLE if not channels_last else MOST_READ if g.kernel[0] == 1 else MOST_READ_OF_PLANES

    def fits(down: int, across: int) -> bool:
        # Dilated windows share little.
        rows = (down - 1) * stride_h + r if g.dilation[1] == 1 else down * r
        columns = (across - 1) * stride_w + s if g.dilation[2] == 1 else across * s
        # Those of a row are held at once.
        return down * across <= most and columns <= 12 and (walked or rows * columns <= read)

    while down * across > 1 and not fits(down, across):
        down, across = (down, across // 2) if across >= down else (down // 2, across)
    # No more than there is.
    return PoolPatch(config, min(down, power(g.output[1], down)), min(across, power(g.output[2], across)), walked)


def pool_gradient_patch(g: PoolGeometry, channels_last: bool, flat: bool, config: Any = None) -> PoolPatch:
    """Of a backward pass.

    Args:
        flat: whether indices are positions in the image.
        config: the forced one.
    """
    from tritonconv.kernels import pool_backward as kernels
    from tritonconv.kernels.pool import WHOLE

    (_, r, s), (_, stride_h, stride_w) = g.kernel, g.stride
    # A cell's columns are woven by powers of two.
    by_pixel = stride_h * stride_w > MOST_PIXELS or r * s > WHOLE or (not channels_last and stride_w not in (1, 2, 4))
    # Indices of 64 bits take twice the registers while they are loaded.
    by_pixel = by_pixel or (flat and r * s > MOST_TAPS_FLAT)
    if config is None:
        if by_pixel:
            wanted = (0, 0)
        else:
            wanted = (1, 1) if stride_h * stride_w > 1 else (2, 2) if channels_last and s > 1 else (2, 1)
        config = _of_patch(kernels.configs(), wanted)
    down, across = config.kwargs["PATCH_P"], config.kwargs["PATCH_Q"]
    if by_pixel or not down:
        return PoolPatch(config, 1, 1, True)
    if not channels_last:
        across = 1

    def windows(cells: int, axis: int) -> int:
        return (cells * g.stride[axis] - 1 + (g.kernel[axis] - 1) * g.dilation[axis]) // g.stride[axis] + 1

    def fits(down: int, across: int) -> bool:
        pairs, pixels = down * across * r * s, down * across * stride_h * stride_w
        return (
            not flat
            and pixels <= MOST_PIXELS
            and pairs <= MOST_PAIRS
            and windows(down, 1) * windows(across, 2) <= MOST_WINDOWS
        )

    while down * across > 1 and not fits(down, across):
        down, across = (down, across // 2) if across > 1 else (down // 2, across)
    return PoolPatch(config, down * stride_h, across * stride_w, False)


@functools.lru_cache(maxsize=4096)
def unpool_config(channels: int, small: int, channels_last: bool, device: Device) -> Any:
    """As few of a tile's values outside as can be, then as many side by side; `small`: values of a plane."""
    from tritonconv.kernels.unpool import configs, tile

    if device.arch == INTERPRETER.arch:
        planes = power(channels, 256)
        return tile(power(small, (1 << 16) // planes), planes)
    return min(configs(), key=lambda config: outside_first(config, small, channels, channels_last))


@functools.lru_cache(maxsize=4096)
def stochastic_pool_config(channels: int, pixels: int, channels_last: bool, device: Device) -> Any:
    """The tile of which least lies outside, in vectors of 16 bytes."""
    from tritonconv.kernels.stochastic_pool import configs, tile

    if device.arch == INTERPRETER.arch:
        side = power(pixels, 256)
        return tile(side, power(channels, (1 << 16) // side))
    allowed = (config for config in configs() if (config.kwargs["BLOCK_C"] >= 64) == channels_last)
    return min(allowed, key=lambda config: outside_first(config, pixels, channels, channels_last)[0])
