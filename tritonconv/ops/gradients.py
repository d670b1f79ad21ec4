"""Gradients of a convolution on Triton: the data gradient, and weight and bias gradient together."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.epilogue import Epilogue
from tritonconv.ops.launch import Launch, axis_constants, config_for, device_of, epilogue_constants, launch, precision
from tritonconv.ops.layout import as_format, empty_output
from tritonconv.ops.plan import lift, power_of_two_divisor
from tritonconv.tuning import Problem
from tritonconv.tuning.ranges import ranges

__all__ = ["conv_dgrad", "conv_wgrad"]

Kind = Literal["conv", "matmul"]
# Columns that the sums are added by.
REDUCE_BLOCK = 1024


def conv_dgrad(dy: Tensor, weight: Tensor, geometry: ConvGeometry, channels_last: bool, kind: Kind) -> Tensor:
    """Gradient of a batched convolution's input, dense in this format.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        weight: (K, C/groups, *filter).
    """
    from tritonconv.kernels.conv_dgrad import conv_dgrad_kernel

    g = geometry
    dx = empty_output(dy, g.input_shape, channels_last, dy.dtype)
    if dx.numel() == 0:
        return dx
    dy, weight = as_format(dy, True), as_format(weight, True)
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    sn, _, sd, sh, sw = lift(dy.stride(), (g.batch, g.out_channels, *g.output))
    vec_y, vec_c = power_of_two_divisor(k, sn, sd, sh, sw), power_of_two_divisor(c)
    products = precision(dy.dtype, kind)
    problem = _problem("conv_dgrad", g, dy, products, "dgrad", vec_y > 1 and vec_c > 1)
    config = config_for(problem)
    tiles = _tiles(config)
    step = tuple(s // math.gcd(s, d) for s, d in zip(g.stride, g.dilation, strict=True))
    # Every phase has as many programs as the largest.
    most = g.batch * math.prod(-(-size // s) for size, s in zip(g.input, g.stride, strict=True))
    programs = -(-most // tiles["BLOCK_M"]) * -(-c // tiles["BLOCK_N"]) * g.groups * math.prod(g.stride)
    arguments: dict[str, Any] = dict(
        dy_ptr=dy, stride_yn=sn, stride_yd=sd, stride_yh=sh, stride_yw=sw, w_ptr=weight, stride_wk=c * g.taps, dx_ptr=dx,
        residual_ptr=None, bias_ptr=None, mean_ptr=None, var_ptr=None, gamma_ptr=None, beta_ptr=None,
        N=g.batch, C=c, K=k, GROUPS=g.groups, STEP_D=step[0], STEP_H=step[1], STEP_W=step[2],
        EVEN_K=k % tiles["BLOCK_K"] == 0, VEC_Y=vec_y, VEC_C=vec_c, X_CHANNELS_LAST=channels_last,
        INDEX_64=g.needs_int64, PRECISION=products, **epilogue_constants(Epilogue()), **axis_constants(g), **tiles,
    )  # fmt: skip
    launch(Launch(conv_dgrad_kernel, programs, arguments, problem, config), dy.device)
    return dx


def conv_wgrad(
    dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool, bias: bool, kind: Kind
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a batched convolution's weight, dense in this format, and of its bias.

    Sums of ranges of the pixels go through a workspace in fp32 (fp64 for fp64) of at most `tuning.ranges.WORKSPACE` bytes.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        x: the input, (N, C, *spatial).
    """
    from tritonconv.kernels.conv_wgrad import conv_wgrad_kernel, wgrad_reduce_kernel

    g = geometry
    dw = empty_output(dy, g.weight_shape, channels_last, dy.dtype)
    db = torch.empty_strided((g.out_channels,), (1,), dtype=dy.dtype, device=dy.device) if bias else None
    if dy.numel() == 0:
        return dw.zero_(), db if db is None else db.zero_()
    dy, x = as_format(dy, True), as_format(x, True)
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    sn, _, sd, sh, sw = lift(x.stride(), (g.batch, g.in_channels, *g.input))
    vec_x, vec_k = power_of_two_divisor(c, sn, sd, sh, sw), power_of_two_divisor(k, g.out_channels)
    products = precision(dy.dtype, kind)
    problem = _problem("conv_wgrad", g, dy, products, "wgrad", vec_x > 1 and vec_k > 1)
    config = config_for(problem)
    tiles = _tiles(config)
    blocks = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    filters, columns, pixels = problem.gemm
    count, size = ranges(problem, *blocks)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    sums = torch.empty_strided((count, dw.numel()), (dw.numel(), 1), dtype=wide, device=dy.device)
    bias_sums = (
        torch.empty_strided((count, g.out_channels), (g.out_channels, 1), dtype=wide, device=dy.device) if bias else None
    )
    programs = -(-filters // blocks[0]) * -(-columns // blocks[1]) * g.groups * count
    linear = g.stride == (1, 1, 1) and g.output == g.input
    if linear:
        # Also where an axis of one pixel has no stride.
        sw = g.in_channels
    arguments: dict[str, Any] = dict(
        x_ptr=x, stride_xn=sn, stride_xd=sd, stride_xh=sh, stride_xw=sw, dy_ptr=dy, stride_ym=g.out_channels,
        dw_ptr=sums, db_ptr=bias_sums, M=pixels, C=c, K=filters, GROUPS=g.groups, RANGE=size, LINEAR=linear,
        ONE_TAP=c % blocks[1] == 0, PADDED=any(g.padding + g.padding_after), VEC_X=vec_x, VEC_K=vec_k,
        INDEX_64=g.needs_int64, PRECISION=products, **axis_constants(g), **tiles,
    )  # fmt: skip
    launch(Launch(conv_wgrad_kernel, programs, arguments, problem, config), dy.device)
    for parts, result, inner, taps in ((sums, dw, c, g.taps), (bias_sums, db, 1, 1)):
        if parts is not None and result is not None:
            reduce: dict[str, Any] = dict(
                sums_ptr=parts, dw_ptr=result, SIZE=result.numel(), SPLITS=count, C=inner, TAPS=taps,
                W_CHANNELS_LAST=channels_last, BLOCK=REDUCE_BLOCK,
            )  # fmt: skip
            blocks_of_sums = -(-result.numel() // REDUCE_BLOCK)
            launch(Launch(wgrad_reduce_kernel, blocks_of_sums, reduce, None, None), dy.device)
    return dw, db


def _problem(
    kernel: str, g: ConvGeometry, dy: Tensor, products: str, pass_: Literal["dgrad", "wgrad"], vectors: bool
) -> Problem:
    return Problem(kernel, g, str(dy.dtype)[6:], products == "tf32", vectors, device_of(dy.device), pass_)


def _tiles(config: Any) -> dict[str, Any]:
    """The config's constants; no operand comes by descriptor."""
    return {name: value for name, value in config.kwargs.items() if name != "USE_TMA"} | dict(STAGES=config.num_stages)
