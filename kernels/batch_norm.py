"""Batch norm, forward: a batch's statistics, their union over slots, running statistics, and the normalization.

A tensor (N, C, *spatial) is read in tiles of pixels and channels. Channels-last, the pixels of all images are one run, with
their channels side by side; contiguous, each image is a run of its own, one plane a channel. A block is BLOCK_P pixels of
one run, so that only a run's last block is ragged, and no pixel's place needs a division.

batch_norm_statistics_kernel reads z once: a program owns BLOCK_C channels and a range of the blocks, which is a slot. Every
place of its tile keeps a mean and a sum of squared deviations of its own by Welford's update, so that the loop has no
reduction; places are joined at its end, slots by batch_norm_combine_kernel, in the same way. batch_norm_normalize_kernel
reads z (and the residual) once and writes y once, a tile a program. There are no atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from .epilogue import load_channels

__all__ = [
    "batch_norm_combine_kernel", "batch_norm_normalize_kernel", "batch_norm_running_kernel", "batch_norm_statistics_kernel",
    "configs",
]  # fmt: skip


def tile(pixels: int, channels: int, stages: int) -> triton.Config:
    return triton.Config(dict(BLOCK_P=pixels, BLOCK_C=channels), num_warps=4, num_stages=stages)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for every kernel here and in batch_norm_backward, and for both memory formats."""
    return [
        # Kernels that walk: 16 elements a thread, the next blocks' loads in flight.
        tile(32, 64, 3),
        tile(64, 32, 3),
        tile(128, 16, 3),
        tile(512, 4, 3),
        # Kernels of one tile a program: 32 elements a thread, for a channel's numbers are read once a tile.
        tile(64, 64, 1),
        tile(128, 32, 1),
        tile(256, 16, 1),
        tile(1024, 4, 1),
    ]


@triton.jit
def locate(
    block, offs_c, PIXELS, C, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_P: tl.constexpr, stride_p=None,
):  # fmt: skip
    """Offsets and mask of a block's tile, [BLOCK_P, channels] channels-last and [channels, BLOCK_P] contiguous.

    Also which of the block's pixels there are. VEC is a power of two up to 16 that divides what lies side by side; stride_p
    is where the next pixel of a channels-last tensor begins, if not behind C channels.
    """
    blocks = tl.cdiv(PIXELS, BLOCK_P)
    run = block // blocks
    offs_p = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    if INDEX_64:
        run = run.to(tl.int64)
        offs_p = offs_p.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if CHANNELS_LAST:
        C = C // VEC * VEC
        if stride_p is None:
            stride_p = C
        else:
            stride_p = stride_p // VEC * VEC
        inside = offs_p < PIXELS
        offsets = (run * PIXELS + offs_p)[:, None] * stride_p + offs_c[None, :]
        mask = inside[:, None] & (offs_c < C)[None, :]
    else:
        PIXELS = PIXELS // VEC * VEC
        inside = offs_p < PIXELS
        offsets = (run * C + offs_c)[:, None] * PIXELS + offs_p[None, :]
        mask = (offs_c < C)[:, None] & inside[None, :]
    return offsets, mask, inside


