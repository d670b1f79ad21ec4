"""Convolution forward with filter taps and channels flattened into one reduction axis.

M = output pixels, N = output channels of one group, K = taps x channels in the order of the weight's memory. For few
channels, and counts that no block divides: a product per tap would be mostly zeros in a stem (49 of depth 16 for a 7x7
filter, against 147 -> 160 here), and with 16 to 64 channels a deep block takes several taps at once.

Element k of the axis is decoded to (t, r, s, c) and read at its own address, so that any layout of the image will do: a
stem reads a contiguous NCHW image without a copy. Where consecutive k are neighbors in memory (8 channels of a
channels-last image, or image patches of 8 or more pixels in their own order) the loads are 128-bit vectors; else they
are single elements, out of L1.

Groups with few channels share a tile: PACK neighbors are one group here, whose weights are gathered as a block diagonal,
zeros in all other places. Nothing else of the kernel knows.

Padding is a word of bits per pixel, made before the loop. Each output is written once, after the epilogue.
"""

import triton
import triton.language as tl

from .dot import matmul_acc, zero_tile
from .epilogue import finish_tile
from .tiles import REMADE, grouped_tile, not_finite, tap_bits, taps_outside, tile, window_origins

__all__ = ["configs", "conv_flat_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""
    return [
        # Many channels out: patch embeddings, and layers of 96 to 256 channels that no block divides.
        tile(128, 128, 64, 4, 3),
        tile(128, 128, 64, 8, 3),
        # 32 to 96 channels out, vector loads.
        tile(128, 64, 128, 4, 3),
        tile(128, 64, 64, 4, 3),
        tile(64, 64, 64, 8, 3),
        tile(128, 32, 64, 4, 3),
        # Groups that share a tile of 32 channels: a step is a tap, and the assembler unrolls the loop. A thread's many
        # results share what is computed for each row. Without stages the image is read through L1, nine taps in a row.
        tile(256, 32, 32, 4, 3),
        tile(256, 32, 32, 8, 1),
        # Groups of 16.
        tile(256, 16, 16, 4, 3, tma=False),
        # Stems, whose single elements are dearer to read than to multiply: few registers, many programs.
        tile(128, 64, 16, 4, 2),
        tile(128, 32, 32, 4, 2),
        tile(64, 32, 32, 4, 2),
        # Groups that no neighbors join, and first layers with few filters.
        tile(64, 16, 32, 4, 2),
        tile(64, 16, 16, 4, 2),
    ]


@triton.jit
def conv_flat_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    # [groups * K, taps * C] (PACK_C of them), dense rows: a pointer, or a descriptor of [BLOCK_N, BLOCK_K] boxes
    w, stride_wk,
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes; K is that of one group; stride_y: from a pixel of y to the
    # next, where y is some channels of a wider channels-last tensor, else None
    M, D, H, W, K, O, P, Q, GROUPS, stride_y,
    # geometry; C is that of one group. PACK: how many of the layer's groups are one here; PACK_C, PACK_K: the channels and
    # filters of each of them; all 1 where groups stay alone
    C: tl.constexpr, PACK: tl.constexpr, PACK_C: tl.constexpr, PACK_K: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: PADDED: some tap can fall outside. W_CHANNELS_LAST: the axis runs (t, r, s, c), else (c, t, r, s).
    # VEC_X, VEC_W, VEC_K: powers of two up to 16 that divide the image's strides but the unit one, the weight's, K
    # and stride_y. POOL: as finish_tile has it
    PADDED: tl.constexpr, W_CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, VEC_W: tl.constexpr, VEC_K: tl.constexpr,
    USE_TMA: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    POOL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xd = stride_xd // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
    if VEC_X > 1 and W_CHANNELS_LAST:
        stride_xw = stride_xw // VEC_X * VEC_X
    if VEC_X > 1 and not W_CHANNELS_LAST:
        stride_xc = stride_xc // VEC_X * VEC_X
    if VEC_W > 1:
        stride_wk = stride_wk // VEC_W * VEC_W
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
        if stride_y is not None:
            stride_y = stride_y // VEC_K * VEC_K
    TAPS: tl.constexpr = T * R * S
    DEPTH: tl.constexpr = TAPS * C
    EVEN: tl.constexpr = DEPTH % BLOCK_K == 0
    HAS_D: tl.constexpr = T > 1 or PAD_D > 0
    BITS: tl.constexpr = PADDED and T + R + S <= 31

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n, d0, h0, w0 = window_origins(offs_m, M, O, P, Q, STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W)
    if BITS:
        outside = taps_outside(d0, h0, w0, D, H, W, T, R, S, DIL_D, DIL_H, DIL_W, HAS_D)
    first_c = group * C
    if INDEX_64:
        n = n.to(tl.int64)
        first_c = first_c.to(tl.int64)
    offs_x = n * stride_xn + first_c * stride_xc
    offs_x += d0.to(n.dtype) * stride_xd + h0.to(n.dtype) * stride_xh + w0.to(n.dtype) * stride_xw
    x_ptrs = x_ptr + offs_x

    if PACK > 1:
        filters = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
        member = filters // PACK_K
        # Its weights in the order of the axis, as if its first channel were the first of all.
        w_ptrs = w + ((group * K + filters) * stride_wk - member * (PACK_C if W_CHANNELS_LAST else PACK_C * TAPS))
    elif not USE_TMA:
        # Filters past the end repeat the last one, likewise.
        offs_n = group * K + tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
        w_ptrs = w + offs_n * stride_wk

    acc = zero_tile(y_ptr, BLOCK_M, BLOCK_N)
    for start in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        if W_CHANNELS_LAST:
            c = k % C
            tap = k // C
        else:
            c = k // TAPS
            tap = k % TAPS
        t = tap // (R * S)
        r = tap // S % R
        s = tap % S
        offs_k = c.to(n.dtype) * stride_xc + t.to(n.dtype) * (DIL_D * stride_xd)
        offs_k += r * (DIL_H * stride_xh) + s * (DIL_W * stride_xw)
        a_ptrs = x_ptrs[:, None] + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
        # The end of the axis is masked on both sides: zero times whatever lies there could be NaN.
        if BITS:
            a_mask = (outside[:, None] & tap_bits(t, r, s, R, S, HAS_D)[None, :]) == 0
        elif PADDED:
            # Unsigned comparison: a negative coordinate is a large number.
            a_mask = (h0[:, None] + (r * DIL_H)[None, :]).to(tl.uint32) < H
            a_mask = a_mask & ((w0[:, None] + (s * DIL_W)[None, :]).to(tl.uint32) < W)
            a_mask = a_mask & ((d0[:, None] + (t * DIL_D)[None, :]).to(tl.uint32) < D)
        if PADDED and not EVEN:
            a_mask = a_mask & (k < DEPTH)[None, :]
        if PADDED:
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        elif EVEN:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < DEPTH)[None, :], other=0.0)
        if PACK > 1:
            # A filter's own channels, and zeros for its neighbors'.
            if W_CHANNELS_LAST:
                offs_b = tap * PACK_C + c
                # Not c // PACK_C, of which the compiler cannot prove that PACK_C neighbors are equal.
                owner = k // PACK_C % PACK
            else:
                offs_b = k
                owner = k // (PACK_C * TAPS)
            mask_b = owner[None, :] == member[:, None]
            if not EVEN:
                mask_b = mask_b & (k < DEPTH)[None, :]
            b = tl.load(w_ptrs[:, None] + offs_b[None, :], mask=mask_b, other=0.0)
        elif USE_TMA:
            b = w.load([group * K + pid_n * BLOCK_N, start])
        elif EVEN:
            b = tl.load(w_ptrs[:, None] + k[None, :])  # [BLOCK_N, BLOCK_K]
        else:
            b = tl.load(w_ptrs[:, None] + k[None, :], mask=(k < DEPTH)[None, :], other=0.0)
        acc = matmul_acc(a, b.T, acc, PRECISION)

    if PACK > 1:
        # Zero times a neighbor's NaN or infinity is NaN. Such a tile is made anew, few columns and one product at a time.
        if not_finite(acc):
            for first_n in range(pid_n * BLOCK_N, pid_n * BLOCK_N + BLOCK_N, REMADE):
                remade = tl.minimum(first_n + tl.arange(0, REMADE), K - 1)
                own_x = x_ptrs[:, None] + (remade // PACK_K * PACK_C).to(n.dtype)[None, :] * stride_xc
                own_w = w + (group * K + remade) * stride_wk
                own = zero_tile(y_ptr, BLOCK_M, REMADE)
                for i in range(0, TAPS * PACK_C):
                    c = i // TAPS
                    tap = i % TAPS
                    t = tap // (R * S) * DIL_D
                    r = tap // S % R * DIL_H
                    s = tap % S * DIL_W
                    # Unsigned comparison, as above.
                    inside = (h0 + r).to(tl.uint32) < H
                    inside = inside & ((w0 + s).to(tl.uint32) < W) & ((d0 + t).to(tl.uint32) < D)
                    offs_k = c * stride_xc + t * stride_xd + r * stride_xh + s * stride_xw
                    a = tl.load(own_x + offs_k, mask=inside[:, None], other=0.0)
                    b = tl.load(own_w + (tap * PACK_C + c if W_CHANNELS_LAST else i))
                    own += a.to(own.dtype) * b.to(own.dtype)[None, :]
                finish_tile(
                    own, offs_m, M, O * P * Q, group, first_n, K, GROUPS * K, stride_y, pid_m, tiles_m, y_ptr, residual_ptr,
                    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B,
                    Y_CHANNELS_LAST, INDEX_64, POOL,
                )  # fmt: skip
            return

    finish_tile(
        acc, offs_m, M, O * P * Q, group, pid_n * BLOCK_N, K, GROUPS * K, stride_y, pid_m, tiles_m, y_ptr, residual_ptr,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST,
        INDEX_64, POOL,
    )  # fmt: skip
