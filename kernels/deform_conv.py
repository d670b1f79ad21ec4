"""Deformable convolution forward: an implicit matrix product whose rows are samples at learned places.

    y[m, k] = epilogue(sum over taps t and channels c of sample[m, t, c] * w[k, t, c])
    sample[m, t, c] = mask[m, g(c), t] * x at (place of tap t of pixel m + offset[m, g(c), t]), bilinear

M = output pixels, N = filters of a weight group, K = taps x channels of it. A program owns a BLOCK_M x BLOCK_N tile and
walks the taps and each tap's channels in steps of BLOCK_K. For a tap it works out each pixel's point (kernels/
deform_sample.py), four weights and four neighbors once for a run of channels; then each step loads the four neighbors of
BLOCK_K channels, side by side in memory, blends them in fp32 (fp64 for fp64), rounds the sample to the image's type and
multiplies. No sample goes to memory: an im2col buffer of taps x channels x pixels does not exist. A sample is computed once
for each column of tiles, so tiles are as wide as the filters where they can be.

The product is turned: samples are the operand of columns, which wgmma takes from shared memory; an operand of rows would
come from registers, and each product would wait for the one before.

The offsets and the mask are read once a column of tiles, the image from L1 and L2 but for the first time.
"""

import triton
import triton.language as tl

from .deform_sample import blend, columns_of, inside_of, load_point, runs_of, weights_of
from .dot import matmul_acc, zero_tile
from .epilogue import finish_tile
from .tiles import grouped_tile, tile, window_origins

__all__ = ["configs", "deform_conv_kernel", "fitting"]


def configs() -> list[triton.Config]:
    """Every candidate; `fitting` leaves those that suit a problem."""
    return [
        # As wide as the filters: every column of tiles computes the samples again.
        tile(64, 256, 32, 8, 3, tma=False),
        tile(128, 128, 32, 8, 3, tma=False),
        tile(64, 128, 32, 4, 3, tma=False),
        tile(64, 64, 32, 4, 3, tma=False),
        # TF32, whose neighbors and operands take twice the registers.
        tile(64, 128, 32, 8, 3, tma=False),
        tile(64, 64, 32, 8, 3, tma=False),
        # Many channels: a point is worked out for twice as many of them.
        tile(64, 128, 64, 8, 3, tma=False),
        # Products without tensor cores.
        tile(64, 64, 16, 8, 1, tma=False),
        tile(64, 16, 16, 4, 1, tma=False),
    ]


def fitting(
    candidates: list[triton.Config], *, m: int, n: int, k: int, itemsize: int, tensor_cores: bool, shared: int,
    arch: str = "",
) -> list[triton.Config]:  # fmt: skip
    """The candidates that suit M x N results with runs of K channels: the one statement of what is valid."""
    kept = []
    for config in candidates:
        m_, n_, k_ = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        # More than twice as large as the output or the reduction: mostly zeros are computed.
        if m_ > max(64, 2 * m - 1) or n_ > max(64, 2 * n - 1) or k_ > max(32, 2 * k - 1):
            continue
        # Four neighbors wait for their turn beside the products' operands; on AMD's GPUs in registers.
        waiting = 0 if arch.startswith("gfx") else 4 * m_ * (config.num_stages - 1)
        if (n_ * config.num_stages + m_ + waiting) * k_ * itemsize > shared:
            continue
        # Plain products hold their operands in registers, and larger tiles spill; fp32's narrow ones do on Ampere.
        narrow = (16,) if itemsize == 8 else (64,) if arch == "sm_80" else (16, 64)
        if (n_ not in narrow or k_ > 16) if not tensor_cores else k_ < 32:
            continue
        # Eight bytes of TF32's would spill on Ampere.
        warps = 8 if itemsize == 4 and (n_ > 64 or arch != "sm_80") else 4
        if tensor_cores and m_ == 64 and n_ <= 128 and k_ == 32 and config.num_warps != warps:
            continue
        kept.append(config)
    return kept


