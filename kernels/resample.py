"""Resampling of images by nearest elements or linearly, up or down, along one to three axes.

A program owns BLOCK_P results of a row and BLOCK_C channels, in RANGE rows one after the other: which columns a result is
made of, and with which weights, is computed once; rows and planes are the program's, so that their weights are scalars.
Each result reads its 1 to 8 elements, of which neighbors share most: x comes from memory once and from the caches
otherwise, y is written once. Channels-last, threads hold channels; contiguous, they hold results along the row, whose
elements are read singly. Strides of x are arguments, so that views are read in place.

Rules of an axis, RULE_D to RULE_W: 0 same, 1 nearest, 2 nearest-exact, 3 linear, 4 linear with aligned corners.
"""

import triton
import triton.language as tl

__all__ = ["configs", "counter", "resample_kernel", "source"]


def tile(results: int, channels: int) -> triton.Config:
    return triton.Config(dict(BLOCK_P=results, BLOCK_C=channels), num_warps=4, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both memory formats."""
    return [
        # 16 elements a thread: up to four rows of an image are held at once.
        tile(16, 128),
        tile(32, 64),
        tile(64, 32),
        # Contiguous rows, short and long; 8 elements a thread for few channels.
        tile(128, 16),
        tile(512, 4),
        tile(1024, 1),
    ]


@triton.jit
def counter(i):
    """A loop's counter as a tensor, which the interpreter has for an integer."""
    return tl.full((), 0, tl.int32) + i


@triton.jit
def source(o, scale, SIZE, RULE: tl.constexpr):
    """The first and second element of result o, and the second one's weight; both are one where there is but one."""
    if RULE == 0:
        first = o
        second = o
        weight = (o * 0).to(scale.dtype)
    elif RULE <= 2:
        place = o.to(scale.dtype)
        if RULE == 2:
            place += 0.5
        first = tl.minimum((place * scale).to(tl.int32), SIZE - 1)
        second = first
        weight = (o * 0).to(scale.dtype)
    else:
        place = o.to(scale.dtype)
        if RULE == 3:
            place = (place + 0.5) * scale - 0.5
        else:
            place = place * scale
        place = tl.where(place < 0.0, 0.0, place)
        first = tl.minimum(place.to(tl.int32), SIZE - 1)
        second = tl.minimum(first + 1, SIZE - 1)
        weight = place - first.to(scale.dtype)
        # A fused multiplication may see an element that rounding has passed.
        weight = tl.where(weight < 0.0, 0.0, weight)
    return first, second, weight


@triton.jit
def resample_kernel(
    x_ptr, stride_n, stride_c, stride_d, stride_h, stride_w,  # (N, C, D, H, W)
    y_ptr,  # (N, C, OD, OH, OW), dense in the same format
    # elements from a result to the next, in the precision that coordinates have
    scale_d: tl.float64, scale_h: tl.float64, scale_w: tl.float64,
    # sizes; RANGE is how many rows a program has
    C, D, H, W, OD, OH, OW, RANGE,
    # flags
    RULE_D: tl.constexpr, RULE_H: tl.constexpr, RULE_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
    INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_P if CHANNELS_LAST else BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_C if CHANNELS_LAST else BLOCK_P
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    LINEAR: tl.constexpr = RULE_D > 2 or RULE_H > 2 or RULE_W > 2
    precise: tl.constexpr = wide if LINEAR else tl.float32
    scale_d = tl.full((), scale_d, precise)
    scale_h = tl.full((), scale_h, precise)
    scale_w = tl.full((), scale_w, precise)
    tiles = tl.cdiv(C, BLOCK_C)
    row_tiles = tl.cdiv(OW, BLOCK_P)
    ranges = tl.cdiv(OH, RANGE)
    rest = tl.program_id(0) // tiles
    offs_o = rest % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    rest = rest // row_tiles
    begin = rest % ranges * RANGE
    plane = rest // ranges
    od = plane % OD
    image = plane // OD
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)

    d0, d1, weight_d = source(od, scale_d, D, RULE_D)
    left, right, weight_w = source(tl.minimum(offs_o, OW - 1), scale_w, W, RULE_W)
    columns = offs_c
    results = offs_o
    if INDEX_64:
        image = image.to(tl.int64)
        columns = columns.to(tl.int64)
        results = results.to(tl.int64)
        left = left.to(tl.int64)
        right = right.to(tl.int64)
        stride_d = tl.full((), 0, tl.int64) + stride_d
        stride_h = tl.full((), 0, tl.int64) + stride_h
    if CHANNELS_LAST:
        C = C // VEC * VEC
        stride_n = stride_n // VEC * VEC
        stride_d = stride_d // VEC * VEC
        stride_h = stride_h // VEC * VEC
        stride_w = stride_w // VEC * VEC
        mask_c = (offs_c < C)[None, :]
        first = (left * stride_w)[:, None] + columns[None, :]
        second = (right * stride_w)[:, None] + columns[None, :]
        weight_w = weight_w[:, None]
        mask = (offs_o < OW)[:, None] & mask_c
        place = (results * C)[:, None] + columns[None, :]
        y_ptr += (image * OD + od) * OH * OW * C
        row = OW * C
    else:
        OW = OW // VEC * VEC
        mask_c = (offs_c < C)[:, None]
        first = (columns * stride_c)[:, None] + (left * stride_w)[None, :]
        second = (columns * stride_c)[:, None] + (right * stride_w)[None, :]
        weight_w = weight_w[None, :]
        mask = mask_c & (offs_o < OW)[None, :]
        place = (columns * (OD * OH * OW))[:, None] + results[None, :]
        y_ptr += image * C * OD * OH * OW + od * OH * OW
        row = OW
    x_ptr += image * stride_n

    for i in range(begin, tl.minimum(OH, begin + RANGE)):
        oh = counter(i)
        h0, h1, weight_h = source(oh, scale_h, H, RULE_H)
        if LINEAR:
            value = tl.zeros((ROWS, COLUMNS), wide)
            for k in tl.static_range((2 if RULE_D > 2 else 1) * (2 if RULE_H > 2 else 1)):
                d = d0
                h = h0
                share = 1.0 + weight_h * 0.0
                if RULE_D > 2:
                    d = d0 if k % 2 == 0 else d1
                    share = 1.0 - weight_d if k % 2 == 0 else weight_d
                    if RULE_H > 2:
                        h = h0 if k < 2 else h1
                        share *= 1.0 - weight_h if k < 2 else weight_h
                elif RULE_H > 2:
                    h = h0 if k == 0 else h1
                    share = 1.0 - weight_h if k == 0 else weight_h
                line = x_ptr + (d * stride_d + h * stride_h)
                x = tl.load(line + first, mask=mask, other=0.0).to(wide)
                if RULE_W > 2:
                    x *= 1.0 - weight_w
                    x += weight_w * tl.load(line + second, mask=mask, other=0.0).to(wide)
                value += share * x
            result = value.to(y_ptr.dtype.element_ty)
        else:
            # Moved as it is.
            result = tl.load(x_ptr + (d0 * stride_d + h0 * stride_h) + first, mask=mask, other=0.0)
        tl.store(y_ptr + (counter(i) if not INDEX_64 else counter(i).to(tl.int64)) * row + place, result, mask=mask)
