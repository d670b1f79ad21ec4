"""Weight and bias gradient of a depthwise convolution with a large filter, on tensor cores.

Products of pixels of dy with elements of the source, for a channel and a few rows of its filter:

    products[(r, v), q] = sum over m of x[image, row of m and r, v] * dy[image, row of m, q],   m = (image, result's row)
    dw[r, s] = sum over q of products[(r, q * stride + s * dilation - padding), q]

so that the gradient of a tap is a diagonal of the product, summed once, behind the loop. M = filter rows x elements v of
the source's row, N = columns q of the result, K = rows of results of all images, in powers of two of an image's rows, so
that no element's place takes a division. Rows that are wider than a block have several windows, whose products add up, for
tap and column are the same distance apart in each of them.

A program owns BLOCK_M // BLOCK_W filter rows of one filter and a range of the results, and writes its sums to a slot of its
own in fp32; `depthwise_wgrad.depthwise_reduce_kernel` adds the slots in their order. dy and x are read once for each of a
filter's groups of rows, from L2 but for the first time. A NaN or infinity in x may reach other taps of its filter row.
"""

import triton
import triton.language as tl

from .bands import Axis, divide_axis
from .dot import matmul_acc
from .masks import both
from .tiles import tile

__all__ = ["configs", "depthwise_bands_wgrad_kernel", "divide", "fitting"]


def configs() -> list[triton.Config]:
    """Every candidate; `fitting` leaves those that suit a problem."""
    return [
        # With 4 warps a thread's masks and addresses spill, on one target or another.
        # Rows of 64: the issue ratio for sm_90 is 0.50 for 31x31 of 56x56, with 205 registers, and 0.78.
        tile(256, 64, 64, 8, 3, tma=False),
        tile(128, 64, 64, 8, 3, tma=False),
        tile(64, 64, 64, 8, 3, tma=False),
        # Rows of 32: 2.1. Rows of 16 and less: 3.2 for vectors of two elements; an output takes few products there.
        tile(128, 32, 64, 8, 3, tma=False),
        tile(256, 16, 64, 8, 3, tma=False),
        tile(128, 16, 64, 8, 3, tma=False),
        tile(64, 16, 64, 8, 3, tma=False),
    ]


