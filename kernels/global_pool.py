"""Mean, sum or maximum over whole images, and the gradients of mean and maximum.

An image (C, P pixels) is read once, in tiles of pixels and channels: channels-last, a pixel's channels lie side by side;
contiguous, a channel's pixels do. A program of global_reduce_kernel owns BLOCK_C channels and a range of one image's
pixels, which is a slot; every place of its tile keeps a sum (or a maximum and where it was) of its own, so that the loop
has no reduction. With several slots global_join_kernel joins them in their order; with one it is not launched. There are
no atomics: the same bits on every run.

Backward, each pixel takes its image's number: dy / P, or for a maximum dy where the pixel's number is the saved one. dx is
written once and nothing of its size is read. Channels-last, global_spread_kernel writes a tile a program; contiguous,
global_spread_flat_kernel writes memory in a row whatever the size of a plane: VEC elements of a thread lie in one plane or
in two.

A maximum is torch's: the first of equal ones, but of NaNs, which are greater than all else, the last.
"""

import triton
import triton.language as tl

from .batch_norm import zeros

__all__ = [
    "configs", "global_join_kernel", "global_reduce_kernel", "global_spread_flat_kernel", "global_spread_kernel",
    "greater", "lowest", "pick",
]  # fmt: skip


def tile(pixels: int, channels: int, stages: int) -> triton.Config:
    return triton.Config(dict(BLOCK_P=pixels, BLOCK_C=channels), num_warps=4, num_stages=stages)


def configs() -> list[triton.Config]:
    """Every candidate, each right for both memory formats; the kernel that walks takes those of several stages."""
    return [
        # 16 elements a thread, the next blocks' loads in flight: two vectors of 16 bits.
        tile(16, 128, 3),
        tile(32, 64, 3),
        tile(64, 32, 3),
        tile(256, 8, 3),
        # Of one tile a program: the gradient of channels-last images, which are stores and nothing else.
        tile(32, 64, 1),
        tile(128, 16, 1),
        tile(256, 8, 1),
    ]


@triton.jit
def greater(value, best):
    """Whether a scan's next value takes the place of the best before it."""
    return (value > best) | (value != value)


