"""Transposed convolution whose filter is its stride, without padding: every input pixel becomes a patch of its own.

    y[n, d * T + t, h * R + r, w * S + s, k] = epilogue(sum over c of x[n, d, h, w, c] * w[c, (t, r, s), k])

A plain product: M = input pixels, N = filter taps x output channels, K = input channels. A program owns one
BLOCK_M x BLOCK_N tile. x is read once per column of tiles and the weight, [C, taps, K], once per row of tiles, from L2 but
for the first time. The results of a pixel go to its patch: those of a patch's row lie side by side in a channels-last
output. Each output is written once, after the epilogue of its channel.
"""

import triton
import triton.language as tl

from .dot import matmul_acc, zero_tile
from .epilogue import finish_rows
from .tiles import grouped_tile, tile

__all__ = ["configs", "conv_up_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""
    return [
        # Wide tiles: a pixel's whole patch at once, so that x is read from memory alone.
        tile(128, 256, 64, 8, 3, tma=False),
        tile(64, 256, 64, 8, 3, tma=False),
        tile(128, 128, 64, 8, 3, tma=False),
        tile(64, 128, 64, 4, 3, tma=False),
        # Few output channels, or too few tiles to fill the GPU.
        tile(128, 64, 64, 4, 3, tma=False),
        tile(64, 64, 64, 8, 3, tma=False),
        tile(64, 32, 64, 8, 3, tma=False),
        tile(64, 16, 64, 4, 3, tma=False),
        # Few input channels: a short reduction.
        tile(128, 128, 32, 8, 3, tma=False),
        tile(128, 64, 32, 4, 3, tma=False),
        # Products without tensor cores, and the fewest channels.
        tile(64, 32, 16, 4, 3, tma=False),
        tile(64, 16, 16, 4, 3, tma=False),
    ]


@triton.jit
def conv_up_kernel(
    x_ptr, stride_xm,  # [M, C], channels side by side
    w, stride_wc,  # [C, taps * K], channels innermost
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes: pixels of x, which is [N, D, H, W], and channels in and out
    M, D, H, W, C, K,
    # geometry, of the filter and of its stride
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    # flags: EVEN_C: BLOCK_K divides C. VEC_C, VEC_K: powers of two up to 16 that divide C and x's stride, and K
    EVEN_C: tl.constexpr, VEC_C: tl.constexpr, VEC_K: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_C > 1:
        C = C // VEC_C * VEC_C
        stride_xm = stride_xm // VEC_C * VEC_C
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
        stride_wc = stride_wc // VEC_K * VEC_K
    columns = T * R * S * K
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(columns, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Pixels past the end repeat the last one: their loads are valid and their results are not stored.
    pixel = tl.minimum(offs_m, M - 1)
    n = pixel // (D * H * W)
    d = pixel // (H * W) % D * T
    h = pixel // W % H * R
    q = pixel % W * S
    offs_c = tl.arange(0, BLOCK_K)
    rows_c = offs_c
    if INDEX_64:
        n = n.to(tl.int64)
        pixel = pixel.to(tl.int64)
        rows_c = offs_c.to(tl.int64)
    # Where each patch begins.
    if Y_CHANNELS_LAST:
        rows = (((n * (D * T) + d) * (H * R) + h) * (W * S) + q) * K
    else:
        rows = ((n * K * (D * T) + d) * (H * R) + h) * (W * S) + q
    # Columns past the end repeat the last one, likewise.
    offs_n = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1)
    if VEC_K > 1:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    x_ptrs = x_ptr + ((pixel * stride_xm)[:, None] + offs_c[None, :])  # [BLOCK_M, BLOCK_K]
    w_ptrs = w + ((rows_c * stride_wc)[:, None] + offs_n[None, :])  # [BLOCK_K, BLOCK_N]

    acc = zero_tile(y_ptr, BLOCK_M, BLOCK_N)
    for c in tl.range(0, C, BLOCK_K, num_stages=STAGES):
        if EVEN_C:
            a = tl.load(x_ptrs)
            b = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_c = offs_c < C - c
            a = tl.load(x_ptrs, mask=mask_c[None, :], other=0.0)
            b = tl.load(w_ptrs, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_acc(a, b, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wc

    finish_rows(
        acc, rows, offs_m < M, D * T * H * R * W * S, 0, pid_n * BLOCK_N, columns, K, pid_m, T * R * S * tiles_m, y_ptr,
        residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B,
        Y_CHANNELS_LAST, (R, S, H * R, W * S, tiles_m),
    )  # fmt: skip
