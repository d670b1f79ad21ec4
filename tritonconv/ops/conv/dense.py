"""Convolution forward on Triton: what is checked, and the launch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, power_of_two_divisor
from tritonconv.ops.conv.plan import ConvPlan, pack_constants, plan_convolution
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.epilogue import Epilogue, check_device, check_dtype
from tritonconv.ops.core.launch import Box, Launch, aligned, axis_constants, config_for, device_of, launch, precision
from tritonconv.ops.core.layout import as_format, empty_output, is_dense, suggests_channels_last
from tritonconv.tuning import Device, Problem

__all__ = ["bias_gradient", "check_convolution", "convolve_dense", "output_format", "plan_for", "problem_of"]


def check_convolution(op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry) -> None:
    """Raise what torch raises for a wrong dtype, device or size; the geometry itself is right already."""
    check_dtype(op, x, "weight", weight, geometry)
    check_device(op, x, "weight", weight, geometry)
    epilogue.check(op, geometry, x, geometry.out_channels, geometry.output_shape)


def output_format(x: Tensor, weight: Tensor) -> bool:
    """Whether the result is channels-last: torch's rule, the input or the weight is."""
    return suggests_channels_last(x) or suggests_channels_last(weight)


def bias_gradient(dy: Tensor) -> Tensor:
    """Gradient of a convolution's bias by torch, where no kernel computes it on its way."""
    return dy.sum((0, *range(2, dy.dim())))


def plan_for(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> ConvPlan:
    """The plan for these tensors."""
    return plan_convolution(
        geometry, x.stride(), weight_contiguous=is_dense(weight, False), weight_channels_last=is_dense(weight, True)
    )


def convolve_dense(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: Literal["conv", "matmul"],
    target: Target = WHOLE, gate: Tensor | None = None,
) -> Result:  # fmt: skip
    """A batched convolution of tensors that `check_convolution` accepts.

    Args:
        kind: "matmul" takes the TF32 switch of matrix products.
        target: where results go.
        gate: [N, C], what x is multiplied by on the way in, which the kernel `matmul` alone can.
    """
    channels_last, shape = output_format(x, weight), geometry.output_shape
    plan = plan_for(x, weight, geometry)
    if 0 in shape:
        return Result(empty_output(x, shape, channels_last, x.dtype))
    x = as_format(x, True) if plan.copy_input else x
    weight = as_format(weight, plan.weight_channels_last) if plan.copy_weight else weight
    problem = problem_of(plan, x.dtype, precision(x.dtype, kind) == "tf32", device_of(x.device))
    problem = replace(problem, statistics=not target.is_plain, computed=gate is not None)
    return _launch(plan, problem, x, weight, epilogue.arranged(channels_last), channels_last, target, gate)


def problem_of(plan: ConvPlan, dtype: torch.dtype, tf32: bool, device: Device) -> Problem:
    """What the choice of a config sees of a plan."""
    return Problem(plan.kernel, plan.geometry, str(dtype)[6:], tf32, plan.vector > 1, device, pack=plan.pack)


def _launch(
    plan: ConvPlan, problem: Problem, x: Tensor, weight: Tensor, epilogue: Epilogue, channels_last: bool, target: Target,
    gate: Tensor | None,
) -> Result:  # fmt: skip
    """Launch a plan with the config that is chosen or forced; tensors lie as the plan has them."""
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
    tma = tiles.pop("USE_TMA") and device.tma and plan.pack == 1 and aligned(weight) and w_row * problem.itemsize % 16 == 0
    if plan.kernel == "matmul":
        # Neither is a computed operand read by descriptor.
        tma = tma and not problem.computed and aligned(x) and plan.row_stride * problem.itemsize % 16 == 0
    pixels = math.prod(g.output)
    slots = -(-m // block_m)
    result, written = target.result(x, g.output_shape, channels_last, slots, block_m, pixels)
    arguments: dict[str, Any] = written | epilogue.arguments() | axis_constants(g) | dict(
        M=m, K=n, VEC_K=power_of_two_divisor(n, target.pitch or n), stride_y=target.pitch,
        POOL=target.images(block_m, pixels),
        Y_CHANNELS_LAST=channels_last, INDEX_64=plan.index_64, PRECISION="tf32" if problem.tf32 else "ieee",
        USE_TMA=tma, stride_wk=w_row, C=c, **tiles, STAGES=config.num_stages,
        w=Box(g.groups * n, w_row, w_row, (block_n, block_k)).of(weight) if tma else weight,
    )  # fmt: skip
    programs = slots * -(-n // block_n) * g.groups
    if plan.kernel == "matmul":
        arguments |= dict(
            x=Box(m, c, plan.row_stride, (block_m, block_k)).of(x) if tma else x, gate_ptr=gate, stride_xm=plan.row_stride,
            PIXELS=pixels, EVEN_C=c % block_k == 0, VEC_C=power_of_two_divisor(c, plan.row_stride),
        )  # fmt: skip
        launch(Launch(matmul_kernel, programs, arguments, problem, config), x.device)
        return result

    sn, sc, sd, sh, sw = plan.strides
    arguments |= dict(
        x_ptr=x, stride_xn=sn, stride_xd=sd, stride_xh=sh, stride_xw=sw, GROUPS=g.groups,
        PADDED=g.is_padded,
    )  # fmt: skip
    if plan.kernel == "conv_fprop":
        arguments["VEC_X"] = power_of_two_divisor(sn, sd, sh, sw)
        launch(Launch(conv_fprop_kernel, programs, arguments, problem, config), x.device)
        return result
    outer = (sd, sh, sw) if plan.weight_channels_last else (sc, sd, sh)
    arguments |= dict(
        stride_xc=sc, W_CHANNELS_LAST=plan.weight_channels_last, VEC_X=power_of_two_divisor(sn, *outer),
        VEC_W=power_of_two_divisor(w_row), **pack_constants(plan.pack, c, n),
    )  # fmt: skip
    launch(Launch(conv_flat_kernel, programs, arguments, problem, config), x.device)
    return result
