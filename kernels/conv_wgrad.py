"""Weight and bias gradient of a convolution: dw[k, t, c] = sum over output pixels m of dy[m, k] * x[pixel(m, t), c].

M = filters of one group, N = filter taps x channels of one group (in the order of a channels-last weight), K = output
pixels. A program owns one BLOCK_M x BLOCK_N tile of dw and one range of the pixels, which it adds up in steps of BLOCK_K.
Each range writes its sums to a workspace of its own in fp32 (fp64 for fp64), and a second kernel adds the ranges in their
order and rounds: no atomics, the same bits on every run. A single range writes the gradient itself. The bias gradient is
the sum of dy's columns, taken by the programs of the first column of tiles.

dy is read once per column of tiles, x once per row of tiles and tap, both from L2 but for the first time. Where BLOCK_N
divides the channels a tile has one tap, and padding is one bit a pixel; elsewhere each column has its own.

Groups with few channels share a tile, as in conv_flat: products of a group's dy with another's x are not stored.

Where a batch norm (and an activation) lies between, the gradient of the convolution's result z can be computed on the way
in, from dy, z and five numbers a channel, as in conv_dgrad.
"""

import triton
import triton.language as tl

from .dot import matmul_acc, zero_tile
from .statistics import input_gradient, load_table
from .tiles import grouped_tile, tile

