"""Adaptive pooling over bins that may be ragged: mean, or maximum and where it was.

Bin i of an axis is [floor(i * size / count), ceil((i + 1) * size / count)). A program owns BLOCK_O results side by side in
one row of results, and BLOCK_C channels; each result has BLOCK_K lanes along the row's bin, and the lanes walk the bin's
planes, rows and steps of BLOCK_K columns in one loop. A lane keeps a sum (or a maximum) of its own; they are joined at the
end, in a fixed order. Channels-last, threads hold channels; contiguous, the lanes of neighboring results read neighboring
pixels. x is read once but for the elements that two bins share; strides are arguments, so that views are read in place.
"""

import triton
import triton.language as tl

from .global_pool import greater, lowest, pick

__all__ = ["adaptive_forward_kernel", "bin_begin", "bin_end", "configs"]


def tile(results: int, lanes: int, channels: int) -> triton.Config:
    return triton.Config(dict(BLOCK_O=results, BLOCK_K=lanes, BLOCK_C=channels), num_warps=4, num_stages=3)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both memory formats."""
    return [
        # 16 elements a thread, 8 on AMD: a vector of 16 bits. Few long bins, shorter ones, and many of few elements.
        tile(1, 16, 128),
        tile(2, 4, 256),
        tile(4, 8, 64),
        tile(16, 1, 128),
        # Contiguous: along the row, fewer channels.
        tile(2, 16, 64),
        tile(8, 16, 16),
        tile(16, 4, 32),
        tile(64, 1, 32),
    ]


@triton.jit
def bin_begin(i, SIZE, COUNT: tl.constexpr):
    return i * SIZE // COUNT


@triton.jit
def bin_end(i, SIZE, COUNT: tl.constexpr):
    return (i * SIZE + SIZE + (COUNT - 1)) // COUNT


@triton.jit
def adaptive_forward_kernel(
    x_ptr, stride_n, stride_c, stride_d, stride_h, stride_w,  # (N, C, D, H, W)
    y_ptr, index_ptr,  # (N, C, OD, OH, OW), dense in the same format; index_ptr may be None
    # sizes; MOST_W: columns of the longest bin
    C, D, H, W, MOST_W,
    # geometry
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    # flags; EVEN_W: OW divides W
    MAX: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN_W: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PLACES: tl.constexpr = BLOCK_O * BLOCK_K
    tiles = tl.cdiv(C, BLOCK_C)
    row_tiles: tl.constexpr = (OW + BLOCK_O - 1) // BLOCK_O
    rest = tl.program_id(0) // tiles
    first_o = rest % row_tiles * BLOCK_O
    row = rest // row_tiles
    oh = row % OH
    od = row // OH % OD
    image = row // (OH * OD)
    d = bin_begin(od, D, OD)
    end_d = bin_end(od, D, OD)
    begin_h = bin_begin(oh, H, OH)
    end_h = bin_end(oh, H, OH)

    places = tl.arange(0, PLACES)
    results = first_o + places // BLOCK_K
    lanes = places % BLOCK_K
    if EVEN_W:
        # A product, of which the compiler knows what divides it.
        size = W // OW
        if not CHANNELS_LAST:
            size = size // VEC * VEC
        begin_w = results * size
        end_w = begin_w + size
    else:
        begin_w = bin_begin(results, W, OW)
        end_w = bin_end(results, W, OW)
    # No elements for results that there are not.
    end_w = tl.where(results < OW, end_w, begin_w)
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = offs_c
    if INDEX_64:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        columns = columns.to(tl.int64)
        lanes = lanes.to(tl.int64)
        begin_w = begin_w.to(tl.int64)
        stride_d = tl.full((), 0, tl.int64) + stride_d
        stride_h = tl.full((), 0, tl.int64) + stride_h
    stride_d = stride_d // VEC * VEC
    stride_h = stride_h // VEC * VEC
    base = x_ptr + image * (stride_n // VEC * VEC)
    if CHANNELS_LAST:
        C = C // VEC * VEC
        mask_c = (offs_c < C)[None, :]
        inner = columns[None, :]
        stride_w = stride_w // VEC * VEC
        if MAX:
            best = lowest(wide, PLACES, BLOCK_C)
            where = tl.zeros((PLACES, BLOCK_C), tl.int32)
        else:
            total = tl.zeros((PLACES, BLOCK_C), wide)
    else:
        mask_c = (offs_c < C)[:, None]
        inner = (columns * (stride_c // VEC * VEC))[:, None]
        if MAX:
            best = lowest(wide, BLOCK_C, PLACES)
            where = tl.zeros((BLOCK_C, PLACES), tl.int32)
        else:
            total = tl.zeros((BLOCK_C, PLACES), wide)
    if MAX:
        # The first element's, should no element be greater than -inf.
        where += tl.expand_dims(((d * H + begin_h) * W + begin_w).to(tl.int32), 1 - axis)

    chunks = tl.cdiv(MOST_W, BLOCK_K)
    sizes = (end_d - d) * (end_h - begin_h)
    h = begin_h
    chunk = tl.full((), 0, tl.int32)
    for _ in tl.range(0, sizes * chunks, num_stages=STAGES):
        offs_w = begin_w + (lanes + chunk * BLOCK_K)
        line = base + (d * stride_d + h * stride_h)
        if CHANNELS_LAST:
            offsets = (offs_w * stride_w)[:, None] + inner
        else:
            offsets = inner + offs_w[None, :]
        mask = tl.expand_dims(offs_w < end_w, 1 - axis) & mask_c
        if MAX:
            x = tl.load(line + offsets, mask=mask, other=float("-inf")).to(wide)
            take = greater(x, best)
            best = tl.where(take, x, best)
            if index_ptr is not None:
                where = tl.where(take, tl.expand_dims(((d * H + h) * W + offs_w).to(tl.int32), 1 - axis), where)
        else:
            total += tl.load(line + offsets, mask=mask, other=0.0).to(wide)
        # One loop over columns, rows and planes is pipelined as a whole.
        chunk += 1
        h = tl.where(chunk == chunks, h + 1, h)
        chunk = tl.where(chunk == chunks, 0, chunk)
        d = tl.where(h == end_h, d + 1, d)
        h = tl.where(h == end_h, begin_h, h)

    offs_o = first_o + tl.arange(0, BLOCK_O)
    if CHANNELS_LAST:
        offsets = ((row * OW + offs_o) * C)[:, None] + offs_c[None, :]
        mask = (offs_o < OW)[:, None] & mask_c
    else:
        place = ((row // (OH * OD) * C + offs_c) * OD + od) * OH + oh
        offsets = (place * OW)[:, None] + offs_o[None, :]
        mask = mask_c & (offs_o < OW)[None, :]
    if MAX:
        result, where = pick(by_lanes(best, CHANNELS_LAST, BLOCK_O, BLOCK_K, BLOCK_C),
                             by_lanes(where, CHANNELS_LAST, BLOCK_O, BLOCK_K, BLOCK_C),
                             1 + axis, index_ptr is not None)  # fmt: skip
        if index_ptr is not None:
            tl.store(index_ptr + offsets, where.to(index_ptr.dtype.element_ty), mask=mask)
    else:
        result = tl.sum(by_lanes(total, CHANNELS_LAST, BLOCK_O, BLOCK_K, BLOCK_C), 1 + axis)
        width = bin_end(offs_o, W, OW) - bin_begin(offs_o, W, OW)
        result = result / tl.expand_dims((width * sizes).to(wide), 1 - axis)
    tl.store(y_ptr + offsets, result.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def by_lanes(tile, CHANNELS_LAST: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile's places as results with their lanes."""
    if CHANNELS_LAST:
        result = tl.reshape(tile, (BLOCK_O, BLOCK_K, BLOCK_C))
    else:
        result = tl.reshape(tile, (BLOCK_C, BLOCK_O, BLOCK_K))
    return result
