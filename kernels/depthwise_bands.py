"""Depthwise convolution with large filters on tensor cores, and its data gradient: products with banded matrices.

One row of a filter, applied to a row of an image, is a product with a banded Toeplitz matrix. A block of P_ x Q_ results of
one channel depends on few rows of the source; each of them, H_ at a time and W_ elements of each, is a step of one product:

    acc[m, (p, q)] += sum over (i, v) of x[image and place of block m, row i, element v] * band[(i, v), (p, q)]
    band[(i, v), (p, q)] = w[c, r, s]   where r * dilation = i - p * stride and s * dilation = v - q * stride,
                                        both counted from the block's window; transposed: where
                                        r * dilation = p + padding - i * stride, and so along the row; else 0

M = blocks of results of all images, N = P_ x Q_ results of a block, K = rows of the source x elements of a row. The band
is the same for all blocks, for it depends on distances of rows and of columns alone. A program owns BLOCK_M blocks of one
channel and walks the source rows of their windows; a row is read once for P_ rows of results, where a step for each filter
row would read it R times. The image comes through pointers, formed once and moved by a scalar a step. The few filter rows
that a step's band holds are one small tile, read a step ahead; the band is gathered from it through shared memory, by
places that no step changes. No packed copy of the weights is kept.

How a tile of BLOCK_M x BLOCK_N x BLOCK_K is divided into P_ x Q_ and H_ x W_ is arithmetic of the geometry (`divide`). An
image that fits the block whole is one row of M, and only its own rows are walked: products of batch x image x image.

An element that is infinite or NaN meets the band's zeros: it may reach every result of its own channel and image whose
block's window holds it, not only those within the filter's reach. No other image and no other channel sees it. So
a weight that is not finite reaches all results of its channel, by the zeros of the padding too.
"""

import triton
import triton.language as tl

from .dot import matmul_acc
from .epilogue import apply_affine, load_affine
from .masks import both
from .tiles import tile

__all__ = ["configs", "depthwise_bands_kernel"]

# Columns that are finished at once, so that residual and addresses do not spill beside a wide tile's accumulators.
SLICE_N = tl.constexpr(32)
# The first source row of blocks that are not there.
NOWHERE = tl.constexpr(-(1 << 30))
# Neighboring columns of the band that a thread gathers: what it stores at once.
RUN = tl.constexpr(8)


def configs() -> list[triton.Config]:
    """Every candidate; `fitting` leaves those that suit a problem."""
    return [
        # Registers and issue ratio for sm_90, first 31x31 on rows of 56, then 7x7 on rows of 14 (vectors of two elements).
        # Wide images: a row of 64 results; 143 and 0.64, 227 and 1.66; two rows, 164 and 0.61, 221 and 0.95.
        tile(256, 64, 64, 8, 3, tma=False),
        tile(128, 128, 64, 8, 3, tma=False),
        # 176 and 0.78, 250 and 1.79; 232 and 0.85, 253 and 1.17; few blocks of results, 246 and 0.83, 247 and 0.93.
        tile(128, 64, 64, 4, 3, tma=False),
        tile(64, 128, 64, 4, 3, tma=False),
        tile(64, 256, 64, 8, 3, tma=False),
        # Windows of more than 64 elements; 147 and 0.78.
        tile(128, 64, 128, 8, 2, tma=False),
        # TF32 on Ampere.
        tile(128, 64, 64, 8, 3, tma=False),
        # For AMD's 64 KB of shared memory.
        tile(128, 64, 64, 4, 2, tma=False),
        # Small images and filters, and Ampere: 202 and 1.59, 205 and 1.7, 155 and 3.1, 80 and 8.3 on rows of 14.
        tile(256, 64, 32, 8, 3, tma=False),
        tile(128, 64, 32, 4, 3, tma=False),
        tile(128, 32, 32, 4, 3, tma=False),
        tile(128, 16, 16, 4, 3, tma=False),
    ]


