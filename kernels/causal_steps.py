"""Time steps in registers: loads and stores of some neighboring ones, what lies before them, and their weighted sums.

A thread has several steps of a few channels, side by side in memory along time or along channels. What a patch's first
results need from before it comes from the steps before, from a state, or is zero.
"""

import triton
import triton.language as tl

from .patches import halves, levels, taps_tile

__all__ = [
    "convolved",
    "cut",
    "halo",
    "lean_silu",
    "lean_silu_gradient",
    "load_steps",
    "part",
    "plus_state",
    "steps_before",
    "store_steps",
    "taps_of",
    "walks",
]


@triton.jit
def lean_silu(x, a: tl.constexpr, b: tl.constexpr):
    """SiLU in fewer instructions than kernels/activations.py has it, for here they are the limit; 1 / inf is 0."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def lean_silu_gradient(dy, x, a: tl.constexpr, b: tl.constexpr):
    """Its gradient, as torch has it, with one exponential and one division."""
    s = 1.0 / (1.0 + tl.exp(-x))
    return dy * (s * (1.0 + x * (1.0 - s)))


@triton.constexpr_function
def halo(taps):
    """Steps outside a patch that are loaded as one vector: a power of two that holds all taps but one."""
    return 1 << levels(taps - 1)


@triton.constexpr_function
def binary(count, rows, columns):
    return (rows, columns) + (2,) * levels(count)


@triton.jit
def part(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles of a tuple."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (values[FIRST + i],)
    return result


@triton.constexpr_function
def vector(count, bits):
    """Steps of a patch that a thread loads or stores at once: 16 bytes."""
    return min(count, 128 // bits)


@triton.jit
def cut(tile, COUNT: tl.constexpr):
    """COUNT tiles [rows, columns] of one [rows, columns, 2, ..., 2]."""
    parts = (tile,)
    for level in tl.static_range(levels(COUNT)):
        parts = halves(parts, 1 << level)
    return parts


@triton.jit
def joined(parts, COUNT: tl.constexpr):
    """The reverse of `cut`."""
    for level in tl.static_range(levels(COUNT)):
        pairs = ()
        for i in tl.static_range(COUNT >> (level + 1)):
            pairs = pairs + (tl.join(parts[i], parts[i + (COUNT >> (level + 1))]),)
        parts = pairs
    return parts[0]


@triton.jit
def load_steps(
    ptrs, times, T, mask, dtype: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """COUNT time steps, a tile each, from `times` on, where ptrs point; zeros outside [0, T) and outside the mask."""
    if CHANNELS_LAST:
        result = ()
        for i in tl.static_range(COUNT):
            # Unsigned comparison: a negative time is a large number.
            inside = mask & ((times + i).to(tl.uint32) < T)
            result = result + (tl.load(ptrs + i * STRIDE, mask=inside, other=0.0).to(dtype),)
        return result
    else:
        VECTOR: tl.constexpr = vector(COUNT, ptrs.dtype.element_ty.primitive_bitwidth)
        result = ()
        for start in tl.static_range(0, COUNT, VECTOR):
            ahead = start + tl.arange(0, VECTOR)[None, None, :]
            inside = mask[:, :, None] & ((times[:, :, None] + ahead).to(tl.uint32) < T)
            tile = tl.load(ptrs[:, :, None] + ahead, mask=inside, other=0.0).to(dtype)
            result = result + cut(tl.reshape(tile, binary(VECTOR, tile.shape[0], tile.shape[1])), VECTOR)
        return result


@triton.jit
def store_steps(ptrs, values, times, size, mask, STRIDE: tl.constexpr, COUNT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Write COUNT time steps, a tile each, where they are in [0, size); the reverse of `load_steps`."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    if CHANNELS_LAST:
        for i in tl.static_range(COUNT):
            inside = mask & ((times + i).to(tl.uint32) < size)
            tl.store(ptrs + i * STRIDE, values[i].to(dtype), mask=inside)
    else:
        VECTOR: tl.constexpr = vector(COUNT, dtype.primitive_bitwidth)
        for start in tl.static_range(0, COUNT, VECTOR):
            ahead = start + tl.arange(0, VECTOR)[None, None, :]
            inside = mask[:, :, None] & ((times[:, :, None] + ahead).to(tl.uint32) < size)
            tile = joined(part(values, start, VECTOR), VECTOR)
            tile = tl.reshape(tile, (tile.shape[0], tile.shape[1], VECTOR))
            tl.store(ptrs[:, :, None] + ahead, tile.to(dtype), mask=inside)


@triton.jit
def plus_state(before, times, state_ptrs, stride_st, mask, COUNT: tl.constexpr):
    """COUNT time steps from `times` on with those before time 0 taken from the state."""
    result = ()
    for i in tl.static_range(COUNT):
        # Its first step is that of time -COUNT.
        at = times + (i + COUNT)
        inside = mask & ((times + i) < 0)
        state = tl.load(state_ptrs + at * stride_st, mask=inside, other=0.0)
        result = result + (before[i] + state.to(before[i].dtype),)
    return result


@triton.jit
def steps_before(ptrs, times, T, mask, state_ptrs, stride_st, K: tl.constexpr, dtype: tl.constexpr):
    """The K - 1 time steps before each patch of a contiguous tensor."""
    loaded = load_steps(ptrs - halo(K), times - halo(K), T, mask, dtype, 1, halo(K), False)
    result = part(loaded, halo(K) - (K - 1), K - 1)
    if state_ptrs is not None:
        result = plus_state(result, times - (K - 1), state_ptrs, stride_st, mask, K - 1)
    return result


@triton.jit
def taps_of(w, offs_c, mask_c, K: tl.constexpr, dtype: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The filter's K taps, each as channels lie in tiles; w is [D, K], dense."""
    taps = taps_tile(w, offs_c, mask_c, 0, 1, K, K, K, dtype)
    result = ()
    for j in tl.static_range(K):
        result = result + (taps[j] if CHANNELS_LAST else tl.trans(taps[j]),)
    return result


@triton.jit
def convolved(xs, taps, bias, index: tl.constexpr, K: tl.constexpr):
    """The result whose first element is xs[index], before the activation."""
    z = xs[index] * taps[0]
    if bias is not None:
        z += bias
    for j in tl.static_range(1, K):
        z += xs[index + j] * taps[j]
    return z


@triton.jit
def walks(slot, B, T, RANGE, PATCH: tl.constexpr, BLOCK_T: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(sequence, first time step, whether it is there, patches to walk) of each row of a program's tiles."""
    if CHANNELS_LAST:
        line = slot * BLOCK_T + tl.arange(0, BLOCK_T)
        count = tl.cdiv(T, RANGE * PATCH)
        there = line < B * count
        # Rows past the end repeat the last sequence; no one stores their results.
        line = tl.minimum(line, B * count - 1)
        return (line // count)[:, None], (line % count * (RANGE * PATCH))[:, None], there[:, None], RANGE
    else:
        blocks = tl.cdiv(T, PATCH * BLOCK_T)
        count = tl.cdiv(blocks, RANGE)
        block = slot % count * RANGE
        first = (block * BLOCK_T + tl.arange(0, BLOCK_T)) * PATCH
        return slot // count, first[None, :], (first >= 0)[None, :], tl.minimum(RANGE, blocks - block)
