"""Gradients of a deformable convolution's input, offsets and mask, which share one product.

    dsample[m, t, c] = sum over filters k of dy[m, k] * w[k, t, c]
    dx      adds mask * weight * dsample to the four neighbors of each point
    doffset = mask * sum over the offset group's channels of dsample * the blend's derivative
    dmask   = sum over the offset group's channels of dsample * the blend

A program owns BLOCK_M output pixels, one tap and one offset group (several where a tile holds them): it works out the
pixels' points once, and for each block of BLOCK_N channels multiplies dy and w over the filters, loads the four neighbors,
adds up its share of doffset and dmask in registers, and scatters dx (kernels/deform_scatter.py). dsample never goes to
memory, and doffset and dmask are written once, without atomics. Pointers that are None stand for gradients that no one
needs: without dx nothing is scattered, without the others no neighbor is loaded.

At h = -1 (and w = -1) values are zero and derivatives are those to the right, as in torchvision.
"""

import triton
import triton.language as tl

from .deform_sample import columns_of, corner, inside_of, load_point, runs_of, weights_of
from .deform_scatter import scatter
from .dot import matmul_acc, zero_tile
from .tiles import tile

__all__ = ["configs", "deform_conv_dgrad_kernel", "fitting"]


def configs() -> list[triton.Config]:
    """Every candidate; `fitting` leaves those that suit a problem."""
    return [
        # A thread holds a tile of products and several of neighbors in fp32: 8 elements of each, for 16 spill.
        tile(64, 32, 64, 8, 3, tma=False),
        # Few filters.
        tile(64, 32, 32, 8, 3, tma=False),
        # Products without tensor cores, and few channels.
        tile(64, 16, 16, 8, 1, tma=False),
    ]


def fitting(
    candidates: list[triton.Config], *, m: int, n: int, k: int, itemsize: int, tensor_cores: bool, shared: int,
    arch: str = "",
) -> list[triton.Config]:  # fmt: skip
    """The candidates that suit M pixels, N channels of a tap and K filters: the one statement of what is valid."""
    kept = []
    for config in candidates:
        m_, n_, k_ = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if k_ > max(32, 2 * k - 1) or (m_ + n_) * k_ * itemsize * config.num_stages > shared:
            continue
        # Deep steps of TF32 spill on Ampere.
        if itemsize == 4 and k_ > 32:
            continue
        # Plain products hold their operands in registers, and larger tiles spill.
        if (m_ * n_ * k_ > 64 * 16 * 16) if not tensor_cores else k_ < 32:
            continue
        kept.append(config)
    return kept


@triton.jit
def load_neighbor(x_ptrs, insides, k: tl.constexpr, mask_c, dtype: tl.constexpr):
    return tl.load(x_ptrs, mask=corner(insides, k, mask_c), other=0.0).to(dtype)


