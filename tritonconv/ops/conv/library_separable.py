"""torch.ops.tritonconv.separable: a depthwise convolution and the 1x1 convolution behind it, each with its epilogue.

For inference alone: in training both run on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.library import conv_geometry, ints, padding_numbers, put_together, taken_apart
from tritonconv.ops.conv.separable import one_by_one, pointwise_geometry, separable, takes
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import empty_output, suggests_channels_last

__all__ = ["call_separable"]


def call_separable(
    x: Tensor, first_weight: Tensor, first: Epilogue, weight: Tensor, epilogue: Epilogue, *, stride: Any, padding: Any,
    dilation: Any, groups: int,
) -> Tensor:  # fmt: skip
    """torch.ops.tritonconv.separable with both epilogues taken apart; the numbers are the depthwise part's."""
    del groups
    before, numbers1 = taken_apart(first)
    behind, numbers2 = taken_apart(epilogue)
    result: Tensor = torch.ops.tritonconv.separable(
        x, first_weight, *before[:5], weight, *behind, stride=ints(stride), **padding_numbers(padding),
        dilation=ints(dilation), **{f"first_{name}": value for name, value in numbers1.items()}, **numbers2,
    )  # fmt: skip
    return result


@torch.library.custom_op("tritonconv::separable", mutates_args=())
def _separable(
    x: Tensor, first_weight: Tensor, first_bias: Tensor | None, first_mean: Tensor | None, first_var: Tensor | None,
    first_gamma: Tensor | None, first_beta: Tensor | None, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *,
    stride: Sequence[int], padding: Sequence[int], padding_name: str, dilation: Sequence[int], first_eps: float,
    first_activation: str, first_a: float, first_b: float, eps: float, activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(conv1x1(act(bn(depthwise(x)))))) + residual), on Triton alone, in one launch where that is worth it."""
    first = put_together(
        (first_bias, first_mean, first_var, first_gamma, first_beta, None), eps=first_eps, activation=first_activation,
        a=first_a, b=first_b,
    )  # fmt: skip
    epilogue = put_together(
        (bias, running_mean, running_var, bn_weight, bn_bias, residual), eps=eps, activation=activation, a=a, b=b
    )
    g = conv_geometry(x.shape, first_weight.shape, stride, padding, padding_name, dilation, x.shape[1])
    run = separable if takes(x, g, weight.shape[0]) else one_by_one
    return run(x, first_weight, first, weight, epilogue, g)


@_separable.register_fake
def _(
    x: Tensor, first_weight: Tensor, *tensors: Any, stride: Sequence[int], padding: Sequence[int], padding_name: str,
    dilation: Sequence[int], **_numbers: Any,
) -> Tensor:  # fmt: skip
    g = conv_geometry(x.shape, first_weight.shape, stride, padding, padding_name, dilation, x.shape[1])
    weight = tensors[5]
    shape = pointwise_geometry(g, weight.shape[0]).output_shape
    channels_last = output_format(x, first_weight) or suggests_channels_last(weight)
    return empty_output(x, shape, channels_last, x.dtype)


@register_flop_formula(torch.ops.tritonconv.separable)
def _flops(
    x_shape: Sequence[int], w_shape: Sequence[int], *shapes: Any, stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], **_numbers: Any,
) -> int:  # fmt: skip
    g = conv_geometry(x_shape, w_shape, stride, padding, padding_name, dilation, x_shape[1])
    return 2 * (g.macs + pointwise_geometry(g, shapes[5][0]).macs)
