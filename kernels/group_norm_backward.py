"""Group norm, instance norm and layer norm over channels, backward.

With n the normalized x, v = n * factor + addend + residual, as group_norm.py has it, and g = dy * act'(v):

    dx = (factor * g - mean of (factor * g) - n * mean of (factor * g * n)) / sqrt(var + eps)

with means over a group. The gradients of weight, bias, scale and shift follow from the sums of g and of g * n over the
pixels of each channel and image.

Where a group fits in a tile, group_norm_backward_kernel reads dy and x (and the residual) once, writes dx, and g where that
is the residual's gradient, and stores its tiles' sums. Tiles of pixels (PER_PIXEL) are walked over in slots, so that the
sums are few. Elsewhere dy and x are read twice: group_norm_reduce_kernel makes the sums by slots, as
group_norm_statistics_kernel does, group_norm_means_kernel joins those of a group, and group_norm_input_gradient_kernel
writes dx. group_norm_parameters_kernel adds all sums in a fixed order.
"""

import triton
import triton.language as tl

from . import group_norm
from .batch_norm import locate, zeros
from .epilogue import load_channels
from .group_norm import channels_of, image_of, load_affine, load_statistics, over_groups, places, summed

__all__ = [
    "configs", "group_norm_backward_kernel", "group_norm_input_gradient_kernel", "group_norm_means_kernel",
    "group_norm_parameters_kernel", "group_norm_reduce_kernel",
]  # fmt: skip


def configs() -> list[triton.Config]:
    """Every candidate, as in group_norm: a program holds two tensors."""
    return [config for config in group_norm.configs() if config.kwargs.get("ELEMENTS", 0) <= 16384]


@triton.jit
def load_gradient(
    normalized, dy_ptr, residual_ptr, g_ptr, offsets, mask, factor, addend, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr,
    ACT_B: tl.constexpr,
):  # fmt: skip
    """g of a tile, which is stored where g_ptr asks for it."""
    g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(normalized.dtype)
    if ACT_GRADIENT is not None:
        v = normalized * factor + addend
        if residual_ptr is not None:
            v = v + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(v.dtype)
        g = ACT_GRADIENT(g, v, ACT_A, ACT_B)
    if g_ptr is not None:
        tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
    return g


@triton.jit
def store_sums(sums_ptr, slot, sum_g, sum_gn, offs_c, mask_c, C):
    tl.store(sums_ptr + 2 * slot * C + offs_c, sum_g, mask=mask_c)
    tl.store(sums_ptr + (2 * slot + 1) * C + offs_c, sum_gn, mask=mask_c)


