"""Patches of results in registers, and which element of an image reaches which of them: what depthwise kernels share.

Along one axis a patch has results i = 0, 1, ..., and an element's place is counted from the patch's first one:

    forward      place = i * stride + tap * dilation
    transposed   place = (i - tap * dilation) / stride, where that is exact

A patch begins where the first result's window does, or, transposed, where its phase is 0: a patch is whole strides long
then. All of this is arithmetic of constants, done by the compiler.
"""

import triton
import triton.language as tl

__all__ = [
    "BAND", "exists", "first_place", "halves", "last_place", "levels", "locate", "pair", "patch_axis", "patches_before",
    "place_of", "reach", "steps_of", "taps_tile",
]  # fmt: skip


@triton.constexpr_function
def reach(place, result, taps, stride, dilation, transposed):
    """The tap by which an element at `place` reaches `result`; -1 for none."""
    distance = result - place * stride if transposed else place - result * stride
    return distance // dilation if distance % dilation == 0 and 0 <= distance < taps * dilation else -1


@triton.constexpr_function
def exists(place, results, taps, stride, dilation, transposed):
    """Whether an element at `place` reaches any of the patch's results."""
    return any(reach(place, i, taps, stride, dilation, transposed) >= 0 for i in range(results))


@triton.constexpr_function
def pair(row, column):
    """Whether taps were found along both axes."""
    return row >= 0 and column >= 0


@triton.constexpr_function
def first_place(taps, stride, dilation, transposed):
    """The least place that may reach a result."""
    return -((taps - 1) * dilation // stride) if transposed else 0


@triton.constexpr_function
def last_place(results, taps, stride, dilation, transposed):
    """The greatest."""
    return (results - 1) // stride if transposed else (results - 1) * stride + (taps - 1) * dilation


@triton.jit
def patch_axis(index, PATCH: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(first result, first element) of an axis's patch with this index; either may lie before the image."""
    if TRANSPOSED:
        return index * PATCH - PAD % STRIDE, index * (PATCH // STRIDE) + PAD // STRIDE
    return index * PATCH, index * PATCH * STRIDE - PAD


@triton.constexpr_function
def patches_before(pad, stride, transposed):
    """Results that the first patch has before the image."""
    return pad % stride if transposed else 0


@triton.jit
def halves(parts, COUNT: tl.constexpr):
    """COUNT tiles of [rows, 2, ..., 2], each split along the last axis: all first halves, then all second ones."""
    low = ()
    high = ()
    for i in tl.static_range(COUNT):
        a, b = tl.split(parts[i])
        low = low + (a,)
        high = high + (b,)
    return low + high


@triton.constexpr_function
def levels(count):
    """Logarithm of the least power of two that is not below count."""
    return max(count - 1, 0).bit_length()


@triton.constexpr_function
def twos(count, rows):
    return (rows,) + (2,) * levels(count)


@triton.jit
def taps_tile(
    w, filters, mask, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """A tuple of ROWS * COLUMNS weights [1, filters], of which each filter's first is `first`; w is [filters, TAPS] dense.

    They are read in one block along memory, cross over to the threads that need them once, and are cut into columns by
    halves, which costs no instruction: as single elements every thread would read them from L1, dearer than the image.
    """
    COUNT: tl.constexpr = ROWS * COLUMNS
    LEVELS: tl.constexpr = levels(COUNT)
    taps = tl.arange(0, 1 << LEVELS)
    offs = filters.to(tl.int64)[:, None] * TAPS + (first + taps // COLUMNS * S + taps % COLUMNS)[None, :]
    keep = (taps < COUNT)[None, :]
    if mask is not None:
        keep = keep & mask[:, None]
    tile = tl.load(w + offs, mask=keep, other=0.0).to(dtype)
    parts = (tl.reshape(tile, twos(COUNT, tile.shape[0])),)
    for level in tl.static_range(LEVELS):
        parts = halves(parts, 1 << level)
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (parts[i][None, :],)
    return result


# In a channels-last image patches follow each other down bands of so many rows: a program's then lie in a square, and need
# fewer elements around them than in a row.
BAND = tl.constexpr(4)


@triton.jit
def steps_of(planes, down, across, BLOCK_T: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """How many blocks of BLOCK_T patches there are in so many planes of down x across patches."""
    if CHANNELS_LAST:
        return tl.cdiv(planes * down * across, BLOCK_T)
    return planes * down * tl.cdiv(across, BLOCK_T)


@triton.jit
def place_of(index, down, across):
    """(plane, row, column) of patches by their number in a channels-last image."""
    plane = index // (down * across)
    rest = index - plane * (down * across)
    first = rest // (BAND * across) * BAND
    rest -= first * across
    # The last band of a plane may be lower.
    rows = tl.minimum(BAND, down - first)
    column = rest // rows
    return plane, first + rest - column * rows, column


@triton.jit
def locate(step, planes, down, across, BLOCK_T: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(plane, row, column, whether it is there) of the patches of a block.

    In a channels-last image patches of all planes follow each other, so that no lane of a thread block is lost to a width.
    In a contiguous one a block lies within a row, so that the compiler sees that neighbors lie side by side in memory.
    """
    if CHANNELS_LAST:
        index = step * BLOCK_T + tl.arange(0, BLOCK_T)
        there = index < planes * down * across
        # Patches past the end repeat the last one; no one stores their results.
        plane, row, column = place_of(tl.minimum(index, planes * down * across - 1), down, across)
        return plane, row, column, there
    else:
        spans = tl.cdiv(across, BLOCK_T)
        line = step // spans
        column = step % spans * BLOCK_T + tl.arange(0, BLOCK_T)
        return line // down, line % down, column, column < across