@triton.jit(do_not_specialize=["STEPS"])
def deform_conv_dgrad_kernel(
    x_ptr, stride_xn, stride_xh, stride_xw,  # channels have stride 1
    offset_ptr, stride_on, stride_oc, stride_op, stride_oq,  # [N, 2 * offset groups * taps, P, Q]
    mask_ptr, stride_mn, stride_mc, stride_mp, stride_mq,  # [N, offset groups * taps, P, Q]
    dy_ptr,  # [M, GROUPS * K], dense
    w,  # [GROUPS * K, taps, CG], dense
    sums_ptr, scale_ptr, SIZE,  # of dx, [1 or 2, N, H, W, C] of SIZE elements each; the scale
    doffset_ptr, stride_dn, stride_dc, stride_dp, stride_dq,
    dmask_ptr, stride_en, stride_ec, stride_ep, stride_eq,
    # sizes; K filters of a group; OWNERS: tiles of offset groups, STEPS: blocks of channels of each
    M, H, W, K, P, Q, GROUPS, TAPS, BLOCKS, OWNERS, STEPS,
    # geometry; CG, CD: channels of a weight group and of an offset group, RUN: the runs of both
    CG: tl.constexpr, CD: tl.constexpr, RUN: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; VEC_X, VEC_K: powers of two up to 16 that divide the image's strides, and K
    VEC_X: tl.constexpr, VEC_K: tl.constexpr, EVEN_K: tl.constexpr, FIXED: tl.constexpr, INDEX_64: tl.constexpr,
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
    # Whether an offset group is one run; else its runs come one after the other.
    WHOLE: tl.constexpr = RUN == CD
    MASKED: tl.constexpr = RUN % BLOCK_C > 0 or (WHOLE and CG // RUN % GROUPS_K > 0)
    DERIVED: tl.constexpr = doffset_ptr is not None or dmask_ptr is not None
    # Programs of one tile of pixels follow each other, and find dy in L2.
    pid = tl.program_id(0)
    owner = pid % OWNERS
    tap = pid // OWNERS % TAPS
    offs_m = pid // (OWNERS * TAPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    row = tl.minimum(offs_m, M - 1)
    n = row // (P * Q)
    p = row // Q % P
    q = row % Q
    h = (p * STRIDE_H - PAD_H + tap // S * DIL_H)[:, None]
    v = (q * STRIDE_W - PAD_W + tap % S * DIL_W)[:, None]
    if WHOLE:
        unit = owner % UNITS
        first_c, there, offset_group = runs_of(owner // UNITS, unit, CG, CD, RUN, GROUPS_K)
    else:
        there = tl.arange(0, GROUPS_K) == 0
        offset_group = owner + tl.zeros((GROUPS_K,), tl.int32)
    places = (offset_group * TAPS + tap)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_64:
        n = n.to(tl.int64)
        p = p.to(tl.int64)
        q = q.to(tl.int64)
        row = row.to(tl.int64)
        places = places.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    offsets = (n * stride_on + p * stride_op + q * stride_oq)[:, None] + places * 2 * stride_oc
    top, left, b, a = load_point(offset_ptr, offsets, stride_oc, h, v, H, W, dtype, True)
    insides = inside_of(top, left, H, W)
    m = None
    if mask_ptr is not None:
        masks = (n * stride_mn + p * stride_mp + q * stride_mq)[:, None] + places * stride_mc
        m = tl.load(mask_ptr + masks).to(dtype)
    pixel = (n * H)[:, None] + top.to(n.dtype)
    offs_x = n[:, None] * stride_xn + top.to(n.dtype) * stride_xh + left.to(n.dtype) * stride_xw
    offs_s = (pixel * W + left.to(n.dtype)) * (GROUPS * CG)
    scale = 0.0
    if sums_ptr is not None and FIXED:
        scale = tl.load(scale_ptr)
    dh = tl.zeros((BLOCK_M, GROUPS_K), dtype)
    dv = tl.zeros((BLOCK_M, GROUPS_K), dtype)
    dm = tl.zeros((BLOCK_M, GROUPS_K), dtype)
    offs_c = tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_N)
    for step in tl.range(0, STEPS):
        first = step % BLOCKS * BLOCK_C
        if WHOLE:
            group = owner // UNITS
            channels = group * CG + first + first_c[:, None] + offs_c[None, :]  # [GROUPS_K, BLOCK_C]
            columns = columns_of(unit, RUN, GROUPS_K, BLOCK_C) + first
            mask_n = (first + column % BLOCK_C < RUN) & (unit * GROUPS_K + column // BLOCK_C < CG // RUN)
        else:
            channel = owner * CD + step // BLOCKS * RUN
            group = channel // CG
            channels = channel + first + tl.zeros((GROUPS_K, 1), tl.int32) + offs_c[None, :]
            columns = channel % CG + first + column
            mask_n = first + column < RUN
        mask_c = None
        if MASKED:
            mask_c = there[:, None] & (first + offs_c < RUN)[None, :]
        dy_ptrs = dy_ptr + (row * (GROUPS * K) + group * K)[:, None] + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
        w_ptrs = w + ((group * K + offs_k) * (TAPS * CG) + tap * CG)[:, None] + columns[None, :]  # [BLOCK_K, BLOCK_N]
        acc = zero_tile(dy_ptr, BLOCK_M, BLOCK_N)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            mask_y = mask_m[:, None]
            mask_w = mask_n[None, :]
            if not EVEN_K:
                mask_y = mask_y & (k + offs_k < K)[None, :]
                mask_w = mask_w & (k + offs_k < K)[:, None]
            dy = tl.load(dy_ptrs, mask=mask_y, other=0.0)
            weights = tl.load(w_ptrs, mask=mask_w, other=0.0)
            acc = matmul_acc(dy, weights, acc, PRECISION)
            dy_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * (TAPS * CG)
        dsample = tl.reshape(acc, (BLOCK_M, GROUPS_K, BLOCK_C))
        if DERIVED:
            x_ptrs = x_ptr + (offs_x[:, :, None] + channels[None, :, :])
            x00 = load_neighbor(x_ptrs, insides, 0, mask_c, dtype)
            d0 = load_neighbor(x_ptrs + stride_xw, insides, 1, mask_c, dtype) - x00
            x10 = load_neighbor(x_ptrs + stride_xh, insides, 2, mask_c, dtype)
            d1 = load_neighbor(x_ptrs + (stride_xh + stride_xw), insides, 3, mask_c, dtype) - x10
            upper = x00 + d0 * a[:, :, None]
            down = x10 + d1 * a[:, :, None] - upper
            dh += tl.sum(dsample * down, 2)
            dv += tl.sum(dsample * (d0 + (d1 - d0) * b[:, :, None]), 2)
            if dmask_ptr is not None:
                dm += tl.sum(dsample * (upper + down * b[:, :, None]), 2)
        if sums_ptr is not None:
            given = dsample if m is None else dsample * m[:, :, None]
            weight = weights_of(b, a)
            for k in tl.static_range(4):
                # A neighbor without weight gets nothing, so that whole places cost one addition and not four.
                mask = corner(insides, k, mask_c) & (mask_m[:, None] & (weight[k] > 0.0))[:, :, None]
                ahead = offs_s + (k // 2 * W + k % 2) * (GROUPS * CG)
                offs = ahead[:, :, None] + channels[None, :, :]
                scatter(sums_ptr, offs, given * weight[k][:, :, None], mask, scale, SIZE, FIXED)

    mask = mask_m[:, None] & there[None, :]
    if doffset_ptr is not None:
        if m is not None:
            dh = dh * m
            dv = dv * m
        offs = (n * stride_dn + p * stride_dp + q * stride_dq)[:, None] + places * 2 * stride_dc
        tl.store(doffset_ptr + offs, dh.to(doffset_ptr.dtype.element_ty), mask=mask)
        tl.store(doffset_ptr + offs + stride_dc, dv.to(doffset_ptr.dtype.element_ty), mask=mask)
    if dmask_ptr is not None:
        # Zero where values are.
        edge = ((top == -1) & (b == 0.0)) | ((left == -1) & (a == 0.0))
        dm = tl.where(edge, 0.0, dm)
        offs = (n * stride_en + p * stride_ep + q * stride_eq)[:, None] + places * stride_ec
        tl.store(dmask_ptr + offs, dm.to(dmask_ptr.dtype.element_ty), mask=mask)
