"""Depthwise convolution, and its data gradient, which is a transposed depthwise convolution's forward: without products.

    forward      y[n, p, q, k] = sum over taps of x[n, p * stride + r * dilation - padding, ..., k // MULT] * w[k, r, s]
    transposed   y[n, p, q, c] = sum over taps and m of x[n, (p + padding - r * dilation) / stride, ..., k] * w[k, r, s]
                                 with k = c * MULT + m, where the division is exact

A thread owns some neighboring channels (8 of 16 bits) of a patch of PATCH_P x PATCH_Q results, held in registers: an
element of x is loaded and converted once for the patch, and feeds every result that it reaches. A program owns BLOCK_T
patches of BLOCK_C channels. In a channels-last image patches follow each other over all images, so that no lane is lost
to a width; in a contiguous one they are neighbors within a row.

Strides, dilations and channels are constants, so that the compiler knows which element feeds which result, and addresses
within a row. Filters of up to 9 taps are unrolled whole; larger ones are walked in steps of STEP_R x STEP_S taps.

x is read once from memory, its overlaps from L1 and L2; every result is written once, behind the epilogue.
"""

import math

import triton
import triton.language as tl

from .epilogue import apply_affine, load_affine
from .masks import both
from .patches import (
    exists,
    first_place,
    last_place,
    locate,
    pair,
    patch_axis,
    patches_before,
    reach,
    steps_of,
    taps_tile,
)

__all__ = ["COLUMNS", "WHOLE", "add_taps", "configs", "depthwise_kernel", "fitting", "patch", "steps", "whole"]

# Filters of so many taps are unrolled whole, and of so many where the rows of a patch share what is read; of four rows, or
# with a stride, 25 taps spill.
WHOLE, WHOLE_SHARED = 9, 25
# Columns of a wider filter that are walked at once.
COLUMNS = 8


