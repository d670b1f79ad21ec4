"""Transposed convolution forward on Triton: which kernel, how it sees its image, and the launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, power_of_two_divisor
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.gradients import launch_dgrad
from tritonconv.ops.conv.plan import Strides, lift, row_stride
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Launch, axis_constants, config_constants, config_for, device_of, launch, precision
from tritonconv.ops.core.layout import as_format, empty_output
from tritonconv.tuning import Problem

__all__ = ["convolve_transposed"]


def convolve_transposed(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, target: Target = WHOLE
) -> Result:
    """A batched transposed convolution of tensors that `check_convolution` accepts.

    Args:
        x: (N, C, *spatial).
        weight: (C, K/groups, *filter).
    """
    g, channels_last = geometry, output_format(x, weight)
    if 0 in g.output_shape:
        return Result(empty_output(x, g.output_shape, channels_last, x.dtype))
    # Channels that do not lie side by side are copied.
    x = x if x.stride()[1] == 1 or g.in_channels == 1 else as_format(x, True)
    weight, epilogue = as_format(weight, True), epilogue.arranged(channels_last)
    strides = lift(x.stride(), (g.batch, g.in_channels, *g.input))
    folded = _folded(g)
    rows = None if folded is None else row_stride(folded, strides)
    if folded is None or rows is None:
        index_64, products = _index_64(g, strides), precision(x.dtype, "conv_transpose")
        return launch_dgrad(x, weight, g.mirrored, products, channels_last, index_64, epilogue, target=target)
    return _launch_folded(x, weight, epilogue, g, folded, rows, channels_last, target)


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


def _launch_folded(
    x: Tensor, weight: Tensor, epilogue: Epilogue, g: ConvGeometry, folded: ConvGeometry, rows: int, channels_last: bool,
    target: Target,
) -> Result:  # fmt: skip
    """Launch a folded product; `rows`: elements from one pixel of the image to the next."""
    from tritonconv.kernels.conv_up import conv_up_kernel

    c, k, products = g.in_channels, g.out_channels, precision(x.dtype, "conv_transpose")
    vec_c, vec_k = power_of_two_divisor(c, rows), power_of_two_divisor(k)
    problem = Problem(
        "conv_up", folded, str(x.dtype)[6:], products == "tf32", vec_c > 1 and vec_k > 1, device_of(x.device),
        statistics=target.statistics,
    )  # fmt: skip
    m, columns, _ = problem.gemm
    config = config_for(problem)
    tiles = config_constants(config)
    tiles_m = -(-m // tiles["BLOCK_M"])
    result, written = target.result(x, g.output_shape, channels_last, g.taps * tiles_m)
    arguments: dict[str, Any] = written | epilogue.arguments() | axis_constants(g) | dict(
        x_ptr=x, stride_xm=rows, w=weight, stride_wc=columns, M=m, C=c, K=k, EVEN_C=c % tiles["BLOCK_K"] == 0, VEC_C=vec_c,
        VEC_K=vec_k, Y_CHANNELS_LAST=channels_last, INDEX_64=g.needs_int64 or m * rows > INT32_MAX,
        PRECISION=products, **tiles,
    )  # fmt: skip
    programs = tiles_m * -(-columns // tiles["BLOCK_N"])
    launch(Launch(conv_up_kernel, programs, arguments, problem, config), x.device)
    return result
