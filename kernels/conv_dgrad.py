"""Data gradient of a convolution, which is a transposed convolution's forward, one stride phase per program.

    dx[n, d, c] = sum over taps t and filters k of dy[n, o, k] * w[k, t, c],  where o * stride = d + padding - t * dilation

M = pixels of dx in one phase, N = its channels of one group, K = taps of that phase x filters of one group. Along an
axis the pixels with the same (d + padding) % stride see the same taps, every (stride / gcd(stride, dilation))th one, and a
step of one tap is a step of a whole number of pixels of dy: within a phase the sum is dense. Nothing is stuffed with
zeros, nothing is added twice, and each pixel of dx is written once; a phase without taps writes the epilogue of zero.

A program owns one BLOCK_M x BLOCK_N tile of one phase; the phases share one launch. dy comes through pointers, each
pixel's address formed once per tile and moved by one scalar a step; the weight, [filters, taps, channels] as the forward
has it, is read in tiles of filters x channels. dy rows are read once per tap and column of tiles, from L2 but for the
first time.

Groups with few channels share a tile, as in conv_flat.

Where a batch norm (and an activation) lies between, the gradient of the convolution's result z can be computed on the way
in, from dy, z and five numbers a channel. A filter of one tap sees each pixel of it once, and the programs of the first
column of tiles write it for the weight gradient: two reads and a write where a pass of its own would take a read more.
"""

import triton
import triton.language as tl

from .dot import matmul_acc, zero_tile
from .epilogue import finish_rows
from .masks import both
from .statistics import input_gradient, load_table
from .tiles import REMADE, grouped_tile, not_finite, taps_outside, tile

