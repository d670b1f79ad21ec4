"""Means, sums and drawn elements of windows: torch.nn.functional's avg_pool and lp_pool, sum_pool and stochastic_pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.pool.call import lp_pool, pool
from tritonconv.ops.stochastic import stochastic_pool

__all__ = [
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "stochastic_pool2d",
    "sum_pool1d",
    "sum_pool2d",
    "sum_pool3d",
]  # fmt: skip

Ints = int | Sequence[int]


def avg_pool1d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:  # fmt: skip
    """Mean of every window, as `torch.nn.functional.avg_pool1d`; summed in fp32 (fp64 for fp64).

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, a number; stride: between windows, by default the window's size.
        padding: zeros on both sides, at most half a window.
        ceil_mode: whether a last window may reach beyond the padding; elements there do not count.
        count_include_pad: whether the padding counts.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> avg_pool1d(torch.arange(6.0).view(1, 1, 6), 2).flatten().tolist()
    [0.5, 2.5, 4.5]
    """
    return pool(
        "avg", input, kernel_size, stride, padding, 1, ceil_mode, nd=1,
        include_pad=count_include_pad,
    )  # fmt: skip


def avg_pool2d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Mean of every window, as `torch.nn.functional.avg_pool2d`; summed in fp32 (fp64 for fp64).

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 2; stride: between windows, by default the window's size.
        padding: zeros on both sides, at most half a window.
        ceil_mode: whether a last window may reach beyond the padding; elements there do not count.
        count_include_pad: whether the padding counts.
        divisor_override: the number by which sums are divided; None: the window's size.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> avg_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    return pool(
        "avg", input, kernel_size, stride, padding, 1, ceil_mode, nd=2,
        include_pad=count_include_pad, divisor=divisor_override,
    )  # fmt: skip


def avg_pool3d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Mean of every window, as `torch.nn.functional.avg_pool3d`; summed in fp32 (fp64 for fp64).

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 3; stride: between windows, by default the window's size.
        padding: zeros on both sides, at most half a window.
        ceil_mode: whether a last window may reach beyond the padding; elements there do not count.
        count_include_pad: whether the padding counts.
        divisor_override: the number by which sums are divided; None: the window's size.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> avg_pool3d(torch.arange(64.0).view(1, 1, 4, 4, 4), 2).flatten().tolist()
    [10.5, 12.5, 18.5, 20.5, 42.5, 44.5, 50.5, 52.5]
    """
    return pool(
        "avg", input, kernel_size, stride, padding, 1, ceil_mode, nd=3,
        include_pad=count_include_pad, divisor=divisor_override,
    )  # fmt: skip


def sum_pool1d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, ceil_mode: bool = False
) -> Tensor:
    """Sum of every window: a mean whose divisor is 1; summed in fp32 (fp64 for fp64).

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, a number; stride: between windows, by default the window's size.
        padding: zeros on both sides, at most half a window.
        ceil_mode: whether a last window may reach beyond the padding.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> sum_pool1d(torch.arange(6.0).view(1, 1, 6), 2).flatten().tolist()
    [1.0, 5.0, 9.0]
    """
    return pool("avg", input, kernel_size, stride, padding, 1, ceil_mode, nd=1, divisor=1)


def sum_pool2d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, ceil_mode: bool = False
) -> Tensor:
    """Sum of every window: a mean whose divisor is 1; summed in fp32 (fp64 for fp64).

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 2; stride: between windows, by default the window's size.
        padding: zeros on both sides, at most half a window.
        ceil_mode: whether a last window may reach beyond the padding.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> sum_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist()
    [10.0, 18.0, 42.0, 50.0]
    """
    return pool("avg", input, kernel_size, stride, padding, 1, ceil_mode, nd=2, divisor=1)


def sum_pool3d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, ceil_mode: bool = False
) -> Tensor:
    """Sum of every window: a mean whose divisor is 1; summed in fp32 (fp64 for fp64).

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 3; stride: between windows, by default the window's size.
        padding: zeros on both sides, at most half a window.
        ceil_mode: whether a last window may reach beyond the padding.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> sum_pool3d(torch.arange(64.0).view(1, 1, 4, 4, 4), 2).flatten().tolist()
    [84.0, 100.0, 148.0, 164.0, 340.0, 356.0, 404.0, 420.0]
    """
    return pool("avg", input, kernel_size, stride, padding, 1, ceil_mode, nd=3, divisor=1)


