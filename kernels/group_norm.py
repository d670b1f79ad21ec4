"""Group norm, instance norm and layer norm over channels, forward.

    y = act(((x - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift + residual)

A group is SIZE channels of all pixels of an image, or (PER_PIXEL) all channels of one pixel. A tensor (N, C, *spatial) is
read in tiles as batch_norm.locate has them: BLOCK_P pixels of a run and BLOCK_C channels, channels-last with the channels
side by side, contiguous with the pixels. A run is an image, or the pixels of all images where nothing differs by image.

Where a group fits in a tile, group_norm_kernel reads x (and the residual) once and writes y once. A tile has whole groups:
STEP channels of all pixels, or all channels of some pixels. Sums over a tile's pixels give a number for each channel, which
groups of several channels add up by comparing the numbers of their groups. So a group may have any number of channels, and
rows are read by vectors whatever it is.

Elsewhere x is read twice. group_norm_statistics_kernel reads it in slots, which are parts of an image's pixels: as many as
the GPU needs, however few groups there are. group_norm_combine_kernel joins an image's slots and a group's channels, and
group_norm_normalize_kernel reads x again and writes y.

Statistics are those of differences: of the values from the tile's mean, or from one element of the group where no tile has
it all. A mean is stored in two parts whose sum is precise where one number would be rounded, so that values around a mean
far from zero are normalized as well as others. There are no atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from . import batch_norm
from .batch_norm import join, locate, moved, widened, zeros
from .epilogue import load_channels

__all__ = [
    "configs", "group_norm_combine_kernel", "group_norm_kernel", "group_norm_normalize_kernel", "group_norm_running_kernel",
    "group_norm_statistics_kernel",
]  # fmt: skip

# Rows of the statistics [3, groups]; the mean is the sum of the first two.
MEAN = tl.constexpr(0)
REST = tl.constexpr(1)
VAR = tl.constexpr(2)


def whole(elements: int, warps: int) -> triton.Config:
    """Tiles of whole groups, of so many elements unless a group needs more."""
    return triton.Config(dict(ELEMENTS=elements), num_warps=warps, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for every kernel here and in group_norm_backward that has its keywords."""
    return [
        # Kernels of whole groups: 16 or 32 elements a thread, fewer in fp64, and 64 where groups have no other place.
        whole(2048, 4),
        whole(2048, 8),
        whole(4096, 4),
        whole(4096, 8),
        whole(8192, 8),
        whole(8192, 16),
        whole(16384, 16),
        whole(32768, 16),
        # The others.
        *batch_norm.configs(),
    ]


