"""Convolution forward, its data gradient and transposed convolution on Hopper's kernels: the launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, Pass, Taps, Triple, best_box, boxes_over, pass_extents, phases_of, tap_hops
from tritonconv.ops.conv.dense import output_format, plan_for
from tritonconv.ops.conv.hopper.supports import aligned, unsupported
from tritonconv.ops.conv.hopper.views import Image, View, as_boxes, of_phases
from tritonconv.ops.conv.plan import lift
from tritonconv.ops.conv.target import WHOLE, Sink
from tritonconv.ops.core.cache import Dense, Prepared
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import NO_NORM, NO_STATISTICS, Recipe, Slots, config_for, device_of, epilogue_constants
from tritonconv.ops.core.layout import empty_output, is_dense
from tritonconv.tuning import Device, Problem

__all__ = ["HopperRecipe", "axis_phases", "hopper_dgrad", "prepare_hopper", "rows_of"]

Strides = tuple[int, int, int, int]
"""Elements between neighbors along N, D, H, W."""


class HopperRecipe(Recipe):
    """Of a kernel whose tensors all come by descriptors, several of one tensor where a stride has phases."""

    def __init__(
        self, kernel: Any, programs: int, config: Any, problem: Problem, slots: int, x: tuple[View, ...], w: View,
        y: tuple[View, ...], constants: tuple[Any, ...],
    ) -> None:  # fmt: skip
        super().__init__(kernel, programs, config, problem, slots)
        self.x, self.w, self.y, self.constants = x, w, y, constants

    def arguments(
        self, x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, statistics: Slots = NO_STATISTICS,
        gate: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Any, ...]:  # fmt: skip
        bias, norm, residual, _ = epilogue
        return (
            *of_phases(self.x, x), self.w.of(weight), *of_phases(self.y, y), *of_phases(self.y, residual), bias,
            *(NO_NORM if norm is None else norm[:4]), *statistics, *self.constants,
        )  # fmt: skip

    def run(
        self, x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, device: torch.device,
        statistics: Slots = NO_STATISTICS, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        if y.data_ptr() % 16 == 0:
            return super().run(x, weight, y, epilogue, device, statistics, gate)
        # Channels of a wider tensor may start anywhere, and no box is written there.
        aligned = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)
        super().run(x, weight, aligned, epilogue, device, statistics, gate)
        y.copy_(aligned)


def prepare_hopper(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, statistics: bool = False, sink: Sink = WHOLE,
    gated: bool = False,
) -> Prepared | str:  # fmt: skip
    """A batched call, as `prepare.prepare_call` has it, or why the portable kernels run it."""
    if gated:
        return "a gated input comes through registers"
    if sink.average:
        return "averages are added by portable kernels"
    g = geometry.mirrored if geometry.transposed else geometry
    pass_: Pass = "dgrad" if geometry.transposed else "fprop"
    refused = unsupported(g, x.dtype, device_of(x.device), pass_)
    if refused is not None:
        return refused
    output = sink.output(geometry.output_shape, output_format(x, weight))
    if output.strides[1] != 1 < geometry.out_channels:
        return "the result is contiguous"
    if sink.pitch is not None and sink.pitch % 8:
        return f"results lie {sink.pitch} elements apart, which is no multiple of 8"
    if geometry.transposed:
        seen, pixels = g, g.output
        read = lift(x.stride(), (g.batch, g.out_channels, *pixels))
        copy_x, copy_weight = x.stride()[1] != 1 < g.out_channels, not is_dense(weight, True)
    else:
        plan = plan_for(x, weight, geometry)
        if not plan.weight_channels_last:
            return "few channels are read where they lie"
        seen, pixels, read = plan.geometry, plan.geometry.input, plan.strides
        copy_x, copy_weight = plan.copy_input, plan.copy_weight
    source = None if copy_x else (read[0], *read[2:])
    refused = aligned(source, (g.batch, *pixels), x.data_ptr()) if source is not None else None
    if refused is not None:
        return refused
    residual = epilogue.residual
    in_place = [t for t, copied in ((weight, copy_weight), (residual, residual is None or not output.fits(residual)))
                if t is not None and not copied]  # fmt: skip
    if any(t.data_ptr() % 16 for t in in_place):
        return "a tensor does not start on 16 bytes"
    recipe = None
    if 0 not in output.shape:
        written = lift(output.strides, (geometry.batch, geometry.out_channels, *geometry.output))
        recipe = _recipe(
            seen, pass_, x.dtype, device_of(x.device), source, (written[0], *written[2:]), epilogue,
            statistics or sink != WHOLE,
        )  # fmt: skip
    return Prepared.of(
        "hopper.conv", recipe, output, x, epilogue, Dense.of(x.shape, True) if copy_x else None,
        Dense.of(weight.shape, True) if copy_weight else None,
    )  # fmt: skip


def hopper_dgrad(dy: Tensor, weight: Tensor, geometry: ConvGeometry, channels_last: bool = True) -> Tensor:
    """Gradient of a batched convolution's input, dense in this format; only where `unsupported_gradient` has nothing.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        weight: (K, C/groups, *filter).
    """
    g = geometry
    dx = empty_output(dy, g.input_shape, channels_last, dy.dtype)
    if dx.numel() == 0:
        return dx
    dy, weight = as_boxes(dy), as_boxes(weight)
    recipe = _recipe(g, "dgrad", dy.dtype, device_of(dy.device), None, None, Epilogue(), False)
    recipe.run(dy, weight, dx, Epilogue(), dy.device)
    return dx


def _recipe(
    g: ConvGeometry, pass_: Pass, dtype: torch.dtype, device: Device, source: Strides | None, target: Strides | None,
    epilogue: Epilogue, statistics: bool,
) -> HopperRecipe:  # fmt: skip
    """The launch of a forward pass or a data gradient.

    Args:
        source, target: strides of what is read and written along N, D, H, W; None for dense ones.
    """
    from tritonconv.kernels.hopper.conv import hopper_conv_kernel
    from tritonconv.kernels.hopper.epilogue import SLICE_N

    back = pass_ == "dgrad"
    g, source, target = rows_of(g, source, target)
    problem = Problem("hopper.conv", g, str(dtype)[6:], False, True, device, pass_, statistics=statistics)
    config = config_for(problem)
    tiles = dict(config.kwargs)
    block_m, block_n, block_k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    image = Image.of(g.batch, g.input, c, g.groups, g.nd, target if back else source)
    result = Image.of(g.batch, g.output, k, g.groups, g.nd, source if back else target)
    extents = pass_extents(g, pass_)
    box = best_box(extents, block_m)
    axes = axis_phases(g, back)
    slice_n = min(SLICE_N.value, block_n)
    phases = list(pixels_of(axes))
    x: tuple[View, ...]
    y: tuple[View, ...]
    if back:
        x, y = (result.view(box, block_k, dtype),), tuple(image.view(box, slice_n, dtype, p, g.stride) for p in phases)
    else:
        x, y = tuple(image.view(box, block_k, dtype, p, g.stride) for p in phases), (result.view(box, slice_n, dtype),)
    # [groups, K, taps, C], as a channels-last weight lies.
    w = View(
        (g.groups, k, g.taps, c), (k * g.taps * c, g.taps * c, c, 1),
        (1, block_k, 1, block_n) if back else (1, block_n, 1, block_k), dtype,
    )  # fmt: skip
    reduced, columns = (k, c) if back else (c, k)
    slots = boxes_over(extents, box) * len(y)
    count = slots * -(-columns // block_n) * g.groups
    hops = [tap_hops(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    values: dict[str, Any] = dict(
        N=extents[0], O=extents[1], P=extents[2], Q=extents[3], C=reduced, K=columns, GROUPS=g.groups,
        T=g.kernel[0], R=g.kernel[1], S=g.kernel[2], STEP=tuple(step for step, _ in hops),
        HOP=tuple(-hop if back else hop for _, hop in hops), GROUPS_ON_D=image.depth_is_groups, TURNED=back,
        **{f"TAPS_{name}": tuple(taps[1:] for taps in axis) for name, axis in zip("DHW", axes, strict=True)},
        **epilogue_constants(epilogue), **tiles, STAGES=config.num_stages,
    )  # fmt: skip
    names = hopper_conv_kernel.arg_names
    constants = tuple(values[name] for name in names[names.index("moments_ptr") + 1 :])
    programs = min(count, device.multiprocessors)
    return HopperRecipe(hopper_conv_kernel, programs, config, problem, slots, x, w, y, constants)


def rows_of(
    g: ConvGeometry, source: Strides | None, target: Strides | None
) -> tuple[ConvGeometry, Strides | None, Strides | None]:  # fmt: skip
    """A filter of one pixel as a product of rows, where pixels of both tensors lie evenly: one axis wastes no box."""
    if g.taps > 1 or g.stride != (1, 1, 1) or any(g.padding + g.padding_after):
        return g, source, target
    pixels, pitches = (g.batch, *g.input), []
    for strides in (source, target):
        inner = next((axis for axis in (3, 2, 1, 0) if pixels[axis] > 1), 3)
        pitch = None if strides is None else strides[inner]
        if strides is not None and any(
            size > 1 and stride != (pitch or 0) * math.prod(pixels[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(pixels, strides, strict=True))
        ):
            return g, source, target
        pitches.append(pitch)
    rows = math.prod(pixels)
    one = (1, 1, rows)
    folded = replace(g, batch=1, input=one, output=one, nd=min(g.nd, 2))
    first, second = (None if pitch is None else (pitch, pitch, pitch, pitch) for pitch in pitches)
    return folded, first, second


def axis_phases(g: ConvGeometry, back: bool) -> tuple[tuple[Taps, ...], ...]:
    """Along each axis, the phases that `phases_of` gives."""
    axes = zip(g.kernel, g.stride, g.padding, g.dilation, strict=True)
    return tuple(phases_of(*axis, back=back) for axis in axes)


def pixels_of(axes: tuple[tuple[Taps, ...], ...]) -> Iterator[Triple]:
    """The first pixel of every phase, in the order that the kernels count them."""
    for d, h, w in itertools.product(*axes):
        yield d.pixel, h.pixel, w.pixel
