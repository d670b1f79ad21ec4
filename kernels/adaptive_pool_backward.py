"""The gradients of adaptive pooling, gathered: each pixel asks the bins that cover it, which are side by side.

Pixel h of an axis lies in the bins floor(h * count / size) to ceil((h + 1) * count / size) - 1: one, or two where bins
overlap, or more where results outnumber pixels. A program owns BLOCK_P pixels of a row, BLOCK_C channels, and RANGE rows
one after the other, so that what follows from a pixel's place in its row is computed once. Of a mean every row between two
borders of bins has the same gradient, which is computed at the border and stored again. Of a maximum a pixel takes the
gradients of those bins whose saved index names it. dx is written once; dy, which is smaller, comes from the cache. There
are no atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from .adaptive_pool import bin_begin, bin_end

__all__ = ["adaptive_backward_kernel", "configs"]


def tile(pixels: int, channels: int) -> triton.Config:
    return triton.Config(dict(BLOCK_P=pixels, BLOCK_C=channels), num_warps=4, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both memory formats."""
    return [
        # 16 elements a thread: where a row lies among the bins takes about as many instructions as 8 elements.
        tile(16, 128),
        tile(32, 64),
        tile(64, 32),
        # Contiguous rows.
        tile(128, 16),
        tile(512, 4),
    ]


@triton.jit
def first_bin(i, SIZE, COUNT: tl.constexpr):
    return i * COUNT // SIZE


@triton.jit
def last_bin(i, SIZE, COUNT: tl.constexpr):
    return (i * COUNT + (COUNT - 1)) // SIZE


@triton.jit
def gathered(
    dy_ptr, index_ptr, stride_row, columns, strides_o, mask_c, first_o, last_o, d, h, offs_w, D, H, W,
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, COVER_W: tl.constexpr, axis: tl.constexpr, wide: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a row's pixels; dy_ptr is the image's."""
    total = tl.zeros((ROWS, COLUMNS), wide)
    for bd in range(first_bin(d, D, OD), last_bin(d, D, OD) + 1):
        for bh in range(first_bin(h, H, OH), last_bin(h, H, OH) + 1):
            deep = bin_end(bd, D, OD) - bin_begin(bd, D, OD)
            size = deep * (bin_end(bh, H, OH) - bin_begin(bh, H, OH))
            line = (bd * OH + bh) * stride_row
            for j in tl.static_range(COVER_W):
                bw = first_o + j
                offsets = line + columns + tl.expand_dims(bw * strides_o, 1 - axis)
                mask = mask_c & tl.expand_dims(bw <= last_o, 1 - axis)
                dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(wide)
                if index_ptr is None:
                    width = bin_end(bw, W, OW) - bin_begin(bw, W, OW)
                    total += dy * tl.expand_dims(1.0 / (width * size).to(wide), 1 - axis)
                else:
                    index = tl.load(index_ptr + offsets, mask=mask, other=-1).to(tl.int32)
                    here = tl.expand_dims((d * H + h) * W + offs_w, 1 - axis)
                    total += tl.where(index == here, dy, 0.0)
    return total


@triton.jit
def adaptive_backward_kernel(
    dy_ptr, index_ptr,  # (N, C, OD, OH, OW), dense; index_ptr: of a maximum, else None
    dx_ptr,  # (N, C, D, H, W), dense in the same format
    # sizes; RANGE is how many rows a program has
    C, D, H, W, RANGE,
    # geometry
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    # flags; COVER_W: the most bins that share a column
    COVER_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    ROWS: tl.constexpr = BLOCK_P if CHANNELS_LAST else BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_C if CHANNELS_LAST else BLOCK_P
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(C, BLOCK_C)
    row_tiles = tl.cdiv(W, BLOCK_P)
    ranges = tl.cdiv(H, RANGE)
    rest = tl.program_id(0) // tiles
    offs_w = rest % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    rest = rest // row_tiles
    begin = rest % ranges * RANGE
    plane = rest // ranges
    d = plane % D
    image = plane // D
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    first_o = first_bin(offs_w, W, OW)
    last_o = tl.where(offs_w < W, last_bin(offs_w, W, OW), -1)
    columns = offs_c
    pixels = offs_w
    if INDEX_64:
        image = image.to(tl.int64)
        columns = columns.to(tl.int64)
        pixels = pixels.to(tl.int64)
    if CHANNELS_LAST:
        C = C // VEC * VEC
        mask_c = (offs_c < C)[None, :]
        mask = (offs_w < W)[:, None] & mask_c
        dy_ptr += image * (OD * OH * OW) * C
        if index_ptr is not None:
            index_ptr += image * (OD * OH * OW) * C
        dy_columns = columns[None, :]
        stride_row = OW * C
        strides_o = C
        line = (image * D + d) * H * W * C
        offsets = (pixels * C)[:, None] + columns[None, :]
        row = W * C
    else:
        W = W // VEC * VEC
        mask_c = (offs_c < C)[:, None]
        mask = mask_c & (offs_w < W)[None, :]
        dy_ptr += image * C * (OD * OH * OW)
        if index_ptr is not None:
            index_ptr += image * C * (OD * OH * OW)
        dy_columns = (columns * (OD * OH * OW))[:, None]
        stride_row = OW
        strides_o = 1
        line = image * C * D * H * W + d * H * W
        offsets = (columns * (D * H * W))[:, None] + pixels[None, :]
        row = W

    value = tl.zeros((ROWS, COLUMNS), wide)
    known = begin * 0 - 1
    known_last = known
    for h in range(begin, tl.minimum(H, begin + RANGE)):
        if index_ptr is None:
            # Rows between two borders are alike.
            first = first_bin(h, H, OH)
            last = last_bin(h, H, OH)
            if (first != known) | (last != known_last):
                value = gathered(
                    dy_ptr, index_ptr, stride_row, dy_columns, strides_o, mask_c, first_o, last_o, d, h, offs_w, D, H, W,
                    OD, OH, OW, COVER_W, axis, wide, ROWS, COLUMNS,
                )  # fmt: skip
                known = first
                known_last = last
        else:
            value = gathered(
                dy_ptr, index_ptr, stride_row, dy_columns, strides_o, mask_c, first_o, last_o, d, h, offs_w, D, H, W,
                OD, OH, OW, COVER_W, axis, wide, ROWS, COLUMNS,
            )  # fmt: skip
        tl.store(dx_ptr + line + h * row + offsets, value.to(dx_ptr.dtype.element_ty), mask=mask)