# Of an argument of 1 the compiler would know the value, and the loop that keeps layouts apart would be gone. BLOCKS, those
# of a run, is no constant either: loops of known length are unrolled, and spill.
@triton.jit(do_not_specialize=["TAPS", "BLOCKS"])
def deform_conv_kernel(
    x_ptr, stride_xn, stride_xh, stride_xw,  # channels have stride 1
    offset_ptr, stride_on, stride_oc, stride_op, stride_oq,  # [N, 2 * offset groups * taps, P, Q]
    mask_ptr, stride_mn, stride_mc, stride_mp, stride_mq,  # [N, offset groups * taps, P, Q]
    w,  # [GROUPS * K, taps, CG], dense
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes; K filters of a group
    M, H, W, K, P, Q, GROUPS, TAPS, BLOCKS,
    # geometry; CG, CD: channels of a weight group and of an offset group, RUN: the runs of both
    CG: tl.constexpr, CD: tl.constexpr, RUN: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; VEC_X, VEC_K: powers of two up to 16 that divide the image's strides, and K
    VEC_X: tl.constexpr, VEC_K: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles; GROUPS_K x BLOCK_C = BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
    GROUPS_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
        stride_xw = stride_xw // VEC_X * VEC_X
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    UNITS: tl.constexpr = (CG // RUN + GROUPS_K - 1) // GROUPS_K
    MASKED: tl.constexpr = RUN % BLOCK_C > 0 or CG // RUN % GROUPS_K > 0
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n, _d0, h0, w0 = window_origins(offs_m, M, 1, P, Q, 1, STRIDE_H, STRIDE_W, 0, PAD_H, PAD_W)
    row = tl.minimum(offs_m, M - 1)
    p = row // Q % P
    q = row % Q
    # Filters past the end repeat the last one; no one stores their results.
    filters = group * K + tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
    if INDEX_64:
        n = n.to(tl.int64)
        p = p.to(tl.int64)
        q = q.to(tl.int64)
        filters = filters.to(tl.int64)
    offset_ptrs = offset_ptr + (n * stride_on + p * stride_op + q * stride_oq)[:, None]
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + (n * stride_mn + p * stride_mp + q * stride_mq)[:, None]
    offs_c = tl.arange(0, BLOCK_C)

    acc = zero_tile(y_ptr, BLOCK_N, BLOCK_M)
    for i in tl.range(0, TAPS * UNITS):
        tap = i // UNITS
        unit = i % UNITS
        first_c, there, offset_group = runs_of(group, unit, CG, CD, RUN, GROUPS_K)
        # [BLOCK_M, GROUPS_K] from here.
        places = (offset_group * TAPS + tap)[None, :]
        top, left, b, a = load_point(
            offset_ptrs, (places * 2).to(n.dtype) * stride_oc, stride_oc, (h0 + tap // S * DIL_H)[:, None],
            (w0 + tap % S * DIL_W)[:, None], H, W, dtype, False,
        )  # fmt: skip
        insides = inside_of(top, left, H, W)
        w00, w01, w10, w11 = weights_of(b, a)
        if mask_ptr is not None:
            m = tl.load(mask_ptrs + places.to(n.dtype) * stride_mc).to(dtype)
            w00, w01, w10, w11 = w00 * m, w01 * m, w10 * m, w11 * m
        offs_x = n[:, None] * stride_xn + top.to(n.dtype) * stride_xh + left.to(n.dtype) * stride_xw
        channels = first_c[:, None] + offs_c[None, :]  # [GROUPS_K, BLOCK_C]
        x_ptrs = x_ptr + (offs_x[:, :, None] + (group * CG + channels)[None, :, :])
        columns = columns_of(unit, RUN, GROUPS_K, BLOCK_C)
        w_ptrs = w + ((filters * (TAPS * CG) + tap * CG)[:, None] + columns[None, :])  # [BLOCK_N, BLOCK_K]
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            mask_c = None
            if MASKED:
                mask_c = there[:, None] & (block * BLOCK_C + offs_c < RUN)[None, :]
            samples = blend(
                x_ptrs + block * BLOCK_C, stride_xh, stride_xw, insides, (w00, w01, w10, w11), mask_c, dtype
            ).to(x_ptr.dtype.element_ty)
            if MASKED:
                column = tl.arange(0, BLOCK_K)
                mask_k = (block * BLOCK_C + column % BLOCK_C < RUN) & (unit * GROUPS_K + column // BLOCK_C < CG // RUN)
                weights = tl.load(w_ptrs + block * BLOCK_C, mask=mask_k[None, :], other=0.0)
            else:
                weights = tl.load(w_ptrs + block * BLOCK_C)
            acc = matmul_acc(weights, tl.reshape(samples, (BLOCK_M, BLOCK_K)).T, acc, PRECISION)

    finish_tile(
        tl.trans(acc), offs_m, M, P * Q, group, pid_n * BLOCK_N, K, GROUPS * K, None, pid_m, tiles_m, y_ptr, residual_ptr,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST,
        INDEX_64, 0,
    )  # fmt: skip
