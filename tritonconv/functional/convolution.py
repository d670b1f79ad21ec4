"""Convolutions, transposed convolutions and the linear layer, with the functions of torch.nn.functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.conv.call import CONVOLUTIONS, LINEAR

__all__ = [
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
]  # fmt: skip

Size = int | Sequence[int]
Padding = str | int | Sequence[int]


# No batch norm and no residual.
NO_EPILOGUE = (None,) * 5
CONV, CONV_TRANSPOSE = CONVOLUTIONS["conv"], CONVOLUTIONS["conv_transpose"]


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
    numbers = (1, stride, padding, dilation, groups)
    y: Tensor = CONV((input, weight, bias, *NO_EPILOGUE), (numbers, "conv1d", 0.0, None))
    return y


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
    numbers = (2, stride, padding, dilation, groups)
    y: Tensor = CONV((input, weight, bias, *NO_EPILOGUE), (numbers, "conv2d", 0.0, None))
    return y


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
    numbers = (3, stride, padding, dilation, groups)
    y: Tensor = CONV((input, weight, bias, *NO_EPILOGUE), (numbers, "conv3d", 0.0, None))
    return y


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """1-d transposed convolution, as `torch.nn.functional.conv_transpose1d`.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        weight: (C, K/groups, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in samples of the output.
        padding: samples removed on both sides of each axis of the output.
        output_padding: samples added after the last element of each axis of the output, fewer than the stride or the
            dilation.

    Returns:
        (N, K, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; a result without samples.
        TypeError: arguments of a wrong type.

    >>> conv_transpose1d(torch.ones(1, 1, 2), torch.ones(1, 1, 3), stride=2).tolist()
    [[[1.0, 1.0, 2.0, 1.0, 1.0]]]
    """
    numbers = (1, stride, padding, output_padding, groups, dilation)
    y: Tensor = CONV_TRANSPOSE((input, weight, bias, *NO_EPILOGUE), (numbers, "conv_transpose1d", 0.0, None))
    return y


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """2-d transposed convolution, as `torch.nn.functional.conv_transpose2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        weight: (C, K/groups, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in pixels of the output, one or two numbers.
        padding: pixels removed on both sides of each axis of the output.
        output_padding: pixels added after the last element of each axis of the output, fewer than the stride or the
            dilation.

    Returns:
        (N, K, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; a result without pixels.
        TypeError: arguments of a wrong type.

    >>> conv_transpose2d(torch.ones(1, 4, 8, 8), torch.ones(4, 2, 2, 2), stride=2).shape
    torch.Size([1, 2, 16, 16])
    """
    numbers = (2, stride, padding, output_padding, groups, dilation)
    y: Tensor = CONV_TRANSPOSE((input, weight, bias, *NO_EPILOGUE), (numbers, "conv_transpose2d", 0.0, None))
    return y


def conv_transpose3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """3-d transposed convolution, as `torch.nn.functional.conv_transpose3d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        weight: (C, K/groups, T, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in voxels of the output, one or three numbers.
        padding: voxels removed on both sides of each axis of the output.
        output_padding: voxels added after the last element of each axis of the output, fewer than the stride or the
            dilation.

    Returns:
        (N, K, O, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; a result without voxels.
        TypeError: arguments of a wrong type.

    >>> conv_transpose3d(torch.ones(1, 4, 3, 3, 3), torch.ones(4, 2, 3, 3, 3), stride=2, output_padding=1).shape
    torch.Size([1, 2, 8, 8, 8])
    """
    numbers = (3, stride, padding, output_padding, groups, dilation)
    y: Tensor = CONV_TRANSPOSE((input, weight, bias, *NO_EPILOGUE), (numbers, "conv_transpose3d", 0.0, None))
    return y


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
    y: Tensor = LINEAR((input, weight, bias, *NO_EPILOGUE), ((), "linear", 0.0, None))
    return y