@triton.jit
def lowest(dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a scan begins with."""
    return tl.full((ROWS, COLUMNS), float("-inf"), dtype)


@triton.jit
def pick(values, index, axis: tl.constexpr, WITH_INDEX: tl.constexpr):
    """The maximum along an axis and where it is, by torch's rule; `index` is not looked at if no one asks where."""
    missing = values != values
    clean = tl.where(missing, float("-inf"), values)
    best = tl.max(clean, axis)
    found = tl.max(missing.to(tl.int32), axis) > 0
    result = tl.where(found, float("nan"), best)
    if WITH_INDEX:
        last = tl.max(tl.where(missing, index, -1), axis)
        first = tl.min(tl.where(clean == tl.expand_dims(best, axis), index, 2147483647), axis)
        where = tl.where(found, last, first)
    else:
        where = found
    return result, where


@triton.jit
def global_reduce_kernel(
    x_ptr, stride_n, stride_c, stride_p,  # (N, C, P); the last stride is 1, or the one before it channels-last
    values_ptr, index_ptr,  # [N, SLOTS, C]; index_ptr may be None
    # sizes; RANGE is how many pixels a slot has
    SLOTS, RANGE, P, C,
    # flags; KIND: 0 sum, 1 mean (of one slot), 2 maximum
    KIND: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // tiles
    image = part // SLOTS
    begin = part % SLOTS * RANGE
    end = tl.minimum(P, begin + RANGE)
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK_P)
    mask_c = offs_c < C
    columns = offs_c
    if INDEX_64:
        image = image.to(tl.int64)
        columns = offs_c.to(tl.int64)
        lanes = lanes.to(tl.int64)
    # The compiler proves alignment, and so vectors, from a product alone.
    if CHANNELS_LAST:
        stride_p = stride_p // VEC * VEC
        base = x_ptr + image * (stride_n // VEC * VEC)
        inner = columns[None, :]
        mask_c2 = (offs_c < C // VEC * VEC)[None, :]
        if KIND == 2:
            best = lowest(wide, BLOCK_P, BLOCK_C)
            where = tl.zeros((BLOCK_P, BLOCK_C), tl.int32) + begin
    else:
        base = x_ptr + image * (stride_n // VEC * VEC)
        inner = (columns * (stride_c // VEC * VEC))[:, None]
        begin = begin // VEC * VEC
        end = end // VEC * VEC
        mask_c2 = mask_c[:, None]
        if KIND == 2:
            best = lowest(wide, BLOCK_C, BLOCK_P)
            where = tl.zeros((BLOCK_C, BLOCK_P), tl.int32) + begin
    if KIND < 2:
        total = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    for first in tl.range(begin, end, BLOCK_P, num_stages=STAGES):
        offs_p = first + lanes
        if CHANNELS_LAST:
            offsets = (offs_p * stride_p)[:, None] + inner
            mask = (offs_p < end)[:, None] & mask_c2
        else:
            offsets = inner + offs_p[None, :]
            mask = mask_c2 & (offs_p < end)[None, :]
        if KIND < 2:
            total += tl.load(base + offsets, mask=mask, other=0.0).to(wide)
        else:
            x = tl.load(base + offsets, mask=mask, other=float("-inf")).to(wide)
            take = greater(x, best)
            best = tl.where(take, x, best)
            if index_ptr is not None:
                where = tl.where(take, tl.expand_dims(offs_p.to(tl.int32), 1 - axis), where)

    places = part * C + offs_c
    if KIND < 2:
        result = tl.sum(total, axis)
        if KIND == 1:
            result = result / P
    else:
        result, where = pick(best, where, axis, index_ptr is not None)
        if index_ptr is not None:
            tl.store(index_ptr + places, where.to(index_ptr.dtype.element_ty), mask=mask_c)
    tl.store(values_ptr + places, result.to(values_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def global_join_kernel(
    parts_ptr, part_index_ptr,  # [N, SLOTS, C], wide; the index may be None
    y_ptr, index_ptr,  # [N, C]; index_ptr may be None
    SLOTS, P, C, KIND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Join an image's slots in a fixed order; a program owns BLOCK_C channels."""
    wide: tl.constexpr = parts_ptr.dtype.element_ty
    tiles = tl.cdiv(C, BLOCK_C)
    image = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if KIND < 2:
        total = tl.zeros((BLOCK_S, BLOCK_C), wide)
    else:
        best = lowest(wide, BLOCK_S, BLOCK_C)
        # Of a place beyond the slots: no pixel, and so never the first of equal ones.
        where = tl.full((BLOCK_S, BLOCK_C), 2147483647, tl.int32)
    for first in tl.range(0, SLOTS, BLOCK_S, num_stages=STAGES):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < SLOTS)[:, None] & mask_c[None, :]
        offsets = (image * SLOTS + offs_s)[:, None] * C + offs_c[None, :]
        if KIND < 2:
            total += tl.load(parts_ptr + offsets, mask=mask, other=0.0)
        else:
            x = tl.load(parts_ptr + offsets, mask=mask, other=float("-inf"))
            # The first slot of a place is taken as it is, for it may be -inf.
            take = greater(x, best) | (mask & (first == 0))
            best = tl.where(take, x, best)
            if index_ptr is not None:
                where = tl.where(take, tl.load(part_index_ptr + offsets, mask=mask, other=0), where)
    places = image * C + offs_c
    if KIND < 2:
        result = tl.sum(total, 0)
        if KIND == 1:
            result = result / P
    else:
        result, where = pick(best, where, 0, index_ptr is not None)
        if index_ptr is not None:
            tl.store(index_ptr + places, where.to(index_ptr.dtype.element_ty), mask=mask_c)
    tl.store(y_ptr + places, result.to(y_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def global_spread_kernel(
    dy_ptr, index_ptr,  # [N, C]; index_ptr: of a maximum, else None
    dx_ptr,  # (N, P, C), dense
    P, C, VEC: tl.constexpr, INDEX_64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, BLOCK_C)
    blocks = tl.cdiv(P, BLOCK_P)
    image = tl.program_id(0) // tiles // blocks
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.program_id(0) // tiles % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    C = C // VEC * VEC
    mask_c = offs_c < C
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = tl.load(dy_ptr + image * C + offs_c, mask=mask_c, other=0.0)
    if index_ptr is None:
        g = (g.to(wide) / P).to(dx_ptr.dtype.element_ty)
        g = tl.broadcast_to(g[None, :], (BLOCK_P, BLOCK_C))
    else:
        index = tl.load(index_ptr + image * C + offs_c, mask=mask_c, other=-1).to(tl.int32)
        g = tl.where(offs_p[:, None] == index[None, :], g[None, :], 0.0).to(dx_ptr.dtype.element_ty)
    rows = offs_p
    if INDEX_64:
        image = image.to(tl.int64)
        rows = rows.to(tl.int64)
    offsets = ((image * P + rows) * C)[:, None] + offs_c[None, :]
    tl.store(dx_ptr + offsets, g, mask=(offs_p < P)[:, None] & mask_c[None, :])


@triton.jit
def global_spread_flat_kernel(
    dy_ptr, index_ptr,  # [ROWS]; index_ptr: of a maximum, else None
    dx_ptr,  # [ROWS, P], dense
    # sizes; P >= VEC
    ROWS, P,
    # flags; EVEN: VEC divides all elements together
    EVEN: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0)
    if INDEX_64:
        block = block.to(tl.int64)
        ROWS = tl.full((), 0, tl.int64) + ROWS
    starts = block * BLOCK + tl.arange(0, BLOCK // VEC) * VEC
    rows = starts // P
    inside = (starts - rows * P).to(tl.int32)
    g = tl.load(dy_ptr + rows, mask=rows < ROWS, other=0.0).to(wide)
    following = tl.load(dy_ptr + rows + 1, mask=rows + 1 < ROWS, other=0.0).to(wide)
    pixels = inside[:, None] + tl.arange(0, VEC)[None, :]
    beyond = pixels >= P
    if index_ptr is None:
        values = tl.where(beyond, (following / P)[:, None], (g / P)[:, None])
    else:
        index = tl.load(index_ptr + rows, mask=rows < ROWS, other=-1).to(tl.int32)
        index_following = tl.load(index_ptr + rows + 1, mask=rows + 1 < ROWS, other=-1).to(tl.int32)
        here = tl.where(pixels == index[:, None], g[:, None], 0.0)
        values = tl.where(beyond, tl.where(pixels - P == index_following[:, None], following[:, None], 0.0), here)
    offsets = starts[:, None] + tl.arange(0, VEC)[None, :]
    if EVEN:
        # One comparison for a vector, so that it is stored as one.
        mask = tl.broadcast_to((rows < ROWS)[:, None], (BLOCK // VEC, VEC))
    else:
        mask = offsets < ROWS * P
    tl.store(dx_ptr + offsets, values.to(dx_ptr.dtype.element_ty), mask=mask)
