"""Convolution forward as an implicit matrix product, channels-last, for channels that BLOCK_K divides.

M = output pixels (n, o, p, q), N = output channels of one group, K = filter taps x input channels of one group.
A program owns one BLOCK_M x BLOCK_N tile of one group. One flat loop runs over taps x channel blocks (nested loops lose
software pipelining); the image comes through pointers, each pixel's address formed once per tile and moved by one
scalar a step; the weights come through a TMA descriptor where there is one. Each output is written once, after the
epilogue. Image rows are read once per filter tap and column of tiles, from L2 but for the first time.

Padding: which filter positions fall outside the image is one word of bits per pixel, made before the loop, so that the
loop tests bits where it would compute and compare coordinates. Filters whose extents add up to more than 31 compare in
the loop; convolutions without padding need no mask at all.
"""

import triton
import triton.language as tl

from .dot import matmul_acc, zero_tile
from .epilogue import finish_tile
from .tiles import grouped_tile, taps_outside, tile, window_origins

__all__ = ["configs", "conv_fprop_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""
    return [
        # Compute-bound layers: the fewest loop instructions per product.
        tile(256, 128, 64, 8, 3),
        tile(128, 256, 64, 8, 3),
        tile(64, 256, 64, 4, 4),
        tile(128, 128, 64, 4, 3),
        # Two programs fit a multiprocessor. Its few products a step are dearer to feed by descriptor than by pointer.
        tile(128, 128, 64, 8, 3, tma=False),
        # Few output channels, or too few tiles to fill the GPU; deep steps spread the loop's own instructions.
        tile(128, 64, 128, 4, 3),
        tile(64, 128, 64, 4, 4),
        tile(64, 64, 128, 4, 3),
        tile(64, 64, 64, 4, 4),
        tile(64, 32, 128, 4, 3),
        tile(64, 16, 128, 4, 3),
        # Products without tensor cores: IEEE fp32 and fp64.
        tile(64, 64, 16, 4, 3),
        tile(64, 32, 32, 4, 3),
        tile(64, 16, 16, 4, 3),
    ]


@triton.jit
def conv_fprop_kernel(
    x_ptr, stride_xn, stride_xd, stride_xh, stride_xw,  # channels have stride 1
    w, stride_wk,  # [groups * K, taps * C], channels innermost: a pointer, or a descriptor of [BLOCK_N, BLOCK_K] boxes
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes; C and K are those of one group, and BLOCK_K divides C; stride_y: from a pixel of y to the
    # next, where y is some channels of a wider channels-last tensor, else None
    M, D, H, W, C, K, O, P, Q, GROUPS, stride_y,
    # geometry
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: PADDED: some tap can fall outside. VEC_X, VEC_K: powers of two up to 16 that divide every image stride, K and
    # stride_y. POOL: as finish_tile has it
    PADDED: tl.constexpr, VEC_X: tl.constexpr, VEC_K: tl.constexpr,
    USE_TMA: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    POOL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    C = C // 16 * 16
    stride_wk = stride_wk // 16 * 16
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xd = stride_xd // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
        stride_xw = stride_xw // VEC_X * VEC_X
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
        if stride_y is not None:
            stride_y = stride_y // VEC_K * VEC_K
    TAPS: tl.constexpr = T * R * S
    HAS_D: tl.constexpr = T > 1 or PAD_D > 0
    # Filter positions that fit a word of bits, a sign bit to spare.
    COUNTED: tl.constexpr = T + R + S <= 31

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n, d0, h0, w0 = window_origins(offs_m, M, O, P, Q, STRIDE_D, STRIDE_H, STRIDE_W, PAD_D, PAD_H, PAD_W)
    if PADDED and COUNTED:
        outside = taps_outside(d0, h0, w0, D, H, W, T, R, S, DIL_D, DIL_H, DIL_W, HAS_D)
    if INDEX_64:
        n = n.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = n * stride_xn + group * C
    offs_x += d0.to(n.dtype) * stride_xd + h0.to(n.dtype) * stride_xh + w0.to(n.dtype) * stride_xw
    x_ptrs = x_ptr + (offs_x[:, None] + offs_k[None, :])  # [BLOCK_M, BLOCK_K]

    if not USE_TMA:
        # Filters past the end repeat the last one, likewise.
        filters = group * K + tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
        if INDEX_64:
            filters = filters.to(tl.int64)
        w_ptrs = w + ((filters * stride_wk)[:, None] + offs_k[None, :])  # [BLOCK_N, BLOCK_K]

    acc = zero_tile(y_ptr, BLOCK_M, BLOCK_N)
    blocks_c = C // BLOCK_K
    # The step's offset and its bits are counted along: decoding them from the step would cost more issue slots than a
    # product. Moving on by a filter row or plane takes back what its columns or rows have added.
    next_w = DIL_W * stride_xw - C
    next_h = DIL_H * stride_xh - S * DIL_W * stride_xw
    next_d = DIL_D * stride_xd - R * DIL_H * stride_xh
    offset = tl.full((), 0, n.dtype)
    c = 0
    bit_w = tl.full((), 1, tl.int32)
    bit_h = tl.full((), 1 << S if COUNTED else 0, tl.int32)
    bit_d = tl.full((), 1 << (S + R) if COUNTED else 0, tl.int32)
    for i in tl.range(0, TAPS * blocks_c, num_stages=STAGES):
        if not COUNTED:
            tap = i // blocks_c
            r = tap // S % R * DIL_H
            s = tap % S * DIL_W
            t = tap // (R * S) * DIL_D
            offset = t.to(n.dtype) * stride_xd + r * stride_xh + s * stride_xw + i % blocks_c * BLOCK_K
        a_ptrs = x_ptrs + offset
        if not PADDED:
            a = tl.load(a_ptrs)
        elif COUNTED:
            bits = bit_w | bit_h
            if HAS_D:
                bits = bits | bit_d
            a = tl.load(a_ptrs, mask=((outside & bits) == 0)[:, None], other=0.0)
        else:
            # Unsigned comparison: a negative coordinate is a large number.
            ok = ((h0 + r).to(tl.uint32) < H) & ((w0 + s).to(tl.uint32) < W) & ((d0 + t).to(tl.uint32) < D)
            a = tl.load(a_ptrs, mask=ok[:, None], other=0.0)
        if USE_TMA:
            b = w.load([group * K + pid_n * BLOCK_N, i * BLOCK_K])
        else:
            b = tl.load(w_ptrs + i * BLOCK_K)
        acc = matmul_acc(a, b.T, acc, PRECISION)
        offset += BLOCK_K
        if COUNTED and TAPS > 1:
            c += BLOCK_K
            tap_ends = c == C
            c = tl.where(tap_ends, 0, c)
            offset = tl.where(tap_ends, offset + next_w, offset)
            bit_w = tl.where(tap_ends, bit_w << 1, bit_w)
            if R * T > 1:
                row_ends = bit_w == (1 << S)
                offset = tl.where(row_ends, offset + next_h, offset)
                bit_w = tl.where(row_ends, 1, bit_w)
                bit_h = tl.where(row_ends, bit_h << 1, bit_h)
            if T > 1:
                plane_ends = bit_h == (1 << (S + R))
                offset = tl.where(plane_ends, offset + next_d, offset)
                bit_h = tl.where(plane_ends, 1 << S, bit_h)
                bit_d = tl.where(plane_ends, bit_d << 1, bit_d)

    finish_tile(
        acc, offs_m, M, O * P * Q, group, pid_n * BLOCK_N, K, GROUPS * K, stride_y, pid_m, tiles_m, y_ptr, residual_ptr,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST,
        INDEX_64, POOL,
    )  # fmt: skip
