"""Batch norm, backward: sums over the batch, the table of a channel's numbers, and the input's gradient.

With g = dy * act'(v), v = (z - mean) * scale + bias + residual, as batch_norm_normalize_kernel has it, the sums of g and of
g * (z - mean) over all pixels are all that a channel's gradients need beside dy and z.

batch_norm_reduce_kernel reads dy and z (and the residual) once, in tiles and slots as batch_norm_statistics_kernel does,
and may write g, which is the residual's gradient. batch_norm_add_kernel adds the slots in a fixed order,
batch_norm_table_kernel makes the table of `statistics.input_gradient` and the gradients of weight and bias, and
batch_norm_input_gradient_kernel reads dy (or g) and z once and writes dz once, a tile a program.
"""

import triton
import triton.language as tl

from .batch_norm import channel_scale, configs, locate, zeros
from .epilogue import load_channels
from .statistics import BETA, MEAN, OFFSET, SCALE, SLOPE, input_gradient, load_table

__all__ = [
    "batch_norm_add_kernel", "batch_norm_input_gradient_kernel", "batch_norm_reduce_kernel", "batch_norm_table_kernel",
    "configs",
]  # fmt: skip


@triton.jit
def batch_norm_reduce_kernel(
    dy_ptr, z_ptr, residual_ptr, g_ptr,  # (N, C, *spatial), dense in the same format; the last two may be None
    mean_ptr, var_ptr, weight_ptr, bias_ptr,  # [C]; the last two may be None
    sums_ptr,  # [SLOTS, 2, C]
    # sizes; RANGE is how many of the BLOCKS a slot has
    RANGE, BLOCKS, PIXELS, C,
    # flags; ACT_GRADIENT: None for none
    EPS: tl.constexpr, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = sums_ptr.dtype.element_ty
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    slot = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.expand_dims(load_channels(mean_ptr, offs_c, mask_c, wide), axis)
    if ACT_GRADIENT is not None:
        scale = tl.expand_dims(channel_scale(var_ptr, weight_ptr, offs_c, mask_c, EPS, wide), axis)
        if bias_ptr is not None:
            bias = tl.expand_dims(load_channels(bias_ptr, offs_c, mask_c, wide), axis)

    sum_g = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    sum_gz = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    for block in tl.range(slot * RANGE, tl.minimum(BLOCKS, slot * RANGE + RANGE), num_stages=STAGES):
        offsets, mask, _ = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
        g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(wide)
        centered = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(wide) - mean
        if ACT_GRADIENT is not None:
            v = centered * scale
            if bias_ptr is not None:
                v = v + bias
            if residual_ptr is not None:
                v = v + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(wide)
            g = ACT_GRADIENT(g, v, ACT_A, ACT_B)
        if g_ptr is not None:
            tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
        sum_g += g
        sum_gz += g * centered

    tl.store(sums_ptr + 2 * slot * C + offs_c, tl.sum(sum_g, axis), mask=mask_c)
    tl.store(sums_ptr + (2 * slot + 1) * C + offs_c, tl.sum(sum_gz, axis), mask=mask_c)


@triton.jit
def batch_norm_add_kernel(
    parts_ptr, sums_ptr,  # [SLOTS, SIZE], [SIZE]
    SLOTS, SIZE, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the slots in a fixed order; a program owns BLOCK_C sums."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), sums_ptr.dtype.element_ty)
    for first in tl.range(0, SLOTS, BLOCK_S, num_stages=STAGES):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < SLOTS)[:, None] & (offs_c < SIZE)[None, :]
        total += tl.load(parts_ptr + (offs_s[:, None] * SIZE + offs_c[None, :]), mask=mask, other=0.0)
    tl.store(sums_ptr + offs_c, tl.sum(total, 0), mask=offs_c < SIZE)


@triton.jit
def batch_norm_table_kernel(
    sums_ptr, count_ptr,  # [2, C], [1] over all that was normalized together; None in eval mode
    local_ptr,  # [2, C], the sums over this process's pixels alone
    mean_ptr, var_ptr, weight_ptr, bias_ptr,  # [C]; the last two may be None
    table_ptr,  # [5, C], rows as in statistics.py
    dweight_ptr, dbias_ptr,  # [C] or None
    C, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = table_ptr.dtype.element_ty
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < C
    mean = load_channels(mean_ptr, offs, mask, wide)
    scale = channel_scale(var_ptr, weight_ptr, offs, mask, EPS, wide)
    beta = tl.zeros((BLOCK,), wide)
    if bias_ptr is not None:
        beta += load_channels(bias_ptr, offs, mask, wide)
    slope = tl.zeros((BLOCK,), wide)
    offset = tl.zeros((BLOCK,), wide)
    var = load_channels(var_ptr, offs, mask, wide) + EPS
    if sums_ptr is not None:
        count = tl.load(count_ptr).to(wide)
        slope -= scale / var * (tl.load(sums_ptr + C + offs, mask=mask, other=0.0) / count)
        offset -= scale * (tl.load(sums_ptr + offs, mask=mask, other=0.0) / count)
    tl.store(table_ptr + MEAN * C + offs, mean, mask=mask)
    tl.store(table_ptr + SCALE * C + offs, scale, mask=mask)
    tl.store(table_ptr + BETA * C + offs, beta, mask=mask)
    tl.store(table_ptr + SLOPE * C + offs, slope, mask=mask)
    tl.store(table_ptr + OFFSET * C + offs, offset, mask=mask)
    if dweight_ptr is not None:
        dweight = tl.load(local_ptr + C + offs, mask=mask, other=0.0) / tl.sqrt(var)
        tl.store(dweight_ptr + offs, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        dbias = tl.load(local_ptr + offs, mask=mask, other=0.0)
        tl.store(dbias_ptr + offs, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_input_gradient_kernel(
    dy_ptr, z_ptr, dz_ptr,  # (N, C, *spatial), dense in the same format
    table_ptr,  # [5, C]
    # sizes
    PIXELS, C,
    # flags; SLOPED: whether the statistics are the batch's own
    SLOPED: tl.constexpr, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, mask, _ = locate(tl.program_id(0) // tiles, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
    table = load_table(table_ptr, offs_c, offs_c < C, C, axis, SLOPED, ACT_GRADIENT)
    dz = input_gradient(dy, z, table, SLOPED, ACT_GRADIENT, ACT_A, ACT_B)
    tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
