"""Convolution forward on Triton: what is checked, and the launch."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.epilogue import Epilogue
from tritonconv.ops.launch import Launch, descriptor, device_limits, epilogue_arguments, pick_config, precision
from tritonconv.ops.layout import as_format, empty_output, is_dense, suggests_channels_last
from tritonconv.ops.plan import ConvPlan, plan_convolution, power_of_two_divisor
from tritonconv.tuning import Problem

__all__ = ["build_launch", "check_convolution", "conv_forward", "output_format", "plan_for"]


def check_convolution(op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry) -> None:
    """Raise what torch raises for a wrong dtype, device or size; the geometry itself is right already."""
    if x.dtype != weight.dtype:
        raise RuntimeError(f"{op}: input type ({x.dtype}) and weight type ({weight.dtype}) should be the same ({geometry})")
    if x.device != weight.device:
        raise RuntimeError(
            f"{op}: expected all tensors to be on the same device, but got {x.device} for the input and {weight.device} "
            f"for the weight ({geometry})"
        )
    epilogue.check(op, str(geometry), x, geometry.out_channels, geometry.output_shape)


def output_format(x: Tensor, weight: Tensor) -> bool:
    """Whether the result is channels-last: torch's rule, the input or the weight is."""
    return suggests_channels_last(x) or suggests_channels_last(weight)


def plan_for(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> ConvPlan:
    """The plan for these tensors."""
    return plan_convolution(
        geometry, x.stride(), weight_contiguous=is_dense(weight, False), weight_channels_last=is_dense(weight, True)
    )


def conv_forward(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: Literal["conv", "matmul"]
) -> Tensor:
    """Launch the kernel for a batched input of a checked geometry; tensors are what `check_convolution` wants."""
    channels_last = output_format(x, weight)
    y = empty_output(x, geometry.output_shape, channels_last, x.dtype)
    if y.numel() == 0:
        return y
    if epilogue.residual is not None and not is_dense(epilogue.residual, channels_last):
        epilogue = epilogue._replace(residual=as_format(epilogue.residual, channels_last))
    plan = plan_for(x, weight, geometry)
    if plan.copy_input:
        x = as_format(x, True)
    if plan.copy_weight:
        weight = as_format(weight, plan.weight_channels_last)
    build_launch(x, weight, y, epilogue, plan, channels_last, kind).run(x.device)
    return y


def build_launch(
    x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, plan: ConvPlan, channels_last: bool,
    kind: Literal["conv", "matmul"],
) -> Launch:  # fmt: skip
    """The launch of a plan; tensors are laid out as it wants them. Depends on no memory, so meta tensors will do."""
    from tritonconv.kernels.conv_flat import conv_flat_kernel
    from tritonconv.kernels.conv_fprop import conv_fprop_kernel
    from tritonconv.kernels.matmul import matmul_kernel

    g, limits = plan.geometry, device_limits(x.device)
    m, n, k = g.gemm()
    c = g.in_channels // g.groups
    run = k if plan.kernel == "conv_flat" else c
    products = precision(x.dtype, kind)
    tensor_cores = x.element_size() == 2 or products == "tf32"
    config = pick_config(Problem(
        plan.kernel, m, n, k, run, g.groups, x.element_size(), tensor_cores, plan.vector > 1, limits.multiprocessors,
        limits.shared_memory,
    ))  # fmt: skip
    tiles = dict(config.kwargs)
    # A descriptor reads whole boxes of rows that start on 16 bytes.
    tma = tiles.pop("USE_TMA") and limits.tma and _on_16_bytes(weight, c if plan.kernel == "matmul" else k)
    box = [tiles["BLOCK_N"], tiles["BLOCK_K"]]
    programs = -(-m // tiles["BLOCK_M"]) * -(-n // tiles["BLOCK_N"]) * g.groups
    arguments: dict[str, Any] = dict(
        y_ptr=y, **epilogue_arguments(epilogue), M=m, K=n, VEC_K=power_of_two_divisor(n), Y_CHANNELS_LAST=channels_last,
        INDEX_64=plan.index_64, PRECISION=products, **tiles, STAGES=config.num_stages,
    )  # fmt: skip
    if plan.kernel == "matmul":
        tma = tma and _on_16_bytes(x, plan.row_stride)
        arguments |= dict(
            x=descriptor(x, m, c, plan.row_stride, [tiles["BLOCK_M"], tiles["BLOCK_K"]]) if tma else x,
            stride_xm=plan.row_stride, w=descriptor(weight, n, c, c, box) if tma else weight, stride_wk=c, C=c,
            PIXELS=g.output[0] * g.output[1] * g.output[2], EVEN_C=c % tiles["BLOCK_K"] == 0,
            VEC_C=power_of_two_divisor(c, plan.row_stride), USE_TMA=tma,
        )  # fmt: skip
        return Launch(matmul_kernel, programs, arguments, config.num_warps, config.num_stages)

    sn, sc, sd, sh, sw = plan.strides
    arguments |= dict(
        x_ptr=x, stride_xn=sn, stride_xd=sd, stride_xh=sh, stride_xw=sw, stride_wk=k, C=c, GROUPS=g.groups,
        w=descriptor(weight, g.groups * n, k, k, box) if tma else weight, USE_TMA=tma,
        PADDED=any(g.padding + g.padding_after),
    ) | dict(zip(
        ("D", "H", "W", "O", "P", "Q", "T", "R", "S", "STRIDE_D", "STRIDE_H", "STRIDE_W", "PAD_D", "PAD_H", "PAD_W",
         "DIL_D", "DIL_H", "DIL_W"),
        g.input + g.output + g.kernel + g.stride + g.padding + g.dilation, strict=True,
    ))  # fmt: skip
    if plan.kernel == "conv_fprop":
        arguments["VEC_X"] = power_of_two_divisor(sn, sd, sh, sw)
        return Launch(conv_fprop_kernel, programs, arguments, config.num_warps, config.num_stages)
    outer = (sd, sh, sw) if plan.weight_channels_last else (sc, sd, sh)
    arguments |= dict(
        stride_xc=sc, W_CHANNELS_LAST=plan.weight_channels_last, VEC_X=power_of_two_divisor(sn, *outer),
        VEC_W=power_of_two_divisor(k),
    )  # fmt: skip
    return Launch(conv_flat_kernel, programs, arguments, config.num_warps, config.num_stages)


def _on_16_bytes(matrix: Tensor, row_stride: int) -> bool:
    """Whether every row starts on 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and row_stride * matrix.element_size() % 16 == 0
