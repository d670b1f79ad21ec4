"""Convolution forward as an implicit matrix product, channels-last.

M = output pixels (n, o, p, q), N = output channels of one group, K = filter taps x input channels of one group.
A program owns one BLOCK_M x BLOCK_N tile of one group. One flat loop runs over taps x channel blocks (nested loops lose
software pipelining); the image comes through pointers, each pixel's address formed once per tile and moved by one
scalar a step; the weights come through a TMA descriptor where there is one. Each output is written once, after the
epilogue. Image rows are read once per filter tap and column of tiles, from L2 but for the first time.

Padding: whether a tap falls inside the image is one bit per tap and pixel, made before the loop, so that the loop tests a
bit where it would compute and compare coordinates (issue ratio 0.66 -> 0.38 for 128x128x64 with 8 warps on sm_90).
Filters of more than 64 taps compare in the loop; convolutions without padding need no mask at all.
"""

import triton
import triton.language as tl

from .dot import accumulator_type, matmul_acc
from .epilogue import finish_tile
from .tiles import grouped_tile, tile

__all__ = ["configs", "conv_fprop_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""

    return [
        # Compute-bound layers: the fewest loop instructions per product.
        tile(256, 128, 64, 8, 3),
        tile(128, 256, 64, 8, 3),
        tile(64, 256, 64, 4, 4),
        tile(128, 128, 64, 4, 4),
        tile(128, 128, 64, 8, 4),
        # Few output channels, or too few tiles to fill the GPU.
        tile(128, 64, 64, 4, 4),
        tile(64, 128, 64, 4, 4),
        tile(64, 64, 64, 4, 4),
        # Channels that 64 does not divide; fp32 and fp64, whose tiles are two and four times as large.
        tile(128, 64, 32, 4, 4),
        tile(64, 64, 32, 4, 4),
        tile(128, 32, 32, 4, 4),
        tile(64, 32, 32, 4, 3),
        # Groups with few channels.
        tile(64, 16, 16, 4, 3),
    ]


@triton.jit
def conv_fprop_kernel(
    x_ptr, stride_xn, stride_xd, stride_xh, stride_xw,  # channels have stride 1
    w, stride_wk,  # [groups * K, taps * C], channels innermost: a pointer, or a descriptor of [BLOCK_N, BLOCK_K] boxes
    y_ptr, residual_ptr,
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    # sizes; C and K are those of one group
    M, D, H, W, C, K, O, P, Q, GROUPS,
    # geometry
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: PADDED: some tap can fall outside. EVEN_C: BLOCK_K divides C. VEC_C, VEC_K: powers of two up to 16 that divide
    # C and every image stride, and K
    PADDED: tl.constexpr, EVEN_C: tl.constexpr, VEC_C: tl.constexpr, VEC_K: tl.constexpr,
    USE_TMA: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    if VEC_C > 1:
        C = tl.multiple_of(C, VEC_C)
        stride_xn = tl.multiple_of(stride_xn, VEC_C)
        stride_xd = tl.multiple_of(stride_xd, VEC_C)
        stride_xh = tl.multiple_of(stride_xh, VEC_C)
        stride_xw = tl.multiple_of(stride_xw, VEC_C)
        stride_wk = tl.multiple_of(stride_wk, VEC_C)
    if VEC_K > 1:
        K = tl.multiple_of(K, VEC_K)
    TAPS: tl.constexpr = T * R * S
    BITS: tl.constexpr = PADDED and TAPS <= 64

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
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = n * stride_xn + d0 * stride_xd + h0 * stride_xh + w0 * stride_xw + group * C
    x_ptrs = x_ptr + (offs_x[:, None] + offs_k[None, :])  # [BLOCK_M, BLOCK_K]

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_w = group * K + pid_n * BLOCK_N
    if not USE_TMA:
        # Filters past the end repeat the last one, likewise.
        filters = group * K + tl.minimum(offs_n, K - 1)
        if INDEX_64:
            filters = filters.to(tl.int64)
        w_ptrs = w + (filters * stride_wk)[:, None] + offs_k[None, :]  # [BLOCK_N, BLOCK_K]

    if BITS:
        inside = tl.zeros((BLOCK_M,), tl.int32 if TAPS <= 32 else tl.int64)
        for t in tl.static_range(T):
            for r in tl.static_range(R):
                for s in tl.static_range(S):
                    ok = (d0 + t * DIL_D >= 0) & (d0 + t * DIL_D < D)
                    ok = ok & (h0 + r * DIL_H >= 0) & (h0 + r * DIL_H < H)
                    ok = ok & (w0 + s * DIL_W >= 0) & (w0 + s * DIL_W < W)
                    inside = inside | (ok.to(inside.dtype) << ((t * R + r) * S + s))

    dtype: tl.constexpr = accumulator_type(x_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    blocks_c = tl.cdiv(C, BLOCK_K)
    for i in tl.range(0, TAPS * blocks_c, num_stages=STAGES):
        tap = i // blocks_c
        c = i % blocks_c * BLOCK_K
        t = tap // (R * S)
        r = tap // S % R
        s = tap % S
        a_ptrs = x_ptrs + (t * DIL_D * stride_xd + r * DIL_H * stride_xh + s * DIL_W * stride_xw + c)
        if BITS:
            bit = tl.full((), 1, inside.dtype) << tap
            mask = ((inside & bit) != 0)[:, None]
            if not EVEN_C:
                mask = mask & (offs_k < C - c)[None, :]
            a = tl.load(a_ptrs, mask=mask, other=0.0)
        elif PADDED:
            # Unsigned comparison: a negative coordinate is a large number.
            ok = (d0 + t * DIL_D).to(tl.uint32) < D
            ok = ok & ((h0 + r * DIL_H).to(tl.uint32) < H) & ((w0 + s * DIL_W).to(tl.uint32) < W)
            mask = ok[:, None]
            if not EVEN_C:
                mask = mask & (offs_k < C - c)[None, :]
            a = tl.load(a_ptrs, mask=mask, other=0.0)
        elif EVEN_C:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(offs_k < C - c)[None, :], other=0.0)
        if USE_TMA:
            b = w.load([row_w, tap * C + c])
        elif EVEN_C:
            b = tl.load(w_ptrs + (tap * C + c))
        else:
            b = tl.load(w_ptrs + (tap * C + c), mask=(offs_k < C - c)[None, :], other=0.0)
        acc = matmul_acc(a, b.T, acc, PRECISION)

    finish_tile(
        acc, offs_m, mask_m, O * P * Q, group * K + offs_n, offs_n < K, GROUPS * K, y_ptr, residual_ptr,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, INDEX_64,
    )  # fmt: skip
