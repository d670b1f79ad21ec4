"""The gradients of resampling, gathered: each element asks the results that were made of it.

Those lie side by side along each axis, in a range that is bounded from the scale and then narrowed: coordinates and weights
are computed by the very function that the forward pass has (`source`), so that each result gives away what it was made of,
whatever a rounding did. A program owns BLOCK_P elements of a row, BLOCK_C channels, and RANGE rows one after the other;
columns' ranges are found once, and their weights once a row. dx is written once, dy comes from memory once and from the
caches otherwise. There are no atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from .masks import both
from .resample import counter, source

__all__ = ["configs", "resample_backward_kernel"]


def tile(pixels: int, channels: int, warps: int = 4) -> triton.Config:
    return triton.Config(dict(BLOCK_P=pixels, BLOCK_C=channels), num_warps=warps, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both memory formats."""
    return [
        # 16 elements a thread: the weight of a result takes about as many instructions as 8 elements. With 4 warps some
        # spill 8 bytes on sm_100, with 8 warps 16 on sm_80.
        tile(8, 128, 2),
        tile(16, 64, 2),
        tile(32, 32, 2),
        # Contiguous rows; 8 elements a thread for few channels.
        tile(128, 16),
        tile(512, 4),
        tile(1024, 1),
    ]


@triton.jit
def reaching(i, scale, inverse, SIZE, COUNT, RULE: tl.constexpr):
    """The results [first, end) that element i may be part of; all that it is part of are within."""
    if RULE == 0:
        first = i
        end = i + 1
    else:
        # Of i - REACH to i + 1 in the axis, as results.
        REACH: tl.constexpr = 1 if RULE > 2 else 0
        before: tl.constexpr = 0.5 if RULE == 3 else 0.0
        behind: tl.constexpr = 0.5 if RULE == 2 or RULE == 3 else 0.0
        place = i.to(scale.dtype) + before
        least = (place - REACH) * inverse - behind
        most = (place + 1.0) * inverse - behind
        # Numbers beyond all results stay within 32 bits.
        bound = COUNT.to(scale.dtype)
        least = tl.where(least > 0.0, tl.where(least < bound, least, bound), 0.0)
        most = tl.where(most > 0.0, tl.where(most < bound, most, bound), 0.0)
        first = least.to(tl.int32)
        end = most.to(tl.int32)
        # Rounded up, and then wider by one and a millionth, which coordinates are not off by.
        first += tl.where(first.to(scale.dtype) < least, 0, -1) - (first >> 20)
        end += tl.where(end.to(scale.dtype) < most, 2, 1) + (end >> 20)
        first = tl.maximum(first, 0)
        end = tl.minimum(end, COUNT)
        # Mostly by one too much.
        _, second, _ = source(first, scale, SIZE, RULE)
        first += tl.where((second < i) & (first < end), 1, 0)
        begin, _, _ = source(tl.maximum(end - 1, 0), scale, SIZE, RULE)
        end -= tl.where((begin > i) & (first < end), 1, 0)
    return first, end


@triton.jit
def part_of(i, o, scale, SIZE, RULE: tl.constexpr):
    """Whether result o was made of element i, and the weight that it had."""
    first, second, weight = source(o, scale, SIZE, RULE)
    inside = first == i
    share = tl.where(inside, 1.0 - weight, 0.0)
    if RULE > 2:
        last = second == i
        share += tl.where(last, weight, 0.0)
        inside = inside | last
    return inside, share


