"""A depthwise convolution and the 1x1 convolution behind it as one launch: when that is worth it, and the launch.

The two parts one by one move x, twice what lies between, and y; one launch moves x and y alone, but a tile of output
channels computes what lies between for itself, again for each tile. Which takes less time is arithmetic (`is_worth_it`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, power_of_two_divisor
from tritonconv.ops.conv.depthwise import is_depthwise
from tritonconv.ops.conv.plan import lift
from tritonconv.ops.conv.route import convolve
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Launch, config_for, device_of, launch, precision
from tritonconv.ops.core.layout import as_format, empty_output, is_dense, suggests_channels_last
from tritonconv.tuning import INTERPRETER, Device, Problem
from tritonconv.tuning.families.separable import BETWEEN_INSTRUCTIONS

__all__ = ["is_faster", "is_separable", "is_worth_it", "one_by_one", "pointwise_geometry", "separable"]

WIDEST = 256
# Taps along an axis.
MOST_TAPS = 8


def pointwise_geometry(g: ConvGeometry, filters: int) -> ConvGeometry:
    """The 1x1 convolution behind a depthwise one."""
    return ConvGeometry.parse(g.output_shape, (filters, g.out_channels, *(1,) * g.nd), nd=g.nd)


def is_separable(g: ConvGeometry, dtype: torch.dtype, tf32: bool, device: Device) -> bool:
    """Whether the kernel can compute a depthwise convolution and a 1x1 one behind it."""
    # Products without tensor cores hold their operands in registers, beside which a depthwise tile has no room.
    products = dtype.itemsize == 2 or tf32 or device.arch == INTERPRETER.arch
    plain = g.nd == 2 and not g.transposed and is_depthwise(g) and g.out_channels == g.in_channels
    return plain and max(g.kernel) <= MOST_TAPS and products and dtype != torch.float64 and g.batch > 0


@functools.lru_cache(maxsize=4096)
def is_worth_it(g: ConvGeometry, filters: int, itemsize: int, device: Device) -> bool:
    """Whether one launch is predicted to take less time than two: bytes against bytes and instructions.

    One by one: x + 2 * between + y through memory. In one: x + y, and the instructions of what lies between, once for each
    tile of output channels. Instructions are FLOPs of the device's fp32 rate, halved, as it counts a multiply-add for two.
    """
    if device.arch == INTERPRETER.arch:
        return True
    x, _, between = g.elements()
    y = between // g.out_channels * filters
    apart = (x + 2 * between + y) * itemsize / device.bandwidth
    issue = device.flops["fp32"] / 2
    together = max((x + y) * itemsize / device.bandwidth, -(-filters // WIDEST) * between * BETWEEN_INSTRUCTIONS / issue)
    return together < apart


def is_faster(x: Tensor, g: ConvGeometry, filters: int) -> bool:
    """Whether one launch should compute a depthwise convolution of `x` and a 1x1 one behind it."""
    # As the kernel reads it: channels side by side.
    if not suggests_channels_last(x) or x.stride()[1] != 1:
        return False
    gpu, tf32 = device_of(x.device), precision(x.dtype, "conv") == "tf32"
    return is_separable(g, x.dtype, tf32, gpu) and is_worth_it(g, filters, x.element_size(), gpu)


def one_by_one(
    x: Tensor, first_weight: Tensor, first: Epilogue, weight: Tensor, epilogue: Epilogue, g: ConvGeometry
) -> Tensor:
    """What `separable` computes, in two launches; arguments as there, but in any format."""
    between = convolve(x, first_weight, first, g, "conv").y
    assert between is not None
    y = convolve(between, weight, epilogue, pointwise_geometry(g, weight.shape[0]), "conv").y
    assert y is not None
    return y


def separable(
    x: Tensor, first_weight: Tensor, first: Epilogue, weight: Tensor, epilogue: Epilogue, g: ConvGeometry
) -> Tensor:
    """epilogue(pointwise(first(depthwise(x)))), channels-last.

    Args:
        x: (N, C, H, W); copied where channels do not lie side by side.
        first_weight: (C, 1, R, S).
        first: bias, batch norm and activation of the depthwise part; no residual.
        weight: (K, C, 1, 1).
        epilogue: what follows the product.
        g: of the depthwise part.
    """
    from tritonconv.kernels.depthwise import WHOLE
    from tritonconv.kernels.separable import separable_kernel

    filters, products = weight.shape[0], precision(x.dtype, "conv")
    y = empty_output(x, (g.batch, filters, *g.output[1:]), True, x.dtype)
    if y.numel() == 0:
        return y
    device = device_of(x.device)
    x = x if x.stride()[1] == 1 else as_format(x, True)
    first_weight, weight = as_format(first_weight, False), weight if is_dense(weight, True) else as_format(weight, False)
    first = first.arranged(True)
    before = {
        f"{name.removesuffix('_ptr')}1_ptr": value for name, value in first.arguments().items() if name.endswith("_ptr")
    }
    constants = {f"{name[:3]}1{name[3:]}": value for name, value in first.constants().items()}
    sn, _, _, sh, sw = lift(x.stride(), (g.batch, g.in_channels, *g.input))
    sizes = pointwise_geometry(g, filters)
    problem = Problem("separable", sizes, str(x.dtype)[6:], products == "tf32", power_of_two_divisor(sn, sh) > 1, device)
    config = config_for(problem)
    tiles = {name: value for name, value in config.kwargs.items() if name != "USE_TMA"}
    r, s = g.kernel[1:]
    step = r if r * s <= WHOLE else 1
    p, q = g.output[1:]
    patches = g.batch * -(-p // 2) * -(-q // 2)
    programs = -(-4 * patches // tiles["BLOCK_M"]) * -(-filters // tiles["BLOCK_N"])
    reach = (g.input[1] + 2 * r * g.dilation[1] + 8 * g.stride[1]) * sh + (q + s * g.dilation[2]) * g.stride[2] * sw
    arguments: dict[str, Any] = dict(
        x_ptr=x, stride_xn=sn, stride_xh=sh, w1_ptr=first_weight, **before, w=weight, y_ptr=y,
        **epilogue.arranged(True).arguments(), counts_ptr=None, moments_ptr=None,
        N=g.batch, H=g.input[1], W=g.input[2], K=filters, P=p, Q=q, STEPS=r // step, C=g.in_channels, STRIDE_XW=sw, R=r,
        S=s, STRIDE_H=g.stride[1], STRIDE_W=g.stride[2], PAD_H=g.padding[1], PAD_W=g.padding[2], DIL_H=g.dilation[1],
        DIL_W=g.dilation[2], VEC_X=power_of_two_divisor(sn, sh), VEC_K=power_of_two_divisor(filters), Y_CHANNELS_LAST=True,
        INDEX_64=g.needs_int64 or sizes.needs_int64 or g.batch * sn + reach > INT32_MAX, PRECISION=products,
        **constants, **tiles, STEP_R=step,
    )  # fmt: skip
    launch(Launch(separable_kernel, programs, arguments, problem, config), x.device)
    return y
