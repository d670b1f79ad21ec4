"""Depthwise convolution on Triton, both directions: which layout, which block, and the launches.

A convolution is depthwise where each group has one input channel. Its data gradient, and so a transposed depthwise
convolution's forward, is the same kernel the other way round; "source" and "result" are the image that is read and the
one that is written, whichever way that is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, Pass, Triple, power_of_two_divisor
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.plan import Strides, lift
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Launch, axis_constants, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, is_dense, wide
from tritonconv.tuning import Device, Problem, choose
from tritonconv.tuning.rules.blocks import patch_block, slot_block

__all__ = ["convolve_depthwise", "depthwise_dgrad", "depthwise_wgrad", "is_depthwise"]

# A result of a stride's phase takes a patch of whole strides.
LARGEST_STRIDE = 4
# Sums of the weight gradient that a thread holds for each channel; programs a multiprocessor, and least blocks of each.
SUMS = 10
WAVES, LEAST_STEPS = 6, 4


def is_depthwise(g: ConvGeometry) -> bool:
    """Whether the depthwise kernels take it: one channel a group, and no large stride to spread results over."""
    conv = g.mirrored if g.transposed else g
    return conv.in_channels == conv.groups > 1 and max(conv.stride[1:]) <= LARGEST_STRIDE


class DepthwiseView(NamedTuple):
    """A depthwise convolution in one direction, as the kernel sees it."""

    conv: ConvGeometry
    transposed: bool
    channels_last: bool
    device: Device
    itemsize: int

    @property
    def source(self) -> Triple:
        return self.conv.output if self.transposed else self.conv.input

    @property
    def result(self) -> Triple:
        return self.conv.input if self.transposed else self.conv.output

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.conv.in_channels if self.transposed else self.conv.out_channels

    def patches(self, patch: tuple[int, int]) -> tuple[int, int]:
        """(rows of patches in all images, patches in a row)."""
        o, p, q = self.result
        before = [pad % s if self.transposed else 0 for pad, s in zip(self.conv.padding, self.conv.stride, strict=True)]
        return self.conv.batch * o * -(-(p + before[1]) // patch[0]), -(-(q + before[2]) // patch[1])

    def block(self, across: int, lines: int, warps: int) -> tuple[int, int]:
        """(patches, channels) of a program."""
        return patch_block(self.device, self.channels_last, self.channels, self.itemsize, across, lines, warps=warps)


def _launch(
    view: DepthwiseView, x: Tensor, weight: Tensor, epilogue: Epilogue, shape: tuple[int, ...], target: Target = WHOLE
) -> Result:
    """Launch a depthwise convolution in either direction, with an epilogue.

    Args:
        x: the source, which lies as the view has it.
        shape: the result's.
    """
    from tritonconv.kernels.depthwise import depthwise_kernel, steps, whole

    g = view.conv
    channels = g.out_channels if view.transposed else g.in_channels
    sn, sc, sd, sh, sw = strides = lift(x.stride(), (g.batch, channels, *view.source))
    pass_: Pass = "dgrad" if view.transposed else "fprop"
    problem = Problem(
        "depthwise", g, str(x.dtype)[6:], False, view.channels_last, view.device, pass_, statistics=target.statistics
    )  # fmt: skip
    config = forced_config("PATCH_P") or choose(problem)
    patch = whole(config, g.stride[1:], view.transposed)
    lines, across = view.patches(patch)
    block_t, block_c = view.block(across, lines, config.num_warps)
    step_r, step_s = steps(patch, g.kernel[1:], g.stride[1:], g.dilation[1:], view.transposed)
    # Sums of an image are those of whole blocks.
    images = g.batch if target.average else 1
    blocks = _blocks(lines // images, across, block_t, view.channels_last)
    slots = images * blocks
    result, written = target.result(x, shape, view.channels_last, slots, 1, blocks)
    arguments = written | epilogue.arguments() | axis_constants(g)
    arguments |= dict(zip("DHWOPQ", (*view.source, *view.result), strict=True)) | dict(
        x_ptr=x, stride_xn=sn, stride_xc=sc, stride_xd=sd, stride_xh=sh, STRIDE_XW=sw, w=weight, N=g.batch, C=view.channels,
        STRIDE_Y=target.pitch or view.channels, POOL=target.images(1, 1),
        MULT=g.out_channels // g.groups, TRANSPOSED=view.transposed, CHANNELS_LAST=view.channels_last,
        VEC_X=power_of_two_divisor(sn, sd, sh), INDEX_64=_index_64(view, strides), PATCH_P=patch[0],
        PATCH_Q=patch[1], BLOCK_T=block_t, BLOCK_C=block_c, STEP_R=step_r, STEP_S=step_s,
    )  # fmt: skip
    launch(Launch(depthwise_kernel, slots * -(-view.channels // block_c), arguments, problem, config), x.device)
    return result


def _blocks(lines: int, across: int, block_t: int, channels_last: bool) -> int:
    return -(-lines * across // block_t) if channels_last else lines * -(-across // block_t)


def _index_64(view: DepthwiseView, strides: Strides) -> bool:
    """Whether 32-bit offsets could overflow: a large tensor, or a small view that strides over a large one."""
    g = view.conv
    # Taps outside the image have addresses too, before their mask is applied; so have the ends of patches.
    reach = [(size + 2 * taps * d + 16 * s) * stride for size, taps, d, s, stride in
             zip(view.source, g.kernel, g.dilation, g.stride, strides[2:], strict=True)]  # fmt: skip
    source_channels = g.out_channels if view.transposed else g.in_channels
    return g.needs_int64 or g.batch * strides[0] + source_channels * max(1, strides[1]) + sum(reach) > INT32_MAX


def _side_by_side(t: Tensor, channels_last: bool) -> bool:
    """Whether the elements that a thread block reads together lie side by side."""
    axis = 1 if channels_last else -1
    return t.stride()[axis] == 1 or t.shape[axis] == 1


def convolve_depthwise(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, target: Target = WHOLE
) -> Result:
    """A batched depthwise convolution, or a transposed one, of tensors that `check_convolution` accepts."""
    g, channels_last = geometry, output_format(x, weight)
    if 0 in g.output_shape:
        return Result(empty_output(x, g.output_shape, channels_last, x.dtype))
    view = DepthwiseView(
        g.mirrored if g.transposed else g, g.transposed, channels_last, device_of(x.device), x.element_size()
    )
    x = x if _side_by_side(x, channels_last) else as_format(x, channels_last)
    # A filter of one channel has one order in memory, whatever it is called.
    return _launch(view, x, as_format(weight, False), epilogue.arranged(channels_last), g.output_shape, target)


def depthwise_dgrad(dy: Tensor, weight: Tensor, geometry: ConvGeometry, channels_last: bool) -> Tensor:
    """Gradient of a batched depthwise convolution's input, dense in this format; arguments as `conv_dgrad` takes them."""
    g = geometry
    if 0 in g.input_shape:
        return empty_output(dy, g.input_shape, channels_last, dy.dtype)
    view = DepthwiseView(g, True, channels_last, device_of(dy.device), dy.element_size())
    dx = _launch(view, as_format(dy, channels_last), as_format(weight, False), Epilogue(), g.input_shape).y
    assert dx is not None
    return dx