@triton.jit
def over_rows(
    value, dy_ptr, od, h, first, end, scale, SIZE, COUNT, stride_row, place, share, mask, RULE: tl.constexpr,
    LINEAR: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """`value` and what rows [first, end) of plane od add to it; `place` and `share` are those of the columns."""
    for oh in range(first, end):
        inside, share_h = part_of(h, counter(oh), scale, SIZE, RULE)
        row = od * COUNT + counter(oh)
        if INDEX_64:
            row = row.to(tl.int64)
        dy = tl.load(dy_ptr + row * stride_row + place, mask=both(mask, inside), other=0.0).to(value.dtype)
        # All that is inside counts as it is, unless some axis has weights.
        value += (share_h * share) * dy if LINEAR else dy
    return value


@triton.jit
def resample_backward_kernel(
    dy_ptr,  # (N, C, OD, OH, OW), dense
    dx_ptr,  # (N, C, D, H, W), dense in the same format
    # elements from a result to the next, in the precision that coordinates have; results from an element to the next
    scale_d: tl.float64, scale_h: tl.float64, scale_w: tl.float64,
    inverse_d: tl.float64, inverse_h: tl.float64, inverse_w: tl.float64,
    # sizes; RANGE is how many rows a program has
    C, D, H, W, OD, OH, OW, RANGE,
    # flags
    RULE_D: tl.constexpr, RULE_H: tl.constexpr, RULE_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
    INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    ROWS: tl.constexpr = BLOCK_P if CHANNELS_LAST else BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_C if CHANNELS_LAST else BLOCK_P
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    LINEAR: tl.constexpr = RULE_D > 2 or RULE_H > 2 or RULE_W > 2
    precise: tl.constexpr = wide if LINEAR else tl.float32
    scale_d = tl.full((), scale_d, precise)
    scale_h = tl.full((), scale_h, precise)
    scale_w = tl.full((), scale_w, precise)
    inverse_d = tl.full((), inverse_d, precise)
    inverse_h = tl.full((), inverse_h, precise)
    inverse_w = tl.full((), inverse_w, precise)
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

    first_d, end_d = reaching(d, scale_d, inverse_d, D, counter(OD), RULE_D)
    first_w, end_w = reaching(offs_w, scale_w, inverse_w, W, counter(OW), RULE_W)
    end_w = tl.where(offs_w < W, end_w, first_w)
    most = tl.max(end_w - first_w, axis=0)
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
        dy_columns = columns[None, :]
        pixel = C
        line = (image * D + d) * H * W * C
        offsets = (pixels * C)[:, None] + columns[None, :]
        row = W * C
    else:
        W = W // VEC * VEC
        mask_c = (offs_c < C)[:, None]
        mask = mask_c & (offs_w < W)[None, :]
        dy_ptr += image * C * (OD * OH * OW)
        dy_columns = (columns * (OD * OH * OW))[:, None]
        pixel = 1
        line = image * C * D * H * W + d * H * W
        offsets = (columns * (D * H * W))[:, None] + pixels[None, :]
        row = W

    for step in range(begin, tl.minimum(H, begin + RANGE)):
        h = counter(step)
        first_h, end_h = reaching(h, scale_h, inverse_h, H, counter(OH), RULE_H)
        value = tl.zeros((ROWS, COLUMNS), wide)
        for j in range(0, most):
            ow = first_w + j
            inside, share_w = part_of(offs_w, ow, scale_w, W, RULE_W)
            inside = inside & (ow < end_w)
            share_w = tl.expand_dims(share_w, 1 - axis)
            here = tl.expand_dims(inside, 1 - axis) & mask_c
            places = ow
            if INDEX_64:
                places = ow.to(tl.int64)
            place = tl.expand_dims(places * pixel, 1 - axis) + dy_columns
            if RULE_D == 0:
                value = over_rows(
                    value, dy_ptr, d, h, first_h, end_h, scale_h, H, OH, OW * pixel, place, share_w, here, RULE_H, LINEAR,
                    INDEX_64,
                )  # fmt: skip
            else:
                for od in range(first_d, end_d):
                    in_d, share_d = part_of(d, counter(od), scale_d, D, RULE_D)
                    value = over_rows(
                        value, dy_ptr, counter(od), h, first_h, end_h, scale_h, H, OH, OW * pixel, place,
                        share_d * share_w, both(here, in_d), RULE_H, LINEAR, INDEX_64,
                    )  # fmt: skip
        store_row = h
        if INDEX_64:
            store_row = h.to(tl.int64)
        tl.store(dx_ptr + line + store_row * row + offsets, value.to(dx_ptr.dtype.element_ty), mask=mask)
