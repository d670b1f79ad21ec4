"""Memory formats: which one a tensor has, which one a result gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_format", "dense_strides", "empty_output", "is_dense", "suggests_channels_last"]


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch would say that `x` (N, C, *spatial) is channels-last; an ambiguous one counts as contiguous.

    Follows c10's is_channels_last_strides, for one to three spatial dimensions.
    """
    result: bool = _by_sizes(_suggests_channels_last, tuple(x.shape), x.stride())
    return result


def _by_sizes(function: Callable[..., Any], *sizes: Any) -> Any:
    """A cached function of sizes; symbolic ones, under torch.compile with dynamic shapes, cannot be keys of a cache."""
    try:
        return function(*sizes)
    except TypeError:
        return function.__wrapped__(*sizes)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _suggests_channels_last(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(sizes) - 1, 1, -1), 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Strides of a dense (N, C, *spatial) tensor in either format."""
    result: tuple[int, ...] = _by_sizes(_dense_strides, shape, channels_last)
    return result


@functools.lru_cache(maxsize=4096)
def _dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    strides = [1] * len(shape)
    order = (1, *range(len(shape) - 1, 1, -1), 0) if channels_last else range(len(shape) - 1, -1, -1)
    step = 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def is_dense(x: Tensor, channels_last: bool) -> bool:
    """Whether `x` has exactly the elements of a dense tensor in that format; strides of unit sizes do not matter."""
    return _is_dense(tuple(x.shape), x.stride(), channels_last)


@functools.lru_cache(maxsize=4096)
def _is_dense(sizes: tuple[int, ...], strides: tuple[int, ...], channels_last: bool) -> bool:
    expected = _dense_strides(sizes, channels_last)
    return all(n <= 1 or s == e for n, s, e in zip(sizes, strides, expected, strict=True))


def empty_output(x: Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Tensor:
    """An uninitialized result beside `x`, dense in that format."""
    return torch.empty_strided(shape, dense_strides(shape, channels_last), dtype=dtype, device=x.device)


def as_format(x: Tensor, channels_last: bool) -> Tensor:
    """`x` itself if it is dense in that format, else a copy that is."""
    return x if is_dense(x, channels_last) else empty_output(x, tuple(x.shape), channels_last, x.dtype).copy_(x)
