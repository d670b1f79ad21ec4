"""What a Hopper convolution does to its accumulators, as kernels/epilogue.py does for the portable ones.

A tile leaves by columns of SLICE_N through staging buffers of its own: a slice is finished in registers, written to shared
memory, and stored by TMA while the next one is finished, and the last one while the next tile's products run. A residual
comes the same way: a loader puts it where the result will be, as soon as the tile before it has left.
"""

from ..statistics import moments
from .gluon import barrier, fence_async_shared, gl, jit, mbarrier, store_box, store_wait

__all__ = ["SLICE_N", "columns", "finish_tile", "fold_affine", "load_affine"]

# A row of a slice is 128 bytes, the widest that TMA's swizzle takes.
SLICE_N = gl.constexpr(64)


@jit
def load_channels(ptr, first, offs_n, mask_n):
    # What nobody gave is never looked at.
    values = offs_n
    if ptr is not None:
        values = gl.load(ptr + first + offs_n, mask=mask_n, other=0.0).to(gl.float32)
    return values


@jit
def load_affine(first_n, group, K, tensors, BLOCK_N: gl.constexpr):
    """The vectors of bias and batch norm for a tile's columns, (bias, mean, var, gamma, beta), a column a thread.

    They are asked for before the products and used behind them.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    offs_n = first_n + gl.arange(0, BLOCK_N, layout=layout)
    mask_n = offs_n < K
    first = group * K
    bias = load_channels(tensors[0], first, offs_n, mask_n)
    mean = load_channels(tensors[1], first, offs_n, mask_n)
    var = load_channels(tensors[2], first, offs_n, mask_n)
    gamma = load_channels(tensors[3], first, offs_n, mask_n)
    return bias, mean, var, gamma, load_channels(tensors[4], first, offs_n, mask_n)


@jit
def fold_affine(folded, vectors, tensors, EPS: gl.constexpr):
    """Leave (scale, shift) of each column in shared memory, where all threads that need them read them."""
    bias, mean, var, gamma, beta = vectors
    if tensors[1] is not None:
        scale = 1.0 / gl.sqrt(var + EPS)
        if tensors[3] is not None:
            scale = scale * gamma
        shift = -mean
        if tensors[0] is not None:
            shift = shift + bias
        shift = shift * scale
        if tensors[4] is not None:
            shift = shift + beta
        folded[0].store(scale)
        folded[1].store(shift)
    elif tensors[0] is not None:
        folded[1].store(bias)


@jit
def apply_affine(acc, folded, SLICE: gl.constexpr, tensors, layout: gl.constexpr):
    """acc * scale + shift for a slice of columns, as far as there is anything to do."""
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    if tensors[1] is not None:
        acc = acc * folded[0].slice(SLICE * SLICE_N, SLICE_N).load(columns)[None, :]
    if tensors[1] is not None or tensors[0] is not None:
        acc = acc + folded[1].slice(SLICE * SLICE_N, SLICE_N).load(columns)[None, :]
    return acc


@jit
def pixels_inside(y, phase, n, o, p, q, layout: gl.constexpr):
    """Which pixels of a box lie in the phase's tensor, and how many."""
    BOX: gl.constexpr = y[0].block_type.shape
    sizes = y[0].shape
    for i in gl.static_range(1, len(y)):
        if phase == i:
            sizes = y[i].shape
    offs = gl.arange(0, BOX[0] * BOX[1] * BOX[2] * BOX[3], layout=layout)
    inside = (q + offs % BOX[3] < sizes[3]) & (p + offs // BOX[3] % BOX[2] < sizes[2])
    inside = inside & (o + offs // (BOX[3] * BOX[2]) % BOX[1] < sizes[1])
    inside = inside & (n + offs // (BOX[3] * BOX[2] * BOX[1]) < sizes[0])
    # Phases differ by a row or column, so that a box may lie outside of one.
    rows = gl.maximum(gl.minimum(sizes[2] - p, BOX[2]), 0) * gl.maximum(gl.minimum(sizes[3] - q, BOX[3]), 0)
    count = rows * gl.minimum(sizes[0] - n, BOX[0]) * gl.maximum(gl.minimum(sizes[1] - o, BOX[1]), 0)
    return inside, count.to(gl.float32)


@jit
def store_phase(y, phase, coordinates, buffer):
    """Store a box into one of some tensors."""
    for i in gl.static_range(len(y)):
        if phase == i:
            store_box(y[i], coordinates, buffer)


@jit
def finish_slice(acc, SLICE: gl.constexpr, where, tensors, folded, staging, y, here, ACT: gl.constexpr,
                 ACT_A: gl.constexpr, ACT_B: gl.constexpr, SLICES: gl.constexpr):  # fmt: skip
    phase, n, o, p, q, first_n, first_y, K, group, slot, slots, channels, parity = where
    counts_ptr, moments_ptr = tensors[5:]
    buffer = staging.index(SLICE)
    layout: gl.constexpr = acc.type.layout
    acc = apply_affine(acc, folded, SLICE, tensors, layout)
    if moments_ptr is not None:
        offs_n = first_n + SLICE * SLICE_N + gl.arange(0, SLICE_N, layout=gl.SliceLayout(0, layout))
        mask_n = offs_n < K
        offs_n = group * K + offs_n
        mask_m, count = pixels_inside(y, phase, n, o, p, q, gl.SliceLayout(1, layout))
        mean, squares = moments(acc, mask_m[:, None], count, 0)
        slot_64 = slot.to(gl.int64)
        gl.store(moments_ptr + slot_64 * channels + offs_n, mean, mask=mask_n)
        gl.store(moments_ptr + (slots + slot_64) * channels + offs_n, squares, mask=mask_n)
        gl.store(counts_ptr + slot + offs_n * 0, count, mask=mask_n & (offs_n == 0))
    rows = buffer.reshape([acc.shape[0], SLICE_N])
    if here is not None:
        mbarrier.wait(here.index(SLICE), parity)
        acc = acc + rows.load(layout).to(gl.float32)
    else:
        store_wait(SLICES - 1)
        barrier()
    rows.store(ACT(acc, ACT_A, ACT_B).to(buffer.dtype))
    fence_async_shared()
    barrier()
    store_phase(y, phase, [n, o, p, q, first_y + SLICE * SLICE_N], buffer)


@jit
def columns(acc, WIDTH: gl.constexpr):
    """A tile by slices of WIDTH columns, each as products of that width lie in registers: nothing moves."""
    if acc.shape[1] == WIDTH:
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, WIDTH, 16]
        )
        return (gl.convert_layout(acc, layout, assert_trivial=True),)
    else:
        left, right = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute([0, 2, 1]).split()
        return columns(left, WIDTH) + columns(right, WIDTH)


@jit
def finish_tile(acc, where, tensors, folded, staging, y, here, ACT: gl.constexpr, ACT_A: gl.constexpr,
                ACT_B: gl.constexpr):  # fmt: skip
    """Finish a tile and store it."""
    slices = columns(acc, SLICE_N)
    for j in gl.static_range(len(slices)):
        finish_slice(slices[j], j, where, tensors, folded, staging, y, here, ACT, ACT_A, ACT_B, len(slices))
