"""Launches of pooling's kernels: which layout, which patches, how many programs; and of max unpooling's.

Tensors are (N, C, *spatial). What is read may be any channels-last view of pixels with channels side by side, or any
contiguous one of rows whose elements lie side by side; all else is copied first.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, PoolGeometry, needs_int64, power_of_two_divisor
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.launch import Launch, activation_constants, axis_constants, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, readable, suggests_channels_last
from tritonconv.tuning import Device
from tritonconv.tuning.rules.blocks import patch_block
from tritonconv.tuning.rules.pooling import pool_gradient_patch, pool_patch, unpool_config

__all__ = [
    "Indices", "Pool", "index_dtype", "pool_backward", "pool_forward", "unpool_backward",
    "unpool_forward",
]  # fmt: skip

Indices = Literal["", "tap", "flat"]
"""What is written beside a maximum: nothing, the number of its tap in the window, or its position in the image."""


class Pool(NamedTuple):
    """What is reduced of a window."""

    kind: Literal["max", "min", "avg", "lp"]
    power: float = 1.0
    """Of "lp"."""
    divisor: float | None = None
    """Of "avg": of the sum; None: how many places the window has."""
    include_pad: bool = True
    """Whether these count the padding."""

    @property
    def extremal(self) -> bool:
        return self.kind in ("max", "min")

    def constants(self, g: PoolGeometry) -> dict[str, Any]:
        """The kernels' arguments that say what is reduced."""
        divisor = self.divisor
        if self.kind == "lp":
            # A mean, and times the window's size: the sum, unless a window overhangs.
            divisor = None if g.overhangs else 1.0
        elif divisor is None and not g.overhangs and (self.include_pad or not any(g.padding)):
            divisor = float(g.taps)
        kind = {"avg": "sum", "lp": "power"}.get(self.kind, self.kind)
        return dict(KIND=kind, POWER=self.power, DIVISOR=divisor, PADDED=self.include_pad)


class Side(NamedTuple):
    """How a tensor lies in memory."""

    channels_last: bool
    strides: tuple[int, ...]
    """Of (N, C, D, H, W); 0 where there is one element alone."""


@functools.lru_cache(maxsize=4096)
def wide_offsets(g: PoolGeometry, side: Side | None = None) -> bool:
    """Whether 32-bit offsets could overflow: a large tensor, or a small view that strides over a large one."""
    if g.needs_int64 or side is None:
        return g.needs_int64
    axes = zip(g.input, g.stride, g.kernel, g.dilation, strict=True)
    sizes = (g.batch, g.channels, *(2 * n + 16 * s + k * d for n, s, k, d in axes))
    return needs_int64(sum(n * s for n, s in zip(sizes, side.strides, strict=True)))


def index_dtype(g: PoolGeometry, indices: Indices) -> torch.dtype:
    """The type of indices: of taps the smallest that holds them."""
    if indices == "flat":
        return torch.int64
    return torch.uint8 if g.taps <= 256 else torch.int32


def _side(x: Tensor, channels_last: bool) -> Side:
    n, c, *spatial = x.stride()
    lifted = (n, c, *(0,) * (3 - len(spatial)), *spatial)
    sizes = (*x.shape[:2], *(1,) * (3 - len(spatial)), *x.shape[2:])
    return Side(channels_last, tuple(s if size > 1 else 0 for s, size in zip(lifted, sizes, strict=True)))


def _vector(side: Side, channels: int) -> int:
    n, c, *spatial = side.strides
    if side.channels_last:
        return power_of_two_divisor(n, *spatial, channels)
    return power_of_two_divisor(n, c, *spatial[:-1])


