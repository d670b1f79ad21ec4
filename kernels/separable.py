"""Depthwise convolution and the 1x1 convolution behind it in one pass: what lies between never goes to memory.

    a[m, c] = act(bn(sum over taps x[pixel(m, tap), c] * w1[c, tap] + bias))
    y[m, k] = epilogue(sum over c a[m, c] * w[k, c])

M = results, N = output channels, K = channels of the depthwise part. A program owns BLOCK_M results, which are patches of
2 x 2 (as in kernels/depthwise.py), and BLOCK_N output channels. It walks the channels in blocks of BLOCK_K: it computes
their depthwise tile in registers, finishes it, rounds it as a layer of its own would, and multiplies. A tile of all output
channels computes each depthwise tile once; where they are more than a tile holds, each column of tiles computes it again.

The depthwise tile must cross over to the layout of the product once a block, not once a tap: layouts do not travel through
loops, so the taps stand in one, even where it runs once (STEPS is an argument, of which the compiler does not know that).

x is read once from memory, its overlaps from L1 and L2; every result is written once, behind the epilogue.
"""

import triton
import triton.language as tl

from .depthwise import add_taps
from .dot import matmul_acc, zero_tile
from .epilogue import apply_affine, finish_rows, load_affine
from .patches import patch_axis, place_of
from .tiles import grouped_tile, tile

__all__ = ["configs", "separable_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; `tiles.fitting` leaves those that suit a problem."""
    return [
        # As wide as the output channels: every column of tiles computes the depthwise part again.
        tile(64, 256, 64, 8, 1, tma=False),
        tile(128, 128, 64, 8, 1, tma=False),
        tile(128, 64, 64, 8, 1, tma=False),
        tile(64, 128, 64, 4, 1, tma=False),
        tile(64, 64, 64, 4, 1, tma=False),
        # Few channels in.
        tile(64, 64, 32, 4, 1, tma=False),
        tile(128, 32, 32, 4, 1, tma=False),
        tile(128, 16, 32, 4, 1, tma=False),
    ]


@triton.jit
def joined(patch):
    """[rows * 4, columns] of the four tiles [rows, columns] of a 2 x 2 patch, in the order of its results."""
    top = tl.join(patch[0], patch[1])
    bottom = tl.join(patch[2], patch[3])
    both = tl.permute(tl.join(top, bottom), (0, 3, 2, 1))
    return tl.reshape(both, (4 * patch[0].shape[0], patch[0].shape[1]))


# Of an argument of 1 the compiler would know the value.
@triton.jit(do_not_specialize=["STEPS"])
def separable_kernel(
    x_ptr, stride_xn, stride_xh,  # channels have stride 1
    # of the depthwise part: [C, taps], dense, and its epilogue
    w1_ptr, bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr,
    w,  # [K, C], dense
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    # sizes; STEPS: R / STEP_R
    N, H, W, K, P, Q, STEPS,
    # geometry
    C: tl.constexpr, STRIDE_XW: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; VEC_X, VEC_K: powers of two up to 16 that divide the image's runtime strides, and K
    VEC_X: tl.constexpr, VEC_K: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
    EPS1: tl.constexpr, ACT1: tl.constexpr, ACT1_A: tl.constexpr, ACT1_B: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STEP_R: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xn = stride_xn // VEC_X * VEC_X
        stride_xh = stride_xh // VEC_X * VEC_X
    if VEC_K > 1:
        K = K // VEC_K * VEC_K
    BLOCK_T: tl.constexpr = BLOCK_M // 4
    across = tl.cdiv(Q, 2)
    down = tl.cdiv(P, 2)
    patches = N * down * across
    tiles_m = tl.cdiv(patches, BLOCK_T)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), GROUP_M)
    # Patches past the end repeat the last one; no one stores their results.
    index = tl.minimum(pid_m * BLOCK_T + tl.arange(0, BLOCK_T), patches - 1)
    n, row, column = place_of(index, down, across)
    _p, h0 = patch_axis(row, 2, STRIDE_H, PAD_H, False)
    _q, w0 = patch_axis(column, 2, STRIDE_W, PAD_W, False)
    filters = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), K - 1)
    if INDEX_64:
        n = n.to(tl.int64)
        filters = filters.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = n * stride_xn + h0.to(n.dtype) * stride_xh + w0.to(n.dtype) * STRIDE_XW
    x_ptrs = x_ptr + (offs_x[:, None] + offs_k[None, :])  # [BLOCK_T, BLOCK_K]
    w_ptrs = w + ((filters * C)[:, None] + offs_k[None, :])  # [BLOCK_N, BLOCK_K]

    acc = zero_tile(y_ptr, BLOCK_M, BLOCK_N)
    for c in tl.range(0, C, BLOCK_K):
        mask_c = None
        if C % BLOCK_K > 0:
            mask_c = offs_k < C - c
        zero = zero_tile(y_ptr, BLOCK_T, BLOCK_K)
        between = (zero, zero, zero, zero)
        for step in tl.range(STEPS):
            rows = step * (STEP_R * DIL_H)
            between = add_taps(
                between, x_ptrs + (c + rows * stride_xh), h0 + rows, w0, index >= 0, w1_ptr, c + offs_k, mask_c,
                step * (STEP_R * S), stride_xh, H, W, STRIDE_XW, STEP_R, S, S, R * S, STRIDE_H, STRIDE_W, DIL_H, DIL_W,
                False, 2, 2,
            )  # fmt: skip
        scale, shift = load_affine(
            c + offs_k, mask_c, bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, EPS1, zero.dtype
        )
        rounded = ()
        for k in tl.static_range(4):
            a = ACT1(apply_affine(between[k], scale, shift, bias1_ptr, mean1_ptr), ACT1_A, ACT1_B)
            if C % BLOCK_K > 0:
                # What the epilogue makes of channels past the end must not meet their weights of zero.
                a = tl.where(mask_c[None, :], a, 0.0)
            rounded = rounded + (a.to(x_ptr.dtype.element_ty),)
        if C % BLOCK_K > 0:
            b = tl.load(w_ptrs + c, mask=mask_c[None, :], other=0.0)
        else:
            b = tl.load(w_ptrs + c)
        acc = matmul_acc(joined(rounded), b.T, acc, PRECISION)

    result = tl.arange(0, BLOCK_M)
    index = pid_m * BLOCK_T + result // 4
    n, row, column = place_of(index, down, across)
    p = row * 2 + result % 4 // 2
    q = column * 2 + result % 2
    mask_m = (index < patches) & (p < P) & (q < Q)
    if INDEX_64:
        n = n.to(tl.int64)
    offs_y = (n * P + p) * Q + q
    if Y_CHANNELS_LAST:
        offs_y = offs_y * K
    else:
        offs_y = offs_y + n * ((K - 1) * P * Q)
    finish_rows(
        acc, offs_y, mask_m, P * Q, 0, pid_n * BLOCK_N, K, K, pid_m, tiles_m, y_ptr, residual_ptr, bias_ptr, mean_ptr,
        var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST,
    )  # fmt: skip
