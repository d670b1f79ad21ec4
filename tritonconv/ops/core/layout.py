"""Memory formats: the format of a tensor, the format of a result, and the type of sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "as_dense", "as_format", "dense_strides", "empty_like", "empty_output", "is_dense", "keeps_channels_last", "pitch_of",
    "readable", "reads_in_place", "same_elements", "suggests_channels_last", "wide", "written_densely",
]  # fmt: skip


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch considers `x` (N, C, *spatial) channels-last; ambiguous strides count as contiguous.

    This decides the format of results, whatever copies are made before. Follows c10's is_channels_last_strides, for one to
    three spatial dimensions. For one and three, only some of torch's functions give channels-last results, and not on all
    devices; our results are channels-last whenever an input is.
    """
    sizes, strides = x.shape, x.stride()
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
    strides = [1] * len(shape)
    order = (1, *range(len(shape) - 1, 1, -1), 0) if channels_last else range(len(shape) - 1, -1, -1)
    step = 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def pitch_of(x: Tensor) -> int | None:
    """Elements from one pixel to the next if `x` is some channels of a wider channels-last tensor, else None."""
    sizes, strides = x.shape, x.stride()
    inner = next((d for d in (*range(len(sizes) - 1, 1, -1), 0) if sizes[d] > 1), None)
    if inner is None or x.numel() == 0 or (sizes[1] > 1 and strides[1] != 1):
        return None
    pitch, step = strides[inner], strides[inner]
    for d in (*range(len(sizes) - 1, 1, -1), 0):
        if sizes[d] > 1 and strides[d] != step:
            return None
        step *= sizes[d]
    # A single channel could belong to a tensor of any format.
    return pitch if pitch > sizes[1] > 1 else None


def same_elements(sizes: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether both strides reach the same elements; strides of axes of size one do not matter."""
    return all(n <= 1 or s == o for n, s, o in zip(sizes, strides, others, strict=True))


def is_dense(x: Tensor, channels_last: bool) -> bool:
    """Whether `x` has exactly the elements of a dense tensor in that format."""
    return same_elements(x.shape, x.stride(), dense_strides(x.shape, channels_last))


def reads_in_place(x: Tensor, channels_last: bool) -> bool:
    """Whether a kernel of that format can read `x`: the channels, or else the elements of a row, are adjacent in memory."""
    axis = 1 if channels_last else -1
    return x.stride(axis) == 1 or x.shape[axis] == 1


def readable(x: Tensor, channels_last: bool) -> Tensor:
    """`x` itself if kernels of that format can read it in place, else a copy that is dense in that format."""
    return x if reads_in_place(x, channels_last) else as_format(x, channels_last)


def keeps_channels_last(x: Tensor) -> bool:
    """Whether torch would give channels-last strides to a result with the format of `x`.

    This includes tensors for which `suggests_channels_last` is false only because of the strides of axes of size one.
    """
    return suggests_channels_last(x) or (is_dense(x, True) and not is_dense(x, False))


def as_dense(x: Tensor) -> Tensor:
    """`x`, or a dense copy in the format that torch would give a result of it."""
    return as_format(x, keeps_channels_last(x))


def empty_like(x: Tensor) -> Tensor:
    """A dense result of x's size and dtype without its contents, in the format that torch would give it."""
    return empty_output(x, tuple(x.shape), keeps_channels_last(x), x.dtype)


def empty_output(x: Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Tensor:
    """An uninitialized result on `x`'s device, dense in that format; for real and fake tensors."""
    return torch.empty_strided(shape, dense_strides(shape, channels_last), dtype=dtype, device=x.device)


def as_format(x: Tensor, channels_last: bool) -> Tensor:
    """`x` itself if it is dense in that format, else a copy that is."""
    return x if is_dense(x, channels_last) else empty_output(x, tuple(x.shape), channels_last, x.dtype).copy_(x)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over elements of this type are computed and stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def written_densely(*vectors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Contiguous stand-ins for vectors of any strides, whose values go back to them after the block."""
    dense = [None if t is None else t.contiguous() for t in vectors]
    yield dense
    for old, new in zip(vectors, dense, strict=True):
        if old is not None and new is not None and new is not old:
            old.copy_(new)
