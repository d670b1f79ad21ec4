"""Convolution forward on Triton: what is checked, and the launch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, power_of_two_divisor
from tritonconv.ops.conv.plan import ConvPlan, pack_constants, plan_convolution
from tritonconv.ops.conv.target import WHOLE, Sink, images_of_tile
from tritonconv.ops.core.cache import Dense, Prepared
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import (
    Box,
    PlainRecipe,
    Recipe,
    axis_constants,
    config_for,
    device_of,
    epilogue_constants,
    precision,
)
from tritonconv.ops.core.layout import is_dense, suggests_channels_last
from tritonconv.tuning import Device, Problem

__all__ = ["check_convolution", "output_format", "plan_for", "prepare", "problem_of"]


def check_convolution(op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry) -> None:
    """Raise what torch raises for a wrong dtype, device or size; the geometry itself is right already."""
    if x.dtype != weight.dtype:
        raise RuntimeError(f"{op}: input type ({x.dtype}) and weight type ({weight.dtype}) should be the same ({geometry})")
    if x.device != weight.device:
        raise RuntimeError(
            f"{op}: expected all tensors to be on the same device, but got {x.device} for the input and {weight.device} "
            f"for the weight ({geometry})"
        )
    epilogue.check(op, geometry, x, geometry.out_channels, geometry.output_shape)


def output_format(x: Tensor, weight: Tensor) -> bool:
    """Whether the result is channels-last: torch's rule, the input or the weight is."""
    return suggests_channels_last(x) or suggests_channels_last(weight)


def plan_for(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> ConvPlan:
    """The plan for these tensors."""
    return plan_convolution(
        geometry, x.stride(), weight_contiguous=is_dense(weight, False), weight_channels_last=is_dense(weight, True)
    )


def prepare(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: Literal["conv", "matmul"],
    statistics: bool = False, sink: Sink = WHOLE, gated: bool = False,
) -> Prepared:  # fmt: skip
    """Everything of a batched call but its tensors, which are what `check_convolution` wants; touches no memory.

    Args:
        statistics: whether it is to be run with room for them.
        sink: where results go.
        gated: whether x is to be multiplied by a gate on the way in, which `matmul` alone can.
    """
    channels_last = output_format(x, weight)
    plan = plan_for(x, weight, geometry)
    output = sink.output(geometry.output_shape, channels_last)
    recipe = None
    if 0 not in output.shape:
        # A copy starts where the allocator likes, on 16 bytes at least.
        aligned = plan.copy_input or x.data_ptr() % 16 == 0, plan.copy_weight or weight.data_ptr() % 16 == 0
        products, device = precision(x.dtype, kind), device_of(x.device)
        problem = problem_of(plan, x.dtype, products == "tf32", device)
        problem = replace(problem, statistics=statistics or sink != WHOLE, computed=gated)
        recipe = _recipe(plan, problem, products, channels_last, aligned, epilogue, sink)
    return Prepared.of(
        plan.kernel, recipe, output, x, epilogue, Dense.of(x.shape, True) if plan.copy_input else None,
        Dense.of(weight.shape, plan.weight_channels_last) if plan.copy_weight else None,
    )  # fmt: skip


def problem_of(plan: ConvPlan, dtype: torch.dtype, tf32: bool, device: Device) -> Problem:
    """What the choice of a config sees of a plan."""
    return Problem(plan.kernel, plan.geometry, str(dtype)[6:], tf32, plan.vector > 1, device, pack=plan.pack)


def _recipe(
    plan: ConvPlan, problem: Problem, products: str, channels_last: bool, aligned: tuple[bool, bool], epilogue: Epilogue,
    sink: Sink,
) -> Recipe:  # fmt: skip
    """The launch of a plan, with the config that is chosen or forced; `aligned`: image and weight start on 16 bytes."""
    from tritonconv.kernels.conv_flat import conv_flat_kernel
    from tritonconv.kernels.conv_fprop import conv_fprop_kernel
    from tritonconv.kernels.matmul import matmul_kernel

    g, device = plan.geometry, problem.device
    c = g.in_channels // g.groups
    m, n, k = problem.gemm
    config = config_for(problem)
    tiles = dict(config.kwargs)
    block_m, block_n, block_k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    # A descriptor reads whole boxes of rows that start on 16 bytes.
    w_row = c if plan.kernel == "matmul" else k // plan.pack
    tma = tiles.pop("USE_TMA") and device.tma and plan.pack == 1 and aligned[1] and w_row * problem.itemsize % 16 == 0
    if plan.kernel == "matmul":
        # Neither is a computed operand read by descriptor.
        tma = tma and not problem.computed and aligned[0] and plan.row_stride * problem.itemsize % 16 == 0
    pixels = math.prod(g.output)
    constants: dict[str, Any] = dict(
        M=m, K=n, VEC_K=power_of_two_divisor(n, sink.pitch or n), stride_y=sink.pitch, POOL=sink.images(block_m, pixels),
        Y_CHANNELS_LAST=channels_last, INDEX_64=plan.index_64, PRECISION=products,
        USE_TMA=tma, stride_wk=w_row, C=c, **tiles, STAGES=config.num_stages,
        **epilogue_constants(epilogue),
    )  # fmt: skip
    slots, sums = -(-m // block_m), (block_m, pixels, images_of_tile(block_m, pixels))
    programs = slots * -(-n // block_n) * g.groups
    w_box = Box(g.groups * n, w_row, w_row, (block_n, block_k)) if tma else None
    if plan.kernel == "matmul":
        constants |= dict(
            gate_ptr=None, stride_xm=plan.row_stride, PIXELS=pixels, EVEN_C=c % block_k == 0,
            VEC_C=power_of_two_divisor(c, plan.row_stride),
        )  # fmt: skip
        x_box = Box(m, c, plan.row_stride, (block_m, block_k)) if tma else None
        return PlainRecipe(matmul_kernel, programs, constants, x_box, w_box, config, problem, slots, sums)

    sn, sc, sd, sh, sw = plan.strides
    constants |= axis_constants(g)
    constants |= dict(
        stride_xn=sn, stride_xd=sd, stride_xh=sh, stride_xw=sw, GROUPS=g.groups, PADDED=any(g.padding + g.padding_after)
    )
    if plan.kernel == "conv_fprop":
        constants["VEC_X"] = power_of_two_divisor(sn, sd, sh, sw)
        return PlainRecipe(conv_fprop_kernel, programs, constants, None, w_box, config, problem, slots, sums)
    outer = (sd, sh, sw) if plan.weight_channels_last else (sc, sd, sh)
    constants |= dict(
        stride_xc=sc, W_CHANNELS_LAST=plan.weight_channels_last, VEC_X=power_of_two_divisor(sn, *outer),
        VEC_W=power_of_two_divisor(w_row), **pack_constants(plan.pack, c, n),
    )  # fmt: skip
    return PlainRecipe(conv_flat_kernel, programs, constants, None, w_box, config, problem, slots, sums)
