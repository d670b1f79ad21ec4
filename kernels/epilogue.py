"""What every convolution does to its accumulators before its only store.

    y = act(bn(acc + bias) + residual),   bn(v) = (v - mean) * gamma / sqrt(var + eps) + beta

in fp32 (fp64 for fp64), or, where a batch norm needs the batch's own statistics first,

    y = acc + bias   and, for each tile of pixels, their number, each channel's mean and sum of squared deviations

from the accumulators before they are rounded, so that no pass over y is needed for them. A global average behind it all
takes each image's sums of y from the same tile, and where nobody else reads y it is not written at all.

A batch norm in eval mode is folded here, per output channel, from its own tensors: weights are never rounded with a scale
in them, nothing is cached on the host that an optimizer, a moving average or a checkpoint could make stale, and the cost is
four BLOCK_N vectors a tile.
"""

import triton
import triton.language as tl

from .statistics import moments

__all__ = ["apply_affine", "finish_rows", "finish_tile", "load_affine"]

# Columns of a slice: a whole wide tile's residual, offsets and per-channel vectors beside its accumulators would spill.
SLICE_N = tl.constexpr(32)


@triton.constexpr_function
def magnitude(n):
    return abs(n)


@triton.jit
def load_channels(ptr, offs_n, mask_n, dtype: tl.constexpr):
    if mask_n is None:
        values = tl.load(ptr + offs_n)
    else:
        values = tl.load(ptr + offs_n, mask=mask_n, other=0.0)
    return values.to(dtype)