@triton.constexpr_function
def filter_rows(first, pad, stride, dilation, transposed, step, group, results):
    """(first, number) of the filter rows that a band of `group` source rows holds, the first of them at place 0."""
    if transposed:
        least, most = pad - (first + (group - 1) * step) * stride, pad - first * stride + results - 1
    else:
        least, most = first + pad - (results - 1) * stride, first + pad + (group - 1) * step
    return least // dilation, most // dilation - least // dilation + 1


@triton.constexpr_function
def power_above(n):
    """The least power of two that is larger."""
    return 1 << n.bit_length()


@triton.jit
def band_places(
    index,  # of places of the band, row by row
    FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, STEP_H: tl.constexpr, LEAST: tl.constexpr, COUNT: tl.constexpr,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Which of COUNT filter rows' taps stands there; COUNT * S, which holds zero, for none."""
    k = index // BLOCK_N
    n = index % BLOCK_N
    i = k // BLOCK_W * STEP_H + FIRST_H
    v = k % BLOCK_W + FIRST_W
    p = n // BLOCK_Q
    q = n % BLOCK_Q
    if TRANSPOSED:
        row = p + PAD_H - i * STRIDE_H - LEAST * DIL_H
        column = q + PAD_W - v * STRIDE_W
    else:
        row = i + PAD_H - p * STRIDE_H - LEAST * DIL_H
        column = v + PAD_W - q * STRIDE_W
    inside = (column >= 0) & (column < S * DIL_W)
    if DIL_W > 1:
        inside = inside & (column % DIL_W == 0)
    if DIL_H > 1:
        inside = inside & (row % DIL_H == 0)
    return tl.where(inside, row // DIL_H * S + column // DIL_W, COUNT * S)


@triton.jit
def gathered(rows, places, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """The band [BLOCK_K, BLOCK_N] from filter rows; `places` has every RUN-th column, then every next one, ..."""
    runs = tl.reshape(tl.gather(rows, places, 0), (RUN, BLOCK_K * BLOCK_N // RUN))
    # What a thread has lies RUN times apart in 1-d, and side by side in the band.
    return tl.reshape(tl.trans(runs), (BLOCK_K, BLOCK_N))


@triton.jit
def halves_of_each(parts, COUNT: tl.constexpr):
    """COUNT tiles, each cut into its left and its right half, in order."""
    result = ()
    for i in tl.static_range(COUNT):
        pairs = tl.permute(tl.reshape(parts[i], (parts[i].shape[0], 2, parts[i].shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(pairs)
        result = result + (left, right)
    return result


@triton.jit
def over_tile(values):
    """The sum of a tile, as a vector of one: for Blackwell, Triton cannot lay out accumulators along a single axis."""
    return tl.sum(tl.sum(values, 1, keep_dims=True), 0)


@triton.constexpr_function
def levels_of(columns, most):
    """How often columns are halved until they are `most` or fewer."""
    return max(0, (columns // most).bit_length() - 1)


@triton.jit
def depthwise_bands_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh,  # elements of a row lie side by side
    w,  # [filters, taps], dense
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes: x is [N, ..., D, H, W], y is [N, C, O, P, Q], dense; M: blocks of results; STEPS: groups of source rows
    M, C, D, H, W, O, P, Q, BLOCKS_P, BLOCKS_Q, STEPS,
    # geometry; MULT: filters of a channel
    MULT: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: VEC_X: a power of two up to 16 that divides the image's strides; VEC_W and VEC_Q: ..., widths. WIDE: several
    # blocks lie side by side in a row; COVERED: every element that is read lies within its row
    TRANSPOSED: tl.constexpr, VEC_X: tl.constexpr, VEC_W: tl.constexpr, VEC_Q: tl.constexpr, WIDE: tl.constexpr,
    COVERED: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # a block's results, its first place, the way to the next place and to the next block
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, STEP_H: tl.constexpr,
    MOVE_H: tl.constexpr, MOVE_W: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xc = stride_xc // VEC_X * VEC_X
        stride_xd = stride_xd // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
    if VEC_W > 1:
        W = W // VEC_W * VEC_W
    if VEC_Q > 1:
        Q = Q // VEC_Q * VEC_Q
    HAS_D: tl.constexpr = T > 1 or PAD_D > 0 or (TRANSPOSED and STRIDE_D > 1)
    FILTERS: tl.constexpr = MULT if TRANSPOSED else 1
    # Source rows of a step.
    GROUP: tl.constexpr = BLOCK_K // BLOCK_W
    ADVANCE: tl.constexpr = (-GROUP * STEP_H * STRIDE_H if TRANSPOSED else GROUP * STEP_H) // DIL_H * S
    tiles = tl.cdiv(M, BLOCK_M)
    c = tl.program_id(0) // tiles
    slot = tl.program_id(0) % tiles

    offs_m = slot * BLOCK_M + tl.arange(0, BLOCK_M)
    there = offs_m < M
    if WIDE:
        block_q = offs_m % BLOCKS_Q
        line = offs_m // BLOCKS_Q
    else:
        line = offs_m
    block_p = line % BLOCKS_P
    line = line // BLOCKS_P
    o = line % O
    n = line // O
    if INDEX_64:
        n = n.to(tl.int64)
        c = c.to(tl.int64)

    # The image's tile.
    offs_k = tl.arange(0, BLOCK_K)
    row_k = offs_k // BLOCK_W
    column_k = offs_k % BLOCK_W
    h0 = block_p * MOVE_H + FIRST_H
    offs_x = n * stride_xn + h0.to(n.dtype) * stride_xh + FIRST_W
    if WIDE:
        offs_x += (block_q * MOVE_W).to(n.dtype)
    if not HAS_D:
        offs_x += (o * STRIDE_D).to(n.dtype) * stride_xd
    channel = c * MULT if TRANSPOSED else c // MULT
    x_ptrs = x_ptr + channel * stride_xc + (offs_x[:, None] + (row_k * (STEP_H * stride_xh) + column_k)[None, :])
    # Rows past the end have no source at all.
    h_tile = tl.where(there, h0, NOWHERE)[:, None]
    if GROUP > 1:
        h_tile = h_tile + (row_k * STEP_H)[None, :]
    if WIDE:
        columns_inside = ((block_q * MOVE_W + FIRST_W)[:, None] + column_k[None, :]).to(tl.uint32) < W
    else:
        columns_inside = ((column_k + FIRST_W).to(tl.uint32) < W)[None, :]

    # Where the band's elements lie among the filter rows of a step, the same for all steps.
    LEAST: tl.constexpr = filter_rows(FIRST_H, PAD_H, STRIDE_H, DIL_H, TRANSPOSED, STEP_H, GROUP, BLOCK_N // BLOCK_Q)[0]
    COUNT: tl.constexpr = filter_rows(FIRST_H, PAD_H, STRIDE_H, DIL_H, TRANSPOSED, STEP_H, GROUP, BLOCK_N // BLOCK_Q)[1]
    index = tl.arange(0, BLOCK_K * BLOCK_N)
    index = index % (BLOCK_K * BLOCK_N // RUN) * RUN + index // (BLOCK_K * BLOCK_N // RUN)
    places = band_places(
        index, FIRST_H, FIRST_W, STEP_H, LEAST, COUNT, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, TRANSPOSED,
        BLOCK_N, BLOCK_Q, BLOCK_W,
    )  # fmt: skip
    offs_w = tl.arange(0, power_above(COUNT * S))
    known = offs_w < COUNT * S
    offs_w += LEAST * S
    w_ptr = w + c.to(tl.int64) * (FILTERS * T * R * S)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    filter_tile = tl.load(w_ptr + offs_w, mask=known & (offs_w.to(tl.uint32) < R * S), other=0.0)
    for step in tl.range(0, FILTERS * T * STEPS, num_stages=STAGES):
        i = step
        ahead = step + 1
        plane = 0
        if FILTERS * T > 1:
            i = step % STEPS
            ahead = (step + 1) % STEPS
            plane = (step + 1) // STEPS
        offset = (i * (GROUP * STEP_H)).to(n.dtype) * stride_xh
        inside = (h_tile + i * (GROUP * STEP_H)).to(tl.uint32) < H
        if HAS_D:
            t = step // STEPS % T
            if TRANSPOSED:
                reached = o + PAD_D - t * DIL_D
                d = reached // STRIDE_D
                plane_inside = (reached >= 0) & (reached % STRIDE_D == 0) & (d < D)
            else:
                d = o * STRIDE_D - PAD_D + t * DIL_D
                plane_inside = d.to(tl.uint32) < D
            inside = inside & plane_inside[:, None]
            a_ptrs = x_ptrs + (d.to(n.dtype) * stride_xd + offset)[:, None]
        else:
            a_ptrs = x_ptrs + offset
        if FILTERS > 1:
            a_ptrs += (step // (STEPS * T)).to(n.dtype) * stride_xc
        if not COVERED:
            inside = inside & columns_inside
        a = tl.load(a_ptrs, mask=inside, other=0.0)
        band = gathered(filter_tile, places, BLOCK_K, BLOCK_N)
        # The next step's rows of the filter, so that they are on their way during this one's products.
        taps = offs_w + ahead * ADVANCE
        more = known & (taps.to(tl.uint32) < R * S)
        if FILTERS * T > 1:
            more = both(more, plane < FILTERS * T)
        filter_tile = tl.load(w_ptr + (plane * (R * S) + taps), mask=more, other=0.0)
        acc = matmul_acc(a, band, acc, PRECISION)

    offs_c = c + tl.arange(0, 1)
    scale, shift = load_affine(offs_c, None, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS, acc.dtype)
    acc = apply_affine(acc, scale, shift, bias_ptr, mean_ptr)
    p0 = block_p * ROWS
    offs_y = ((n * C + c) * O + o) * P + p0
    q0 = 0
    if WIDE:
        q0 = block_q * COLUMNS
    offs_n = tl.arange(0, BLOCK_N)
    p_n = offs_n // BLOCK_Q
    q_n = offs_n % BLOCK_Q
    if moments_ptr is not None:
        rows_there = there[:, None] & (p_n < ROWS)[None, :] & (p0[:, None] + p_n[None, :] < P)
        if WIDE:
            counted = rows_there & (q_n < COLUMNS)[None, :] & (q0[:, None] + q_n[None, :] < Q)
        else:
            counted = rows_there & (q_n < Q)[None, :]
        count = over_tile(counted.to(tl.float32))
        mean = over_tile(tl.where(counted, acc, 0.0)) / count
        deviation = tl.where(counted, acc - mean[None, :], 0.0)
        row = slot.to(tl.int64)
        tl.store(moments_ptr + row * C + offs_c, mean)
        tl.store(moments_ptr + (tiles + row) * C + offs_c, over_tile(deviation * deviation))
        tl.store(counts_ptr + row + tl.zeros_like(offs_c), count, mask=offs_c == 0)
    LEVELS: tl.constexpr = levels_of(BLOCK_N, SLICE_N)
    slices = (acc,)
    for level in tl.static_range(LEVELS):
        slices = halves_of_each(slices, 1 << level)
    for k in tl.static_range(1 << LEVELS):
        result = slices[k]
        columns = k * result.shape[1] + tl.arange(0, result.shape[1])
        p = columns // BLOCK_Q
        q = columns % BLOCK_Q
        mask = there[:, None] & ((p < ROWS) & (q < COLUMNS))[None, :] & (p0[:, None] + p[None, :] < P)
        offs = (offs_y * Q)[:, None] + (p * Q + q)[None, :]
        if WIDE:
            mask = mask & (q0[:, None] + q[None, :] < Q)
            offs += q0.to(n.dtype)[:, None]
        else:
            mask = mask & (q < Q)[None, :]
        if residual_ptr is not None:
            result = result + tl.load(residual_ptr + offs, mask=mask, other=0.0).to(result.dtype)
        result = ACT(result, ACT_A, ACT_B)
        tl.store(y_ptr + offs, result.to(y_ptr.dtype.element_ty), mask=mask)