__all__ = ["configs", "conv_wgrad_kernel", "wgrad_reduce_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""
    return [
        # Compute-bound layers.
        # Four stages, for which Hopper and later have the room: on Ampere it would spill.
        tile(256, 128, 64, 8, 4, tma=False),
        tile(128, 256, 64, 8, 3, tma=False),
        tile(64, 128, 64, 4, 3, tma=False),
        tile(128, 64, 64, 4, 3, tma=False),
        # TF32, whose operands are turned in registers.
        tile(128, 128, 64, 8, 3, tma=False),
        tile(128, 64, 64, 8, 3, tma=False),
        # Few filters or few columns.
        tile(64, 64, 64, 8, 3, tma=False),
        tile(64, 32, 64, 4, 3, tma=False),
        tile(64, 16, 64, 4, 3, tma=False),
        # Single elements: few input channels.
        tile(64, 64, 32, 8, 3, tma=False),
        # Few pixels.
        tile(64, 16, 16, 4, 3, tma=False),
    ]


@triton.jit
def carry(x, X):
    """x in [0, X) and what goes over, for x in [0, 2 * X)."""
    over = x >= X
    return tl.where(over, x - X, x), over.to(tl.int32)


@triton.jit
def conv_wgrad_kernel(
    x_ptr, stride_xn, stride_xd, stride_xh, stride_xw,  # channels have stride 1
    dy_ptr, stride_ym,  # [pixels, groups * K], filters side by side
    # sums of each range: [SPLITS, groups * K, taps * C] and [SPLITS, groups * K]; DIRECT: the gradients
    dw_ptr, db_ptr,
    z_ptr, table_ptr,  # where dy is the gradient behind a batch norm: the convolution's result, as dy lies; its table
    # sizes; C and K are those of one group
    M, D, H, W, C, K, O, P, Q, GROUPS, RANGE,
    # geometry; PACK, PACK_C, PACK_K: as conv_flat has them, and dw has the layer's own groups
    PACK: tl.constexpr, PACK_C: tl.constexpr, PACK_K: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: LINEAR: the window of output pixel m begins m pixels along a dense image, but for padding. ONE_TAP: BLOCK_N
    # divides C. VEC_X, VEC_K: powers of two up to 16 that divide C and the image's strides, and K and dy's stride
    LINEAR: tl.constexpr, ONE_TAP: tl.constexpr, PADDED: tl.constexpr, VEC_X: tl.constexpr, VEC_K: tl.constexpr,
    DIRECT: tl.constexpr, W_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    # of that batch norm, as statistics.input_gradient takes them
    SLOPED: tl.constexpr, ACT_GRADIENT: tl.constexpr, GRADIENT_A: tl.constexpr, GRADIENT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        C = C // VEC_X * VEC_X
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xd = stride_xd // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
        stride_xw = stride_xw // VEC_X * VEC_X
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
        stride_ym = stride_ym // VEC_K * VEC_K
    HAS_D: tl.constexpr = T > 1 or PAD_D > 0
    columns = T * R * S * C
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    split = pid // (tiles_m * tiles_n * GROUPS)
    pid = pid % (tiles_m * tiles_n * GROUPS)
    group = pid // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    if ONE_TAP:
        tap = pid_n * BLOCK_N // C
        offs_c = pid_n * BLOCK_N - tap * C + tl.arange(0, BLOCK_N)
    else:
        tap = offs_n // C
        offs_c = offs_n % C
    t = tap // (R * S) * DIL_D - PAD_D
    r = tap // S % R * DIL_H - PAD_H
    s = tap % S * DIL_W - PAD_W

    # The first step's pixels, and what a step adds to their coordinates: carrying costs less than dividing again.
    row = split * RANGE + tl.arange(0, BLOCK_K)
    last = tl.minimum(M, split * RANGE + RANGE)
    n = row // (O * P * Q)
    o = row // (P * Q) % O
    p = row // Q % P
    q = row % Q
    step_n = BLOCK_K // (O * P * Q)
    step_o = BLOCK_K // (P * Q) % O
    step_p = BLOCK_K // Q % P
    step_q = BLOCK_K % Q
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < K
    first_c = group * C
    rows = row
    if INDEX_64:
        rows = rows.to(tl.int64)
        first_c = first_c.to(tl.int64)
    offs_y = (rows * stride_ym)[:, None] + (group * K + offs_m)[None, :]
    dy_ptrs = dy_ptr + offs_y  # [BLOCK_K, BLOCK_M]
    if z_ptr is not None:
        z_ptrs = z_ptr + offs_y
    if table_ptr is not None:
        table = load_table(table_ptr, group * K + offs_m, mask_m, GROUPS * K, 0, SLOPED, ACT_GRADIENT)

    if ONE_TAP:
        # One scalar a tile; in the other case one offset a column.
        offs_c = offs_c + (t * stride_xd + r * stride_xh + s * stride_xw).to(rows.dtype)
    else:
        offs_c = offs_c + (t * stride_xd + r * stride_xh + s * stride_xw)
    x_ptrs = x_ptr + ((rows * stride_xw)[:, None] + (first_c + offs_c)[None, :])  # [BLOCK_K, BLOCK_N], where LINEAR

    acc = zero_tile(dy_ptr, BLOCK_M, BLOCK_N)
    for _ in tl.range(split * RANGE, last, BLOCK_K, num_stages=STAGES):
        inside = row < last
        dy = tl.load(dy_ptrs, mask=inside[:, None] & mask_m[None, :], other=0.0)
        if table_ptr is not None:
            z = dy
            if z_ptr is not None:
                z = tl.load(z_ptrs, mask=inside[:, None] & mask_m[None, :], other=0.0)
                z_ptrs += BLOCK_K * stride_ym
            # Past the end the table's offset meets an x of zero.
            dy = input_gradient(dy, z, table, SLOPED, ACT_GRADIENT, GRADIENT_A, GRADIENT_B).to(dy.dtype)
        if not LINEAR:
            wide = n.to(rows.dtype)
            offs_x = wide * stride_xn + o.to(rows.dtype) * (STRIDE_D * stride_xd)
            offs_x += p * (STRIDE_H * stride_xh) + q * (STRIDE_W * stride_xw)
            x_ptrs = x_ptr + (offs_x[:, None] + (first_c + offs_c)[None, :])
        if ONE_TAP:
            if PADDED:
                # Unsigned comparison: a negative coordinate is a large number.
                inside = inside & ((p * STRIDE_H + r).to(tl.uint32) < H) & ((q * STRIDE_W + s).to(tl.uint32) < W)
                if HAS_D:
                    inside = inside & ((o * STRIDE_D + t).to(tl.uint32) < D)
            x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
        else:
            mask = inside[:, None] & mask_n[None, :]
            if PADDED:
                mask = mask & (((p * STRIDE_H)[:, None] + r[None, :]).to(tl.uint32) < H)
                mask = mask & (((q * STRIDE_W)[:, None] + s[None, :]).to(tl.uint32) < W)
                if HAS_D:
                    mask = mask & (((o * STRIDE_D)[:, None] + t[None, :]).to(tl.uint32) < D)
            x = tl.load(x_ptrs, mask=mask, other=0.0)
        acc = matmul_acc(dy.T, x, acc, PRECISION)
        dy_ptrs += BLOCK_K * stride_ym
        row += BLOCK_K
        if LINEAR:
            x_ptrs += BLOCK_K * stride_xw
        if PADDED or not LINEAR:
            q, over = carry(q + step_q, Q)
            p, over = carry(p + step_p + over, P)
            if HAS_D or not LINEAR:
                o, over = carry(o + step_o + over, O)
                n += step_n + over

    filters = (split * GROUPS + group) * K + offs_m
    # A single range's weights may lie as [filters, C, taps].
    ahead = offs_n if W_CHANNELS_LAST or not DIRECT else offs_n % C * (T * R * S) + offs_n // C
    if PACK > 1:
        # The blocks on the diagonal are all that is kept; the others are products of one group with another.
        TAPS: tl.constexpr = T * R * S
        member = offs_m // PACK_K
        mask = mask_m[:, None] & mask_n[None, :] & (member[:, None] == (offs_n // PACK_C % PACK)[None, :])
        if W_CHANNELS_LAST or not DIRECT:
            ahead = offs_n // C * PACK_C + offs_n % C
            offs_w = (filters.to(tl.int64) * (TAPS * PACK_C) - member * PACK_C)[:, None] + ahead[None, :]
        else:
            offs_w = ((filters.to(tl.int64) - member) * (TAPS * PACK_C))[:, None] + ahead[None, :]
        tl.store(dw_ptr + offs_w, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    else:
        offs_w = (filters.to(tl.int64) * columns)[:, None] + ahead[None, :]
        tl.store(dw_ptr + offs_w, acc.to(dw_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    if db_ptr is not None:
        # A loop of its own, so that the products' loop has no tile to hold for it; dy is in L2.
        if pid_n == 0:
            sums = tl.zeros((BLOCK_M,), acc.dtype)
            row = split * RANGE + tl.arange(0, BLOCK_K)
            rows = row.to(rows.dtype)
            offs_y = (rows * stride_ym)[:, None] + (group * K + offs_m)[None, :]
            for start in tl.range(split * RANGE, last, BLOCK_K):
                mask = (start + tl.arange(0, BLOCK_K) < last)[:, None] & mask_m[None, :]
                dy = tl.load(dy_ptr + offs_y, mask=mask, other=0.0)
                if table_ptr is not None:
                    z = dy
                    if z_ptr is not None:
                        z = tl.load(z_ptr + offs_y, mask=mask, other=0.0)
                    gradient = input_gradient(dy, z, table, SLOPED, ACT_GRADIENT, GRADIENT_A, GRADIENT_B)
                    dy = tl.where(mask, gradient, 0.0)
                sums += tl.sum(dy.to(sums.dtype), 0)
                offs_y += BLOCK_K * stride_ym
            tl.store(db_ptr + filters, sums.to(db_ptr.dtype.element_ty), mask=mask_m)


@triton.jit
def wgrad_reduce_kernel(
    sums_ptr,  # [SPLITS, SIZE], where SIZE is filters x taps x C
    dw_ptr,  # [filters, taps, C], or [filters, C, taps]
    SIZE, SPLITS, C, TAPS: tl.constexpr, W_CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the ranges' sums in their order, and write them as the weight lies."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    total = tl.zeros((BLOCK,), sums_ptr.dtype.element_ty)
    ptrs = sums_ptr + offs
    for _ in range(SPLITS):
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += SIZE
    if not W_CHANNELS_LAST:
        offs = (offs // (TAPS * C) * C + offs % C) * TAPS + offs // C % TAPS
    tl.store(dw_ptr + offs, total.to(dw_ptr.dtype.element_ty), mask=mask)
