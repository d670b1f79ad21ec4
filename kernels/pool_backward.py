"""Pooling over windows, backward: each pixel of the input gathers from the windows that cover it.

    maximum, minimum   dx[pixel] = sum over windows whose index is this pixel of dy[window]
    sum, average       dx[pixel] = sum over windows of dy[window] / divisor[window]
    sum of powers      dx[pixel] = x[pixel] ** (power - 1) * sum over windows of dy * y ** (1 - power)

A thread owns some neighboring channels of PATCH_P x PATCH_Q cells, each of STRIDE_H x STRIDE_W pixels, held in registers: a
window's dy and index are loaded once for all pixels of the cells that it covers, and which of its taps a pixel is, is
arithmetic of constants. Strides whose cells are too large for that, and large windows, go pixel by pixel (PATCH_P = 0)
through loops over the windows that may cover one. 3-d windows are walked plane by plane in either case.

Programs lie as in kernels/pool.py; contiguous, a cell's columns are joined in registers, so that rows are written whole.
dy and the indices are read once from memory, their overlaps from L1 and L2; dx is written once. Nothing is added in memory:
no atomics, and the same bits on every run.
"""

import triton
import triton.language as tl

from .batch_norm import widened
from .masks import both
from .patches import locate
from .pool import raised, window_size

__all__ = ["configs", "pool_backward_kernel"]


