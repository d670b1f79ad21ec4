"""Weight gradient on Hopper's kernels: the launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, best_box, pass_extents, tap_places
from tritonconv.ops.conv.gradients import add_ranges
from tritonconv.ops.conv.hopper.convolution import axis_phases, pixels_of, rows_of
from tritonconv.ops.conv.hopper.views import BoxView, Image, as_boxes, of_phases
from tritonconv.ops.core.launch import Launch, config_for, device_of, launch
from tritonconv.ops.core.layout import empty_output
from tritonconv.tuning import Problem
from tritonconv.tuning.families.hopper import hopper_ranges

__all__ = ["hopper_wgrad"]

# Bytes of a row of what is stored at once.
ROW = 128


def hopper_wgrad(dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool) -> Tensor:
    """Gradient of a batched convolution's weight, dense in this format; only where `unsupported_gradient` has nothing.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        x: the input, (N, C, *spatial).
    """
    from tritonconv.kernels.hopper.wgrad import hopper_wgrad_kernel

    dw = empty_output(dy, geometry.weight_shape, channels_last, dy.dtype)
    if dy.numel() == 0:
        return dw.zero_()
    dy, x = as_boxes(dy), as_boxes(x)
    g, _, _ = rows_of(geometry, None, None)
    device = device_of(dy.device)
    problem = Problem("hopper.wgrad", g, str(dy.dtype)[6:], False, True, device, "wgrad")
    config = config_for(problem)
    tiles = dict(config.kwargs)
    block_m, block_n, block_k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    extents = pass_extents(g, "wgrad")
    box = best_box(extents, block_k)
    count, size = hopper_ranges(problem, block_m, block_n, block_k)
    # A single range needs no one to add it, where the weight lies as its sums do.
    direct = count == 1 and channels_last
    sums = dw if direct else torch.empty_strided(
        (count, dw.numel()), (dw.numel(), 1), dtype=torch.float32, device=dy.device)  # fmt: skip
    image = Image.of(g.batch, g.input, c, g.groups, g.nd)
    phases = tuple(image.view(box, block_n, dy.dtype, pixel, g.stride) for pixel in pixels_of(axis_phases(g, False)))
    row, filters = g.taps * c, g.groups * k
    target = BoxView(
        (count, g.groups, k, g.taps, c), (filters * row, k * row, row, c, 1),
        (1, 1, block_m, 1, min(block_n, ROW // sums.element_size())), sums.dtype,
    )  # fmt: skip
    places = [tap_places(*axis) for axis in zip(g.kernel, g.stride, g.padding, g.dilation, strict=True)]
    arguments: dict[str, Any] = dict(
        **{f"x{i}": argument for i, argument in enumerate(of_phases(phases, x))},
        dy=Image.of(g.batch, g.output, k, g.groups, g.nd).view(box, block_m, dy.dtype).of(dy), dw=target.of(sums),
        N=extents[0], O=extents[1], P=extents[2], Q=extents[3], C=c, K=k, GROUPS=g.groups, RANGES=count, RANGE=size,
        TAPS_D=places[0], TAPS_H=places[1], TAPS_W=places[2], PHASES_H=1 + max(phase for phase, _ in places[1]),
        PHASES_W=1 + max(phase for phase, _ in places[2]), GROUPS_ON_D=image.depth_is_groups, **tiles,
        STAGES=config.num_stages,
    )  # fmt: skip
    work = -(-k // block_m) * -(-c // block_n) * g.taps * g.groups * count
    launch(Launch(hopper_wgrad_kernel, min(work, device.multiprocessors), arguments, problem, config), dy.device)
    if not direct:
        add_ranges(sums, dw, c, g.taps, channels_last)
    return dw
