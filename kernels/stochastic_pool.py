"""Stochastic pooling over windows: a drawn element in training, the weighted mean in eval mode, and their gradients.

An element's weight is itself where it is greater than zero, else zero; what lies beyond the image weighs nothing. A program
owns BLOCK_P results side by side in one row and BLOCK_C channels. In training it goes through the window twice, row by
row: for the sum of the weights, and for the first element at which their running sum exceeds the drawn share of that sum.
The second time the elements lie in the cache. The element's place in its window is saved. In eval mode one pass sums
weights and their squares.

Backward, a program owns pixels of a row and asks the windows that cover each of them: in training whether the saved place
is the pixel's, in eval mode for the formula's derivative. Every element is written once, without atomics: the same bits on
every run. Channels-last, threads hold channels; contiguous, pixels.
"""

import triton
import triton.language as tl

from .masks import both

__all__ = ["configs", "stochastic_backward_kernel", "stochastic_kernel"]


def tile(pixels: int, channels: int) -> triton.Config:
    return triton.Config(dict(BLOCK_P=pixels, BLOCK_C=channels), num_warps=4, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both memory formats."""
    return [
        # 16 elements a thread, 8 on AMD: a vector of 16 bits.
        tile(16, 128),
        tile(32, 64),
        # Contiguous rows.
        tile(128, 16),
        tile(512, 4),
    ]


@triton.jit
def places(
    image, row, offs_p, offs_c, ROWS, COLUMNS, C, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr,
    INDEX_64: tl.constexpr,
):  # fmt: skip
    """Offsets in a dense (N, C, ROWS, COLUMNS) of a row's tile."""
    if INDEX_64:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    if CHANNELS_LAST:
        C = C // VEC * VEC
        offsets = (((image * ROWS + row) * COLUMNS + offs_p) * C)[:, None] + offs_c[None, :]
    else:
        COLUMNS = COLUMNS // VEC * VEC
        offsets = (((image * C + offs_c) * ROWS + row) * COLUMNS)[:, None] + offs_p[None, :]
    return offsets


@triton.jit
def masked(offs_p, offs_c, P, C, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr):
    """Which of a tile's elements there are; VEC divides what lies side by side."""
    if CHANNELS_LAST:
        mask = (offs_p < P)[:, None] & (offs_c < C // VEC * VEC)[None, :]
    else:
        mask = (offs_c < C)[:, None] & (offs_p < P // VEC * VEC)[None, :]
    return mask


@triton.jit
def weight(x):
    """Comparisons leave NaN what it is."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def stochastic_kernel(
    x_ptr, stride_n, stride_c, stride_h, stride_w,  # (N, C, H, W)
    u_ptr,  # as y, wide: uniform numbers of [0, 1); None: the weighted mean
    y_ptr, tap_ptr,  # (N, C, P, Q), dense; with u_ptr the drawn places, -1 for none, else the sums of weights; may be None
    # sizes
    C, H, W, P, Q,
    # geometry
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    # flags
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, VEC_Q: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    ROWS: tl.constexpr = BLOCK_P if CHANNELS_LAST else BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_C if CHANNELS_LAST else BLOCK_P
    tiles = tl.cdiv(C, BLOCK_C)
    row_tiles = tl.cdiv(Q, BLOCK_P)
    rest = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_q = rest % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    row = rest // row_tiles
    p = row % P
    image = row // P

    results = places(image, p, offs_q, offs_c, P, Q, C, CHANNELS_LAST, VEC_Q, INDEX_64)
    there = masked(offs_q, offs_c, Q, C, CHANNELS_LAST, VEC_Q)
    columns = offs_c
    first_w = offs_q * STRIDE_W - PAD_W
    pixels = first_w
    if INDEX_64:
        image = image.to(tl.int64)
        columns = columns.to(tl.int64)
        pixels = pixels.to(tl.int64)
        stride_h = tl.full((), 0, tl.int64) + stride_h
    base = x_ptr + image * (stride_n // VEC * VEC)
    stride_h = stride_h // VEC * VEC
    if CHANNELS_LAST:
        stride_w = stride_w // VEC * VEC
        inside_c = (offs_c < C // VEC * VEC)[None, :]
        inner = columns[None, :]
    else:
        inside_c = (offs_c < C)[:, None]
        inner = (columns * (stride_c // VEC * VEC))[:, None]

    total = tl.zeros((ROWS, COLUMNS), wide)
    squares = tl.zeros((ROWS, COLUMNS), wide)
    for tap in range(R * S):
        h = p * STRIDE_H - PAD_H + tap // S
        w = first_w + tap % S
        mask = both(both(tl.expand_dims((w >= 0) & (w < W), 1 - axis) & inside_c, h >= 0), h < H)
        x = weight(tl.load(base + h * stride_h + inner + tl.expand_dims((pixels + tap % S) * stride_w, 1 - axis),
                           mask=mask, other=0.0).to(wide))  # fmt: skip
        total += x
        if u_ptr is None:
            squares += x * x
    if u_ptr is None:
        # Squares are zero where their sum is.
        y = squares / tl.where(total == 0.0, 1.0, total)
        if tap_ptr is not None:
            tl.store(tap_ptr + results, total, mask=there)
    else:
        share = tl.load(u_ptr + results, mask=there, other=0.0) * total
        running = tl.zeros((ROWS, COLUMNS), wide)
        # Of a sum that is not finite no share can be drawn.
        y = tl.where(total - total == 0.0, 0.0, float("nan")).to(wide)
        drawn = tl.full((ROWS, COLUMNS), -1, tl.int32)
        for tap in range(R * S):
            h = p * STRIDE_H - PAD_H + tap // S
            w = first_w + tap % S
            mask = both(both(tl.expand_dims((w >= 0) & (w < W), 1 - axis) & inside_c, h >= 0), h < H)
            x = weight(tl.load(base + h * stride_h + inner + tl.expand_dims((pixels + tap % S) * stride_w, 1 - axis),
                               mask=mask, other=0.0).to(wide))  # fmt: skip
            # Until the share is exceeded each element that weighs anything is a candidate, should rounding leave no other.
            take = (running <= share) & (x > 0.0)
            y = tl.where(take & (y == y), x, y)
            drawn = tl.where(take & (y == y), tap, drawn)
            running += x
        if tap_ptr is not None:
            tl.store(tap_ptr + results, drawn.to(tap_ptr.dtype.element_ty), mask=there)
    tl.store(y_ptr + results, y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def stochastic_backward_kernel(
    dy_ptr, tap_ptr,  # (N, C, P, Q), dense: drawn places, or sums of weights
    x_ptr, y_ptr,  # in eval mode the input, dense as dx, and the result, dense as dy; else None
    dx_ptr,  # (N, C, H, W), dense
    # sizes
    C, H, W, P, Q,
    # geometry; COVER_H, COVER_W: the most windows that share a pixel
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, COVER_H: tl.constexpr, COVER_W: tl.constexpr,
    # flags
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    ROWS: tl.constexpr = BLOCK_P if CHANNELS_LAST else BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_C if CHANNELS_LAST else BLOCK_P
    # What lies side by side in a row of windows is not aligned; channels are.
    vec: tl.constexpr = VEC if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    row_tiles = tl.cdiv(W, BLOCK_P)
    rest = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_w = rest % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    row = rest // row_tiles
    h = row % H
    image = row // H
    pixels = places(image, h, offs_w, offs_c, H, W, C, CHANNELS_LAST, VEC, INDEX_64)
    there = masked(offs_w, offs_c, W, C, CHANNELS_LAST, VEC)
    last_p = (h + PAD_H) // STRIDE_H
    last_q = (offs_w + PAD_W) // STRIDE_W

    if x_ptr is not None:
        x = tl.load(x_ptr + pixels, mask=there, other=0.0).to(wide)
    total = tl.zeros((ROWS, COLUMNS), wide)
    for i in range(COVER_H):
        p = last_p - i
        r = h + PAD_H - p * STRIDE_H
        for j in tl.static_range(COVER_W):
            q = last_q - j
            s = offs_w + PAD_W - q * STRIDE_W
            known = both((p >= 0) & (p < P) & (r < R), q >= 0) & (q < Q) & (s < S)
            mask = tl.expand_dims(known, 1 - axis) & masked(offs_w, offs_c, W, C, CHANNELS_LAST, vec)
            windows = places(image, p, q, offs_c, P, Q, C, CHANNELS_LAST, vec, INDEX_64)
            dy = tl.load(dy_ptr + windows, mask=mask, other=0.0).to(wide)
            if x_ptr is None:
                drawn = tl.load(tap_ptr + windows, mask=mask, other=-1).to(tl.int32)
                total += tl.where(drawn == tl.expand_dims(r * S + s, 1 - axis), dy, 0.0)
            else:
                weights = tl.load(tap_ptr + windows, mask=mask, other=1.0)
                y = tl.load(y_ptr + windows, mask=mask, other=0.0).to(wide)
                slope = (2.0 * x - y) / tl.where(weights == 0.0, 1.0, weights)
                total += tl.where(mask & (x > 0.0), dy * slope, 0.0)
    tl.store(dx_ptr + pixels, total.to(dx_ptr.dtype.element_ty), mask=there)