@triton.jit
def zeros(dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile as `locate` has them."""
    if CHANNELS_LAST:
        result = tl.zeros((BLOCK_P, BLOCK_C), dtype)
    else:
        result = tl.zeros((BLOCK_C, BLOCK_P), dtype)
    return result


@triton.jit
def widened(values):
    """The type that is computed in: fp64 stays, all else becomes fp32."""
    if values.dtype == tl.float64:
        result = values
    else:
        result = values.to(tl.float32)
    return result


@triton.jit
def join(counts, means, squares, axis: tl.constexpr):
    """Count, mean and sum of squared deviations of the union along an axis; empty parts do not count.

    The mean is taken in two steps, for the sum of means far from zero is rounded much more than their differences.
    """
    total = tl.sum(counts, 0)
    counts = tl.expand_dims(counts, 1 - axis)
    size = tl.maximum(total, 1.0)
    mean = tl.sum(counts * means, axis) / size
    deviation = means - tl.expand_dims(mean, axis)
    rest = tl.sum(counts * deviation, axis) / size
    return total, mean + rest, tl.sum(squares + counts * deviation * deviation, axis) - total * rest * rest


@triton.jit
def channel_scale(var_ptr, weight_ptr, offs_c, mask_c, EPS: tl.constexpr, dtype: tl.constexpr):
    """weight / sqrt(var + eps)"""
    scale = 1.0 / tl.sqrt(load_channels(var_ptr, offs_c, mask_c, dtype) + EPS)
    if weight_ptr is not None:
        scale = scale * load_channels(weight_ptr, offs_c, mask_c, dtype)
    return scale


@triton.jit
def batch_norm_statistics_kernel(
    z_ptr,  # (N, C, *spatial), dense
    counts_ptr, moments_ptr,  # [SLOTS], [2, SLOTS, C]
    # sizes; RANGE is how many of the BLOCKS a slot has
    SLOTS, RANGE, BLOCKS, PIXELS, C,
    # flags
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = moments_ptr.dtype.element_ty
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    slot = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)

    count = tl.zeros((BLOCK_P,), wide)
    mean = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    squares = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    for block in tl.range(slot * RANGE, tl.minimum(BLOCKS, slot * RANGE + RANGE), num_stages=STAGES):
        offsets, mask, inside = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(wide)
        count += inside.to(wide)
        delta = tl.where(mask, z - mean, 0.0)
        mean += delta * tl.expand_dims(1.0 / tl.maximum(count, 1.0), 1 - axis)
        squares += delta * (z - mean)

    total, mean, squares = join(count, mean, squares, axis)
    mask_c = offs_c < C
    tl.store(moments_ptr + slot * C + offs_c, mean, mask=mask_c)
    tl.store(moments_ptr + (SLOTS + slot) * C + offs_c, squares, mask=mask_c)
    tl.store(counts_ptr + slot, total, mask=tl.program_id(0) % tiles == 0)


@triton.jit
def batch_norm_combine_kernel(
    counts_ptr, moments_ptr,  # [SLOTS], [2, SLOTS, C]
    mean_ptr, var_ptr, count_ptr,  # [C], [C], [1]
    SLOTS, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance and count of the union of all slots; a program owns BLOCK_C channels."""
    wide: tl.constexpr = mean_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    count = tl.zeros((BLOCK_S,), wide)
    mean = tl.zeros((BLOCK_S, BLOCK_C), wide)
    squares = tl.zeros((BLOCK_S, BLOCK_C), wide)
    for first in tl.range(0, SLOTS, BLOCK_S, num_stages=STAGES):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < SLOTS)[:, None] & mask_c[None, :]
        ptrs = moments_ptr + (offs_s[:, None] * C + offs_c[None, :])
        means = tl.load(ptrs, mask=mask, other=0.0)
        more = tl.load(ptrs + SLOTS * C, mask=mask, other=0.0)
        counts = tl.load(counts_ptr + offs_s, mask=offs_s < SLOTS, other=0.0)
        total = count + counts
        share = counts / tl.maximum(total, 1.0)
        # What an empty slot holds is not used, for it may be NaN.
        filled = (counts > 0.0)[:, None]
        delta = tl.where(filled, means - mean, 0.0)
        mean += delta * share[:, None]
        squares += tl.where(filled, more, 0.0) + delta * delta * (count * share)[:, None]
        count = total
    total, mean, squares = join(count, mean, squares, 0)
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(var_ptr + offs_c, squares / tl.maximum(total, 1.0), mask=mask_c)
    tl.store(count_ptr, total, mask=tl.program_id(0) == 0)


@triton.jit
def moved(running_ptr, value, offs, mask, momentum):
    """Move a running statistic towards the batch's."""
    running = tl.load(running_ptr + offs, mask=mask, other=0.0).to(tl.float64)
    running = (1.0 - momentum) * running + momentum * value
    if running_ptr.dtype.element_ty != tl.float64:
        # The interpreter turns fp64 into bf16 by way of fp32 alone.
        running = running.to(tl.float32)
    tl.store(running_ptr + offs, running.to(running_ptr.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_running_kernel(
    mean_ptr, var_ptr, count_ptr,  # of the batch: [C], [C], [1]
    running_mean_ptr, running_var_ptr,  # [C], updated in place; None: not kept
    # a Python number would come as fp32
    C, momentum: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < C
    if running_mean_ptr is not None:
        mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        moved(running_mean_ptr, mean, offs, mask, momentum)
    if running_var_ptr is not None:
        count = tl.load(count_ptr).to(tl.float64)
        var = tl.load(var_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        moved(running_var_ptr, var * (count / (count - 1.0)), offs, mask, momentum)


@triton.jit
def batch_norm_normalize_kernel(
    z_ptr, residual_ptr, y_ptr,  # (N, C, *spatial), dense in the same format, but for z's pixels; residual_ptr may be None
    mean_ptr, var_ptr, weight_ptr, bias_ptr,  # [C]; the last two may be None
    # sizes; stride_z: from a pixel of z to the next, where z is some channels of a wider channels-last tensor, else None
    PIXELS, C, stride_z,
    # flags
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((z - mean) * weight / sqrt(var + eps) + bias + residual)"""
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offsets, mask, _ = locate(tl.program_id(0) // tiles, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    offs_z = offsets
    if stride_z is not None:
        offs_z, _, _ = locate(tl.program_id(0) // tiles, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P, stride_z)
    v = widened(tl.load(z_ptr + offs_z, mask=mask, other=0.0))
    v = v - tl.expand_dims(load_channels(mean_ptr, offs_c, mask_c, v.dtype), axis)
    v = v * tl.expand_dims(channel_scale(var_ptr, weight_ptr, offs_c, mask_c, EPS, v.dtype), axis)
    if bias_ptr is not None:
        v = v + tl.expand_dims(load_channels(bias_ptr, offs_c, mask_c, v.dtype), axis)
    if residual_ptr is not None:
        v = v + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(v.dtype)
    v = ACT(v, ACT_A, ACT_B)
    tl.store(y_ptr + offsets, v.to(y_ptr.dtype.element_ty), mask=mask)