@functools.lru_cache(maxsize=4096)
def _forward(
    g: PoolGeometry, pool: Pool, itemsize: int, x: Side, stride_y: int, indices: Indices,
    activation: ActivationSpec | None, device: Device, config: Any, index_64: bool,
) -> tuple[int, dict[str, Any], Any]:  # fmt: skip
    """(programs, all arguments but tensors, config) of a forward pass.

    By simple rules: none was measured on a GPU.
    """
    from tritonconv.kernels.pool import COLUMNS

    (_, r, s), stride_w = g.kernel, g.stride[2]
    config, down, across, walked = pool_patch(g, x.channels_last, bool(indices), config)
    columns = -(-g.output[2] // across)
    lines = g.batch * g.output[0] * -(-g.output[1] // down)
    # Single elements have an address each.
    step_s = min(s, COLUMNS if x.channels_last else COLUMNS // 2)
    grouped = not x.channels_last and stride_w in (2, 4) and step_s == s and g.dilation[2] == 1
    vectors = x.channels_last or grouped
    block_t, block_c = patch_block(device, x.channels_last, g.channels, itemsize, columns, lines, vectors=vectors)
    blocks = -(-lines * columns // block_t) if x.channels_last else lines * -(-columns // block_t)
    vec_y = power_of_two_divisor(g.channels, stride_y) if x.channels_last else power_of_two_divisor(g.output[2])
    arguments = axis_constants(g) | pool.constants(g) | dict(
        zip(("stride_xn", "stride_xc", "stride_xd", "stride_xh", "stride_xw"), x.strides, strict=True)
    ) | activation_constants(activation) | dict(
        stride_y=stride_y, N=g.batch, C=g.channels, FLAT=indices == "flat", CHANNELS_LAST=x.channels_last,
        VEC_X=_vector(x, g.channels), VEC_Y=vec_y, INDEX_64=index_64, PATCH_P=down, PATCH_Q=across, BLOCK_T=block_t,
        BLOCK_C=block_c, STEP_R=1 if walked else r, STEP_S=step_s,
        GROUPED=grouped,
    )  # fmt: skip
    # Side by side, even where there is but one.
    arguments["stride_xc" if x.channels_last else "stride_xw"] = 1
    return blocks * -(-g.channels // block_c), arguments, config


def pool_forward(
    x: Tensor, g: PoolGeometry, pool: Pool, indices: Indices = "", activation: ActivationSpec | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(pooled, indices or None) of a batched x, in the format that torch would give the result.

    Args:
        out: a channels-last view of the result's size that is written in place of a new tensor.
    """
    from tritonconv.kernels.pool import pool_kernel

    channels_last = suggests_channels_last(x) if out is None else True
    x = readable(x, channels_last)
    y = empty_output(x, g.output_shape, channels_last, x.dtype) if out is None else out
    found = empty_output(x, g.output_shape, channels_last, index_dtype(g, indices)) if indices else None
    if y.numel() == 0:
        return y, found
    side, device = _side(x, channels_last), device_of(x.device)
    stride_y = _pixel_stride(y) if channels_last else 1
    index_64 = wide_offsets(g, side) or y.numel() // g.channels * stride_y > INT32_MAX
    programs, constants, config = _forward(
        g, pool, x.element_size(), side, stride_y, indices, activation, device, forced_config("PATCH_P"), index_64
    )
    arguments = dict(x_ptr=x, y_ptr=y, index_ptr=found, **constants)
    launch(Launch(pool_kernel, programs, arguments, None, config), x.device)
    return y, found


def _pixel_stride(y: Tensor) -> int:
    """Elements between neighboring pixels of a channels-last view, which must be evenly spaced."""
    axes = [d for d in (*range(y.dim() - 1, 1, -1), 0) if y.shape[d] > 1]
    step = y.stride(axes[0]) if axes else y.shape[1]
    expected = step
    for d in axes:
        if y.stride(d) != expected:
            raise ValueError(
                f"pool: expected a channels-last view of evenly spaced pixels to write to, but got size {list(y.shape)} "
                f"and strides {list(y.stride())}"
            )
        expected *= y.shape[d]
    if y.shape[1] > 1 and y.stride(1) != 1:
        raise ValueError(f"pool: expected channels side by side, but got strides {list(y.stride())}")
    return step


@functools.lru_cache(maxsize=4096)
def _backward(
    g: PoolGeometry, pool: Pool, itemsize: int, channels_last: bool, flat: bool, device: Device, config: Any, index_64: bool
) -> tuple[int, dict[str, Any], Any]:
    """(programs, all arguments but tensors, config) of a backward pass, by simple rules."""
    covering = [-(-((k - 1) * d + 1) // step) for k, d, step in zip(g.kernel, g.dilation, g.stride, strict=True)]
    config, pixels_h, pixels_w, by_pixel = pool_gradient_patch(g, channels_last, flat, config)
    _, height, wide_ = g.input
    columns, lines = -(-wide_ // pixels_w), g.batch * g.input[0] * -(-height // pixels_h)
    vectors = channels_last or pixels_w > 1
    block_t, block_c = patch_block(device, channels_last, g.channels, itemsize, columns, lines, vectors=vectors)
    blocks = -(-lines * columns // block_t) if channels_last else lines * -(-columns // block_t)
    arguments = axis_constants(g) | pool.constants(g) | dict(
        N=g.batch, C=g.channels, FLAT=flat, CHANNELS_LAST=channels_last, INDEX_64=index_64, PIXELS_H=pixels_h,
        VEC_X=power_of_two_divisor(g.channels if channels_last else wide_), VEC_Y=power_of_two_divisor(g.output[2]),
        PIXELS_W=pixels_w, BY_PIXEL=by_pixel, BLOCK_T=block_t, BLOCK_C=block_c, WINDOWS_D=covering[0],
        WINDOWS_H=covering[1], WINDOWS_W=covering[2],
    )  # fmt: skip
    return blocks * -(-g.channels // block_c), arguments, config


def pool_backward(
    dy: Tensor, g: PoolGeometry, pool: Pool, channels_last: bool, found: Tensor | None = None, x: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of a pooling's input, dense in a format.

    Args:
        dy: of the result's size with any strides; copied to that format where it has another.
        found: indices of a maximum or minimum, of taps (uint8, int32) or flat (int64).
        x, y: input and result, of a sum of powers.
    """
    from tritonconv.kernels.pool_backward import pool_backward_kernel

    dx = empty_output(dy, g.input_shape, channels_last, dy.dtype)
    if dx.numel() == 0:
        return dx
    dy = as_format(dy, channels_last)
    found, x, y = (None if t is None else as_format(t, channels_last) for t in (found, x, y))
    flat = found is not None and found.dtype == torch.int64
    programs, constants, config = _backward(
        g, pool, dy.element_size(), channels_last, flat, device_of(dy.device), forced_config("PATCH_P"), wide_offsets(g)
    )
    tensors = dict(dy_ptr=dy, index_ptr=found, x_ptr=x, y_ptr=y, dx_ptr=dx)
    launch(Launch(pool_backward_kernel, programs, tensors | constants, None, config), dy.device)
    return dx


@functools.lru_cache(maxsize=4096)
def _unpool(
    batch: int, channels: int, small: int, large: int, channels_last: bool, device: Device, config: Any, backward: bool
) -> tuple[int, dict[str, Any], Any]:
    config = config or unpool_config(channels, small, channels_last, device)
    side = channels if channels_last else small
    arguments = dict(
        N=batch, C=channels, SMALL=small, LARGE=large, BACKWARD=backward, CHANNELS_LAST=channels_last,
        VEC=power_of_two_divisor(side), INDEX_64=batch * channels * max(small, large) > INT32_MAX, **config.kwargs,
    )  # fmt: skip
    blocks = -(-small // config.kwargs["BLOCK_P"]) * -(-channels // config.kwargs["BLOCK_C"])
    return batch * blocks, arguments, config


def _launch_unpool(small: Tensor, index: Tensor, large: Tensor, channels_last: bool, backward: bool) -> None:
    from tritonconv.kernels.unpool import unpool_kernel

    n, c, *spatial = small.shape
    programs, constants, config = _unpool(
        n, c, math.prod(spatial), math.prod(large.shape[2:]), channels_last, device_of(small.device),
        forced_config("BLOCK_P"), backward,
    )  # fmt: skip
    tensors = dict(small_ptr=small, index_ptr=index, large_ptr=large)
    launch(Launch(unpool_kernel, programs, tensors | constants, None, config), small.device)


def unpool_forward(x: Tensor, indices: Tensor, size: tuple[int, ...]) -> Tensor:
    """Zeros of (N, C, *size) with x's values at the positions that indices, of x's size, name in their planes."""
    channels_last = suggests_channels_last(x)
    y = empty_output(x, (*x.shape[:2], *size), channels_last, x.dtype).zero_()
    if x.numel() and y.numel():
        _launch_unpool(as_format(x, channels_last), as_format(indices, channels_last), y, channels_last, False)
    return y


def unpool_backward(dy: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    """Gradient of `unpool_forward`'s x, dense in a format."""
    dx = empty_output(dy, tuple(indices.shape), channels_last, dy.dtype)
    if dx.numel():
        _launch_unpool(dx, as_format(indices, channels_last), as_format(dy, channels_last), channels_last, True)
    return dx