def depthwise_wgrad(
    dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a batched depthwise convolution's weight and bias; arguments as `conv_wgrad` takes them.

    Sums of ranges of the pixels go through a workspace in fp32 (fp64 for fp64).
    """
    from tritonconv.kernels.depthwise import COLUMNS
    from tritonconv.kernels.depthwise_wgrad import depthwise_wgrad_kernel

    g, k = geometry, geometry.out_channels
    # A filter of one channel has one order in memory, whatever its strides are called.
    dw = empty_output(dy, g.weight_shape, channels_last, dy.dtype)
    db = torch.empty_strided((k,), (1,), dtype=dy.dtype, device=dy.device) if bias else None
    if dy.numel() == 0:
        return dw.zero_(), db if db is None else db.zero_()
    # As dy lies, if it is dense: it is as large as x, and mostly fresh from a kernel of ours.
    last = is_dense(dy, True) or not is_dense(dy, False)
    dy = as_format(dy, last)
    x = x if _side_by_side(x, last) else as_format(x, last)
    sn, sc, sd, sh, sw = strides = lift(x.stride(), (g.batch, g.in_channels, *g.input))
    view = DepthwiseView(g, False, last, device_of(dy.device), dy.element_size())
    problem = Problem("depthwise_wgrad", g, str(dy.dtype)[6:], False, last, view.device, "wgrad")
    config = forced_config("PATCH_P") or choose(problem)
    patch = config.kwargs["PATCH_P"], config.kwargs["PATCH_Q"]
    lines, across = view.patches(patch)
    block_t, block_c = view.block(across, lines, config.num_warps)
    t, r, s = g.kernel
    columns = min(s, COLUMNS)
    rows = max(1, min(r, SUMS // columns))
    groups = t * -(-r // rows) * -(-s // columns) * -(-k // block_c)
    blocks = _blocks(lines, across, block_t, last)
    size = max(LEAST_STEPS, -(-blocks * groups // (WAVES * view.device.multiprocessors)))
    slots = -(-blocks // size)
    sums = empty_output(dy, (slots, g.taps + 1, k), False, wide(dy.dtype))
    arguments: dict[str, Any] = axis_constants(g) | dict(zip("DHW", touched_input(g), strict=True)) | dict(
        x_ptr=x, stride_xn=sn, stride_xc=sc, stride_xd=sd, stride_xh=sh, STRIDE_XW=sw, dy_ptr=dy, sums_ptr=sums, N=g.batch,
        RANGE=size, K=k, MULT=k // g.groups, BIAS=bias, CHANNELS_LAST=last, VEC_X=power_of_two_divisor(sn, sd, sh),
        INDEX_64=_index_64(view, strides), PATCH_P=patch[0], PATCH_Q=patch[1], BLOCK_T=block_t, BLOCK_C=block_c, ROWS=rows,
        COLUMNS=columns,
    )  # fmt: skip
    launch(Launch(depthwise_wgrad_kernel, slots * groups, arguments, problem, config), dy.device)
    add_slots(sums, dw, db)
    return dw, db


def touched_input(g: ConvGeometry) -> list[int]:
    """Extents of the input that some tap reaches: what lies behind may be NaN, and must not be multiplied by zero."""
    return [
        min(n, (out - 1) * step + (taps - 1) * d - pad + 1)
        for n, out, step, taps, d, pad in zip(g.input, g.output, g.stride, g.kernel, g.dilation, g.padding, strict=True)
    ]


def add_slots(sums: Tensor, dw: Tensor, db: Tensor | None) -> None:
    """Add sums [slots, taps + 1, filters] of a weight gradient, the bias's behind the taps', in their order."""
    from tritonconv.kernels.depthwise_wgrad import depthwise_reduce_kernel

    slots, rows, k = sums.shape
    block_s, block_k = slot_block(device_of(sums.device), slots, k, 128)
    arguments: dict[str, Any] = dict(
        sums_ptr=sums, dw_ptr=dw, db_ptr=db, SLOTS=slots, K=k, TAPS=rows - 1, BLOCK_S=block_s, BLOCK_K=block_k
    )  # fmt: skip
    programs = (rows - (db is None)) * -(-k // block_k)
    launch(Launch(depthwise_reduce_kernel, programs, arguments, None, None), sums.device)
