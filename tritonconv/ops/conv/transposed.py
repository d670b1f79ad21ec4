"""Transposed convolution forward on Triton: which kernel, how it sees its image, and the launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, power_of_two_divisor
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.gradients import dgrad_recipe
from tritonconv.ops.conv.plan import Strides, lift, row_stride
from tritonconv.ops.core.cache import Dense, Prepared
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import (
    PlainRecipe,
    Recipe,
    axis_constants,
    config_constants,
    config_for,
    device_of,
    epilogue_constants,
    precision,
)
from tritonconv.ops.core.layout import dense_strides, is_dense
from tritonconv.tuning import Device, Problem

__all__ = ["prepare_transposed"]


def prepare_transposed(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, statistics: bool = False
) -> Prepared:
    """Everything of a batched call but its tensors, which are what `check_convolution` wants; touches no memory.

    Args:
        x: (N, C, *spatial).
        weight: (C, K/groups, *filter).
        statistics: whether it is to be run with room for them.
    """
    g, channels_last = geometry, output_format(x, weight)
    output = Dense.of(g.output_shape, channels_last)
    # Channels that do not lie side by side are copied.
    copy_x = x.stride()[1] != 1 and g.in_channels > 1
    strides = lift(dense_strides(g.input_shape, True) if copy_x else x.stride(), (g.batch, g.in_channels, *g.input))
    folded = _folded(g)
    rows = None if folded is None else row_stride(folded, strides)
    recipe = None
    if 0 not in output.shape:
        products, device = precision(x.dtype, "conv_transpose"), device_of(x.device)
        if folded is None or rows is None:
            index_64 = _index_64(g, strides)
            recipe = dgrad_recipe(
                g.mirrored, strides, x.dtype, products, channels_last, index_64, device, epilogue, statistics=statistics
            )
        else:
            recipe = _up_recipe(g, folded, rows, x.dtype, products, channels_last, device, epilogue, statistics)
    return Prepared.of(
        "conv_dgrad" if rows is None else "conv_up", recipe, output, x, epilogue,
        Dense.of(x.shape, True) if copy_x else None, None if is_dense(weight, True) else Dense.of(weight.shape, True),
    )  # fmt: skip


def _index_64(g: ConvGeometry, strides: Strides) -> bool:
    """Whether 32-bit offsets could overflow: a large tensor, or a small view that strides over a large one."""
    # Taps outside the image have addresses too, before their mask is applied.
    reach = [(size + 2 * tap * d) * stride
             for size, tap, d, stride in zip(g.input, g.kernel, g.dilation, strides[2:], strict=True)]  # fmt: skip
    return g.mirrored.needs_int64 or g.batch * strides[0] + g.in_channels + sum(reach) > INT32_MAX


def _folded(g: ConvGeometry) -> ConvGeometry | None:
    """The product with the filter's taps as output channels, where every input pixel has output pixels of its own.

    So it is where the filter is the stride, nothing is cut off and nothing added, and along an axis of one pixel.
    """
    alone = all(
        (taps == step or size == 1) and (dilation == 1 or taps == 1)
        for taps, step, size, dilation in zip(g.kernel, g.stride, g.input, g.dilation, strict=True)
    )
    if g.groups > 1 or any(g.padding + g.output_padding) or not alone:
        return None
    one = (1, 1, 1)
    return replace(g, out_channels=g.taps * g.out_channels, kernel=one, stride=one, dilation=one, output=g.input)


def _up_recipe(
    g: ConvGeometry, folded: ConvGeometry, rows: int, dtype: torch.dtype, products: str, channels_last: bool,
    device: Device, epilogue: Epilogue, statistics: bool,
) -> Recipe:  # fmt: skip
    """The launch of a folded product; `rows`: elements from one pixel of the image to the next."""
    from tritonconv.kernels.conv_up import conv_up_kernel

    c, k = g.in_channels, g.out_channels
    vec_c, vec_k = power_of_two_divisor(c, rows), power_of_two_divisor(k)
    vectors = vec_c > 1 and vec_k > 1
    problem = Problem("conv_up", folded, str(dtype)[6:], products == "tf32", vectors, device, statistics=statistics)
    m, columns, _ = problem.gemm
    config = config_for(problem)
    tiles = config_constants(config)
    tiles_m = -(-m // tiles["BLOCK_M"])
    constants: dict[str, Any] = axis_constants(g) | dict(
        stride_xm=rows, stride_wc=columns, M=m, C=c, K=k, EVEN_C=c % tiles["BLOCK_K"] == 0, VEC_C=vec_c, VEC_K=vec_k,
        Y_CHANNELS_LAST=channels_last, INDEX_64=g.needs_int64 or m * rows > INT32_MAX,
        PRECISION=products, **epilogue_constants(epilogue), **tiles,
    )  # fmt: skip
    programs = tiles_m * -(-columns // tiles["BLOCK_N"])
    return PlainRecipe(conv_up_kernel, programs, constants, None, None, config, problem, g.taps * tiles_m)
