"""Gradients of a convolution on Triton: the data gradient, and weight and bias gradient together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, power_of_two_divisor
from tritonconv.ops.conv.plan import lift, pack_constants, packed
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import (
    ConvKind,
    Launch,
    axis_constants,
    config_constants,
    config_for,
    device_of,
    gradient_constants,
    launch,
    precision,
)
from tritonconv.ops.core.layout import as_format, empty_output, wide
from tritonconv.tuning import Problem
from tritonconv.tuning.ranges import ranges

__all__ = ["NormGradient", "add_ranges", "conv_dgrad", "conv_wgrad", "launch_dgrad"]

# Columns that the sums are added by.
REDUCE_BLOCK = 1024


class NormGradient(NamedTuple):
    """A batch norm and an activation behind a convolution, whose gradient kernels compute on their way in from dy."""

    z: Tensor
    """What the convolution gave, (N, K, *spatial)."""
    table: Tensor
    """[5, K], the numbers of each channel that kernels/statistics.py describes, in fp32 (fp64 for fp64)."""
    activation: ActivationSpec | None
    batch_statistics: bool
    """Whether the statistics were the batch's own."""
    dz: Tensor | None = None
    """Where `conv_dgrad` leaves the gradient of z: dense, channels-last. Filters of one tap without padding see each pixel
    once; others may not have it."""


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    channels_last: bool,
    kind: ConvKind,
    norm: NormGradient | None = None,
) -> Tensor:
    """Gradient of a batched convolution's input, dense in this format.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        weight: (K, C/groups, *filter).
        norm: what lies between the output and dy.
    """
    g = geometry
    if 0 in g.input_shape:
        return empty_output(dy, g.input_shape, channels_last, dy.dtype)
    dy, weight = as_format(dy, True), as_format(weight, True)
    dx = launch_dgrad(dy, weight, g, precision(dy.dtype, kind), channels_last, g.needs_int64, Epilogue(), norm).y
    assert dx is not None
    return dx


