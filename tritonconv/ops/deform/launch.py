"""Deformable convolution on Triton: what is checked, what all its kernels are told, and the forward launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, DeformGeometry, power, power_of_two_divisor
from tritonconv.ops.core.epilogue import Epilogue, check_device, check_dtype
from tritonconv.ops.core.launch import (
    Launch,
    config_constants,
    config_for,
    device_of,
    launch,
    precision,
)  # fmt: skip
from tritonconv.ops.core.layout import as_format, empty_output, readable, suggests_channels_last
from tritonconv.tuning import Problem

__all__ = [
    "check_deform", "deform_forward", "problem_of", "reading",
]  # fmt: skip


def check_deform(
    op: str, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, epilogue: Epilogue, geometry: DeformGeometry
) -> None:  # fmt: skip
    """Raise what torchvision raises for a wrong dtype or device; sizes of x, offset, mask and weight are right already."""
    for name, t in (("weight", weight), ("offset", offset), ("mask", mask)):
        if t is None:
            continue
        check_device(op, x, name, t, geometry)
        # Places may be finer than values.
        finer = name != "weight" and t.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
        if not finer:
            check_dtype(op, x, name, t, geometry)
    epilogue.check(op, geometry, x, geometry.conv.out_channels, geometry.conv.output_shape)


def problem_of(kernel: str, g: DeformGeometry, x: Tensor, pass_: Any) -> Problem:
    """What the choice of a config sees of a launch."""
    vectors = power_of_two_divisor(g.run, x.stride(0), x.stride(2), x.stride(3)) > 1
    tf32 = precision(x.dtype, "conv") == "tf32"
    return Problem(kernel, g.conv, str(x.dtype)[6:], tf32, vectors, device_of(x.device), pass_)


def reading(g: DeformGeometry, x: Tensor, offset: Tensor, mask: Tensor | None, block: int) -> dict[str, Any]:
    """The arguments of every kernel that samples, with `block` columns of samples in a tile."""
    conv = g.conv
    sn, _, sh, sw = x.stride()
    wide = min(block, power(g.run, block))
    masks = (0,) * 4 if mask is None else mask.stride()
    return dict(
        x_ptr=x, stride_xn=sn, stride_xh=sh, stride_xw=sw, offset_ptr=offset,
        **dict(zip(("stride_on", "stride_oc", "stride_op", "stride_oq"), offset.stride(), strict=True)),
        mask_ptr=mask, **dict(zip(("stride_mn", "stride_mc", "stride_mp", "stride_mq"), masks, strict=True)),
        M=conv.batch * conv.output[1] * conv.output[2], H=conv.input[1], W=conv.input[2],
        K=conv.out_channels // conv.groups, P=conv.output[1], Q=conv.output[2], GROUPS=conv.groups, TAPS=conv.taps,
        BLOCKS=-(-g.run // wide),
        CG=conv.in_channels // conv.groups, CD=conv.in_channels // g.offset_groups, RUN=g.run, S=conv.kernel[2],
        STRIDE_H=conv.stride[1], STRIDE_W=conv.stride[2], PAD_H=conv.padding[1], PAD_W=conv.padding[2],
        DIL_H=conv.dilation[1], DIL_W=conv.dilation[2], VEC_X=power_of_two_divisor(sn, sh, sw),
        INDEX_64=g.needs_int64 or _far(x, offset, mask), PRECISION=precision(x.dtype, "conv"), GROUPS_K=block // wide,
        BLOCK_C=wide,
    )  # fmt: skip


def _far(*tensors: Tensor | None) -> bool:
    """Whether a view reaches further than 2^31 - 1 elements; a neighbor's address may lie two rows outside."""
    return any(
        t is not None and sum((n + 4) * s for n, s in zip(t.shape, t.stride(), strict=True)) > INT32_MAX for t in tensors
    )


def deform_forward(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, epilogue: Epilogue, g: DeformGeometry
) -> Tensor:
    """epilogue(deformable convolution), channels-last if the input or the weight is.

    Args:
        x: (N, C, H, W); copied where channels do not lie side by side.
        offset: (N, 2 * offset groups * taps, P, Q), of any strides, of x's type or fp32.
        mask: (N, offset groups * taps, P, Q), likewise.
        weight: (K, C/groups, R, S).
    """
    from tritonconv.kernels.deform_conv import deform_conv_kernel

    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    y = empty_output(x, g.conv.output_shape, channels_last, x.dtype)
    if y.numel() == 0:
        return y
    x, weight = readable(x, True), as_format(weight, True)
    problem = problem_of("deform_conv", g, x, "fprop")
    config = config_for(problem)
    tiles = config_constants(config)
    filters = g.conv.out_channels // g.conv.groups
    arguments = reading(g, x, offset, mask, tiles["BLOCK_K"])
    programs = -(-arguments["M"] // tiles["BLOCK_M"]) * -(-filters // tiles["BLOCK_N"]) * g.conv.groups
    arguments |= epilogue.arranged(channels_last).arguments() | dict(
        w=weight, y_ptr=y, counts_ptr=None, moments_ptr=None, VEC_K=power_of_two_divisor(filters),
        Y_CHANNELS_LAST=channels_last, **tiles,
    )  # fmt: skip
    launch(Launch(deform_conv_kernel, programs, arguments, problem, config), x.device)
    return y
