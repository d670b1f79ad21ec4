"""Where deformable convolution reads its image: four neighbors of a point, their weights, and what lies outside.

A point (h, w) is a tap's place plus its learned offset, in fp32 (fp64 for fp64) whatever the image's type. Its value is

    (1 - b) (1 - a) x[i, j] + (1 - b) a x[i, j + 1] + b (1 - a) x[i + 1, j] + b a x[i + 1, j + 1]

with i = floor(h), b = h - i, j = floor(w), a = w - j, where neighbors outside the image count zero, and all of it is zero
where h <= -1, h >= H, w <= -1 or w >= W. A NaN counts as a point of row (column) 0 with weights of NaN, as in torchvision's
CUDA code: its results are NaN, and no memory is touched that is not the image's.

Channels come in runs: a run is as many neighboring channels as share a weight group and an offset group, so that a point
is worked out once for a whole run. Tiles are [rows, GROUPS_K, BLOCK_C]: pixels, runs, and channels of a run; a run longer
than a tile is cut into blocks, several short ones share a tile.
"""

import triton
import triton.language as tl

__all__ = ["blend", "columns_of", "corner", "inside_of", "load_point", "runs_of", "weights_of"]


@triton.jit
def runs_of(group, unit, CG: tl.constexpr, CD: tl.constexpr, RUN: tl.constexpr, GROUPS_K: tl.constexpr):
    """(first channels in the weight group, which runs there are, offset groups) of a tile's runs, [GROUPS_K] each."""
    run = unit * GROUPS_K + tl.arange(0, GROUPS_K)
    there = run < CG // RUN
    run = tl.where(there, run, 0)
    return run * RUN, there, (group * CG + run * RUN) // CD


@triton.jit
def columns_of(unit, RUN: tl.constexpr, GROUPS_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a tile's columns, [GROUPS_K * BLOCK_C], the first of each run's blocks: their channels in the weight group."""
    # Not the reshaped channels, of which the compiler no longer knows that they lie side by side.
    column = tl.arange(0, GROUPS_K * BLOCK_C)
    if GROUPS_K == 1:
        return unit * RUN + column
    if BLOCK_C == RUN:
        return unit * (GROUPS_K * BLOCK_C) + column
    return (unit * GROUPS_K + column // BLOCK_C) * RUN + column % BLOCK_C


@triton.jit
def load_point(
    offset_ptr, places, stride_oc,  # the tap's vertical offsets, and from there to the horizontal ones
    h, w, H, W, dtype: tl.constexpr, CLOSED: tl.constexpr,
):  # fmt: skip
    """(i, j, b, a) of points; those outside lie two rows and columns before the image, where no neighbor is inside.

    Args:
        h, w: the taps' places without their offsets.
        CLOSED: whether h = -1 and w = -1 count: values are zero there, derivatives to the right are not.
    """
    h = h.to(dtype) + tl.load(offset_ptr + places).to(dtype)
    w = w.to(dtype) + tl.load(offset_ptr + (places + stride_oc)).to(dtype)
    if CLOSED:
        outside = (h < -1.0) | (h >= H) | (w < -1.0) | (w >= W)
    else:
        outside = (h <= -1.0) | (h >= H) | (w <= -1.0) | (w >= W)
    h = tl.where(outside, -2.0, h)
    w = tl.where(outside, -2.0, w)
    i = tl.floor(tl.where(h == h, h, 0.0))
    j = tl.floor(tl.where(w == w, w, 0.0))
    return i.to(tl.int32), j.to(tl.int32), h - i, w - j


@triton.jit
def weights_of(b, a):
    """Of the neighbors (i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)."""
    return (1.0 - b) * (1.0 - a), (1.0 - b) * a, b * (1.0 - a), b * a


@triton.jit
def inside_of(i, j, H, W):
    """Whether the rows i, i + 1 and the columns j, j + 1 lie in the image."""
    # Unsigned comparison: a negative coordinate is a large number.
    return i.to(tl.uint32) < H, (i + 1).to(tl.uint32) < H, j.to(tl.uint32) < W, (j + 1).to(tl.uint32) < W


@triton.jit
def corner(insides, k: tl.constexpr, mask_c):
    """Which elements of neighbor k are there, [rows, GROUPS_K, BLOCK_C], of `inside_of` and [GROUPS_K, BLOCK_C] or None."""
    inside = tl.expand_dims(insides[k // 2] & insides[2 + k % 2], 2)
    if mask_c is not None:
        inside = inside & tl.expand_dims(mask_c, 0)
    return inside


@triton.jit
def blend(x_ptrs, stride_xh, stride_xw, insides, weights, mask_c, dtype: tl.constexpr):
    """Values of points, [rows, GROUPS_K, BLOCK_C], with x_ptrs at the neighbors (i, j), likewise, and weights of points."""
    # One after the other: a thread holds one neighbor beside the sum.
    total = tl.load(x_ptrs, mask=corner(insides, 0, mask_c), other=0.0).to(dtype) * tl.expand_dims(weights[0], 2)
    part = tl.load(x_ptrs + stride_xw, mask=corner(insides, 1, mask_c), other=0.0)
    total += part.to(dtype) * tl.expand_dims(weights[1], 2)
    part = tl.load(x_ptrs + stride_xh, mask=corner(insides, 2, mask_c), other=0.0)
    total += part.to(dtype) * tl.expand_dims(weights[2], 2)
    part = tl.load(x_ptrs + (stride_xh + stride_xw), mask=corner(insides, 3, mask_c), other=0.0)
    total += part.to(dtype) * tl.expand_dims(weights[3], 2)
    return total
