"""Global averages from the sums that tiles of other kernels kept: the second stage of a tree.

A tile of TILE units (pixels, or blocks of them) may touch IMAGES images, of UNITS units each, and has a row of sums for
each of them, in order. A program owns one image and BLOCK_C channels and adds up its tiles' rows in a fixed order: the same
bits on every run.
"""

import triton
import triton.language as tl

__all__ = ["average_kernel", "configs"]


def configs() -> list[triton.Config]:
    """None to choose from: what it reads is small."""
    return []


@triton.jit
def average_kernel(
    sums_ptr,  # [tiles, IMAGES, C]
    mean_ptr,  # [N, C]
    C, UNITS, TILE, COUNT,
    IMAGES: tl.constexpr, VEC: tl.constexpr,  # VEC: a power of two up to 16 that divides C
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The mean of COUNT pixels for each image and channel."""
    C = C // VEC * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    n = tl.program_id(0) // tiles_c
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = n.to(tl.int64) * UNITS
    first = begin // TILE
    last = (begin + UNITS - 1) // TILE
    total = tl.zeros((BLOCK_S, BLOCK_C), sums_ptr.dtype.element_ty)
    for step in tl.range(0, tl.cdiv((last - first + 1).to(tl.int32), BLOCK_S)):
        tile = first + step * BLOCK_S + tl.arange(0, BLOCK_S)
        rows = tile * IMAGES + (n - tile * TILE // UNITS)
        mask = (tile <= last)[:, None] & (offs_c < C)[None, :]
        total += tl.load(sums_ptr + rows[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    mean = tl.sum(total, 0) / COUNT
    if mean_ptr.dtype.element_ty != tl.float64:
        mean = mean.to(tl.float32)
    offs = n.to(tl.int64) * C + offs_c
    tl.store(mean_ptr + offs, mean.to(mean_ptr.dtype.element_ty), mask=offs_c < C)
