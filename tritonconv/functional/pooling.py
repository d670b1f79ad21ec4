"""Maxima and minima of windows, and max unpooling. torch.nn.functional has all but the minima, `-max_pool(-input)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.pool.call import pool, pool_with_indices, unpool

__all__ = [
    "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices", "max_pool3d",
    "max_pool3d_with_indices", "max_unpool1d", "max_unpool2d", "max_unpool3d", "min_pool1d", "min_pool2d", "min_pool3d",
]  # fmt: skip

Ints = int | Sequence[int]


def _extremum(kind: Any, nd: int, return_indices: bool, *arguments: Any) -> Any:
    return (pool_with_indices if return_indices else pool)(kind, *arguments, nd=nd)


def max_pool1d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Maximum of every window, as `torch.nn.functional.max_pool1d`.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, a number; stride: between windows, by default the window's size.
        padding: elements of negative infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return the positions too.

    Returns:
        A tensor of the input's dtype, channels-last if the input is, else contiguous. With `return_indices` also the int64
        positions in the input's planes, as `max_unpool1d` expects them.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> max_pool1d(torch.arange(6.0).view(1, 1, 6), 2).flatten().tolist()
    [1.0, 3.0, 5.0]
    """
    return _extremum("max", 1, return_indices, input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool1d_with_indices(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`max_pool1d` with the positions of the maxima, as `torch.nn.functional.max_pool1d_with_indices`.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, a number; stride: between windows, by default the window's size.
        padding: elements of negative infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: has no effect; it is part of torch's signature.

    Returns:
        (pooled, indices): of the input's dtype, and int64 positions in the input's planes; channels-last if the input is,
        else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> [t.flatten().tolist() for t in max_pool1d_with_indices(torch.arange(6.0).view(1, 1, 6), 2)]
    [[1.0, 3.0, 5.0], [1, 3, 5]]
    """
    return pool_with_indices("max", input, kernel_size, stride, padding, dilation, ceil_mode, nd=1)


def max_pool2d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Maximum of every window, as `torch.nn.functional.max_pool2d`.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 2; stride: between windows, by default the window's size.
        padding: elements of negative infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return the positions too.

    Returns:
        A tensor of the input's dtype, channels-last if the input is, else contiguous. With `return_indices` also the int64
        positions in the input's planes, as `max_unpool2d` expects them.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist()
    [5.0, 7.0, 13.0, 15.0]
    """
    return _extremum("max", 2, return_indices, input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_with_indices(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`max_pool2d` with the positions of the maxima, as `torch.nn.functional.max_pool2d_with_indices`.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 2; stride: between windows, by default the window's size.
        padding: elements of negative infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: has no effect; it is part of torch's signature.

    Returns:
        (pooled, indices): of the input's dtype, and int64 positions in the input's planes; channels-last if the input is,
        else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> [t.flatten().tolist() for t in max_pool2d_with_indices(torch.arange(16.0).view(1, 1, 4, 4), 2)]
    [[5.0, 7.0, 13.0, 15.0], [5, 7, 13, 15]]
    """
    return pool_with_indices("max", input, kernel_size, stride, padding, dilation, ceil_mode, nd=2)


def max_pool3d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Maximum of every window, as `torch.nn.functional.max_pool3d`.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 3; stride: between windows, by default the window's size.
        padding: elements of negative infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return the positions too.

    Returns:
        A tensor of the input's dtype, channels-last if the input is, else contiguous. With `return_indices` also the int64
        positions in the input's planes, as `max_unpool3d` expects them.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> max_pool3d(torch.arange(64.0).view(1, 1, 4, 4, 4), 2).flatten().tolist()
    [21.0, 23.0, 29.0, 31.0, 53.0, 55.0, 61.0, 63.0]
    """
    return _extremum("max", 3, return_indices, input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool3d_with_indices(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`max_pool3d` with the positions of the maxima, as `torch.nn.functional.max_pool3d_with_indices`.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 3; stride: between windows, by default the window's size.
        padding: elements of negative infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: has no effect; it is part of torch's signature.

    Returns:
        (pooled, indices): of the input's dtype, and int64 positions in the input's planes; channels-last if the input is,
        else contiguous.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> [t.flatten().tolist() for t in max_pool3d_with_indices(torch.arange(64.0).view(1, 1, 4, 4, 4), 2)]
    [[21.0, 23.0, 29.0, 31.0, 53.0, 55.0, 61.0, 63.0], [21, 23, 29, 31, 53, 55, 61, 63]]
    """
    return pool_with_indices("max", input, kernel_size, stride, padding, dilation, ceil_mode, nd=3)


def min_pool1d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Minimum of every window: `-max_pool1d(-input)`, with the same arguments.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, a number; stride: between windows, by default the window's size.
        padding: elements of infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return the positions too.

    Returns:
        A tensor of the input's dtype, channels-last if the input is, else contiguous. With `return_indices` also the int64
        positions in the input's planes, as `max_unpool1d` expects them.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> min_pool1d(torch.arange(6.0).view(1, 1, 6), 2).flatten().tolist()
    [0.0, 2.0, 4.0]
    """
    return _extremum("min", 1, return_indices, input, kernel_size, stride, padding, dilation, ceil_mode)


def min_pool2d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Minimum of every window: `-max_pool2d(-input)`, with the same arguments.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 2; stride: between windows, by default the window's size.
        padding: elements of infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return the positions too.

    Returns:
        A tensor of the input's dtype, channels-last if the input is, else contiguous. With `return_indices` also the int64
        positions in the input's planes, as `max_unpool2d` expects them.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> min_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2).flatten().tolist()
    [0.0, 2.0, 8.0, 10.0]
    """
    return _extremum("min", 2, return_indices, input, kernel_size, stride, padding, dilation, ceil_mode)


def min_pool3d(
    input: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """Minimum of every window: `-max_pool3d(-input)`, with the same arguments.

    A window with NaN gives NaN. If several elements are equal, the position of the first one is returned; if there are
    several NaNs, the position of the last one.

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        kernel_size: size of the window, one number or 3; stride: between windows, by default the window's size.
        padding: elements of infinity on both sides, at most half a window.
        dilation: distance between the elements of a window.
        ceil_mode: whether a last window may reach beyond the padding.
        return_indices: whether to return the positions too.

    Returns:
        A tensor of the input's dtype, channels-last if the input is, else contiguous. With `return_indices` also the int64
        positions in the input's planes, as `max_unpool3d` expects them.

    Raises:
        RuntimeError, TypeError: as in torch.

    >>> min_pool3d(torch.arange(64.0).view(1, 1, 4, 4, 4), 2).flatten().tolist()
    [0.0, 2.0, 8.0, 10.0, 32.0, 34.0, 40.0, 42.0]
    """
    return _extremum("min", 3, return_indices, input, kernel_size, stride, padding, dilation, ceil_mode)


def max_unpool1d(
    input: Tensor, indices: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Zeros, with the pooled values at the positions from which they came, as `torch.nn.functional.max_unpool1d`.

    On a GPU, indices outside the result are skipped. If two different values of a plane have the same index, the result has
    one of them, and it is not defined which.

    Args:
        input: (N, C, L) or without N; fp16, bf16, fp32 or fp64.
        indices: int64, of the input's size: positions in the result's planes.
        kernel_size, stride, padding: those of the pooling that is undone, as for `max_pool1d`.
        output_size: size of the result, with or without (N, C); by default the smallest possible input size of the pooling.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        ValueError: an output size that is no possible input size of the pooling.
        RuntimeError, TypeError: as in torch; on CPUs also for indices outside the result.

    >>> max_unpool1d(torch.tensor([[[5.0, 7.0]]]), torch.tensor([[[1, 2]]]), 2).flatten().tolist()
    [0.0, 5.0, 7.0, 0.0]
    """
    return unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor, indices: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Zeros, with the pooled values at the positions from which they came, as `torch.nn.functional.max_unpool2d`.

    On a GPU, indices outside the result are skipped. If two different values of a plane have the same index, the result has
    one of them, and it is not defined which.

    Args:
        input: (N, C, H, W) or without N; fp16, bf16, fp32 or fp64.
        indices: int64, of the input's size: positions in the result's planes.
        kernel_size, stride, padding: those of the pooling that is undone, as for `max_pool2d`.
        output_size: size of the result, with or without (N, C); by default the smallest possible input size of the pooling.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        ValueError: an output size that is no possible input size of the pooling.
        RuntimeError, TypeError: as in torch; on CPUs also for indices outside the result.

    >>> max_unpool2d(torch.tensor([[[[7.0]]]]), torch.tensor([[[[2]]]]), 2).flatten().tolist()
    [0.0, 0.0, 7.0, 0.0]
    """
    return unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor, indices: Tensor, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Zeros, with the pooled values at the positions from which they came, as `torch.nn.functional.max_unpool3d`.

    On a GPU, indices outside the result are skipped. If two different values of a plane have the same index, the result has
    one of them, and it is not defined which.

    Args:
        input: (N, C, D, H, W) or without N; fp16, bf16, fp32 or fp64.
        indices: int64, of the input's size: positions in the result's planes.
        kernel_size, stride, padding: those of the pooling that is undone, as for `max_pool3d`.
        output_size: size of the result, with or without (N, C); by default the smallest possible input size of the pooling.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        ValueError: an output size that is no possible input size of the pooling.
        RuntimeError, TypeError: as in torch; on CPUs also for indices outside the result.

    >>> max_unpool3d(torch.tensor([[[[[7.0]]]]]), torch.tensor([[[[[2]]]]]), 2).flatten().tolist()
    [0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    return unpool(3, input, indices, kernel_size, stride, padding, output_size)
