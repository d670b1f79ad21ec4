"""Weight and bias gradient of a depthwise convolution: dw[k, r, s] = sum over results of dy[n, p, q, k] * x[n, element].

A program owns BLOCK_C filters, some of their taps, and a range of the results, which it walks in steps of BLOCK_T patches.
A thread holds PATCH_P x PATCH_Q elements of dy of some neighboring channels, loads the elements of x around them once, and
adds each product to the tap that it belongs to: one sum a tap, in registers for the whole range. Up to ROWS x COLUMNS taps
are a program's; larger filters take several programs, which read the same range at the same time, so that memory gives it
once. Each range's sums go to a slot of their own in fp32 (fp64 for fp64), and a second kernel adds the slots in a fixed
order and rounds: no atomics, the same bits on every run.

x and dy are read once from memory. How a patch is laid out, in which image, is as in kernels/depthwise.py.
"""

import triton
import triton.language as tl

from .depthwise import patch
from .masks import both
from .patches import exists, last_place, locate, pair, patch_axis, reach, steps_of

__all__ = ["configs", "depthwise_reduce_kernel", "depthwise_wgrad_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `depthwise.fitting` leaves those that suit a problem."""
    return [
        # Channels-last.
        patch(2, 4, 4),
        patch(2, 2, 4),
        patch(1, 7, 4),
        patch(1, 4, 4),
        # Contiguous: neighboring threads have neighboring results, each with an address of its own, and four of them spill.
        patch(2, 1, 4),
        patch(1, 1, 4),
    ]


@triton.jit
def depthwise_wgrad_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh,
    dy_ptr,  # [N, O, P, Q], dense
    sums_ptr,  # [SLOTS, TAPS + 1, K], the bias's sums behind the taps'
    # sizes
    N, D, H, W, O, P, Q, RANGE,
    # geometry; K: filters; MULT: those of a channel
    K: tl.constexpr, MULT: tl.constexpr, STRIDE_XW: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; VEC_X: a power of two up to 16 that divides the image's runtime strides
    BIAS: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xd = stride_xd // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
    TAPS: tl.constexpr = T * R * S
    GROUPS_R: tl.constexpr = (R + ROWS - 1) // ROWS
    GROUPS_S: tl.constexpr = (S + COLUMNS - 1) // COLUMNS
    tiles_k: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    across = tl.cdiv(Q, PATCH_Q)
    down = tl.cdiv(P, PATCH_P)
    # Programs that read the same pixels are neighbors.
    pid = tl.program_id(0)
    s0 = pid % GROUPS_S * COLUMNS
    pid = pid // GROUPS_S
    r0 = pid % GROUPS_R * ROWS
    pid = pid // GROUPS_R
    t = pid % T
    pid = pid // T
    slot = pid // tiles_k
    offs_k = pid % tiles_k * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k = offs_k < K

    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    acc = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        acc = acc + (tl.zeros((BLOCK_T, BLOCK_C), dtype),)
    bias = tl.zeros((BLOCK_T, BLOCK_C), dtype)
    next_q = K if CHANNELS_LAST else 1
    next_p = Q * next_q
    steps = steps_of(N * O, down, across, BLOCK_T, CHANNELS_LAST)
    for step in tl.range(slot * RANGE, tl.minimum(steps, slot * RANGE + RANGE)):
        plane, row, column, there = locate(step, N * O, down, across, BLOCK_T, CHANNELS_LAST)
        n = plane // O
        o = plane % O
        p0, h0 = patch_axis(row, PATCH_P, STRIDE_H, PAD_H, False)
        q0, w0 = patch_axis(column, PATCH_Q, STRIDE_W, PAD_W, False)
        h0 += r0 * DIL_H
        w0 += s0 * DIL_W
        d = o * STRIDE_D - PAD_D + t * DIL_D
        inside = both(there, d.to(tl.uint32) < D)
        if INDEX_64:
            n = n.to(tl.int64)
        offs_y = ((n * O + o) * P + p0) * Q + q0
        if CHANNELS_LAST:
            dy_ptrs = dy_ptr + ((offs_y * K)[:, None] + offs_k[None, :])
        else:
            offs_y += n * ((K - 1) * O * P * Q)
            dy_ptrs = dy_ptr + (offs_y[:, None] + (offs_k.to(n.dtype) * (O * P * Q))[None, :])
        dy = ()
        for i in tl.static_range(PATCH_P):
            for j in tl.static_range(PATCH_Q):
                mask = (both(there, p0 + i < P) & (q0 + j < Q))[:, None]
                if K % BLOCK_C > 0:
                    mask = mask & mask_k[None, :]
                element = tl.load(dy_ptrs + (i * next_p + j * next_q), mask=mask, other=0.0).to(dtype)
                dy = dy + (element,)
                if BIAS:
                    bias += element
        offs_x = n * stride_xn + d.to(n.dtype) * stride_xd + h0.to(n.dtype) * stride_xh + w0.to(n.dtype) * STRIDE_XW
        x_ptrs = x_ptr + (offs_x[:, None] + ((offs_k // MULT).to(n.dtype) * stride_xc)[None, :])
        for h in tl.static_range(last_place(PATCH_P, ROWS, STRIDE_H, DIL_H, False) + 1):
            row_ptrs = x_ptrs + h * stride_xh
            # Unsigned comparison: a negative coordinate is a large number.
            row_inside = both(inside, (h0 + h).to(tl.uint32) < H)
            for v in tl.static_range(last_place(PATCH_Q, COLUMNS, STRIDE_W, DIL_W, False) + 1):
                if pair(
                    exists(h, PATCH_P, ROWS, STRIDE_H, DIL_H, False), exists(v, PATCH_Q, COLUMNS, STRIDE_W, DIL_W, False)
                ):
                    mask = (row_inside & ((w0 + v).to(tl.uint32) < W))[:, None]
                    if K % BLOCK_C > 0:
                        mask = mask & mask_k[None, :]
                    x = tl.load(row_ptrs + v * STRIDE_XW, mask=mask, other=0.0).to(dtype)  # [BLOCK_T, BLOCK_C]
                    for i in tl.static_range(PATCH_P):
                        for j in tl.static_range(PATCH_Q):
                            if pair(
                                reach(h, i, ROWS, STRIDE_H, DIL_H, False), reach(v, j, COLUMNS, STRIDE_W, DIL_W, False)
                            ):
                                acc = replaced(
                                    acc, x * dy[i * PATCH_Q + j],
                                    reach(h, i, ROWS, STRIDE_H, DIL_H, False) * COLUMNS
                                    + reach(v, j, COLUMNS, STRIDE_W, DIL_W, False), ROWS * COLUMNS,
                                )  # fmt: skip

    sums_ptrs = sums_ptr + slot.to(tl.int64) * ((TAPS + 1) * K) + offs_k
    for r in tl.static_range(ROWS):
        for s in tl.static_range(COLUMNS):
            mask = both(both(mask_k, r0 + r < R), s0 + s < S)
            tap = (t * R + r0 + r) * S + s0 + s
            tl.store(sums_ptrs + tap * K, tl.sum(acc[r * COLUMNS + s], 0), mask=mask)
    if BIAS:
        tl.store(sums_ptrs + TAPS * K, tl.sum(bias, 0), mask=both(mask_k, t + r0 + s0 == 0))


@triton.jit
def replaced(acc, product, index: tl.constexpr, COUNT: tl.constexpr):
    """The tuple with a product added to one of its tiles."""
    result = ()
    for k in tl.static_range(COUNT):
        if k == index:
            result = result + (acc[k] + product,)
        else:
            result = result + (acc[k],)
    return result


@triton.jit
def depthwise_reduce_kernel(
    sums_ptr,  # [SLOTS, TAPS + 1, K]
    dw_ptr,  # [K, TAPS]
    db_ptr,
    SLOTS, K, TAPS, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the slots' sums in a fixed order, a block of slots at once, and write them as the weight lies."""
    tiles = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // tiles
    offs_k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    slots = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK_K), sums_ptr.dtype.element_ty)
    for start in tl.range(0, SLOTS, BLOCK_S):
        offs = (start + slots).to(tl.int64)[:, None] * ((TAPS + 1) * K) + (row * K + offs_k)[None, :]
        total += tl.load(sums_ptr + offs, mask=(start + slots < SLOTS)[:, None] & mask_k[None, :], other=0.0)
    result = tl.sum(total, 0)
    if row < TAPS:
        tl.store(dw_ptr + offs_k * TAPS + row, result.to(dw_ptr.dtype.element_ty), mask=mask_k)
    elif db_ptr is not None:
        tl.store(db_ptr + offs_k, result.to(db_ptr.dtype.element_ty), mask=mask_k)
