"""Weight gradient of a deformable convolution: dw[k, t, c] = sum over output pixels m of dy[m, k] * sample[m, t, c].

M = filters of one weight group, N = channels of one tap (runs as in kernels/deform_sample.py), K = output pixels. A program
owns one BLOCK_M x BLOCK_N tile of dw and one range of the pixels, which it adds up in steps of BLOCK_K: for each it loads
the pixels' offsets and mask, works out the points, loads four neighbors, blends, rounds the samples to the image's type as
the forward does, and multiplies. Samples are computed again rather than kept, once for each row of tiles.

Each range writes its sums to a workspace of its own in fp32 (fp64 for fp64), which wgrad_reduce_kernel (conv_wgrad) adds in
their order: no atomics, the same bits on every run. A single range writes the gradient itself.
"""

import triton
import triton.language as tl

from .deform_sample import blend, columns_of, inside_of, load_point, runs_of, weights_of
from .dot import matmul_acc, zero_tile
from .tiles import grouped_tile, tile

__all__ = ["configs", "deform_conv_wgrad_kernel", "fitting"]


def configs() -> list[triton.Config]:
    """Every candidate; `fitting` leaves those that suit a problem."""
    return [
        # As high as the filters: every row of tiles computes the samples again.
        tile(256, 64, 32, 8, 3, tma=False),
        tile(128, 64, 32, 8, 3, tma=False),
        tile(64, 64, 32, 4, 3, tma=False),
        # Products without tensor cores, and few channels.
        tile(64, 16, 16, 4, 1, tma=False),
        tile(64, 64, 16, 8, 1, tma=False),
    ]


def fitting(
    candidates: list[triton.Config], *, m: int, n: int, k: int, itemsize: int, tensor_cores: bool, shared: int,
    arch: str = "",
) -> list[triton.Config]:  # fmt: skip
    """The candidates that suit M filters and N columns: the one statement of what is valid. K pixels are never few."""
    kept = []
    for config in candidates:
        m_, n_, k_ = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if m_ > max(64, 2 * m - 1):
            continue
        # Four neighbors wait for their turn beside the products' operands; on AMD's GPUs in registers.
        waiting = 0 if arch.startswith("gfx") else 4 * n_ * (config.num_stages - 1)
        if (m_ * config.num_stages + n_ + waiting) * k_ * itemsize > shared:
            continue
        # Plain products hold their operands in registers, and larger tiles spill.
        if (m_ * n_ * k_ > (64 * 64 * 16 if itemsize == 4 else 64 * 16 * 16)) if not tensor_cores else k_ < 32:
            continue
        kept.append(config)
    return kept