def divide(
    block_m: int, block_n: int, block_k: int, *, batch: int, source: tuple[int, int, int], result: tuple[int, int, int],
    kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int],
    dilation: tuple[int, int, int], align: int,
) -> tuple[int, int, Axis, int, int] | None:  # fmt: skip
    """(elements of a window, rows of a block's image, windows of a row, groups of filter rows, steps over all results).

    None where no window fits.
    """
    width = divide_axis(
        block_n, result[2], source[2], kernel[2], stride[2], padding[2], dilation[2], False, align, False
    )  # fmt: skip
    block_w = max(2, 1 << (width.places - 1).bit_length())
    if block_w > block_m:
        return None
    rows = min(block_k, 1 << (result[1] - 1).bit_length())
    steps = -(-batch // (block_k // rows)) * result[0] * -(-result[1] // rows) * width.blocks
    groups = -(-kernel[1] // (block_m // block_w))
    return block_w, rows, width, groups, steps


def fitting(
    candidates: list[triton.Config], *, itemsize: int, tensor_cores: bool, shared: int, arch: str = "", **geometry: object
) -> list[triton.Config]:
    """The candidates that suit a geometry, as `divide` takes it."""
    kept = []
    for config in candidates:
        m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if divide(m, n, k, **geometry) is None:
            continue
        # Addresses and masks of single elements spill; so they do on Ampere, where an operand waits in registers.
        if m * n > 128 * 64 and (arch == "sm_80" or geometry["align"] == 1):
            continue
        if m * n >= 128 * 32 and arch == "sm_80" and geometry["align"] * itemsize < 16:
            continue
        # The pipeline's buffers, and the products that cross over to their diagonals, must fit.
        if max((m + n) * k * itemsize * config.num_stages, m * n * 4) > shared:
            continue
        # Plain products hold their operands in registers, and larger tiles spill.
        if not tensor_cores and m * n * k > 64 * 64 * 16:
            continue
        kept.append(config)
    return kept


@triton.jit
def place(
    step, BLOCKS_Q, blocks_p, O, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, IMAGES: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr,
):  # fmt: skip
    """(first column, first row, plane, first image) of a step's results."""
    q0 = step * 0
    p0 = step * 0
    if WIDE:
        q0 = step % BLOCKS_Q * BLOCK_N
        step = step // BLOCKS_Q
    if TALL:
        p0 = step % blocks_p * BLOCK_P
        step = step // blocks_p
    return q0, p0, step % O, step // O * IMAGES


@triton.jit
def dy_tile(
    dy_ptr, offs_y, inside, q0, p0, o, n0, offs_n, row_k, image, N, O, P, Q, stride_yn,
    WIDE: tl.constexpr, TALL: tl.constexpr, EVEN: tl.constexpr, n_type: tl.constexpr,
):  # fmt: skip
    """A step's results [BLOCK_K, BLOCK_N]."""
    if WIDE or TALL:
        inside = (p0 + row_k < P)[:, None] & (q0 + offs_n < Q)[None, :]
    if not EVEN:
        inside = inside & (n0 + image < N)[:, None]
    at_y = n0.to(n_type) * stride_yn + (o * P + p0).to(n_type) * Q + q0
    return tl.load(dy_ptr + at_y + offs_y, mask=inside, other=0.0)


@triton.jit
def depthwise_bands_wgrad_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh,  # elements of a row lie side by side
    dy_ptr,  # [N, K, O, P, Q], dense
    sums_ptr,  # [SLOTS, TAPS + 1, K], the bias's sums behind the taps'
    # sizes; STEPS: of all results, RANGE of a program
    N, K, D, H, W, O, P, Q, BLOCKS_Q, STEPS, RANGE,
    # geometry; MULT: filters of a channel
    MULT: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags: VEC_X: a power of two up to 16 that divides the image's strides; VEC_W and VEC_Q: ..., widths. WIDE, TALL: an
    # image of the result has several blocks side by side, or one below the other; EVEN: each block of images is full
    BIAS: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, EVEN: tl.constexpr, VEC_X: tl.constexpr,
    VEC_W: tl.constexpr, VEC_Q: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    # tiles; a window's first element
    FIRST_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
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
    TAPS: tl.constexpr = T * R * S
    GROUP: tl.constexpr = BLOCK_M // BLOCK_W
    GROUPS: tl.constexpr = (R + GROUP - 1) // GROUP
    IMAGES: tl.constexpr = BLOCK_K // BLOCK_P
    # Programs that read the same pixels are neighbors.
    pid = tl.program_id(0)
    r0 = pid % GROUPS * GROUP
    pid = pid // GROUPS
    t = pid % T
    pid = pid // T
    k = pid % K
    slot = pid // K

    offs_m = tl.arange(0, BLOCK_M)
    row_m = offs_m // BLOCK_W
    column_m = offs_m % BLOCK_W
    offs_k = tl.arange(0, BLOCK_K)
    image = offs_k // BLOCK_P
    row_k = offs_k % BLOCK_P
    offs_n = tl.arange(0, BLOCK_N)
    n_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    stride_yn = K.to(n_type) * O * P * Q
    offs_x = image.to(n_type) * stride_xn + row_k.to(n_type) * (STRIDE_H * stride_xh)
    offs_x = offs_x[:, None] + (row_m * (DIL_H * stride_xh) + column_m)[None, :]
    offs_y = (image.to(n_type) * stride_yn + row_k * Q)[:, None] + offs_n[None, :]
    h_tile = (row_k * STRIDE_H - PAD_H)[:, None] + (r0 * DIL_H + row_m * DIL_H)[None, :]
    w_tile = column_m + FIRST_W
    # Masks that no step changes.
    x_inside = (h_tile.to(tl.uint32) < H) & (w_tile.to(tl.uint32) < W)[None, :] & (row_k < P)[:, None]
    y_inside = (row_k < P)[:, None] & (offs_n < Q)[None, :]
    x_ptr += (k // MULT).to(n_type) * stride_xc
    dy_ptr += k.to(n_type) * O * P * Q
    blocks_p = tl.cdiv(P, BLOCK_P)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = slot * RANGE
    last = tl.minimum(STEPS, first + RANGE)
    for step in tl.range(first, last, num_stages=STAGES):
        q0, p0, o, n0 = place(step, BLOCKS_Q, blocks_p, O, BLOCK_N, BLOCK_P, IMAGES, WIDE, TALL)
        if WIDE or TALL:
            x_mask = ((h_tile + p0 * STRIDE_H).to(tl.uint32) < H) & (p0 + row_k < P)[:, None]
            x_mask = x_mask & ((q0 * STRIDE_W + w_tile).to(tl.uint32) < W)[None, :]
        else:
            x_mask = x_inside
        if not EVEN:
            x_mask = x_mask & (n0 + image < N)[:, None]
        d = o * STRIDE_D + (t * DIL_D - PAD_D)
        if T > 1 or PAD_D > 0:
            x_mask = both(x_mask, (d >= 0) & (d < D))
        at_x = n0.to(n_type) * stride_xn + d.to(n_type) * stride_xd
        at_x += (p0 * STRIDE_H - PAD_H + r0 * DIL_H).to(n_type) * stride_xh + (q0 * STRIDE_W + FIRST_W)
        x = tl.load(x_ptr + at_x + offs_x, mask=x_mask, other=0.0)
        dy = dy_tile(
            dy_ptr, offs_y, y_inside, q0, p0, o, n0, offs_n, row_k, image, N, O, P, Q, stride_yn, WIDE, TALL, EVEN, n_type
        )
        acc = matmul_acc(x.T, dy, acc, PRECISION)

    # Each tap's diagonal: row (r, s) of it is row (r, v) of the products, for each q another v.
    offs_t = tl.arange(0, GROUP * BLOCK_S)
    r = offs_t // BLOCK_S
    s = offs_t % BLOCK_S
    v = (s * DIL_W - (PAD_W + FIRST_W))[:, None] + (offs_n * STRIDE_W)[None, :]
    inside = (v >= 0) & (v < BLOCK_W)
    rows = tl.where(inside, r[:, None] * BLOCK_W + v, 0)
    diagonals = tl.where(inside, tl.gather(acc, rows, 0), 0.0)
    sums_ptrs = sums_ptr + slot.to(tl.int64) * (K * (TAPS + 1)) + k
    tap = (t * R + r0 + r) * S + s
    tl.store(sums_ptrs + tap.to(tl.int64) * K, tl.sum(diagonals, 1), mask=(s < S) & (r0 + r < R))
    if BIAS:
        # A pass of its own: within the products' loop it would double the instructions.
        if t + r0 == 0:
            bias = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
            for step in tl.range(first, last, num_stages=STAGES):
                q0, p0, o, n0 = place(step, BLOCKS_Q, blocks_p, O, BLOCK_N, BLOCK_P, IMAGES, WIDE, TALL)
                bias += dy_tile(
                    dy_ptr, offs_y, y_inside, q0, p0, o, n0, offs_n, row_k, image, N, O, P, Q, stride_yn, WIDE, TALL, EVEN,
                    n_type,
                ).to(tl.float32)  # fmt: skip
            tl.store(sums_ptrs + tl.full((), TAPS, tl.int64) * K, tl.sum(tl.sum(bias, 1), 0))
