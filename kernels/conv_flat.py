"""Convolution forward with filter taps and channels flattened into one reduction axis: stems and image patches.

M = output pixels, N = output channels of one group, K = taps x channels in the order of the weight's memory. With 1 to 4
channels a product per tap would be mostly zeros (a 7x7 stem: 49 of depth 16, against 147 -> 160 here). Element k of the
axis is decoded to (t, r, s, c) and read at its own address, so that any layout of the image will do: a stem reads a
contiguous NCHW image without a copy. Where consecutive k are neighbors in memory (patches of 8 or more pixels in a
contiguous image, read in its own order), the loads are vectors; else they are single elements, out of L1.
Each output is written once, after the epilogue.
"""

import triton
import triton.language as tl

from .dot import accumulator_type, matmul_acc
from .epilogue import finish_tile
from .tiles import grouped_tile, tile

__all__ = ["configs", "conv_flat_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""

    return [
        # Patch embeddings: many channels out, a deep axis.
        tile(128, 128, 32, 8, 3),
        # Stems: 32 to 96 channels out. Deeper blocks only add masks for the axis' end.
        tile(128, 64, 32, 8, 3),
        tile(128, 64, 32, 4, 2),
        tile(64, 64, 32, 4, 2),
        tile(128, 32, 32, 4, 2),
        tile(64, 32, 32, 4, 2),
        # Groups with few channels, and first layers with few filters.
        tile(128, 16, 16, 4, 2),
        tile(64, 16, 16, 4, 2),
    ]


@triton.jit
def conv_flat_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    w_ptr, stride_wk,  # [groups * K, taps * C], dense rows
    y_ptr, residual_ptr,
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    # sizes; K is that of one group
    M, D, H, W, K, O, P, Q, GROUPS,
    # geometry; C is that of one group
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: PADDED: some tap can fall outside. W_CHANNELS_LAST: the axis runs (t, r, s, c), else (c, t, r, s). VEC_X, VEC_W,
    # VEC_K: powers of two up to 16 that divide the image's strides but the unit one, the weight's, and K
    PADDED: tl.constexpr, W_CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, VEC_W: tl.constexpr, VEC_K: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    if VEC_X > 1:
        stride_xn = tl.multiple_of(stride_xn, VEC_X)
        stride_xd = tl.multiple_of(stride_xd, VEC_X)
        stride_xh = tl.multiple_of(stride_xh, VEC_X)
    if VEC_W > 1:
        stride_wk = tl.multiple_of(stride_wk, VEC_W)
    if VEC_K > 1:
        K = tl.multiple_of(K, VEC_K)
    if VEC_X > 1 and W_CHANNELS_LAST:
        stride_xw = tl.multiple_of(stride_xw, VEC_X)
    if VEC_X > 1 and not W_CHANNELS_LAST:
        stride_xc = tl.multiple_of(stride_xc, VEC_X)
    TAPS: tl.constexpr = T * R * S
    DEPTH: tl.constexpr = TAPS * C

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    # Rows past the end repeat the last pixel: their loads are valid and their results are not stored.
    row = tl.minimum(offs_m, M - 1)
    d0 = row // (P * Q) % O * STRIDE_D - PAD_D
    h0 = row // Q % P * STRIDE_H - PAD_H
    w0 = row % Q * STRIDE_W - PAD_W
    n = row // (O * P * Q)
    if INDEX_64:
        n = n.to(tl.int64)
        d0 = d0.to(tl.int64)
        h0 = h0.to(tl.int64)
    x_ptrs = x_ptr + (n * stride_xn + d0 * stride_xd + h0 * stride_xh + w0 * stride_xw + group * C * stride_xc)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Filters past the end repeat the last one, likewise.
    filters = group * K + tl.minimum(offs_n, K - 1)
    w_ptrs = w_ptr + filters * stride_wk

    dtype: tl.constexpr = accumulator_type(x_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype)
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
        offs_k = c * stride_xc + t * (DIL_D * stride_xd) + r * (DIL_H * stride_xh) + s * (DIL_W * stride_xw)
        # The end of the axis is masked on both sides: zero times whatever lies there could be NaN.
        a_mask = (k < DEPTH)[None, :]
        if PADDED:
            # Unsigned comparison: a negative coordinate is a large number.
            a_mask = a_mask & ((h0[:, None] + (r * DIL_H)[None, :]).to(tl.uint32) < H)
            a_mask = a_mask & ((w0[:, None] + (s * DIL_W)[None, :]).to(tl.uint32) < W)
            if T > 1 or PAD_D > 0:
                a_mask = a_mask & ((d0[:, None] + (t * DIL_D)[None, :]).to(tl.uint32) < D)
        a = tl.load(x_ptrs[:, None] + offs_k[None, :], mask=a_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(w_ptrs[:, None] + k[None, :], mask=(k < DEPTH)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = matmul_acc(a, b.T, acc, PRECISION)

    finish_tile(
        acc, offs_m, mask_m, O * P * Q, group * K + offs_n, offs_n < K, GROUPS * K, y_ptr, residual_ptr,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, INDEX_64,
    )  # fmt: skip