@triton.jit
def deform_conv_wgrad_kernel(
    x_ptr, stride_xn, stride_xh, stride_xw,  # channels have stride 1
    offset_ptr, stride_on, stride_oc, stride_op, stride_oq,  # [N, 2 * offset groups * taps, P, Q]
    mask_ptr, stride_mn, stride_mc, stride_mp, stride_mq,  # [N, offset groups * taps, P, Q]
    dy_ptr,  # [M, GROUPS * K], dense
    dw_ptr,  # sums of each range, [SPLITS, GROUPS * K, taps, CG]; DIRECT: the gradient
    # sizes; K filters of a group
    M, H, W, K, P, Q, GROUPS, TAPS, BLOCKS, RANGE,
    # geometry; CG, CD: channels of a weight group and of an offset group, RUN: the runs of both
    CG: tl.constexpr, CD: tl.constexpr, RUN: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; VEC_X, VEC_K: powers of two up to 16 that divide the image's strides, and K
    VEC_X: tl.constexpr, VEC_K: tl.constexpr, DIRECT: tl.constexpr, W_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    # tiles; GROUPS_K x BLOCK_C = BLOCK_N
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
    dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    UNITS: tl.constexpr = (CG // RUN + GROUPS_K - 1) // GROUPS_K
    MASKED: tl.constexpr = RUN % BLOCK_C > 0 or CG // RUN % GROUPS_K > 0
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = TAPS * UNITS * BLOCKS
    pid = tl.program_id(0)
    split = pid // (tiles_m * tiles_n * GROUPS)
    pid = pid % (tiles_m * tiles_n * GROUPS)
    group = pid // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    tap = pid_n // (UNITS * BLOCKS)
    unit = pid_n // BLOCKS % UNITS
    first = pid_n % BLOCKS * BLOCK_C

    first_c, there, offset_group = runs_of(group, unit, CG, CD, RUN, GROUPS_K)
    offs_c = tl.arange(0, BLOCK_C)
    channels = group * CG + first + first_c[:, None] + offs_c[None, :]  # [GROUPS_K, BLOCK_C]
    mask_c = None
    if MASKED:
        mask_c = there[:, None] & (first + offs_c < RUN)[None, :]
    h_tap = tap // S * DIL_H - PAD_H
    w_tap = tap % S * DIL_W - PAD_W
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < K
    places = (offset_group * TAPS + tap)[None, :]
    if INDEX_64:
        places = places.to(tl.int64)
        group = group.to(tl.int64)
    offset_ptrs = offset_ptr + places * 2 * stride_oc
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + places * stride_mc
    last = tl.minimum(M, split * RANGE + RANGE)

    acc = zero_tile(dy_ptr, BLOCK_M, BLOCK_N)
    for start in tl.range(split * RANGE, last, BLOCK_K, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_K)
        inside = row < last
        # Pixels past the end repeat the last one; their dy and their samples are zero.
        row = tl.minimum(row, last - 1)
        n = row // (P * Q)
        p = row // Q % P
        q = row % Q
        h = (p * STRIDE_H + h_tap)[:, None]
        w = (q * STRIDE_W + w_tap)[:, None]
        if INDEX_64:
            n = n.to(tl.int64)
            p = p.to(tl.int64)
            q = q.to(tl.int64)
            row = row.to(tl.int64)
        top, left, b, a = load_point(
            offset_ptrs, (n * stride_on + p * stride_op + q * stride_oq)[:, None], stride_oc, h, w, H, W, dtype, False
        )
        y0, y1, x0, x1 = inside_of(top, left, H, W)
        insides = y0 & inside[:, None], y1 & inside[:, None], x0, x1
        w00, w01, w10, w11 = weights_of(b, a)
        if mask_ptr is not None:
            m = tl.load(mask_ptrs + (n * stride_mn + p * stride_mp + q * stride_mq)[:, None]).to(dtype)
            w00, w01, w10, w11 = w00 * m, w01 * m, w10 * m, w11 * m
        zero = inside[:, None]
        w00, w01 = tl.where(zero, w00, 0.0), tl.where(zero, w01, 0.0)
        w10, w11 = tl.where(zero, w10, 0.0), tl.where(zero, w11, 0.0)
        offs_x = n[:, None] * stride_xn + top.to(n.dtype) * stride_xh + left.to(n.dtype) * stride_xw
        x_ptrs = x_ptr + (offs_x[:, :, None] + channels[None, :, :])
        samples = blend(x_ptrs, stride_xh, stride_xw, insides, (w00, w01, w10, w11), mask_c, dtype)
        samples = tl.reshape(samples.to(x_ptr.dtype.element_ty), (BLOCK_K, BLOCK_N))
        dy_ptrs = dy_ptr + ((row * (GROUPS * K))[:, None] + (group * K + offs_m)[None, :])
        dy = tl.load(dy_ptrs, mask=inside[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        acc = matmul_acc(dy.T, samples, acc, PRECISION)

    column = tl.arange(0, BLOCK_N)
    columns = columns_of(unit, RUN, GROUPS_K, BLOCK_C) + first
    mask_n = (first + column % BLOCK_C < RUN) & (unit * GROUPS_K + column // BLOCK_C < CG // RUN)
    filters = (split * GROUPS + group).to(tl.int64) * K + offs_m
    # A single range's weights may lie as [filters, C, taps].
    ahead = tap * CG + columns if W_CHANNELS_LAST or not DIRECT else columns * TAPS + tap
    offs_w = (filters * (TAPS * CG))[:, None] + ahead[None, :]
    tl.store(dw_ptr + offs_w, acc.to(dw_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