__all__ = ["configs", "conv_dgrad_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""
    return [
        # Compute-bound layers.
        tile(256, 128, 64, 8, 3, tma=False),
        tile(128, 256, 64, 8, 3, tma=False),
        tile(128, 128, 64, 8, 3, tma=False),
        # Few channels, or too few tiles to fill the GPU.
        tile(128, 64, 64, 4, 3, tma=False),
        tile(64, 64, 64, 8, 4, tma=False),
        # Groups that share a tile, as in conv_flat.
        tile(256, 32, 32, 8, 3, tma=False),
        tile(128, 32, 32, 4, 3, tma=False),
        # Few filters, and operands computed on the way in.
        tile(64, 256, 32, 8, 3, tma=False),
        tile(64, 128, 32, 4, 3, tma=False),
        tile(64, 64, 32, 8, 3, tma=False),
        tile(64, 32, 64, 4, 3, tma=False),
        tile(64, 16, 64, 4, 3, tma=False),
        # Products without tensor cores, and few filters.
        tile(64, 32, 16, 4, 3, tma=False),
        tile(64, 16, 16, 4, 3, tma=False),
    ]


@triton.jit
def axis_phase(phase, X, PAD: tl.constexpr, STRIDE: tl.constexpr):
    """(first, count) of an axis's pixels with (x + PAD) % STRIDE == phase, for X pixels."""
    first = (phase - PAD % STRIDE + STRIDE) % STRIDE
    return first, tl.maximum((X - first + STRIDE - 1) // STRIDE, 0)


@triton.jit
def axis_taps(phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr):
    """(first, count) of the taps with (tap * DIL) % STRIDE == phase: first, first + STEP, ..."""
    first = tl.full((), TAPS, tl.int32)
    for back in tl.static_range(STEP):
        if STEP - 1 - back < TAPS:
            first = tl.where((STEP - 1 - back) * DIL % STRIDE == phase, STEP - 1 - back, first)
    return first, (TAPS - first + STEP - 1) // STEP


@triton.jit
def conv_dgrad_kernel(
    dy_ptr, stride_yn, stride_yd, stride_yh, stride_yw,  # filters have stride 1
    w, stride_wk,  # [groups * K, taps, C] (PACK_C of them), channels innermost
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # where dy is the gradient behind a batch norm: the convolution's result and its gradient, strided as dy; the table
    z_ptr, dz_ptr, table_ptr,
    # sizes: y is dx, [N, D, H, W], and dy is [N, O, P, Q]; C and K are those of one group
    N, D, H, W, C, K, O, P, Q, GROUPS,
    # geometry; STEP: stride / gcd(stride, dilation). PACK, PACK_C, PACK_K: as conv_flat has them
    PACK: tl.constexpr, PACK_C: tl.constexpr, PACK_K: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    # flags: EVEN_K: BLOCK_K divides K. VEC_Y, VEC_C: powers of two up to 16 that divide every stride of dy and K, and C
    EVEN_K: tl.constexpr, VEC_Y: tl.constexpr, VEC_C: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # of that batch norm, as statistics.input_gradient takes them
    SLOPED: tl.constexpr, ACT_GRADIENT: tl.constexpr, GRADIENT_A: tl.constexpr, GRADIENT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_Y > 1:
        K = K // VEC_Y * VEC_Y
        stride_yn = stride_yn // VEC_Y * VEC_Y
        stride_yd = stride_yd // VEC_Y * VEC_Y
        stride_yh = stride_yh // VEC_Y * VEC_Y
        stride_yw = stride_yw // VEC_Y * VEC_Y
    if VEC_C > 1:
        C = C // VEC_C * VEC_C
        stride_wk = stride_wk // VEC_C * VEC_C
    # Channels in a tap of the weight.
    W_C = C
    if PACK > 1:
        # Known when compiling, so that without a stride the loop is unrolled and its counters are constants.
        C = PACK * PACK_C
        K = PACK * PACK_K
        W_C = PACK_C
        stride_wk = T * R * S * PACK_C
    # A dilation alone matters too: a transposed convolution may then have output padding.
    HAS_D: tl.constexpr = T > 1 or PAD_D > 0 or STRIDE_D > 1 or DIL_D > 1
    # Taps of a phase at most, and pixels of dy from one to the next.
    MOST_D: tl.constexpr = (T + STEP_D - 1) // STEP_D
    MOST_H: tl.constexpr = (R + STEP_H - 1) // STEP_H
    MOST_W: tl.constexpr = (S + STEP_W - 1) // STEP_W
    HOP_D: tl.constexpr = STEP_D * DIL_D // STRIDE_D
    HOP_H: tl.constexpr = STEP_H * DIL_H // STRIDE_H
    HOP_W: tl.constexpr = STEP_W * DIL_W // STRIDE_W
    # Positions that fit a word of bits, a sign bit to spare.
    COUNTED: tl.constexpr = MOST_D + MOST_H + MOST_W <= 30

    PHASES: tl.constexpr = STRIDE_D * STRIDE_H * STRIDE_W
    programs = tl.num_programs(0) // PHASES
    phase = tl.program_id(0) // programs
    if PACK > 1 and PHASES == 1:
        phase = 0
    first_d, size_d = axis_phase(phase // (STRIDE_H * STRIDE_W), D, PAD_D, STRIDE_D)
    first_h, size_h = axis_phase(phase // STRIDE_W % STRIDE_H, H, PAD_H, STRIDE_H)
    first_w, size_w = axis_phase(phase % STRIDE_W, W, PAD_W, STRIDE_W)
    tap_d, taps_d = axis_taps(phase // (STRIDE_H * STRIDE_W), T, STRIDE_D, DIL_D, STEP_D)
    tap_h, taps_h = axis_taps(phase // STRIDE_W % STRIDE_H, R, STRIDE_H, DIL_H, STEP_H)
    tap_w, taps_w = axis_taps(phase % STRIDE_W, S, STRIDE_W, DIL_W, STEP_W)

    # Phases differ by a row or column of pixels; the first is at least as large as any.
    M = N * size_d * size_h * size_w
    tiles_n = tl.cdiv(C, BLOCK_N)
    tiles_m = programs // (tiles_n * GROUPS)
    pid = tl.program_id(0) % programs
    group = pid // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    if pid_m * BLOCK_M >= M:
        if counts_ptr is not None:
            if pid_n + group == 0:
                tl.store(counts_ptr + phase * tiles_m + pid_m, 0.0)
        return

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Pixels past the end repeat the last one: their loads are valid and their results are not stored.
    row = tl.minimum(offs_m, M - 1)
    n = row // (size_d * size_h * size_w)
    at_d = first_d + row // (size_h * size_w) % size_d * STRIDE_D
    at_h = first_h + row // size_w % size_h * STRIDE_H
    at_w = first_w + row % size_w * STRIDE_W
    # The pixel of dy under the first tap; exact but where there is no tap. Negative ones lie outside.
    o = (at_d + PAD_D - tap_d * DIL_D + T * DIL_D * STRIDE_D) // STRIDE_D - T * DIL_D
    p = (at_h + PAD_H - tap_h * DIL_H + R * DIL_H * STRIDE_H) // STRIDE_H - R * DIL_H
    q = (at_w + PAD_W - tap_w * DIL_W + S * DIL_W * STRIDE_W) // STRIDE_W - S * DIL_W
    if COUNTED:
        outside = taps_outside(o, p, q, O, P, Q, MOST_D, MOST_H, MOST_W, -HOP_D, -HOP_H, -HOP_W, HAS_D)
    if INDEX_64:
        n = n.to(tl.int64)
    # Where the results go, in one register a pixel across the loop.
    if X_CHANNELS_LAST:
        rows = (((n * D + at_d) * H + at_h) * W + at_w) * (GROUPS * C)
    else:
        rows = ((n * (GROUPS * C) * D + at_d) * H + at_h) * W + at_w
    offs_k = tl.arange(0, BLOCK_K)
    offs_y = n * stride_yn + group * K
    offs_y += o.to(n.dtype) * stride_yd + p.to(n.dtype) * stride_yh + q.to(n.dtype) * stride_yw
    first_y = offs_y
    offs_y = offs_y[:, None] + offs_k[None, :]
    dy_ptrs = dy_ptr + offs_y  # [BLOCK_M, BLOCK_K]
    if z_ptr is not None:
        z_ptrs = z_ptr + offs_y
    filters = group * K + offs_k
    if INDEX_64:
        filters = filters.to(tl.int64)
    # Channels past the end repeat the last one, likewise.
    offs_n = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), C - 1)
    if VEC_C > 1:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C
    w_ptrs = w + ((filters * stride_wk)[:, None] + offs_n[None, :])  # [BLOCK_K, BLOCK_N]

    # wgmma would take a computed operand of rows from registers, and wait for each product to let go of them. As the other
    # operand it goes through shared memory.
    TURNED: tl.constexpr = table_ptr is not None and BLOCK_N >= 64
    acc = zero_tile(y_ptr, BLOCK_N if TURNED else BLOCK_M, BLOCK_M if TURNED else BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    # The step's offsets and its bits are counted along, as in conv_fprop. Moving on by a tap, a filter row or a plane takes
    # back what the filters, columns or rows have added.
    next_w = -HOP_W * stride_yw - blocks_k * BLOCK_K
    next_h = -HOP_H * stride_yh + taps_w * HOP_W * stride_yw
    next_d = -HOP_D * stride_yd + taps_h * HOP_H * stride_yh
    w_next_w = STEP_W * W_C - blocks_k * BLOCK_K * stride_wk
    w_next_h = (STEP_H * S - taps_w * STEP_W) * W_C
    w_next_d = (STEP_D * R - taps_h * STEP_H) * S * W_C
    offset = tl.full((), 0, n.dtype)
    w_offset = ((tap_d * R + tap_h) * S + tap_w).to(n.dtype) * W_C
    k = 0
    bit_w = tl.full((), 1, tl.int32)
    bit_h = tl.full((), 1 << MOST_W if COUNTED else 0, tl.int32)
    bit_d = tl.full((), 1 << (MOST_W + MOST_H) if COUNTED else 0, tl.int32)
    for i in tl.range(0, taps_d * taps_h * taps_w * blocks_k, num_stages=STAGES):
        if COUNTED:
            bits = bit_w | bit_h
            if HAS_D:
                bits = bits | bit_d
            inside = (outside & bits) == 0
        else:
            k = i % blocks_k * BLOCK_K
            j = i // blocks_k
            j_w = j % taps_w
            j_h = j // taps_w % taps_h
            j_d = j // (taps_w * taps_h)
            offset = k - j_d.to(n.dtype) * (HOP_D * stride_yd) - j_h * (HOP_H * stride_yh) - j_w * (HOP_W * stride_yw)
            tap = ((tap_d + j_d * STEP_D) * R + tap_h + j_h * STEP_H) * S + tap_w + j_w * STEP_W
            w_offset = k.to(n.dtype) * stride_wk + tap * W_C
            # Unsigned comparison: a negative coordinate is a large number.
            inside = ((p - j_h * HOP_H).to(tl.uint32) < P) & ((q - j_w * HOP_W).to(tl.uint32) < Q)
            inside = inside & ((o - j_d * HOP_D).to(tl.uint32) < O)
        mask_k = offs_k < K - k
        mask_a = inside[:, None]
        mask_b = mask_n[None, :]
        if not EVEN_K:
            mask_a = mask_a & mask_k[None, :]
            mask_b = mask_b & mask_k[:, None]
        a = tl.load(dy_ptrs + offset, mask=mask_a, other=0.0)
        if PACK > 1:
            # A filter's own channels, and zeros for its neighbors'.
            member = offs_k // PACK_K if PACK * PACK_K <= BLOCK_K else (k + offs_k) // PACK_K
            mask_b = mask_b & (member[:, None] == (offs_n // PACK_C)[None, :])
            b = tl.load(w_ptrs + (w_offset - member * PACK_C)[:, None], mask=mask_b, other=0.0)
        else:
            b = tl.load(w_ptrs + w_offset, mask=mask_b, other=0.0)
        if table_ptr is not None:
            table = load_table(table_ptr, group * K + k + offs_k, mask_k, GROUPS * K, 0, SLOPED, ACT_GRADIENT)
            z = a
            if z_ptr is not None:
                z = tl.load(z_ptrs + offset, mask=mask_a, other=0.0)
            # Outside of the image there is no gradient, and the table's offset is none of nothing.
            gradient = input_gradient(a, z, table, SLOPED, ACT_GRADIENT, GRADIENT_A, GRADIENT_B)
            a = tl.where(mask_a, gradient, 0.0).to(a.dtype)
            if dz_ptr is not None:
                tl.store(dz_ptr + (offs_y + offset), a, mask=both(mask_a, pid_n == 0))
        acc = matmul_acc(b.T, a.T, acc, PRECISION) if TURNED else matmul_acc(a, b, acc, PRECISION)
        if COUNTED:
            offset += BLOCK_K
            w_offset += BLOCK_K * stride_wk
            k += BLOCK_K
            tap_ends = k >= K
            k = tl.where(tap_ends, 0, k)
            offset = tl.where(tap_ends, offset + next_w, offset)
            w_offset = tl.where(tap_ends, w_offset + w_next_w, w_offset)
            bit_w = tl.where(tap_ends, bit_w << 1, bit_w)
            if R * T > 1:
                row_ends = bit_w == (1 << taps_w)
                offset = tl.where(row_ends, offset + next_h, offset)
                w_offset = tl.where(row_ends, w_offset + w_next_h, w_offset)
                bit_w = tl.where(row_ends, 1, bit_w)
                bit_h = tl.where(row_ends, bit_h << 1, bit_h)
            if T > 1:
                plane_ends = bit_h == (1 << (MOST_W + taps_h))
                offset = tl.where(plane_ends, offset + next_d, offset)
                w_offset = tl.where(plane_ends, w_offset + w_next_d, w_offset)
                bit_h = tl.where(plane_ends, 1 << MOST_W, bit_h)
                bit_d = tl.where(plane_ends, bit_d << 1, bit_d)

    if TURNED:
        acc = tl.trans(acc)
    if PACK > 1:
        # As in conv_flat.
        if not_finite(acc):
            for first_n in range(pid_n * BLOCK_N, pid_n * BLOCK_N + BLOCK_N, REMADE):
                remade = tl.minimum(first_n + tl.arange(0, REMADE), C - 1)
                first_k = remade // PACK_C * PACK_K
                own_w = w + ((group * K + first_k).to(n.dtype) * stride_wk + remade % PACK_C)
                own = zero_tile(y_ptr, BLOCK_M, REMADE)
                for i in range(0, taps_d * taps_h * taps_w * PACK_K):
                    j = i // PACK_K
                    j_w = j % taps_w
                    j_h = j // taps_w % taps_h
                    j_d = j // (taps_w * taps_h)
                    back = j_d.to(n.dtype) * (HOP_D * stride_yd) + j_h * (HOP_H * stride_yh) + j_w * (HOP_W * stride_yw)
                    tap = ((tap_d + j_d * STEP_D) * R + tap_h + j_h * STEP_H) * S + tap_w + j_w * STEP_W
                    # Unsigned comparison, as above.
                    inside = ((p - j_h * HOP_H).to(tl.uint32) < P) & ((q - j_w * HOP_W).to(tl.uint32) < Q)
                    inside = (inside & ((o - j_d * HOP_D).to(tl.uint32) < O))[:, None]
                    own_y = (first_y - back)[:, None] + (first_k + i % PACK_K)[None, :]
                    a = tl.load(dy_ptr + own_y, mask=inside, other=0.0)
                    if table_ptr is not None:
                        channels = group * K + first_k + i % PACK_K
                        table = load_table(table_ptr, channels, channels >= 0, GROUPS * K, 0, SLOPED, ACT_GRADIENT)
                        z = a
                        if z_ptr is not None:
                            z = tl.load(z_ptr + own_y, mask=inside, other=0.0)
                        gradient = input_gradient(a, z, table, SLOPED, ACT_GRADIENT, GRADIENT_A, GRADIENT_B)
                        a = tl.where(inside, gradient, 0.0).to(a.dtype)
                    b = tl.load(own_w + ((i % PACK_K) * stride_wk + tap * PACK_C))
                    own += a.to(own.dtype) * b.to(own.dtype)[None, :]
                finish_rows(
                    own, rows, offs_m < M, D * H * W, group, first_n, C, GROUPS * C, phase * tiles_m + pid_m,
                    PHASES * tiles_m, y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr,
                    moments_ptr, EPS, ACT, ACT_A, ACT_B, X_CHANNELS_LAST,
                )  # fmt: skip
            return

    finish_rows(
        acc, rows, offs_m < M, D * H * W, group, pid_n * BLOCK_N, C, GROUPS * C, phase * tiles_m + pid_m, PHASES * tiles_m,
        y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A,
        ACT_B, X_CHANNELS_LAST,
    )  # fmt: skip