@triton.jit
def channels_of(tile, C, SIZE, STEP, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """(channels of a tile of STEP, which there are, which of the tile's groups each is in)."""
    offs = tl.arange(0, BLOCK_C)
    group = offs // SIZE
    if CHANNELS_LAST:
        # The compiler proves alignment from products.
        STEP = STEP // VEC * VEC
        C = C // VEC * VEC
    offs_c = tile * STEP + offs
    return offs_c, (offs < STEP) & (offs_c < C), group


@triton.jit
def over_groups(values, group, BLOCK_G: tl.constexpr):
    """For each channel the sum over the channels of its group, of which a tile has BLOCK_G at most; 0: each is a group."""
    result = values
    if BLOCK_G == 1:
        result = tl.zeros(values.shape, values.dtype) + tl.sum(values, 0)
    elif BLOCK_G > 1:
        mine = group[:, None] == tl.arange(0, BLOCK_G)[None, :]
        sums = tl.sum(tl.where(mine, values[:, None], 0.0), 0)
        result = tl.sum(tl.where(mine, sums[None, :], 0.0), 1)
    return result


@triton.jit
def summed(values, group, axis: tl.constexpr, PER_PIXEL: tl.constexpr, BLOCK_G: tl.constexpr):
    """A tile's sums over each group, in a shape that goes with the tile's; `axis` is that of pixels."""
    if PER_PIXEL:
        result = tl.expand_dims(tl.sum(values, 1 - axis), 1 - axis)
    else:
        result = tl.expand_dims(over_groups(tl.sum(values, axis), group, BLOCK_G), axis)
    return result


@triton.jit
def two_parts(mean, more):
    """mean + more as a sum of two numbers, of which the first is the rounded sum."""
    total = mean + more
    return total, (mean - total) + more


@triton.jit
def image_of(block, PIXELS, INDEX_64: tl.constexpr, BLOCK_P: tl.constexpr):
    image = block // tl.cdiv(PIXELS, BLOCK_P)
    if INDEX_64:
        image = image.to(tl.int64)
    return image


@triton.jit
def places(
    block, offs_c, PIXELS, C, SIZE, axis: tl.constexpr, PER_PIXEL: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Where the statistics of a tile's groups stand, in a shape that goes with the tile's."""
    image = image_of(block, PIXELS, INDEX_64, BLOCK_P)
    if PER_PIXEL:
        offs_p = block % tl.cdiv(PIXELS, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
        result = tl.expand_dims(image * PIXELS + offs_p, 1 - axis)
    else:
        result = tl.expand_dims(image * (C // SIZE) + offs_c // SIZE, axis)
    return result


@triton.jit
def load_affine(
    weight_ptr, bias_ptr, scale_ptr, stride_scale, shift_ptr, stride_shift, image, offs_c, mask_c, dtype: tl.constexpr
):  # fmt: skip
    """(factor, addend) of some channels of an image: v = x * factor + addend for normalized x."""
    factor = tl.full(offs_c.shape, 1.0, dtype)
    addend = tl.zeros(offs_c.shape, dtype)
    if weight_ptr is not None:
        factor = load_channels(weight_ptr, offs_c, mask_c, dtype)
    if bias_ptr is not None:
        addend = load_channels(bias_ptr, offs_c, mask_c, dtype)
    if scale_ptr is not None:
        more = 1.0 + load_channels(scale_ptr + image * stride_scale, offs_c, mask_c, dtype)
        factor = factor * more
        addend = addend * more
    if shift_ptr is not None:
        addend = addend + load_channels(shift_ptr + image * stride_shift, offs_c, mask_c, dtype)
    return factor, addend


@triton.jit
def load_statistics(statistics_ptr, at, mask, STATISTICS, EPS: tl.constexpr, dtype: tl.constexpr):
    """(both parts of the mean, 1 / sqrt(var + eps)) of some groups."""
    mean = tl.load(statistics_ptr + MEAN * STATISTICS + at, mask=mask, other=0.0).to(dtype)
    rest = tl.load(statistics_ptr + REST * STATISTICS + at, mask=mask, other=0.0).to(dtype)
    var = tl.load(statistics_ptr + VAR * STATISTICS + at, mask=mask, other=0.0).to(dtype)
    return mean, rest, 1.0 / tl.sqrt(var + EPS)


@triton.jit
def finish(
    normalized, y_ptr, residual_ptr, offsets, mask, factor, addend, ACT: tl.constexpr, ACT_A: tl.constexpr,
    ACT_B: tl.constexpr,
):  # fmt: skip
    """Store act(normalized * factor + addend + residual); the factor may contain 1 / sqrt(var + eps)."""
    v = normalized * factor + addend
    if residual_ptr is not None:
        v = v + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(v.dtype)
    v = ACT(v, ACT_A, ACT_B)
    tl.store(y_ptr + offsets, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def group_norm_kernel(
    x_ptr, residual_ptr, y_ptr,  # (N, C, *spatial), dense in the same format; the residual may be None
    weight_ptr, bias_ptr,  # [C] or None
    scale_ptr, stride_scale, shift_ptr, stride_shift,  # [N, C] or None, and where their rows begin
    statistics_ptr,  # [3, STATISTICS]
    # sizes; SHARE is one element's of its group
    PIXELS, C, SIZE, STEP, STATISTICS, SHARE: tl.float64,
    # flags
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    PER_PIXEL: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = tl.cdiv(C, STEP)
    block = tl.program_id(0) // tiles
    offs_c, mask_c, group = channels_of(tl.program_id(0) % tiles, C, SIZE, STEP, CHANNELS_LAST, VEC, BLOCK_C)
    offsets, mask, inside = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    mask = mask & tl.expand_dims(mask_c, axis)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(wide)

    share = tl.full((), SHARE, wide)
    mean = summed(x, group, axis, PER_PIXEL, BLOCK_G) * share
    x = tl.where(mask, x - mean, 0.0)
    more = summed(x, group, axis, PER_PIXEL, BLOCK_G) * share
    x = tl.where(mask, x - more, 0.0)
    var = summed(x * x, group, axis, PER_PIXEL, BLOCK_G) * share

    at = places(block, offs_c, PIXELS, C, SIZE, axis, PER_PIXEL, INDEX_64, BLOCK_P)
    if PER_PIXEL:
        kept = tl.expand_dims(inside, 1 - axis)
    else:
        # By the first channel of each group.
        kept = tl.expand_dims(mask_c & (offs_c % SIZE == 0), axis)
    mean, rest = two_parts(mean, more)
    tl.store(statistics_ptr + MEAN * STATISTICS + at, mean, mask=kept)
    tl.store(statistics_ptr + REST * STATISTICS + at, rest, mask=kept)
    tl.store(statistics_ptr + VAR * STATISTICS + at, var, mask=kept)

    image = image_of(block, PIXELS, INDEX_64, BLOCK_P)
    factor, addend = load_affine(
        weight_ptr, bias_ptr, scale_ptr, stride_scale, shift_ptr, stride_shift, image, offs_c, mask_c, wide
    )  # fmt: skip
    factor = tl.expand_dims(factor, axis) * (1.0 / tl.sqrt(var + EPS))
    finish(x, y_ptr, residual_ptr, offsets, mask, factor, tl.expand_dims(addend, axis), ACT, ACT_A, ACT_B)


@triton.jit
def first_of_group(x_ptr, image, offs_c, mask_c, PIXELS, C, SIZE, CHANNELS_LAST: tl.constexpr, dtype: tl.constexpr):
    """The first element of each channel's group."""
    first = offs_c // SIZE * SIZE
    if CHANNELS_LAST:
        offsets = image * PIXELS * C + first
    else:
        offsets = (image * C + first) * PIXELS
    return load_channels(x_ptr, offsets, mask_c, dtype)


@triton.jit
def group_norm_statistics_kernel(
    x_ptr,  # (N, C, *spatial), dense
    moments_ptr,  # [2, N, SLOTS, C]
    # sizes; RANGE is how many blocks a slot has, SLOTS how many slots an image
    RANGE, SLOTS, IMAGES, PIXELS, C, SIZE,
    # flags
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Means of what is left of x without its group's first element, and sums of squared deviations, by slots."""
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    wide: tl.constexpr = moments_ptr.dtype.element_ty
    tiles = tl.cdiv(C, BLOCK_C)
    slot = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    blocks = tl.cdiv(PIXELS, BLOCK_P)
    start = slot // SLOTS * blocks
    first = start + slot % SLOTS * RANGE
    image = image_of(start, PIXELS, INDEX_64, BLOCK_P)
    origin = tl.expand_dims(first_of_group(x_ptr, image, offs_c, mask_c, PIXELS, C, SIZE, CHANNELS_LAST, wide), axis)

    count = tl.zeros((BLOCK_P,), wide)
    mean = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    squares = zeros(wide, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    for block in tl.range(first, tl.minimum(start + blocks, first + RANGE), num_stages=STAGES):
        offsets, mask, inside = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(wide) - origin
        count += inside.to(wide)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * tl.expand_dims(1.0 / tl.maximum(count, 1.0), 1 - axis)
        squares += delta * (x - mean)

    _, mean, squares = join(count, mean, squares, axis)
    tl.store(moments_ptr + slot * C + offs_c, mean, mask=mask_c)
    tl.store(moments_ptr + (IMAGES * SLOTS + slot) * C + offs_c, squares, mask=mask_c)


@triton.jit
def group_norm_combine_kernel(
    moments_ptr,  # [2, N, SLOTS, C]
    x_ptr,  # what they were taken of, for the first element of each group
    statistics_ptr,  # [3, N * groups]
    # sizes; LENGTH is how many pixels a slot has, SHARE one channel's of its group
    LENGTH, SLOTS, IMAGES, PIXELS, C, SIZE, STEP, SHARE: tl.float64,
    # flags; VEC is of rows of channels
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Statistics of groups; a program owns STEP channels of an image, which are whole groups."""
    wide: tl.constexpr = statistics_ptr.dtype.element_ty
    tiles = tl.cdiv(C, STEP)
    image = tl.program_id(0) // tiles
    C = C // VEC * VEC
    offs_c, mask_c, group = channels_of(tl.program_id(0) % tiles, C, SIZE, STEP, True, VEC, BLOCK_C)
    count = tl.zeros((BLOCK_S,), wide)
    mean = tl.zeros((BLOCK_S, BLOCK_C), wide)
    squares = tl.zeros((BLOCK_S, BLOCK_C), wide)
    for first in tl.range(0, SLOTS, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < SLOTS)[:, None] & mask_c[None, :]
        ptrs = moments_ptr + ((image * SLOTS + offs_s)[:, None] * C + offs_c[None, :])
        means = tl.load(ptrs, mask=mask, other=0.0)
        more = tl.load(ptrs + IMAGES * SLOTS * C, mask=mask, other=0.0)
        counts = tl.minimum(tl.maximum(PIXELS - offs_s * LENGTH, 0), LENGTH).to(wide)
        total = count + counts
        share = counts / tl.maximum(total, 1.0)
        delta = tl.where(mask, means - mean, 0.0)
        mean += delta * share[:, None]
        squares += more + delta * delta * (count * share)[:, None]
        count = total
    total, mean, squares = join(count, mean, squares, 0)

    # Over the channels of a group, which have as many pixels each.
    share = tl.full((), SHARE, wide)
    squares = tl.where(mask_c, squares, 0.0)
    common = over_groups(tl.where(mask_c, mean, 0.0), group, BLOCK_G) * share
    deviation = tl.where(mask_c, mean - common, 0.0)
    more = over_groups(deviation, group, BLOCK_G) * share
    deviation = tl.where(mask_c, deviation - more, 0.0)
    var = over_groups(squares / total + deviation * deviation, group, BLOCK_G) * share
    if INDEX_64:
        image = image.to(tl.int64)
    origin = first_of_group(x_ptr, image, offs_c, mask_c, PIXELS, C, SIZE, CHANNELS_LAST, wide)
    mean, rest = two_parts(origin, common + more)
    statistics = IMAGES * (C // SIZE)
    at = statistics_ptr + image * (C // SIZE) + offs_c // SIZE
    kept = mask_c & (offs_c % SIZE == 0)
    tl.store(at + MEAN * statistics, mean, mask=kept)
    tl.store(at + REST * statistics, rest, mask=kept)
    tl.store(at + VAR * statistics, var, mask=kept)


@triton.jit
def group_norm_normalize_kernel(
    x_ptr, residual_ptr, y_ptr,  # (N, C, *spatial), dense in the same format; the residual may be None
    weight_ptr, bias_ptr,  # [C] or None
    scale_ptr, stride_scale, shift_ptr, stride_shift,  # [N, C] or None, and where their rows begin
    statistics_ptr,  # [3, STATISTICS]
    # sizes
    PIXELS, C, SIZE, STATISTICS,
    # flags
    EPS: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offsets, mask, _ = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    x = widened(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    image = image_of(block, PIXELS, INDEX_64, BLOCK_P)
    at = image * (C // SIZE) + offs_c // SIZE
    mean, rest, inverse = load_statistics(statistics_ptr, at, mask_c, STATISTICS, EPS, x.dtype)
    factor, addend = load_affine(
        weight_ptr, bias_ptr, scale_ptr, stride_scale, shift_ptr, stride_shift, image, offs_c, mask_c, x.dtype
    )  # fmt: skip
    x = (x - tl.expand_dims(mean, axis)) - tl.expand_dims(rest, axis)
    factor = tl.expand_dims(factor * inverse, axis)
    finish(x, y_ptr, residual_ptr, offsets, mask, factor, tl.expand_dims(addend, axis), ACT, ACT_A, ACT_B)


@triton.jit
def group_norm_running_kernel(
    statistics_ptr,  # [3, N, C]
    running_mean_ptr, running_var_ptr,  # [C], updated in place; None: not kept
    # sizes, and n / (n - 1) of n pixels; a Python number would come as fp32
    IMAGES, C, unbiased: tl.float64, momentum: tl.float64, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Move the running statistics of an instance norm towards the mean of the images' statistics."""
    offs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs < C
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float64)
    var = tl.zeros((BLOCK_N, BLOCK_C), tl.float64)
    for first in tl.range(0, IMAGES, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask = (offs_n < IMAGES)[:, None] & mask_c[None, :]
        ptrs = statistics_ptr + (offs_n[:, None] * C + offs[None, :])
        rows = IMAGES * C
        mean += tl.load(ptrs + MEAN * rows, mask=mask, other=0.0).to(tl.float64)
        mean += tl.load(ptrs + REST * rows, mask=mask, other=0.0).to(tl.float64)
        var += tl.load(ptrs + VAR * rows, mask=mask, other=0.0).to(tl.float64)
    if running_mean_ptr is not None:
        moved(running_mean_ptr, tl.sum(mean, 0) / IMAGES, offs, mask_c, momentum)
    if running_var_ptr is not None:
        moved(running_var_ptr, tl.sum(var, 0) / IMAGES * unbiased, offs, mask_c, momentum)