def launch_dgrad(
    dy: Tensor, weight: Tensor, g: ConvGeometry, products: str, channels_last: bool, index_64: bool, epilogue: Epilogue,
    norm: NormGradient | None = None, target: Target = WHOLE,
) -> Result:  # fmt: skip
    """Launch a data gradient, with an epilogue.

    Args:
        dy: with its channels side by side.
        weight: channels-last.
        products: how fp32 products are computed, as `precision` gives it.
        channels_last: the layout of the result.
        norm: what lies between the output and dy.
    """
    from tritonconv.kernels.conv_dgrad import conv_dgrad_kernel

    shape, pack = g.input_shape, packed(g)
    sn, _, sd, sh, sw = lift(dy.stride(), (g.batch, g.out_channels, *g.output))
    g = replace(g, groups=g.groups // pack)
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    vec_y, vec_c = power_of_two_divisor(k, sn, sd, sh, sw), power_of_two_divisor(c)
    problem = Problem(
        "conv_dgrad", g, str(dy.dtype)[6:], products == "tf32", vec_y > 1, device_of(dy.device), "dgrad", norm is not None,
        target.statistics, pack,
    )  # fmt: skip
    config = config_for(problem)
    tiles = config_constants(config)
    step = tuple(s // math.gcd(s, d) for s, d in zip(g.stride, g.dilation, strict=True))
    # Every phase has as many programs as the largest.
    most = g.batch * math.prod(-(-size // s) for size, s in zip(g.input, g.stride, strict=True))
    slots = -(-most // tiles["BLOCK_M"]) * math.prod(g.stride)
    result, written = target.result(dy, shape, channels_last, slots)
    arguments: dict[str, Any] = written | epilogue.arguments() | axis_constants(g) | dict(
        dy_ptr=dy, stride_yn=sn, stride_yd=sd, stride_yh=sh, stride_yw=sw, w=weight, stride_wk=c // pack * g.taps,
        N=g.batch, C=c, K=k, GROUPS=g.groups, STEP_D=step[0], STEP_H=step[1], STEP_W=step[2],
        EVEN_K=k % tiles["BLOCK_K"] == 0, VEC_Y=vec_y, VEC_C=vec_c, X_CHANNELS_LAST=channels_last, INDEX_64=index_64,
        PRECISION=products, **_between(norm), dz_ptr=None if norm is None else norm.dz, **pack_constants(pack, c, k),
        **tiles,
    )  # fmt: skip
    launch(Launch(conv_dgrad_kernel, slots * -(-c // tiles["BLOCK_N"]) * g.groups, arguments, problem, config), dy.device)
    return result


def conv_wgrad(
    dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool, bias: bool, kind: ConvKind,
    norm: NormGradient | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of a batched convolution's weight, dense in this format, and of its bias.

    Sums of ranges of the pixels go through a workspace in fp32 (fp64 for fp64) of at most `tuning.ranges.WORKSPACE` bytes.

    Args:
        dy: gradient of the output, (N, K, *spatial).
        x: the input, (N, C, *spatial).
        norm: what lies between the output and dy.
    """
    from tritonconv.kernels.conv_wgrad import conv_wgrad_kernel

    g = geometry
    dw = empty_output(dy, g.weight_shape, channels_last, dy.dtype)
    db = torch.empty_strided((g.out_channels,), (1,), dtype=dy.dtype, device=dy.device) if bias else None
    if dy.numel() == 0:
        return dw.zero_(), db if db is None else db.zero_()
    dy, x = as_format(dy, True), as_format(x, True)
    pack = packed(g)
    g = replace(g, groups=g.groups // pack)
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    sn, _, sd, sh, sw = lift(x.stride(), (g.batch, g.in_channels, *g.input))
    vec_x, vec_k = power_of_two_divisor(c, sn, sd, sh, sw), power_of_two_divisor(k, g.out_channels)
    products = precision(dy.dtype, kind)
    problem = Problem(
        "conv_wgrad", g, str(dy.dtype)[6:], products == "tf32", vec_x > 1 and vec_k > 1, device_of(dy.device), "wgrad",
        norm is not None, pack=pack,
    )  # fmt: skip
    config = config_for(problem)
    tiles = config_constants(config)
    blocks = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    filters, columns, pixels = problem.gemm
    count, size = ranges(problem, *blocks)
    # A single range needs no one to add it.
    direct = count == 1
    sums, bias_sums = (
        t if t is None or direct else torch.empty_strided(
            (count, t.numel()), (t.numel(), 1), dtype=wide(dy.dtype), device=dy.device)
        for t in (dw, db)
    )  # fmt: skip
    programs = -(-filters // blocks[0]) * -(-columns // blocks[1]) * g.groups * count
    linear = g.stride == (1, 1, 1) and g.output == g.input
    if linear:
        # Also where an axis of one pixel has no stride.
        sw = g.in_channels
    arguments: dict[str, Any] = dict(
        x_ptr=x, stride_xn=sn, stride_xd=sd, stride_xh=sh, stride_xw=sw, dy_ptr=dy, stride_ym=g.out_channels,
        dw_ptr=sums, db_ptr=bias_sums, M=pixels, C=c, K=filters, GROUPS=g.groups, RANGE=size, LINEAR=linear,
        DIRECT=direct, W_CHANNELS_LAST=channels_last,
        ONE_TAP=c % blocks[1] == 0, PADDED=g.is_padded, VEC_X=vec_x, VEC_K=vec_k,
        INDEX_64=g.needs_int64, PRECISION=products, **_between(norm), **axis_constants(g),
        **pack_constants(pack, c, k), **tiles,
    )  # fmt: skip
    launch(Launch(conv_wgrad_kernel, programs, arguments, problem, config), dy.device)
    for parts, result, inner, taps in ((sums, dw, c // pack, g.taps), (bias_sums, db, 1, 1)):
        if parts is not None and result is not None and not direct:
            add_ranges(parts, result, inner, taps, channels_last)
    return dw, db


def add_ranges(sums: Tensor, dw: Tensor, channels: int, taps: int, channels_last: bool) -> None:
    """Add the sums of ranges of the pixels, [ranges, filters, taps, channels], in their order into dw in this format."""
    from tritonconv.kernels.conv_wgrad import wgrad_reduce_kernel

    arguments: dict[str, Any] = dict(
        sums_ptr=sums, dw_ptr=dw, SIZE=dw.numel(), SPLITS=sums.shape[0], C=channels, TAPS=taps,
        W_CHANNELS_LAST=channels_last, BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    launch(Launch(wgrad_reduce_kernel, -(-dw.numel() // REDUCE_BLOCK), arguments, None, None), dw.device)


def _between(norm: NormGradient | None) -> dict[str, Any]:
    """The arguments of both kernels that compute a batch norm's gradient on the way in."""
    act = None if norm is None else norm.activation
    slope = gradient_constants(act)
    constants = dict(ACT_GRADIENT=slope["ACT_GRADIENT"], GRADIENT_A=slope["ACT_A"], GRADIENT_B=slope["ACT_B"])
    if norm is None:
        return dict(z_ptr=None, table_ptr=None, SLOPED=False, **constants)
    # Without either the gradient is a multiple of dy, and z need not be read.
    z = as_format(norm.z, True) if act or norm.batch_statistics else None
    return dict(z_ptr=z, table_ptr=norm.table, SLOPED=norm.batch_statistics, **constants)