@triton.jit
def load_affine(
    offs_n, mask_n, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """(scale, shift) of some channels, into which bias and batch norm are folded, for `apply_affine`."""
    scale = tl.full(offs_n.shape, 1.0, dtype)
    shift = tl.zeros(offs_n.shape, dtype)
    if mean_ptr is not None:
        scale = 1.0 / tl.sqrt(load_channels(var_ptr, offs_n, mask_n, dtype) + EPS)
        if gamma_ptr is not None:
            scale = scale * load_channels(gamma_ptr, offs_n, mask_n, dtype)
        shift = -load_channels(mean_ptr, offs_n, mask_n, dtype)
        if bias_ptr is not None:
            shift = shift + load_channels(bias_ptr, offs_n, mask_n, dtype)
        shift = shift * scale
        if beta_ptr is not None:
            shift = shift + load_channels(beta_ptr, offs_n, mask_n, dtype)
    elif bias_ptr is not None:
        shift = load_channels(bias_ptr, offs_n, mask_n, dtype)
    return scale, shift


@triton.jit
def apply_affine(acc, scale, shift, bias_ptr, mean_ptr):
    """acc * scale + shift, [rows, channels], as far as the pointers say that there is anything to do."""
    if mean_ptr is not None:
        acc = acc * scale[None, :] + shift[None, :]
    elif bias_ptr is not None:
        acc = acc + shift[None, :]
    return acc


@triton.jit
def finish_slice(acc, first_n, where, tensors, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
                 ACT_B: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr):  # fmt: skip
    rows, stride_c, mask_m, images, group, K, channels, slot, slots, patches = where
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr = tensors
    offs_n = first_n + tl.arange(0, acc.shape[1])
    mask_n = offs_n < K
    if patches is None:
        offs_n = group * K + offs_n
        ahead = offs_n if Y_CHANNELS_LAST else offs_n * stride_c
    else:
        R, S, P, Q, tiles_m = patches
        tap = offs_n // channels
        # Not the remainder, whose alignment the compiler cannot prove.
        offs_n = offs_n - tap * channels
        pixel = ((tap // (R * S) * P + tap // S % R) * Q + tap % S).to(rows.dtype)
        ahead = pixel * channels + offs_n if Y_CHANNELS_LAST else offs_n.to(rows.dtype) * stride_c + pixel
        slot = slot + tap * tiles_m
    scale, shift = load_affine(offs_n, mask_n, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, EPS, acc.dtype)
    acc = apply_affine(acc, scale, shift, bias_ptr, mean_ptr)
    if moments_ptr is not None and POOL == 0:
        count = tl.sum(mask_m.to(acc.dtype))
        mean, squares = moments(acc, mask_m[:, None], count, 0)
        slot_64 = slot.to(tl.int64)
        tl.store(moments_ptr + slot_64 * channels + offs_n, mean, mask=mask_n)
        tl.store(moments_ptr + (slots + slot_64) * channels + offs_n, squares, mask=mask_n)
        tl.store(counts_ptr + slot + tl.zeros_like(offs_n), count, mask=mask_n & (offs_n == 0))
    if Y_CHANNELS_LAST:
        offs_y = rows[:, None] + ahead[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
    else:
        # Neighboring threads take neighboring pixels, which lie side by side in memory.
        acc = tl.trans(acc)
        offs_y = rows[None, :] + ahead[:, None]
        mask = mask_n[:, None] & mask_m[None, :]
    if residual_ptr is not None:
        acc = acc + tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(acc.dtype)
    acc = ACT(acc, ACT_A, ACT_B)
    axis: tl.constexpr = 0 if Y_CHANNELS_LAST else 1
    for i in tl.static_range(magnitude(POOL)):
        total = tl.sum(tl.where(tl.expand_dims(mask_m & (images == i), 1 - axis), acc, 0.0), axis)
        row = slot.to(tl.int64) * magnitude(POOL) + i
        tl.store(moments_ptr + row * channels + offs_n, total, mask=mask_n)
    if POOL >= 0:
        tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns."""
    pairs = tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1))
    return tl.split(pairs)


# Triton has no recursion: each width has its own function, and the widest calls all.
@triton.jit
def finish_2(acc, first_n, where, tensors, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
             ACT_B: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr):  # fmt: skip
    if acc.shape[1] <= SLICE_N:
        finish_slice(acc, first_n, where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)
    else:
        left, right = halves(acc)
        finish_slice(left, first_n, where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)
        finish_slice(right, first_n + left.shape[1], where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)


@triton.jit
def finish_4(acc, first_n, where, tensors, EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
             ACT_B: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr):  # fmt: skip
    if acc.shape[1] <= 2 * SLICE_N:
        finish_2(acc, first_n, where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)
    else:
        left, right = halves(acc)
        finish_2(left, first_n, where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)
        finish_2(right, first_n + left.shape[1], where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)


@triton.jit
def finish_rows(
    acc,  # [BLOCK_M, BLOCK_N]
    rows, mask_m, pixels,  # each pixel's first channel in the output, which pixels there are, and how many in an image
    group, first_n, K, channels,  # the tile's group and first column, channels of a group and of the output
    slot, slots,  # where its statistics go
    y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr,
    patches=None,  # where columns are filter taps x channels: (R, S, P, Q, rows of tiles); each tap has slots of its own
    images=None, POOL: tl.constexpr = 0,  # as finish_tile has POOL; which of a tile's images a pixel is of
):  # fmt: skip
    """Apply the epilogue to one tile of pixels and store it into a dense output, channels-last or contiguous.

    The residual has the output's layout. Each element of it is read once and each output written once. Statistics, where
    there are pointers for them, are counts [slots] and moments [2, slots, channels], as kernels/statistics.py has them.
    """
    where = (rows, pixels, mask_m, images, group, K, channels, slot, slots, patches)
    tensors = (y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr)
    if acc.shape[1] <= 4 * SLICE_N:
        finish_4(acc, first_n, where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)
    else:
        left, right = halves(acc)
        finish_4(left, first_n, where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)
        finish_4(right, first_n + left.shape[1], where, tensors, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, POOL)


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N]
    offs_m, M, pixels,  # output pixels, how many there are, and how many in an image
    group, first_n, K, channels,  # as finish_rows has them
    stride_y,  # from a pixel to the next where y is some channels of a wider channels-last tensor, else None
    slot, slots, y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """`finish_rows` for consecutive pixels.

    POOL: so many images a tile may have pixels of, whose sums go to moments [slots * POOL, channels] instead of
    statistics; negative: likewise, and nothing to y, whose type alone counts.
    """
    mask_m = offs_m < M
    images = None
    if POOL != 0:
        images = offs_m // pixels - slot * acc.shape[0] // pixels
    if INDEX_64:
        offs_m = offs_m.to(tl.int64)
    if Y_CHANNELS_LAST:
        rows = offs_m * (channels if stride_y is None else stride_y)
    else:
        rows = offs_m // pixels * channels * pixels + offs_m % pixels
    finish_rows(
        acc, rows, mask_m, pixels, group, first_n, K, channels, slot, slots, y_ptr, residual_ptr, bias_ptr, mean_ptr,
        var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr, EPS, ACT, ACT_A, ACT_B, Y_CHANNELS_LAST, None, images, POOL,
    )  # fmt: skip