@triton.jit
def tile_gradient(
    block, dy_ptr, x_ptr, dx_ptr, residual_ptr, g_ptr, statistics_ptr, factor, addend, offs_c, mask_c, group,
    PIXELS, C, SIZE, STATISTICS, SHARE,
    EPS: tl.constexpr, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    PER_PIXEL: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store dx of a tile of whole groups; g and g * n, or (not PER_PIXEL) their sums over pixels."""
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = statistics_ptr.dtype.element_ty
    offsets, mask, inside = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    mask = mask & tl.expand_dims(mask_c, axis)
    at = places(block, offs_c, PIXELS, C, SIZE, axis, PER_PIXEL, INDEX_64, BLOCK_P)
    # Beside the tile's groups there are zeros; beside a group's elements dy is 0.
    if PER_PIXEL:
        known = tl.expand_dims(inside, 1 - axis)
    else:
        known = tl.expand_dims(mask_c, axis)
    mean, rest, inverse = load_statistics(statistics_ptr, at, known, STATISTICS, EPS, wide)
    inverse = tl.where(known, inverse, 0.0)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(wide)
    normalized = ((x - mean) - rest) * inverse
    g = load_gradient(
        normalized, dy_ptr, residual_ptr, g_ptr, offsets, mask, factor, addend, ACT_GRADIENT, ACT_A, ACT_B
    )  # fmt: skip
    gn = g * normalized
    sum_g = g
    sum_gn = gn
    if not PER_PIXEL:
        sum_g = tl.sum(g, axis)
        sum_gn = tl.sum(gn, axis)
    if dx_ptr is not None:
        share = tl.full((), SHARE, wide)
        if PER_PIXEL:
            g = g * factor
            level = summed(g, group, axis, PER_PIXEL, BLOCK_G) * share
            slope = summed(g * normalized, group, axis, PER_PIXEL, BLOCK_G) * share
            dx = (g - level - normalized * slope) * inverse
        else:
            # The factor is the same for all pixels.
            level = tl.expand_dims(over_groups(tl.sum(factor, axis) * sum_g, group, BLOCK_G) * share, axis)
            slope = tl.expand_dims(over_groups(tl.sum(factor, axis) * sum_gn, group, BLOCK_G) * share, axis)
            dx = g * (factor * inverse) - level * inverse - normalized * (slope * inverse)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return sum_g, sum_gn


@triton.jit
def group_norm_backward_kernel(
    dy_ptr, x_ptr, dx_ptr,  # (N, C, *spatial), dense in the same format; dx may be None
    residual_ptr, g_ptr,  # likewise, both may be None
    weight_ptr, bias_ptr,  # [C] or None
    scale_ptr, stride_scale, shift_ptr, stride_shift,  # [N, C] or None, and where their rows begin
    statistics_ptr,  # [3, STATISTICS]
    sums_ptr,  # [N, SLOTS, 2, C], or None
    # sizes; RANGE is how many blocks a slot has, SLOTS how many slots a run, SHARE one element's of its group
    RANGE, SLOTS, PIXELS, C, SIZE, STEP, STATISTICS, SHARE: tl.float64,
    # flags; ACT_GRADIENT: None for none
    EPS: tl.constexpr, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    PER_PIXEL: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = tl.cdiv(C, STEP)
    slot = tl.program_id(0) // tiles
    offs_c, mask_c, group = channels_of(tl.program_id(0) % tiles, C, SIZE, STEP, CHANNELS_LAST, VEC, BLOCK_C)
    blocks = tl.cdiv(PIXELS, BLOCK_P)
    start = slot // SLOTS * blocks
    first = start + slot % SLOTS * RANGE
    image = image_of(start, PIXELS, INDEX_64, BLOCK_P)
    factor, addend = load_affine(
        weight_ptr, bias_ptr, scale_ptr, stride_scale, shift_ptr, stride_shift, image, offs_c, mask_c, wide
    )  # fmt: skip
    factor = tl.expand_dims(factor, axis)
    addend = tl.expand_dims(addend, axis)
    if PER_PIXEL:
        sum_g = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
        sum_gn = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
        for block in tl.range(first, tl.minimum(start + blocks, first + RANGE)):
            g, gn = tile_gradient(
                block, dy_ptr, x_ptr, dx_ptr, residual_ptr, g_ptr, statistics_ptr, factor, addend, offs_c, mask_c, group,
                PIXELS, C, SIZE, STATISTICS, SHARE, EPS, ACT_GRADIENT, ACT_A, ACT_B, PER_PIXEL, CHANNELS_LAST, VEC,
                INDEX_64, BLOCK_P, BLOCK_C, BLOCK_G,
            )  # fmt: skip
            sum_g += g
            sum_gn += gn
        sum_g = tl.sum(sum_g, axis)
        sum_gn = tl.sum(sum_gn, axis)
    else:
        # A slot is a block there.
        sum_g, sum_gn = tile_gradient(
            first, dy_ptr, x_ptr, dx_ptr, residual_ptr, g_ptr, statistics_ptr, factor, addend, offs_c, mask_c, group,
            PIXELS, C, SIZE, STATISTICS, SHARE, EPS, ACT_GRADIENT, ACT_A, ACT_B, PER_PIXEL, CHANNELS_LAST, VEC,
            INDEX_64, BLOCK_P, BLOCK_C, BLOCK_G,
        )  # fmt: skip
    if sums_ptr is not None:
        store_sums(sums_ptr, slot, sum_g, sum_gn, offs_c, mask_c, C)


@triton.jit
def group_norm_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, g_ptr,  # (N, C, *spatial), dense in the same format; the last two may be None
    weight_ptr, bias_ptr,  # [C] or None
    scale_ptr, stride_scale, shift_ptr, stride_shift,  # [N, C] or None, and where their rows begin
    statistics_ptr,  # [3, STATISTICS]
    sums_ptr,  # [N, SLOTS, 2, C]
    # sizes; RANGE is how many blocks a slot has, SLOTS how many slots an image
    RANGE, SLOTS, PIXELS, C, SIZE, STATISTICS,
    # flags; ACT_GRADIENT: None for none
    EPS: tl.constexpr, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * n by slots and channels."""
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = sums_ptr.dtype.element_ty
    tiles = tl.cdiv(C, BLOCK_C)
    slot = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    blocks = tl.cdiv(PIXELS, BLOCK_P)
    start = slot // SLOTS * blocks
    first = start + slot % SLOTS * RANGE
    image = image_of(start, PIXELS, INDEX_64, BLOCK_P)
    at = image * (C // SIZE) + offs_c // SIZE
    mean, rest, inverse = load_statistics(statistics_ptr, at, mask_c, STATISTICS, EPS, wide)
    factor, addend = load_affine(
        weight_ptr, bias_ptr, scale_ptr, stride_scale, shift_ptr, stride_shift, image, offs_c, mask_c, wide
    )  # fmt: skip
    # v of the values without their mean, so that a loop's step has one multiplication less.
    factor = tl.expand_dims(factor * inverse, axis)
    addend = tl.expand_dims(addend, axis)
    mean = tl.expand_dims(mean, axis)
    rest = tl.expand_dims(rest, axis)

    sum_g = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    sum_gn = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    for block in tl.range(first, tl.minimum(start + blocks, first + RANGE), num_stages=STAGES):
        offsets, mask, _ = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
        centered = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(wide) - mean) - rest
        g = load_gradient(
            centered, dy_ptr, residual_ptr, g_ptr, offsets, mask, factor, addend, ACT_GRADIENT, ACT_A, ACT_B
        )  # fmt: skip
        sum_g += g
        sum_gn += g * centered
    store_sums(sums_ptr, slot, tl.sum(sum_g, axis), tl.sum(sum_gn, axis) * inverse, offs_c, mask_c, C)


@triton.jit
def group_norm_means_kernel(
    sums_ptr,  # [N, SLOTS, 2, C]
    weight_ptr,  # [C] or None
    scale_ptr, stride_scale,  # [N, C] or None, and where its rows begin
    means_ptr,  # [2, N * groups]
    # sizes; SHARE is one element's of its group, VEC is of rows of channels
    SLOTS, IMAGES, C, SIZE, STEP, SHARE: tl.float64, VEC: tl.constexpr,
    # tiles
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A group's means of factor * g and of factor * g * n; a program owns STEP channels of an image."""
    wide: tl.constexpr = means_ptr.dtype.element_ty
    tiles = tl.cdiv(C, STEP)
    image = tl.program_id(0) // tiles
    C = C // VEC * VEC
    offs_c, mask_c, group = channels_of(tl.program_id(0) % tiles, C, SIZE, STEP, True, VEC, BLOCK_C)
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), wide)
    sum_gn = tl.zeros((BLOCK_S, BLOCK_C), wide)
    for first in tl.range(0, SLOTS, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < SLOTS)[:, None] & mask_c[None, :]
        ptrs = sums_ptr + (2 * (image * SLOTS + offs_s)[:, None] * C + offs_c[None, :])
        sum_g += tl.load(ptrs, mask=mask, other=0.0)
        sum_gn += tl.load(ptrs + C, mask=mask, other=0.0)
    factor, _ = load_affine(weight_ptr, None, scale_ptr, stride_scale, None, 0, image, offs_c, mask_c, wide)
    share = tl.full((), SHARE, wide)
    at = means_ptr + image * (C // SIZE) + offs_c // SIZE
    kept = mask_c & (offs_c % SIZE == 0)
    level = tl.where(mask_c, factor * tl.sum(sum_g, 0), 0.0)
    slope = tl.where(mask_c, factor * tl.sum(sum_gn, 0), 0.0)
    tl.store(at, over_groups(level, group, BLOCK_G) * share, mask=kept)
    tl.store(at + IMAGES * (C // SIZE), over_groups(slope, group, BLOCK_G) * share, mask=kept)


@triton.jit
def group_norm_input_gradient_kernel(
    dy_ptr, x_ptr, dx_ptr,  # (N, C, *spatial), dense in the same format
    weight_ptr, bias_ptr,  # [C] or None
    scale_ptr, stride_scale, shift_ptr, stride_shift,  # [N, C] or None, and where their rows begin
    statistics_ptr, means_ptr,  # [3, STATISTICS], [2, STATISTICS]
    # sizes
    PIXELS, C, SIZE, STATISTICS,
    # flags; ACT_GRADIENT: None where dy is g, as where there is a residual
    EPS: tl.constexpr, ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offsets, mask, _ = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    image = image_of(block, PIXELS, INDEX_64, BLOCK_P)
    at = image * (C // SIZE) + offs_c // SIZE
    mean, rest, inverse = load_statistics(statistics_ptr, at, mask_c, STATISTICS, EPS, wide)
    factor, addend = load_affine(
        weight_ptr, bias_ptr, scale_ptr, stride_scale, shift_ptr, stride_shift, image, offs_c, mask_c, wide
    )  # fmt: skip
    level = tl.expand_dims(load_channels(means_ptr, at, mask_c, wide) * inverse, axis)
    slope = tl.expand_dims(load_channels(means_ptr + STATISTICS, at, mask_c, wide) * inverse * inverse, axis)
    factor = tl.expand_dims(factor * inverse, axis)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(wide)
    centered = (x - tl.expand_dims(mean, axis)) - tl.expand_dims(rest, axis)
    g = load_gradient(
        centered, dy_ptr, None, None, offsets, mask, factor, tl.expand_dims(addend, axis), ACT_GRADIENT, ACT_A, ACT_B
    )  # fmt: skip
    dx = factor * g - level - slope * centered
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_narrow(ptr, values, offs, mask):
    tl.store(ptr + offs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_parameters_kernel(
    sums_ptr,  # [IMAGES, SLOTS, 2, C]
    weight_ptr, bias_ptr,  # [C] or None
    scale_ptr, stride_scale,  # [IMAGES, C] or None, and where its rows begin
    dweight_ptr, dbias_ptr,  # [C] or None
    dscale_ptr, dshift_ptr,  # [IMAGES, C] or None
    # sizes; without scale and shift all slots may belong to one image
    IMAGES, SLOTS, C, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters; a program owns BLOCK_C channels."""
    wide: tl.constexpr = sums_ptr.dtype.element_ty
    C = C // VEC * VEC
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    weight, bias = load_affine(weight_ptr, bias_ptr, None, 0, None, 0, 0, offs_c, mask_c, wide)
    dweight = tl.zeros((BLOCK_C,), wide)
    dbias = tl.zeros((BLOCK_C,), wide)
    for image in tl.range(0, IMAGES):
        sum_g = tl.zeros((BLOCK_S, BLOCK_C), wide)
        sum_gn = tl.zeros((BLOCK_S, BLOCK_C), wide)
        for first in tl.range(0, SLOTS, BLOCK_S):
            offs_s = first + tl.arange(0, BLOCK_S)
            mask = (offs_s < SLOTS)[:, None] & mask_c[None, :]
            ptrs = sums_ptr + (2 * (image * SLOTS + offs_s)[:, None] * C + offs_c[None, :])
            sum_g += tl.load(ptrs, mask=mask, other=0.0)
            sum_gn += tl.load(ptrs + C, mask=mask, other=0.0)
        g = tl.sum(sum_g, 0)
        gn = tl.sum(sum_gn, 0)
        if dshift_ptr is not None:
            store_narrow(dshift_ptr + image * C, g, offs_c, mask_c)
        if dscale_ptr is not None:
            store_narrow(dscale_ptr + image * C, weight * gn + bias * g, offs_c, mask_c)
        if scale_ptr is not None:
            more = 1.0 + load_channels(scale_ptr + image * stride_scale, offs_c, mask_c, wide)
            g = g * more
            gn = gn * more
        dweight += gn
        dbias += g
    if dweight_ptr is not None:
        store_narrow(dweight_ptr, dweight, offs_c, mask_c)
    if dbias_ptr is not None:
        store_narrow(dbias_ptr, dbias, offs_c, mask_c)