def lp_pool1d(
    input: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """(sum of x ** p) ** (1 / p) of every window, as `torch.nn.functional.lp_pool1d`; in fp32 (fp64 for fp64).

    An odd p with a negative sum, and a fractional p with negative elements, give NaN, as in torch.

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        norm_type: p, an integer up to 16 or fractional; if infinite, the maximum of absolute values, or their minimum.
        kernel_size: size of the window, a number; stride: between windows, by default the window's size.
        ceil_mode: whether a last window may reach beyond the image.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous. The gradient of a zero sum is zero.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> lp_pool1d(torch.tensor([[[3.0, 4.0, 6.0, 8.0]]]), 2, 2).flatten().tolist()
    [5.0, 10.0]
    """
    return lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """(sum of x ** p) ** (1 / p) of every window, as `torch.nn.functional.lp_pool2d`; in fp32 (fp64 for fp64).

    An odd p with a negative sum, and a fractional p with negative elements, give NaN, as in torch.

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        norm_type: p, an integer up to 16 or fractional; if infinite, the maximum of absolute values, or their minimum.
        kernel_size: size of the window, one number or 2; stride: between windows, by default the window's size.
        ceil_mode: whether a last window may reach beyond the image.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous. The gradient of a zero sum is zero.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> lp_pool2d(torch.tensor([[[[3.0, 4.0], [0.0, 12.0]]]]), 2, 2).flatten().tolist()
    [13.0]
    """
    return lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """(sum of x ** p) ** (1 / p) of every window, as `torch.nn.functional.lp_pool3d`; in fp32 (fp64 for fp64).

    An odd p with a negative sum, and a fractional p with negative elements, give NaN, as in torch.

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        norm_type: p, an integer up to 16 or fractional; if infinite, the maximum of absolute values, or their minimum.
        kernel_size: size of the window, one number or 3; stride: between windows, by default the window's size.
        ceil_mode: whether a last window may reach beyond the image.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous. The gradient of a zero sum is zero.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> lp_pool3d(torch.tensor([[[[[3.0, 4.0], [0.0, 12.0]]]]]), 2, (1, 2, 2)).flatten().tolist()
    [13.0]
    """
    return lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


def stochastic_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Pooling that draws one element of each window (Zeiler and Fergus 2013, arXiv:1301.3557).

    In training an element x_i is drawn with probability x_i / sum(x), where negative elements count as zero; a window
    without any positive element gives zero. The gradient goes only to the drawn element. In eval mode the result is the
    mean with these probabilities, sum(x_i^2) / sum(x), and has the gradient of this formula. A window whose sum is not
    finite gives NaN.

    torch's generator gives one uniform number for each result, so that `torch.manual_seed` or `generator` determines the
    choice, on any backend. The number is a share of the window's sum. The drawn element is the first one, row by row, at
    which the cumulative sum exceeds that share; sums are in fp32 (fp64 for fp64). The numbers have the memory format of the
    result: a channels-last input gets other numbers than a contiguous one.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64; meant to follow an activation such as ReLU.
        kernel_size: an int or two; stride: the same; None: `kernel_size`.
        padding: an int or two: zeros on both sides, which are never drawn, at most half of `kernel_size`.
        ceil_mode: let the last windows reach beyond the image, as `torch.nn.functional.max_pool2d` does.
        training: draw an element; else compute the weighted mean.
        generator: the source of the numbers; None: torch's default generator of the input's device.

    Returns:
        (N, C, P, Q) or (C, P, Q), of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: sizes or dtypes that do not fit.
        TypeError: arguments of a wrong type.

    >>> x = torch.tensor([[[0.0, 3.0], [-1.0, 0.0]]])
    >>> stochastic_pool2d(x, 2).item()
    3.0
    >>> stochastic_pool2d(torch.tensor([[[1.0, 3.0]]]), (1, 2), training=False).item()
    2.5
    """
    return stochastic_pool(input, kernel_size, stride, padding, ceil_mode, training, generator)
