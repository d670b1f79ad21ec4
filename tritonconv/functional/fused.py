"""A convolution with the layers after it: batch norm, residual addition and activation."""

from __future__ import annotations

from typing import Any, Literal

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.functional.convolution import Padding, Size
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.conv.norm_call import CONV_NORMS
from tritonconv.ops.core.activation import parse_activation

__all__ = [
    "conv1d_bn_act", "conv2d_bn_act", "conv3d_bn_act", "conv_transpose1d_bn_act", "conv_transpose2d_bn_act",
    "conv_transpose3d_bn_act",
]  # fmt: skip


def conv1d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv1d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> conv1d_bn_act(torch.ones(1, 1, 4), -torch.ones(1, 1, 3), None, None, None, None, None, activation="relu").tolist()
    [[[0.0, 0.0]]]
    """
    return _conv_bn_act(
        "conv", 1, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, (stride, padding, dilation, groups),
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv2d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv2d(input, weight, bias)) + residual) in one kernel.

    The batch norm is folded in fp32 inside the kernel, from its own tensors: weights are not multiplied by a scale and
    rounded again.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as for `conv2d`.
        running_mean, running_var: (K,); both None: no batch norm.
        bn_weight, bn_bias: (K,) or None.
        training: normalize with the batch's own statistics, which the convolution computes from its accumulators, and
            update the running statistics in place. A bias has no effect then, and its gradient is zero.
        momentum: weight of the batch in the running statistics; eps: added to the variance.
        activation: None, a name ("relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh",
            "hardswish", "hardsigmoid", "mish", "softplus", "hardtanh"), a tuple of a name and its numbers, such as
            ("leaky_relu", 0.2), or a module of torch.nn.
        residual: added before the activation, of the output's size.

    Returns:
        (N, K, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.
        ValueError: an unknown activation, or affine parameters without statistics.

    >>> ones = torch.ones(2)
    >>> x, w = torch.ones(1, 1, 2, 2), torch.ones(2, 1, 1, 1)
    >>> conv2d_bn_act(x, w, None, 3 * ones, ones, None, None, eps=0.0, activation=("leaky_relu", 0.5))[0, 0, 0, 0].item()
    -1.0
    """
    return _conv_bn_act(
        "conv", 2, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, (stride, padding, dilation, groups),
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv3d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv3d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w = torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    >>> conv3d_bn_act(x, w, None, None, None, None, None, activation="relu6").item()
    6.0
    """
    return _conv_bn_act(
        "conv", 3, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, (stride, padding, dilation, groups),
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv_transpose1d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    activation: object = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv_transpose1d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w = torch.ones(1, 1, 2), -torch.ones(1, 1, 2)
    >>> conv_transpose1d_bn_act(x, w, None, None, None, None, None, stride=2, activation="relu").tolist()
    [[[0.0, 0.0, 0.0, 0.0]]]
    """
    return _conv_bn_act(
        "conv_transpose", 1, input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        (stride, padding, output_padding, groups, dilation), training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv_transpose2d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    activation: object = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv_transpose2d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w, ones = torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, 2), torch.ones(2)
    >>> conv_transpose2d_bn_act(x, w, None, 3 * ones, ones, None, None, stride=2, eps=0.0).unique().item()
    -2.0
    """
    return _conv_bn_act(
        "conv_transpose", 2, input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        (stride, padding, output_padding, groups, dilation), training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv_transpose3d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    activation: object = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv_transpose3d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w = torch.ones(1, 1, 1, 1, 1), 7 * torch.ones(1, 1, 2, 2, 2)
    >>> conv_transpose3d_bn_act(x, w, None, None, None, None, None, activation="relu6").unique().item()
    6.0
    """
    return _conv_bn_act(
        "conv_transpose", 3, input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        (stride, padding, output_padding, groups, dilation), training, momentum, eps, activation, residual,
    )  # fmt: skip


def _conv_bn_act(
    kind: Literal["conv", "conv_transpose"], nd: int, input: Tensor, weight: Tensor, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    numbers: tuple[Any, ...], training: bool, momentum: float, eps: float, activation: object, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`numbers`: the arguments of torch's convolution after the bias, in the same order."""
    op, act = f"{kind}{nd}d_bn_act", None if activation is None else parse_activation(activation)
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual)
    y: Tensor
    if training:
        y = CONV_NORMS[kind](tensors, ((nd, *numbers), op, eps, act, momentum, ""))
        return y
    affine_alone = running_mean is None and (bn_weight is not None or bn_bias is not None)
    if affine_alone or (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: expected running_mean and running_var to be defined when training=False")
    y = CONVOLUTIONS[kind](tensors, ((nd, *numbers), op, eps, act))
    return y