def cells(h: int, w: int) -> triton.Config:
    """A candidate: h x w cells a thread; 0: pixel by pixel."""
    return triton.Config(dict(PATCH_P=h, PATCH_Q=w), num_warps=4, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for every pooling, for cells are cut to what a thread can hold (ops/pool)."""
    return [
        # Strides: a cell is some pixels already.
        cells(1, 1),
        # Stride 1: pixels share windows.
        cells(2, 2),
        cells(2, 1),
        # Large strides and large windows.
        cells(0, 0),
    ]


@triton.constexpr_function
def tap_of(window, pixel, taps, stride, dilation, pad):
    """The tap by which the window at this place covers a cell's pixel; -1 for none. Places count from the cell's own."""
    distance = pixel + pad - window * stride
    return distance // dilation if distance % dilation == 0 and 0 <= distance < taps * dilation else -1


@triton.constexpr_function
def first_window(taps, stride, dilation, pad):
    """The least place of a window that may cover a pixel of the cell."""
    return -(((taps - 1) * dilation - pad) // stride)


@triton.constexpr_function
def last_window(pixels, stride, pad):
    """The greatest."""
    return (pixels - 1 + pad) // stride


@triton.constexpr_function
def covers(row, column, pixels_h, pixels_w, taps_h, taps_w, stride_h, stride_w, dil_h, dil_w, pad_h, pad_w):
    """Whether the window at this place covers any of the cell's pixels."""
    down = any(tap_of(row, i, taps_h, stride_h, dil_h, pad_h) >= 0 for i in range(pixels_h))
    return down and any(tap_of(column, j, taps_w, stride_w, dil_w, pad_w) >= 0 for j in range(pixels_w))


@triton.constexpr_function
def flat_tap(r, s, columns):
    """The number of a tap in its plane; -1 where either is none."""
    return r * columns + s if r >= 0 and s >= 0 else -1


@triton.jit
def slope(
    dy_ptr, y_ptr, offs, mask, o, p, q, D, H, W,
    KIND: tl.constexpr, POWER: tl.constexpr, DIVISOR: tl.constexpr, PADDED: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """What windows give to each of their elements, but for the element's own part."""
    g = widened(tl.load(dy_ptr + offs, mask=mask, other=0.0))
    if KIND == "power":
        y = widened(tl.load(y_ptr + offs, mask=mask, other=0.0))
        # Torch's gradient is zero where the sum is.
        if POWER == 1.0:
            g = tl.where(y == 0.0, 0.0, g)
        else:
            g = tl.where(y == 0.0, 0.0, g / raised(tl.where(y == 0.0, 1.0, y), POWER - 1.0))
    if KIND == "sum" or KIND == "power":
        if DIVISOR is None:
            count = window_size(o * STRIDE_D - PAD_D, D, T, PAD_D, PADDED)
            count = count * window_size(p * STRIDE_H - PAD_H, H, R, PAD_H, PADDED)
            count = count * window_size(q * STRIDE_W - PAD_W, W, S, PAD_W, PADDED)
            # There may be none in windows that do not exist.
            g = g / tl.expand_dims(tl.maximum(count + tl.zeros_like(q), 1), 1 - AXIS).to(g.dtype)
            if KIND == "power":
                g = g * (T * R * S)
        elif DIVISOR != 1.0:
            g = g / DIVISOR
    return g


@triton.jit
def given(g, index, wanted, KIND: tl.constexpr):
    """A window's part of a pixel's gradient: all or nothing, where it has an index."""
    if KIND == "max" or KIND == "min":
        result = tl.where(index == wanted, g, 0.0)
    else:
        result = g
    return result


@triton.jit
def add_window(
    acc, dy_ptr, index_ptr, y_ptr, n, d, o, t, h0, w0, row, place, inside, there, offs_c, mask_c, blank,
    C, D, H, W, O, P, Q, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, KIND: tl.constexpr, POWER: tl.constexpr, DIVISOR: tl.constexpr, PADDED: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS_H: tl.constexpr, PIXELS_W: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """The pixels of cells with what the window at this place gives them."""
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if covers(ROW, COLUMN, PIXELS_H, PIXELS_W, R, S, STRIDE_H, STRIDE_W, DIL_H, DIL_W, PAD_H, PAD_W):
        p = row * (PIXELS_H // STRIDE_H) + ROW
        q = place * (PIXELS_W // STRIDE_W) + COLUMN
        # Unsigned comparison: a negative coordinate is a large number.
        # In a contiguous image `there` adds nothing, and would hide from the compiler that whole vectors are inside.
        keep = both(inside & (p.to(tl.uint32) < P), q.to(tl.uint32) < Q)
        if CHANNELS_LAST:
            keep = keep & there
        mask = tl.expand_dims(keep, 1 - AXIS) & mask_c
        if CHANNELS_LAST:
            offs = (((n * O + o) * P + p) * Q + q)[:, None] * C + offs_c[None, :]
        else:
            offs = (((n * C + offs_c) * O + o) * P + p)[:, None] * Q + q[None, :]
        g = slope(
            dy_ptr, y_ptr, offs, mask, o, p, q, D, H, W, KIND, POWER, DIVISOR, PADDED, T, R, S, STRIDE_D, STRIDE_H,
            STRIDE_W, PAD_D, PAD_H, PAD_W, AXIS,
        )  # fmt: skip
        index = blank
        if index_ptr is not None:
            index = tl.load(index_ptr + offs, mask=mask, other=0)
            if FLAT:
                # Of 64 bits they would take twice the registers.
                index = index.to(n.dtype)
                index = index - tl.expand_dims((d.to(n.dtype) * H + h0) * W + w0, 1 - AXIS)
            else:
                index = index.to(tl.int32)
                if T > 1:
                    index = index - tl.expand_dims(t * (R * S) + tl.zeros_like(q), 1 - AXIS)
        fed = ()
        for k in tl.static_range(PIXELS_H * PIXELS_W):
            if flat_tap(
                tap_of(ROW, k // PIXELS_W, R, STRIDE_H, DIL_H, PAD_H),
                tap_of(COLUMN, k % PIXELS_W, S, STRIDE_W, DIL_W, PAD_W), S,
            ) >= 0:  # fmt: skip
                if FLAT:
                    wanted = k // PIXELS_W * W + k % PIXELS_W
                else:
                    wanted = flat_tap(
                        tap_of(ROW, k // PIXELS_W, R, STRIDE_H, DIL_H, PAD_H),
                        tap_of(COLUMN, k % PIXELS_W, S, STRIDE_W, DIL_W, PAD_W), S,
                    )  # fmt: skip
                fed = fed + (acc[k] + given(g, index, wanted, KIND),)
            else:
                fed = fed + (acc[k],)
        acc = fed
    return acc


@triton.jit
def woven(tiles, COUNT: tl.constexpr):
    """COUNT tiles [C, T] (1, 2 or 4) as one [C, T * COUNT], in which their columns alternate."""
    C: tl.constexpr = tiles[0].shape[0]
    T: tl.constexpr = tiles[0].shape[1]
    if COUNT == 1:
        result = tiles[0]
    elif COUNT == 2:
        result = tl.reshape(tl.join(tiles[0], tiles[1]), (C, 2 * T))
    else:
        result = tl.reshape(tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], tiles[3])), (C, 4 * T))
    return result


@triton.jit
def pool_backward_kernel(
    dy_ptr, index_ptr,  # [N, C, O, P, Q], dense; the second for a maximum or minimum
    x_ptr, y_ptr,  # of a sum of powers, dense; else None
    dx_ptr,  # [N, C, D, H, W], dense
    # sizes
    N, C, D, H, W, O, P, Q,
    # geometry
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags, as pool_kernel has them; WINDOWS_*: how many windows may cover a pixel
    KIND: tl.constexpr, POWER: tl.constexpr, DIVISOR: tl.constexpr, PADDED: tl.constexpr, FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, VEC_Y: tl.constexpr, INDEX_64: tl.constexpr,
    WINDOWS_D, WINDOWS_H, WINDOWS_W,
    # tiles: pixels of a thread
    PIXELS_H: tl.constexpr, PIXELS_W: tl.constexpr, BY_PIXEL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    INDEXED: tl.constexpr = index_ptr is not None
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if CHANNELS_LAST:
        C = C // VEC_X * VEC_X
    else:
        W = W // VEC_X * VEC_X
        Q = Q // VEC_Y * VEC_Y
    tiles_c = tl.cdiv(C, BLOCK_C)
    across = tl.cdiv(W, PIXELS_W)
    slot = tl.program_id(0) // tiles_c
    plane, row, place, there = locate(slot, N * D, tl.cdiv(H, PIXELS_H), across, BLOCK_T, CHANNELS_LAST)
    n = plane // D
    d = plane % D
    if INDEX_64:
        n = n.to(tl.int64)
    h0 = row * PIXELS_H
    w0 = place * PIXELS_W
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = tl.expand_dims(offs_c < C, AXIS)
    if CHANNELS_LAST:
        blank = tl.zeros((BLOCK_T, BLOCK_C), tl.int32)
    else:
        blank = tl.zeros((BLOCK_C, BLOCK_T), tl.int32)
    acc = ()
    for _ in tl.static_range(PIXELS_H * PIXELS_W):
        if dx_ptr.dtype.element_ty == tl.float64:
            acc = acc + (blank.to(tl.float64),)
        else:
            acc = acc + (blank.to(tl.float32),)

    for a in tl.range(WINDOWS_D):
        o = (d + PAD_D) // STRIDE_D - a
        distance_d = (d + PAD_D) % STRIDE_D + a * STRIDE_D
        t = distance_d // DIL_D
        inside = (o.to(tl.uint32) < O) & (t < T)
        if DIL_D > 1:
            inside = inside & (distance_d % DIL_D == 0)
        if BY_PIXEL:
            for b in tl.range(WINDOWS_H):
                p = (h0 + PAD_H) // STRIDE_H - b
                distance_h = (h0 + PAD_H) % STRIDE_H + b * STRIDE_H
                r = distance_h // DIL_H
                row_inside = inside & (p.to(tl.uint32) < P) & (r < R)
                if DIL_H > 1:
                    row_inside = row_inside & (distance_h % DIL_H == 0)
                for c in tl.range(WINDOWS_W):
                    q = (w0 + PAD_W) // STRIDE_W - c
                    distance_w = (w0 + PAD_W) % STRIDE_W + c * STRIDE_W
                    s = distance_w // DIL_W
                    keep = both(there, row_inside) & (q.to(tl.uint32) < Q) & (s < S)
                    if DIL_W > 1:
                        keep = keep & (distance_w % DIL_W == 0)
                    mask = tl.expand_dims(keep, 1 - AXIS) & mask_c
                    if CHANNELS_LAST:
                        offs = (((n * O + o) * P + p) * Q + q)[:, None] * C + offs_c[None, :]
                    else:
                        offs = (((n * C + offs_c) * O + o) * P + p)[:, None] * Q + q[None, :]
                    g = slope(
                        dy_ptr, y_ptr, offs, mask, o, p, q, D, H, W, KIND, POWER, DIVISOR, PADDED, T, R, S, STRIDE_D,
                        STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W, AXIS,
                    )  # fmt: skip
                    if INDEXED:
                        index = tl.load(index_ptr + offs, mask=mask, other=0)
                        if FLAT:
                            wanted = (d.to(n.dtype) * H + h0) * W + w0
                        else:
                            wanted = (t * R + r) * S + s
                            index = index.to(tl.int32)
                        acc = (acc[0] + given(g, index, tl.expand_dims(wanted, 1 - AXIS), KIND),)
                    else:
                        acc = (acc[0] + g,)
        else:
            for u in tl.static_range(last_window(PIXELS_H, STRIDE_H, PAD_H) - first_window(R, STRIDE_H, DIL_H, PAD_H) + 1):
                for v in tl.static_range(
                    last_window(PIXELS_W, STRIDE_W, PAD_W) - first_window(S, STRIDE_W, DIL_W, PAD_W) + 1
                ):
                    acc = add_window(
                        acc, dy_ptr, index_ptr, y_ptr, n, d, o, t, h0, w0, row, place, inside, there, offs_c, mask_c, blank,
                        C, D, H, W, O, P, Q, T, R, S, STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W, DIL_H, DIL_W, KIND,
                        POWER, DIVISOR, PADDED, FLAT, CHANNELS_LAST, PIXELS_H, PIXELS_W,
                        u + first_window(R, STRIDE_H, DIL_H, PAD_H), v + first_window(S, STRIDE_W, DIL_W, PAD_W),
                    )  # fmt: skip

    for i in tl.static_range(PIXELS_H):
        h = h0 + i
        if CHANNELS_LAST:
            for j in tl.static_range(PIXELS_W):
                w = w0 + j
                mask = (there & (h < H) & (w < W))[:, None] & mask_c
                offs = (((n * D + d) * H + h) * W + w)[:, None] * C + offs_c[None, :]
                finish(acc[i * PIXELS_W + j], x_ptr, dx_ptr, offs, mask, KIND, POWER)
        else:
            tiles = ()
            for j in tl.static_range(PIXELS_W):
                tiles = tiles + (acc[i * PIXELS_W + j],)
            # A block's pixels lie side by side.
            w = slot % tl.cdiv(across, BLOCK_T) * (BLOCK_T * PIXELS_W) + tl.arange(0, BLOCK_T * PIXELS_W)
            mask = both(w < W, h < H)[None, :] & mask_c
            offs = (((n * C + offs_c) * D + d) * H + h)[:, None] * W + w[None, :]
            finish(woven(tiles, PIXELS_W), x_ptr, dx_ptr, offs, mask, KIND, POWER)


@triton.jit
def finish(value, x_ptr, dx_ptr, offs, mask, KIND: tl.constexpr, POWER: tl.constexpr):
    """Store a gradient; of a sum of powers, times the element's own part."""
    if KIND == "power":
        if POWER != 1.0:
            x = widened(tl.load(x_ptr + offs, mask=mask, other=0.0))
            value = value * raised(x, POWER - 1.0)
    if dx_ptr.dtype.element_ty != value.dtype:
        value = value.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + offs, value, mask=mask)
