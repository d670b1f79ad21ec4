"""Launches of resampling: tensors (N, C, *spatial) whose channels or whose pixels lie side by side.

Results are dense, channels-last where the input is. Views are read in place; only a channels-last input whose channels, or
another one whose rows' elements, do not lie side by side is copied first.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tritonconv.geometry import ResampleGeometry, needs_int64, power_of_two_divisor
from tritonconv.ops.core.launch import Launch, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, readable, suggests_channels_last, wide
from tritonconv.tuning import Device
from tritonconv.tuning.rules.resampling import resample_config

__all__ = ["resample_forward", "resample_gradient"]

# Programs of 4 warps a multiprocessor that hide each other's latencies; not measured.
WAVES = 8


def resample_forward(x: Tensor, geometry: ResampleGeometry) -> Tensor:
    """x (N, C, *spatial) at the geometry's results, of its dtype."""
    from tritonconv.kernels.resample import resample_kernel

    g, channels_last = geometry, suggests_channels_last(x)
    x = readable(x, channels_last)
    y = empty_output(x, g.output_shape, channels_last, x.dtype)
    n, c, *spatial = x.stride()
    d, h, w = (*(0,) * (3 - g.nd), *spatial)
    device = device_of(x.device)
    config = forced_config("BLOCK_P") or resample_config("forward", g.output[2], g.channels, channels_last, device)
    programs, size = _programs(g.batch, g.channels, *g.output, config, device)
    axes = zip((g.batch, g.channels, *g.input), (n, c, d, h, w), strict=True)
    extent = sum((length - 1) * stride for length, stride in axes)
    arguments = dict(
        x_ptr=x, stride_n=n, stride_c=c, stride_d=d, stride_h=h, stride_w=w, y_ptr=y, **_axes(g, x), RANGE=size,
        CHANNELS_LAST=channels_last,
        # Contiguous, x is read by single elements and y alone by vectors.
        VEC=power_of_two_divisor(*((g.channels, n, d, h, w) if channels_last else (g.output[2],))),
        INDEX_64=needs_int64(max(extent, g.results)), **config.kwargs,
    )  # fmt: skip
    launch(Launch(resample_kernel, programs, arguments, None, config), x.device)
    return y


def resample_gradient(dy: Tensor, geometry: ResampleGeometry, channels_last: bool) -> Tensor:
    """The input's gradient, dense in that format; dy of the result's size, with any strides."""
    from tritonconv.kernels.resample_backward import resample_backward_kernel

    g = geometry
    dx = empty_output(dy, (g.batch, g.channels, *g.input[3 - g.nd :]), channels_last, dy.dtype)
    dy = as_format(dy, channels_last)
    device = device_of(dy.device)
    config = forced_config("BLOCK_P") or resample_config("backward", g.input[2], g.channels, channels_last, device)
    programs, size = _programs(g.batch, g.channels, *g.input, config, device)
    inverse = {f"inverse_{name}": g.inverse(axis) for axis, name in enumerate("dhw")}
    arguments = dict(
        dy_ptr=dy, dx_ptr=dx, **_axes(g, dy), **inverse, RANGE=size, CHANNELS_LAST=channels_last,
        VEC=power_of_two_divisor(g.channels if channels_last else g.input[2]),
        INDEX_64=needs_int64(max(g.elements, g.results)), **config.kwargs,
    )  # fmt: skip
    launch(Launch(resample_backward_kernel, programs, arguments, None, config), dy.device)
    return dx


def _axes(g: ResampleGeometry, x: Tensor) -> dict[str, Any]:
    """Sizes, scales and rules by the names that kernels give them."""
    # Torch finds the nearest element in fp32 for fp64 too.
    precise = wide(x.dtype) == x.dtype and x.element_size() == 8 and g.mode.startswith("linear")
    found: dict[str, Any] = dict(C=g.channels)
    for axis, name in enumerate("DHW"):
        found.update({
            name: g.input[axis], f"O{name}": g.output[axis], f"RULE_{name}": g.rule(axis),
            f"scale_{name.lower()}": g.scale(axis, precise),
        })  # fmt: skip
    return found


def _programs(
    batch: int, channels: int, depth: int, height: int, width: int, config: Any, device: Device
) -> tuple[int, int]:
    """(programs, rows of each) that write an image: long walks compute less, but every multiprocessor wants its share."""
    tiles = config.kwargs
    lines = batch * depth * math.ceil(width / tiles["BLOCK_P"]) * math.ceil(channels / tiles["BLOCK_C"])
    size = math.ceil(height / max(1, math.ceil(WAVES * device.multiprocessors / lines)))
    return lines * math.ceil(height / size), size
