"""y = epilogue(x @ w.T): 1x1 convolutions over pixels, linear layers, and patches as rows.

M = rows, N = output channels, K = input channels. A program owns one BLOCK_M x BLOCK_N tile. Both operands come by TMA
where the GPU has it and rows start on 16 bytes (past the end it fills zeros), else through pointers. Rows are read once
per column of tiles, weights once per row of tiles, from L2 but for the first time; each output is written once, after
the epilogue, which is where a memory-bound 1x1 layer gains.

Behind a squeeze-excite block rows are multiplied by their image's gate on the way in, so that the scaled tensor never goes
to memory: y = epilogue((x * gate) @ w.T).
"""

import triton
import triton.language as tl

from .dot import matmul_acc, zero_tile
from .epilogue import finish_tile
from .tiles import grouped_tile, tile

__all__ = ["configs", "matmul_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""

    return [
        # Compute-bound products.
        tile(256, 128, 64, 8, 3),
        tile(128, 256, 64, 8, 3),
        tile(128, 128, 64, 4, 4),
        tile(128, 128, 64, 8, 4),
        # Memory-bound 1x1 layers: small tiles, several resident programs.
        tile(128, 64, 64, 4, 3),
        tile(64, 128, 64, 4, 3),
        tile(64, 64, 64, 8, 3),
        tile(128, 32, 32, 4, 4),
        tile(128, 64, 32, 4, 3),
        tile(64, 32, 32, 4, 3),
        tile(64, 16, 32, 4, 3),
        tile(64, 16, 16, 4, 3),
        # A batch of a few rows: the weight is what is read.
        tile(16, 64, 64, 2, 4),
        # Gated rows, which are computed on their way in, each from two tiles in registers.
        # Columns of 256 spill 8 bytes on sm_80.
        tile(64, 128, 32, 8, 3, tma=False),
        tile(128, 64, 32, 8, 3, tma=False),
        tile(64, 64, 32, 4, 3, tma=False),
        # Products without tensor cores: IEEE fp32 and fp64.
        tile(64, 64, 16, 4, 3, tma=False),
        tile(64, 16, 16, 4, 3, tma=False),
    ]


@triton.jit
def matmul_kernel(
    x,  # [M, C], channels side by side: a pointer, or a descriptor of [BLOCK_M, BLOCK_K] boxes
    gate_ptr,  # [images, C], by which x's elements are multiplied, or None
    stride_xm,
    w, stride_wk,  # [K, C]: a pointer, or a descriptor of [BLOCK_N, BLOCK_K] boxes
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes: rows, channels in and out, rows of one image; stride_y: from a row of y to the next,
    # where y is some channels of a wider channels-last tensor, else None
    M, C, K, PIXELS, stride_y,
    # flags: EVEN_C: BLOCK_K divides C. VEC_C, VEC_K: powers of two up to 16 that divide C and both strides, K and
    # stride_y. POOL: as finish_tile has it
    EVEN_C: tl.constexpr, VEC_C: tl.constexpr, VEC_K: tl.constexpr, USE_TMA: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    POOL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_C > 1:
        C = C // VEC_C * VEC_C
        stride_xm = stride_xm // VEC_C * VEC_C
        stride_wk = stride_wk // VEC_C * VEC_C
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
        if stride_y is not None:
            stride_y = stride_y // VEC_K * VEC_K
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if not USE_TMA:
        # Rows and filters past the end repeat the last one: their loads are valid and their results are not stored.
        rows = tl.minimum(offs_m, M - 1)
        filters = tl.minimum(offs_n, K - 1)
        if INDEX_64:
            rows = rows.to(tl.int64)
            filters = filters.to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x + ((rows * stride_xm)[:, None] + offs_k[None, :])  # [BLOCK_M, BLOCK_K]
        w_ptrs = w + ((filters * stride_wk)[:, None] + offs_k[None, :])  # [BLOCK_N, BLOCK_K]
        if gate_ptr is not None:
            gate_ptrs = gate_ptr + ((rows // PIXELS * C)[:, None] + offs_k[None, :])  # [BLOCK_M, BLOCK_K]

    # As in conv_dgrad: a computed operand goes to the products by way of shared memory.
    TURNED: tl.constexpr = gate_ptr is not None and BLOCK_N >= 64
    acc = zero_tile(y_ptr, BLOCK_N if TURNED else BLOCK_M, BLOCK_M if TURNED else BLOCK_N)
    for c in tl.range(0, C, BLOCK_K, num_stages=STAGES):
        if USE_TMA:
            a = x.load([pid_m * BLOCK_M, c])
            b = w.load([pid_n * BLOCK_N, c])
        elif EVEN_C:
            a = tl.load(x_ptrs + c)
            b = tl.load(w_ptrs + c)
        else:
            mask = (offs_k < C - c)[None, :]
            a = tl.load(x_ptrs + c, mask=mask, other=0.0)
            b = tl.load(w_ptrs + c, mask=mask, other=0.0)
        if gate_ptr is not None:
            if EVEN_C:
                gate = tl.load(gate_ptrs + c)
            else:
                gate = tl.load(gate_ptrs + c, mask=mask, other=0.0)
            a = (a.to(acc.dtype) * gate.to(acc.dtype)).to(a.dtype)
        acc = matmul_acc(b, a.T, acc, PRECISION) if TURNED else matmul_acc(a, b.T, acc, PRECISION)
    if TURNED:
        acc = tl.trans(acc)

    finish_tile(
        acc, offs_m, M, PIXELS, 0, pid_n * BLOCK_N, K, K, stride_y, pid_m, tiles_m, y_ptr, residual_ptr, bias_ptr, mean_ptr,
        var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, INDEX_64, POOL,
    )  # fmt: skip
