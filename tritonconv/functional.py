"""torch.nn.functional's names and signatures on our kernels, and fused convolutions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.activation import parse_activation
from tritonconv.ops.backend import decide
from tritonconv.ops.dispatch import convolution
from tritonconv.ops.dispatch import linear as _linear
from tritonconv.ops.epilogue import BatchNorm, Epilogue

__all__ = ["conv1d", "conv1d_bn_act", "conv2d", "conv2d_bn_act", "conv3d", "conv3d_bn_act", "linear"]

Size = int | Sequence[int]
Padding = str | int | Sequence[int]


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """1-d convolution (cross-correlation), as `torch.nn.functional.conv1d`.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        weight: (K, C/groups, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in samples.
        padding: zeros on both sides, "same" or "valid".

    Returns:
        (N, K, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.

    >>> conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 3)).tolist()
    [[[3.0, 3.0]]]
    """
    return convolution("conv1d", input, weight, Epilogue(bias), 1, stride, padding, dilation, groups)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """2-d convolution (cross-correlation), as `torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        weight: (K, C/groups, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in pixels, one or two numbers.
        padding: zeros on both sides of each axis, "same" or "valid".

    Returns:
        (N, K, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.

    >>> conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding="same").shape
    torch.Size([1, 1, 4, 4])
    """
    return convolution("conv2d", input, weight, Epilogue(bias), 2, stride, padding, dilation, groups)


def conv3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """3-d convolution (cross-correlation), as `torch.nn.functional.conv3d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        weight: (K, C/groups, T, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in voxels, one or three numbers.
        padding: zeros on both sides of each axis, "same" or "valid".

    Returns:
        (N, K, O, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.

    >>> conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 2, 2, 2), stride=2).shape
    torch.Size([1, 3, 2, 2, 2])
    """
    return convolution("conv3d", input, weight, Epilogue(bias), 3, stride, padding, dilation, groups)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias, as `torch.nn.functional.linear`.

    Args:
        input: (*, C), fp16, bf16, fp32 or fp64.
        weight: (K, C), of the input's dtype.
        bias: (K,), of the input's dtype.

    Returns:
        (*, K).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])
    """
    return _linear(input, weight, Epilogue(bias))


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
        1, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, stride, padding, dilation, groups, training,
        momentum, eps, activation, residual,
    )  # fmt: skip


def conv2d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv2d(input, weight, bias)) + residual) in one kernel.

    The batch norm is folded in fp32 inside the kernel, from its own tensors: weights are not rounded with a scale in them.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as `conv2d`.
        running_mean, running_var: (K,); both None: no batch norm.
        bn_weight, bn_bias: (K,) or None.
        training: normalize with the batch's statistics and update the running ones; runs on torch so far.
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
        2, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, stride, padding, dilation, groups, training,
        momentum, eps, activation, residual,
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
        3, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, stride, padding, dilation, groups, training,
        momentum, eps, activation, residual,
    )  # fmt: skip


def _conv_bn_act(
    nd: int, input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, stride: Size, padding: Padding, dilation: Size, groups: int,
    training: bool, momentum: float, eps: float, activation: object, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    op = f"conv{nd}d_bn_act"
    act = parse_activation(activation)
    if training:
        _no_training_kernel(op, input, weight)
        conv: Any = getattr(torch.nn.functional, f"conv{nd}d")
        y = conv(input, weight, bias, stride, padding, dilation, groups)
        y = torch.nn.functional.batch_norm(
            y, running_mean, running_var, bn_weight, bn_bias, training=True, momentum=momentum, eps=eps
        )
        return Epilogue(residual=residual, activation=act).torch(y)
    affine_alone = running_mean is None and (bn_weight is not None or bn_bias is not None)
    if affine_alone or (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: expected running_mean and running_var to be defined when training=False")
    norm = None
    if running_mean is not None and running_var is not None:
        norm = BatchNorm(running_mean, running_var, bn_weight, bn_bias, eps)
    return convolution(op, input, weight, Epilogue(bias, norm, residual, act), nd, stride, padding, dilation, groups)


def _no_training_kernel(op: str, input: Tensor, weight: Tensor) -> None:
    decide((input, weight), None, lambda: op, "batch norm with the batch's own statistics has no kernel yet")
