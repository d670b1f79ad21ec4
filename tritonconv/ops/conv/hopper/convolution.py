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
from tritonconv.ops.conv.hopper.supports import why_no_boxes, why_unsupported
from tritonconv.ops.conv.hopper.views import BoxView, Image, as_boxes, of_phases
from tritonconv.ops.conv.plan import lift
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Launch, aligned, config_for, device_of, launch
from tritonconv.ops.core.layout import as_format, dense_strides, empty_output, is_dense
from tritonconv.tuning import Problem

__all__ = ["axis_phases", "hopper_convolution", "hopper_dgrad", "pixels_of", "rows_of"]

Strides = tuple[int, int, int, int]
"""Elements between neighbors along N, D, H, W."""


def hopper_convolution(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, target: Target = WHOLE
) -> Result | str:
    """A batched convolution, or a transposed one, or why the portable kernels run it."""
    if target.average:
        return "averages are added by portable kernels"
    g = geometry.mirrored if geometry.transposed else geometry
    pass_: Pass = "dgrad" if geometry.transposed else "fprop"
    reason = why_unsupported(g, x.dtype, device_of(x.device), pass_)
    if reason is not None:
        return reason
    channels_last, shape = output_format(x, weight), geometry.output_shape
    if not channels_last and dense_strides(shape, False)[1] != 1 < geometry.out_channels:
        return "the result is contiguous"
    if target.pitch is not None and target.pitch % 8:
        return f"results lie {target.pitch} elements apart, which is no multiple of 8"
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
    reason = why_no_boxes(source, (g.batch, *pixels), x) if source is not None else None
    if reason is not None:
        return reason
    residual = epilogue.residual
    in_place = [] if copy_weight else [weight]
    in_place += [residual] if residual is not None and is_dense(residual, channels_last) else []
    if not all(map(aligned, in_place)):
        return "a tensor does not start on 16 bytes"
    if 0 in shape:
        return Result(empty_output(x, shape, channels_last, x.dtype))
    x, weight = as_format(x, True) if copy_x else x, as_format(weight, True) if copy_weight else weight
    return _launch(x, weight, epilogue.arranged(channels_last), seen, pass_, source, shape, channels_last, target)


def hopper_dgrad(dy: Tensor, weight: Tensor, geometry: ConvGeometry, channels_last: bool = True) -> Tensor:
    """Gradient of a batched convolution's input, dense in this format; only where `why_no_gradient` has nothing.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        weight: (K, C/groups, *filter).
    """
    g = geometry
    if 0 in g.input_shape:
        return empty_output(dy, g.input_shape, channels_last, dy.dtype)
    dx = _launch(as_boxes(dy), as_boxes(weight), Epilogue(), g, "dgrad", None, g.input_shape, channels_last, WHOLE).y
    assert dx is not None
    return dx


def _launch(
    x: Tensor, weight: Tensor, epilogue: Epilogue, g: ConvGeometry, pass_: Pass, source: Strides | None,
    shape: tuple[int, ...], channels_last: bool, target: Target,
) -> Result:  # fmt: skip
    """Launch a forward pass or a data gradient.

    Args:
        x: what is read, with its channels side by side; source: its strides along N, D, H, W, None for dense ones.
        shape, channels_last: of the result, whose channels lie side by side in any case.
    """
    from tritonconv.kernels.hopper.conv import hopper_conv_kernel
    from tritonconv.kernels.hopper.epilogue import SLICE_N

    back = pass_ == "dgrad"
    strides = dense_strides(shape, channels_last) if target.out is None else target.out.stride()
    written = lift(strides, (g.batch, shape[1], *(g.input if back else g.output)))
    g, source, into = rows_of(g, source, (written[0], *written[2:]))
    device = device_of(x.device)
    problem = Problem(
        "hopper.conv", g, str(x.dtype)[6:], False, True, device, pass_, statistics=not target.is_plain
    )  # fmt: skip
    config = config_for(problem)
    tiles = dict(config.kwargs)
    block_m, block_n, block_k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    image = Image.of(g.batch, g.input, c, g.groups, g.nd, into if back else source)
    output = Image.of(g.batch, g.output, k, g.groups, g.nd, source if back else into)
    extents = pass_extents(g, pass_)
    box = best_box(extents, block_m)
    axes = axis_phases(g, back)
    slice_n = min(SLICE_N.value, block_n)
    phases = list(pixels_of(axes))

    def views(seen: Image, width: int, in_phases: bool) -> tuple[BoxView, ...]:
        if not in_phases:
            return (seen.view(box, width, x.dtype),)
        return tuple(seen.view(box, width, x.dtype, p, g.stride) for p in phases)

    xs, ys = views(output if back else image, block_k, not back), views(image if back else output, slice_n, back)
    residuals = ys
    if target.out is not None:
        # A residual is dense, also beside some channels of a wider tensor.
        sizes, channels = (g.input, c) if back else (g.output, k)
        residuals = views(Image.of(g.batch, sizes, channels, g.groups, g.nd), slice_n, back)
    # [groups, K, taps, C], as a channels-last weight lies.
    w = BoxView(
        (g.groups, k, g.taps, c), (k * g.taps * c, g.taps * c, c, 1),
        (1, block_k, 1, block_n) if back else (1, block_n, 1, block_k), x.dtype,
    )  # fmt: skip
    reduced, columns = (k, c) if back else (c, k)
    slots = boxes_over(extents, box) * len(ys)
    count = slots * -(-columns // block_n) * g.groups
    hops = [tap_hops(stride, dilation) for stride, dilation in zip(g.stride, g.dilation, strict=True)]
    # Channels of a wider tensor may start anywhere, and no box is written there.
    direct = target.out is None or aligned(target.out)
    out = target.out if direct or target.out is None else empty_like(target.out)
    result, room = target._replace(out=out).result(x, shape, channels_last, slots)
    assert result.y is not None
    values: dict[str, Any] = room | epilogue.arguments() | dict(
        N=extents[0], O=extents[1], P=extents[2], Q=extents[3], C=reduced, K=columns, GROUPS=g.groups,
        T=g.kernel[0], R=g.kernel[1], S=g.kernel[2], STEP=tuple(step for step, _ in hops),
        HOP=tuple(-hop if back else hop for _, hop in hops), GROUPS_ON_D=image.depth_is_groups, TURNED=back,
        **{f"TAPS_{name}": tuple(taps[1:] for taps in axis) for name, axis in zip("DHW", axes, strict=True)},
        **tiles, STAGES=config.num_stages,
    )  # fmt: skip
    names = hopper_conv_kernel.arg_names
    tensors = (
        *of_phases(xs, x), w.of(weight), *of_phases(ys, result.y), *of_phases(residuals, epilogue.residual),
    )  # fmt: skip
    arguments = dict(zip(names, tensors, strict=False)) | {name: values[name] for name in names[len(tensors) :]}
    programs = min(count, device.multiprocessors)
    launch(Launch(hopper_conv_kernel, programs, arguments, problem, config), x.device)
    if target.out is not None and not direct:
        target.out.copy_(result.y)
        result = result._replace(y=target.out)
    return result


def empty_like(t: Tensor) -> Tensor:
    """As `t` lies, in memory of its own, which starts on 16 bytes."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def rows_of(
    g: ConvGeometry, source: Strides | None, target: Strides | None
) -> tuple[ConvGeometry, Strides | None, Strides | None]:  # fmt: skip
    """A filter of one pixel as a product of rows, where pixels of both tensors lie evenly: one axis wastes no box."""
    if g.taps > 1 or g.stride != (1, 1, 1) or g.is_padded:
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