def patch(p: int, q: int, warps: int) -> triton.Config:
    """A candidate: patches of p x q results. How many of them are a program's follows from its threads."""
    return triton.Config(dict(PATCH_P=p, PATCH_Q=q), num_warps=warps, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; `fitting` leaves those that suit a problem."""
    return [
        # Channels-last: 8 results of a small filter, whose rows meet.
        patch(2, 4, 4),
        patch(4, 2, 4),
        # Small images, and strides whose windows are far apart.
        patch(2, 2, 4),
        # One row: large filters walked row by row, 1-d, and widths that 7 divides.
        patch(1, 8, 4),
        patch(1, 7, 4),
        patch(1, 4, 4),
        # Contiguous: neighboring threads have neighboring results.
        patch(4, 1, 4),
        patch(2, 1, 4),
        patch(1, 1, 4),
    ]


def fitting(
    candidates: list[triton.Config], *, p: int, q: int, planes: int, taps: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int], transposed: bool, channels_last: bool, summed: bool = False,
) -> list[triton.Config]:  # fmt: skip
    """The candidates that suit an image of p x q results, for filters of so many planes, rows and columns.

    This is the one statement of what is valid. `summed`: for the weight gradient, whose threads hold sums and windows.
    """
    kept: dict[tuple[int, int], triton.Config] = {}
    for config in candidates:
        if (config.kwargs["PATCH_Q"] > 1) != channels_last:
            continue
        down, across = patches = whole(config, stride, transposed)
        # Registers: a thread holds 16 bytes of channels of each result, in fp32. The least patch must do.
        if down * across > 16 and down * across > 4 * stride[0] * stride[1]:
            continue
        # Rows that are walked one by one share nothing, and the addresses of several spill; 7 results of one spill 8 bytes
        # on sm_90, transposed.
        walked = steps(patches, taps, stride, dilation, transposed)[0] < taps[0] or (summed and taps[0] * taps[1] > WHOLE)
        if walked and (config.kwargs["PATCH_P"] > 1 or (transposed and config.kwargs["PATCH_Q"] == 7)):
            continue
        # The windows of a stride are far apart.
        apart = max(stride) > 1 and not transposed and down * across > 4
        if apart and (summed or not walked):
            continue
        # The loop over planes takes registers too.
        if planes > 1 and down * across > 7 and across > 4:
            continue
        kept.setdefault(patches, config)
    # A patch that lies mostly outside the image is for images of a few pixels, which none fits.
    most_p, most_q = max(1, 2 * p - 1), max(1, 2 * q - 1)
    inside = [config for (down, across), config in kept.items() if down <= most_p and across <= most_q]
    return inside or list(kept.values())


def steps(
    patches: tuple[int, int], taps: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], transposed: bool
) -> tuple[int, int]:
    """(rows, columns) of taps that are unrolled: the whole filter, or one row, or one row of each phase of a stride."""
    r, s = taps
    # Rows of a patch share most of what is read where nothing lies between them.
    shared = (patches[0] == 2 or patches == (4, 1)) and stride == dilation == (1, 1)
    if s <= COLUMNS and r * s <= (WHOLE_SHARED if shared else WHOLE):
        return r, s
    # A step of taps must be a step of whole elements.
    least = [n // math.gcd(n, d) if transposed else 1 for n, d in zip(stride, dilation, strict=True)]
    return min(r, least[0]), s if s <= COLUMNS else COLUMNS // least[1] * least[1]


def whole(config: triton.Config, stride: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """The patch of a config; of a transposed convolution it is whole strides long."""
    patches = config.kwargs["PATCH_P"], config.kwargs["PATCH_Q"]
    return tuple(-(-n // s) * s for n, s in zip(patches, stride, strict=True)) if transposed else patches


@triton.jit
def add_taps(
    acc, x_ptrs, h0, w0, inside,  # results of a patch; its first element, where that is, and whether there may be any
    w, filters, mask_c, first,  # weights, of which each filter's `first` is the first of these taps
    stride_xh, H, W,
    STRIDE_XW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr,
):  # fmt: skip
    """The results with ROWS x COLUMNS taps added."""
    taps = taps_tile(w, filters, mask_c, first, ROWS, COLUMNS, S, TAPS, acc[0].dtype)
    for h in tl.static_range(
        first_place(ROWS, STRIDE_H, DIL_H, TRANSPOSED), last_place(PATCH_P, ROWS, STRIDE_H, DIL_H, TRANSPOSED) + 1
    ):
        row_ptrs = x_ptrs + h * stride_xh
        # Unsigned comparison: a negative coordinate is a large number.
        row_inside = both(inside, (h0 + h).to(tl.uint32) < H)
        for v in tl.static_range(
            first_place(COLUMNS, STRIDE_W, DIL_W, TRANSPOSED), last_place(PATCH_Q, COLUMNS, STRIDE_W, DIL_W, TRANSPOSED) + 1
        ):
            if pair(
                exists(h, PATCH_P, ROWS, STRIDE_H, DIL_H, TRANSPOSED),
                exists(v, PATCH_Q, COLUMNS, STRIDE_W, DIL_W, TRANSPOSED),
            ):
                mask = (row_inside & ((w0 + v).to(tl.uint32) < W))[:, None]
                if mask_c is not None:
                    mask = mask & mask_c[None, :]
                x = tl.load(row_ptrs + v * STRIDE_XW, mask=mask, other=0.0).to(acc[0].dtype)  # [BLOCK_T, BLOCK_C]
                fed = ()
                for i in tl.static_range(PATCH_P):
                    for j in tl.static_range(PATCH_Q):
                        if pair(
                            reach(h, i, ROWS, STRIDE_H, DIL_H, TRANSPOSED),
                            reach(v, j, COLUMNS, STRIDE_W, DIL_W, TRANSPOSED),
                        ):
                            tap = taps[
                                reach(h, i, ROWS, STRIDE_H, DIL_H, TRANSPOSED) * COLUMNS
                                + reach(v, j, COLUMNS, STRIDE_W, DIL_W, TRANSPOSED)
                            ]
                            fed = fed + (acc[i * PATCH_Q + j] + x * tap,)
                        else:
                            fed = fed + (acc[i * PATCH_Q + j],)
                acc = fed
    return acc


@triton.jit
def add_rows(
    acc, x_ptrs, h0, w0, inside, w, filters, mask_c, first, stride_xh, H, W,
    STRIDE_XW: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, STEP_S: tl.constexpr,
):  # fmt: skip
    """The results with ROWS whole rows of taps added, STEP_S columns at once."""
    NEXT: tl.constexpr = -(STEP_S * DIL_W // STRIDE_W) if TRANSPOSED else STEP_S * DIL_W
    for step in tl.range(S // STEP_S):
        acc = add_taps(
            acc, x_ptrs + step * (NEXT * STRIDE_XW), h0, w0 + step * NEXT, inside, w, filters, mask_c,
            first + step * STEP_S, stride_xh, H, W, STRIDE_XW, ROWS, STEP_S, S, TAPS, STRIDE_H, STRIDE_W, DIL_H, DIL_W,
            TRANSPOSED, PATCH_P, PATCH_Q,
        )  # fmt: skip
    if S % STEP_S > 0:
        acc = add_taps(
            acc, x_ptrs + S // STEP_S * (NEXT * STRIDE_XW), h0, w0 + S // STEP_S * NEXT, inside, w, filters, mask_c,
            first + S // STEP_S * STEP_S, stride_xh, H, W, STRIDE_XW, ROWS, S % STEP_S, S, TAPS, STRIDE_H, STRIDE_W, DIL_H,
            DIL_W, TRANSPOSED, PATCH_P, PATCH_Q,
        )  # fmt: skip
    return acc


@triton.jit
def keep_moments(
    results, p0, q0, there, P, Q, slot, slots, offs_c, C, counts_ptr, moments_ptr,
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr,
):  # fmt: skip
    """Write a program's statistics as kernels/statistics.py has them: number, means, sums of squared deviations."""
    dtype: tl.constexpr = results[0].dtype
    count = tl.zeros((), dtype)
    total = tl.zeros((results[0].shape[1],), dtype)
    for k in tl.static_range(PATCH_P * PATCH_Q):
        # As when results are stored: the first of a transposed patch may lie before the image.
        mask = both(there, (p0 + k // PATCH_Q).to(tl.uint32) < P) & ((q0 + k % PATCH_Q).to(tl.uint32) < Q)
        count += tl.sum(mask.to(dtype))
        total += tl.sum(tl.where(mask[:, None], results[k], 0.0), 0)
    mean = total / count
    squares = tl.zeros((results[0].shape[1],), dtype)
    for k in tl.static_range(PATCH_P * PATCH_Q):
        mask = both(there, (p0 + k // PATCH_Q).to(tl.uint32) < P) & ((q0 + k % PATCH_Q).to(tl.uint32) < Q)
        deviation = tl.where(mask[:, None], results[k] - mean[None, :], 0.0)
        squares += tl.sum(deviation * deviation, 0)
    row = slot.to(tl.int64)
    tl.store(moments_ptr + row * C + offs_c, mean, mask=offs_c < C)
    tl.store(moments_ptr + (slots + row) * C + offs_c, squares, mask=offs_c < C)
    tl.store(counts_ptr + row + tl.zeros_like(offs_c), count, mask=offs_c == 0)


@triton.jit
def depthwise_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh,
    w,  # [filters, taps], dense
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes: x is [N, D, H, W], y is [N, O, P, Q], dense
    N, D, H, W, O, P, Q,
    # geometry; C: channels of y; STRIDE_Y: from a pixel of a channels-last y to the next; MULT: filters of a channel
    C: tl.constexpr, STRIDE_Y: tl.constexpr, MULT: tl.constexpr, STRIDE_XW: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; VEC_X: a power of two up to 16 that divides the image's runtime strides. POOL: not 0 where sums over the
    # program's results, all of one image, go to moments [slots, C] instead of statistics; negative: and no results to y
    TRANSPOSED: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, INDEX_64: tl.constexpr,
    POOL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xd = stride_xd // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
    TAPS: tl.constexpr = T * R * S
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    across = tl.cdiv(Q + patches_before(PAD_W, STRIDE_W, TRANSPOSED), PATCH_Q)
    down = tl.cdiv(P + patches_before(PAD_H, STRIDE_H, TRANSPOSED), PATCH_P)
    pid_c = tl.program_id(0) % tiles_c
    slot = tl.program_id(0) // tiles_c
    if POOL == 0:
        plane, row, column, there = locate(slot, N * O, down, across, BLOCK_T, CHANNELS_LAST)
        n = plane // O
        o = plane % O
    else:
        steps = steps_of(O, down, across, BLOCK_T, CHANNELS_LAST)
        o, row, column, there = locate(slot % steps, O, down, across, BLOCK_T, CHANNELS_LAST)
        n = slot // steps
    p0, h0 = patch_axis(row, PATCH_P, STRIDE_H, PAD_H, TRANSPOSED)
    q0, w0 = patch_axis(column, PATCH_Q, STRIDE_W, PAD_W, TRANSPOSED)
    if INDEX_64:
        n = n.to(tl.int64)

    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = None
    if C % BLOCK_C > 0:
        mask_c = offs_c < C
    # Where the taps of a plane begin, whatever the plane.
    offs_x = n * stride_xn + h0.to(n.dtype) * stride_xh + w0.to(n.dtype) * STRIDE_XW
    acc = ()
    for _ in tl.static_range(PATCH_P * PATCH_Q):
        if y_ptr.dtype.element_ty == tl.float64:
            acc = acc + (tl.zeros((BLOCK_T, BLOCK_C), tl.float64),)
        else:
            acc = acc + (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)

    NEXT: tl.constexpr = -(STEP_R * DIL_H // STRIDE_H) if TRANSPOSED else STEP_R * DIL_H
    for m in tl.range(MULT if TRANSPOSED else 1):
        if TRANSPOSED:
            filters = offs_c * MULT + m
            channels = filters
        else:
            filters = offs_c
            channels = offs_c // MULT
        for t in tl.range(T):
            if TRANSPOSED:
                reached = o + PAD_D - t * DIL_D
                inside = both(there, reached % STRIDE_D == 0)
                d = reached // STRIDE_D
            else:
                inside = there
                d = o * STRIDE_D - PAD_D + t * DIL_D
            inside = both(inside, d.to(tl.uint32) < D)
            x_ptrs = x_ptr + ((offs_x + d.to(n.dtype) * stride_xd)[:, None] + (channels.to(n.dtype) * stride_xc)[None, :])
            for step in tl.range(R // STEP_R):
                acc = add_rows(
                    acc, x_ptrs + step * (NEXT * stride_xh), h0 + step * NEXT, w0, inside, w, filters, mask_c,
                    (t * R + step * STEP_R) * S, stride_xh, H, W, STRIDE_XW, STEP_R, S, TAPS, STRIDE_H, STRIDE_W, DIL_H,
                    DIL_W, TRANSPOSED, PATCH_P, PATCH_Q, STEP_S,
                )  # fmt: skip
            if R % STEP_R > 0:
                acc = add_rows(
                    acc, x_ptrs + R // STEP_R * (NEXT * stride_xh), h0 + R // STEP_R * NEXT, w0, inside, w, filters, mask_c,
                    (t * R + R // STEP_R * STEP_R) * S, stride_xh, H, W, STRIDE_XW, R % STEP_R, S, TAPS, STRIDE_H, STRIDE_W,
                    DIL_H, DIL_W, TRANSPOSED, PATCH_P, PATCH_Q, STEP_S,
                )  # fmt: skip

    # Along rows and columns, from one result to the next.
    next_q = STRIDE_Y if CHANNELS_LAST else 1
    next_p = Q * next_q
    offs_y = ((n * O + o) * P + p0) * Q + q0
    if CHANNELS_LAST:
        offs_y = (offs_y * STRIDE_Y)[:, None] + offs_c[None, :]
    else:
        offs_y = (offs_y + n * ((C - 1) * O * P * Q))[:, None] + (offs_c.to(n.dtype) * (O * P * Q))[None, :]
    scale, shift = load_affine(offs_c, mask_c, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS, acc[0].dtype)
    results = ()
    for k in tl.static_range(PATCH_P * PATCH_Q):
        results = results + (apply_affine(acc[k], scale, shift, bias_ptr, mean_ptr),)
    if moments_ptr is not None and POOL == 0:
        slots = tl.num_programs(0) // tiles_c
        keep_moments(results, p0, q0, there, P, Q, slot, slots, offs_c, C, counts_ptr, moments_ptr, PATCH_P, PATCH_Q)
    total = tl.zeros((BLOCK_C,), acc[0].dtype)
    for i in tl.static_range(PATCH_P):
        for j in tl.static_range(PATCH_Q):
            # The first results of a transposed patch may lie before the image.
            mask = (both(there, (p0 + i).to(tl.uint32) < P) & ((q0 + j).to(tl.uint32) < Q))[:, None]
            if mask_c is not None:
                mask = mask & mask_c[None, :]
            result = results[i * PATCH_Q + j]
            offs = offs_y + (i * next_p + j * next_q)
            if residual_ptr is not None:
                result = result + tl.load(residual_ptr + offs, mask=mask, other=0.0).to(result.dtype)
            result = ACT(result, ACT_A, ACT_B)
            if POOL >= 0:
                tl.store(y_ptr + offs, result.to(y_ptr.dtype.element_ty), mask=mask)
            if POOL != 0:
                total += tl.sum(tl.where(mask, result, 0.0), 0)
    if POOL != 0:
        tl.store(moments_ptr + slot.to(tl.int64) * C + offs_c, total, mask=offs_c < C)
