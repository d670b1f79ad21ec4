"""Short causal depthwise convolution over time, its gradients in one pass, and its step for decoding.

    y[b, d, t] = act(bias[d] + sum over j < K of w[d, j] * x[b, d, t - (K - 1) + j])

    forward    x once in, y once out
    backward   x and dy once in, dx once out: z, what the activation was given, is computed again and never stored
    update     one launch a step: state and x in, state and y out

Before the first time step are zeros, or K - 1 steps of a state. A thread holds PATCH time steps in registers, one tile
each, so that an element is loaded and converted once and feeds all K results that it reaches.

channels-last   tiles are [BLOCK_T, BLOCK_C], some neighboring channels a thread. Each row of a tile walks RANGE patches of
                one sequence, and carries the last K - 1 steps along in registers: nothing is loaded or computed twice but
                at the ends of a walk.
contiguous      tiles are [BLOCK_C, BLOCK_T], and a thread's patch lies side by side in memory: it is loaded as vectors,
                which are cut into time steps by halves, without an instruction. Neighboring threads have neighboring
                patches; what reaches into a patch from outside is loaded, and in the backward pass computed, again.

Sums of the weight's and the bias's gradient stay in registers for the whole walk, in fp32 (fp64 for fp64), then go to a
slot of their own, as those of kernels/depthwise_wgrad.py do, whose second kernel adds the slots in a fixed order: no
atomics.
"""

import triton
import triton.language as tl

from .causal_steps import (
    convolved,
    halo,
    lean_silu,
    lean_silu_gradient,
    load_steps,
    part,
    plus_state,
    steps_before,
    store_steps,
    taps_of,
    walks,
)
from .masks import both

__all__ = [
    "LONGEST", "causal_backward_kernel", "causal_forward_kernel", "causal_update_kernel", "configs", "fitting",
    "lean_silu", "lean_silu_gradient",
]  # fmt: skip

# Taps that are unrolled; the windows of more would not stay in registers.
LONGEST = 8


def config(warps: int = 4, **constants: int) -> triton.Config:
    return triton.Config(constants, num_warps=warps, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate, in three families.

    WALK and BACK are time steps of a channels-last patch, forward and backward, PATCH those of a contiguous one; BYTES are
    those of a thread's neighboring channels.
    """
    return [
        # Loads of a patch are in flight together: 8 of 16 bytes each.
        config(WALK=8),
        # Fewer registers: more threads in their place.
        config(WALK=4),
        # Windows and each tap's sums take registers for the whole walk: 4 channels a thread leave twice the threads of 8.
        config(BACK=4, BYTES=8),
        config(BACK=8, BYTES=8),
        # Vectors of 16 bytes; of 16 bits 4 time steps of them spill.
        config(BACK=2, BYTES=16),
        # A longer patch computes less of its neighbors again.
        config(PATCH=16),
        # Short sequences, and fp64.
        config(PATCH=8),
    ]


def fitting(*, channels_last: bool, backward: bool, taps: int, itemsize: int) -> list[triton.Config]:
    """The candidates for this layout and element size, the best one first: the one statement of what is valid."""
    family = ("BACK" if backward else "WALK") if channels_last else "PATCH"
    kept = []
    for one in configs():
        if family not in one.kwargs:
            continue
        if family == "BACK":
            channels = one.kwargs["BYTES"] // itemsize
            # Registers: windows, taps and sums are as many tiles as there are taps.
            if channels < 1 or channels * taps > 32 or (taps > 4 and one.kwargs["BACK"] > 4):
                continue
        if family == "PATCH" and backward and one.kwargs["PATCH"] * itemsize > 64:
            continue
        kept.append(one)
    return kept


@triton.jit
def causal_forward_kernel(
    x_ptr, stride_xb, stride_xd,
    w,  # [D, K], dense
    bias_ptr,
    state_ptr, stride_sb, stride_sd, stride_st,  # [B, D, K - 1]
    y_ptr,  # [B, D, T], dense
    # sizes
    B, T, RANGE,
    # geometry
    D: tl.constexpr, K: tl.constexpr, STRIDE_XT: tl.constexpr,
    # flags; VEC_X, VEC_T: powers of two up to 16 that divide the runtime strides, and T
    CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, VEC_T: tl.constexpr, INDEX_64: tl.constexpr,
    ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    PATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_X > 1:
        stride_xb = stride_xb // VEC_X * VEC_X
        if not CHANNELS_LAST:
            stride_xd = stride_xd // VEC_X * VEC_X
    if VEC_T > 1:
        T = T // VEC_T * VEC_T
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_c: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    b, first, there, count = walks(tl.program_id(0) // tiles_c, B, T, RANGE, PATCH, BLOCK_T, CHANNELS_LAST)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = None
    if D % BLOCK_C > 0:
        mask_c = offs_c < D
    taps = taps_of(w, offs_c, mask_c, K, dtype, CHANNELS_LAST)
    channels = offs_c[None, :] if CHANNELS_LAST else offs_c[:, None]
    mask = there
    if D % BLOCK_C > 0:
        mask = there & (channels < D)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=channels < D, other=0.0).to(dtype)
    if INDEX_64:
        b, channels, first_64 = b.to(tl.int64), channels.to(tl.int64), first.to(tl.int64)
    else:
        first_64 = first
    STRIDE_YT: tl.constexpr = D if CHANNELS_LAST else 1
    NEXT: tl.constexpr = PATCH if CHANNELS_LAST else PATCH * BLOCK_T
    x_ptrs = x_ptr + (b * stride_xb + first_64 * STRIDE_XT) + channels * stride_xd
    if CHANNELS_LAST:
        y_ptrs = y_ptr + (b * T + first_64) * D + channels
    else:
        y_ptrs = y_ptr + (b * D + channels) * T + first_64
    state_ptrs = None
    if state_ptr is not None:
        state_ptrs = state_ptr + b * stride_sb + channels * stride_sd
    before = ()
    if CHANNELS_LAST:
        before = load_steps(x_ptrs - (K - 1) * STRIDE_XT, first - (K - 1), T, mask, dtype, STRIDE_XT, K - 1, True)
        if state_ptr is not None:
            before = plus_state(before, first - (K - 1), state_ptrs, stride_st, mask, K - 1)
    for step in tl.range(count):
        times = first + step * NEXT
        x = load_steps(x_ptrs, times, T, mask, dtype, STRIDE_XT, PATCH, CHANNELS_LAST)
        if CHANNELS_LAST:
            xs = before + x
        else:
            xs = steps_before(x_ptrs, times, T, mask, state_ptrs, stride_st, K, dtype) + x
        y = ()
        for i in tl.static_range(PATCH):
            y = y + (ACT(convolved(xs, taps, bias, i, K), ACT_A, ACT_B),)
        store_steps(y_ptrs, y, times, T, mask, STRIDE_YT, PATCH, CHANNELS_LAST)
        if CHANNELS_LAST:
            before = part(xs, PATCH, K - 1)
        x_ptrs += NEXT * STRIDE_XT
        y_ptrs += NEXT * STRIDE_YT


@triton.jit
def gradients_of(
    dy, xs, taps, bias, COUNT: tl.constexpr, K: tl.constexpr, GRADIENT: tl.constexpr, ACT_A: tl.constexpr,
    ACT_B: tl.constexpr,
):  # fmt: skip
    """dz of COUNT time steps, of which the first one's window begins with xs[0]."""
    result = ()
    for i in tl.static_range(COUNT):
        if GRADIENT is None:
            result = result + (dy[i],)
        else:
            result = result + (GRADIENT(dy[i], convolved(xs, taps, bias, i, K), ACT_A, ACT_B),)
    return result


@triton.jit
def correlated(dzs, taps, COUNT: tl.constexpr, K: tl.constexpr):
    """dx of COUNT time steps, of which the first one reaches dzs[0] to dzs[K - 1]."""
    result = ()
    for i in tl.static_range(COUNT):
        dx = dzs[i] * taps[K - 1]
        for j in tl.static_range(1, K):
            dx += dzs[i + j] * taps[K - 1 - j]
        result = result + (dx,)
    return result


@triton.jit
def causal_backward_kernel(
    dy_ptr, stride_yb, stride_yd,
    x_ptr, stride_xb, stride_xd,
    w,  # [D, K], dense
    bias_ptr,
    state_ptr, stride_sb, stride_sd, stride_st,  # [B, D, K - 1]
    dx_ptr,  # [B, D, T], dense
    dstate_ptr,  # [B, D, K - 1], dense
    sums_ptr,  # [SLOTS, K + 1, D], the bias's sums behind the taps'
    # sizes
    B, T, RANGE,
    # geometry
    D: tl.constexpr, K: tl.constexpr, STRIDE_YT: tl.constexpr, STRIDE_XT: tl.constexpr,
    # flags; VEC_Y, VEC_X, VEC_T: powers of two up to 16 that divide the runtime strides, and T; WHOLE: whether no walk ends
    # behind the last time step, EVEN: whether no patch does
    CHANNELS_LAST: tl.constexpr, VEC_Y: tl.constexpr, VEC_X: tl.constexpr, VEC_T: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, INDEX_64: tl.constexpr, GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    # tiles
    PATCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if VEC_Y > 1:
        stride_yb = stride_yb // VEC_Y * VEC_Y
        if not CHANNELS_LAST:
            stride_yd = stride_yd // VEC_Y * VEC_Y
    if VEC_X > 1:
        stride_xb = stride_xb // VEC_X * VEC_X
        if not CHANNELS_LAST:
            stride_xd = stride_xd // VEC_X * VEC_X
    if VEC_T > 1:
        T = T // VEC_T * VEC_T
    dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_c: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    slot = tl.program_id(0) // tiles_c
    b, first, there, count = walks(slot, B, T, RANGE, PATCH, BLOCK_T, CHANNELS_LAST)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = None
    if D % BLOCK_C > 0:
        mask_c = offs_c < D
    taps = taps_of(w, offs_c, mask_c, K, dtype, CHANNELS_LAST)
    channels = offs_c[None, :] if CHANNELS_LAST else offs_c[:, None]
    mask = there
    if D % BLOCK_C > 0:
        mask = there & (channels < D)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=channels < D, other=0.0).to(dtype)
    if INDEX_64:
        b, channels, first_64 = b.to(tl.int64), channels.to(tl.int64), first.to(tl.int64)
    else:
        first_64 = first
    STRIDE_T: tl.constexpr = D if CHANNELS_LAST else 1
    NEXT: tl.constexpr = PATCH if CHANNELS_LAST else PATCH * BLOCK_T
    dy_ptrs = dy_ptr + (b * stride_yb + first_64 * STRIDE_YT) + channels * stride_yd
    x_ptrs = x_ptr + (b * stride_xb + first_64 * STRIDE_XT) + channels * stride_xd
    if CHANNELS_LAST:
        # A result is known K - 1 steps after its time.
        dx_ptrs = dx_ptr + (b * T + first_64 - (K - 1)) * D + channels
    else:
        dx_ptrs = dx_ptr + (b * D + channels) * T + first_64
    state_ptrs = None
    dstate_ptrs = None
    if state_ptr is not None:
        state_ptrs = state_ptr + b * stride_sb + channels * stride_sd
        dstate_ptrs = dstate_ptr + (b * D + channels) * (K - 1)

    TILE: tl.constexpr = (BLOCK_T, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_T)
    acc = ()
    for _ in tl.static_range(K + 1):
        acc = acc + (tl.zeros(TILE, dtype),)
    before = ()
    dz_before = ()
    # The time steps whose results are this walk's.
    origin, size = 0, T
    if CHANNELS_LAST:
        origin, size = first, tl.minimum(T - first, RANGE * PATCH)
        before = load_steps(x_ptrs - (K - 1) * STRIDE_XT, first - (K - 1), T, mask, dtype, STRIDE_XT, K - 1, True)
        if state_ptr is not None:
            before = plus_state(before, first - (K - 1), state_ptrs, stride_st, mask, K - 1)
        for _ in tl.static_range(K - 1):
            dz_before = dz_before + (tl.zeros(TILE, dtype),)
    for step in tl.range(count):
        times = first + step * NEXT
        x = load_steps(x_ptrs, times, T, mask, dtype, STRIDE_XT, PATCH, CHANNELS_LAST)
        dy = load_steps(dy_ptrs, times, T, mask, dtype, STRIDE_YT, PATCH, CHANNELS_LAST)
        if CHANNELS_LAST:
            if not WHOLE:
                # What lies before may be infinite, and would be multiplied by zeros.
                kept = ()
                for i in tl.static_range(K - 1):
                    kept = kept + (tl.where(times < T, before[i], 0.0),)
                before = kept
            xs = before + x
            dz = gradients_of(dy, xs, taps, bias, PATCH, K, GRADIENT, ACT_A, ACT_B)
            dzs = dz_before + dz
        else:
            # What lies before a patch that is not there may be infinite, and would be multiplied by zeros.
            xs = steps_before(x_ptrs, times, T, mask & (times < T), state_ptrs, stride_st, K, dtype) + x
            if GRADIENT is not None:
                xs = xs + load_steps(x_ptrs + PATCH, times + PATCH, T, mask, dtype, 1, halo(K), False)
            dy = dy + load_steps(dy_ptrs + PATCH, times + PATCH, T, mask, dtype, 1, halo(K), False)
            dz = gradients_of(dy, xs, taps, bias, PATCH + K - 1, K, GRADIENT, ACT_A, ACT_B)
            dzs = dz
        sums = ()
        for j in tl.static_range(K):
            total = acc[j]
            for i in tl.static_range(PATCH):
                if EVEN:
                    total += dz[i] * xs[i + j]
                else:
                    total += tl.where(times + i < T, dz[i] * xs[i + j], 0.0)
            sums = sums + (total,)
        total = acc[K]
        for i in tl.static_range(PATCH):
            total += dz[i]
        acc = sums + (total,)
        dx = correlated(dzs, taps, PATCH, K)
        if CHANNELS_LAST:
            times -= K - 1
            before = part(xs, PATCH, K - 1)
            dz_before = part(dzs, PATCH, K - 1)
            if state_ptr is not None:
                store_steps(dstate_ptrs + (times + K - 1), dx, times + K - 1, K - 1, mask & (first == 0), 1, PATCH, True)
        elif state_ptr is not None:
            # The state's gradient, from what reaches back over time 0.
            for i in tl.static_range(K - 1):
                back = dz[0] * taps[i]
                for j in tl.static_range(1, i + 1):
                    back += dz[j] * taps[i - j]
                tl.store(dstate_ptrs + (times + i), back.to(dstate_ptr.dtype.element_ty), mask=mask & (times == 0))
        store_steps(dx_ptrs, dx, times - origin, size, mask, STRIDE_T, PATCH, CHANNELS_LAST)
        dy_ptrs += NEXT * STRIDE_YT
        x_ptrs += NEXT * STRIDE_XT
        dx_ptrs += NEXT * STRIDE_T
    if CHANNELS_LAST and K > 1:
        # The last results of the walk, from what follows it.
        times = first + count * PATCH
        xs = before + load_steps(x_ptrs, times, T, mask, dtype, STRIDE_XT, K - 1, True)
        dy = load_steps(dy_ptrs, times, T, mask, dtype, STRIDE_YT, K - 1, True)
        dzs = dz_before + gradients_of(dy, xs, taps, bias, K - 1, K, GRADIENT, ACT_A, ACT_B)
        dx = correlated(dzs, taps, K - 1, K)
        times -= K - 1
        if state_ptr is not None:
            store_steps(dstate_ptrs + (times + K - 1), dx, times + K - 1, K - 1, mask & (first == 0), 1, K - 1, True)
        store_steps(dx_ptrs, dx, times - origin, size, mask, STRIDE_T, K - 1, True)

    sums_ptrs = sums_ptr + slot.to(tl.int64) * ((K + 1) * D) + offs_c
    for j in tl.static_range(K + 1):
        tl.store(sums_ptrs + j * D, tl.sum(acc[j], 0 if CHANNELS_LAST else 1), mask=offs_c < D)


@triton.jit
def causal_update_kernel(
    x_ptr, stride_xb, stride_xd, stride_xt,
    state_ptr, stride_sb, stride_sd, stride_st,  # [B, D, L]
    w,  # [D, K], dense
    bias_ptr,
    y_ptr,  # [B, D, STEPS], dense
    STEPS, D: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_C channels of one sequence. Everything is read before the state is written."""
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_c: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    b = (tl.program_id(0) // tiles_c).to(tl.int64)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < D
    x_ptrs = x_ptr + b * stride_xb + offs_c.to(tl.int64) * stride_xd
    state_ptrs = state_ptr + b * stride_sb + offs_c.to(tl.int64) * stride_sd
    for step in tl.range(STEPS):
        z = tl.zeros((BLOCK_C,), dtype)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(dtype)
        for j in tl.static_range(K):
            # Counted from the first of the new steps; before it lies the state's end.
            at = step + (j - (K - 1))
            old = tl.load(state_ptrs + (L + at) * stride_st, mask=both(mask, at < 0), other=0.0).to(dtype)
            new = tl.load(x_ptrs + at * stride_xt, mask=both(mask, at >= 0), other=0.0).to(dtype)
            z += (old + new) * tl.load(w + offs_c * K + j, mask=mask, other=0.0).to(dtype)
        y = ACT(z, ACT_A, ACT_B)
        tl.store(y_ptr + (b * D + offs_c) * STEPS + step, y.to(y_ptr.dtype.element_ty), mask=mask)
    steps = tl.arange(0, BLOCK_L)[None, :]
    keep = mask[:, None] & (steps < L)
    moved = steps + STEPS
    old = tl.load(state_ptrs[:, None] + moved * stride_st, mask=keep & (moved < L), other=0.0)
    new = tl.load(x_ptrs[:, None] + (moved - L) * stride_xt, mask=keep & (moved >= L), other=0.0)
    state = tl.where(moved < L, old, new.to(old.dtype))
    # Threads may own other elements where they write than where they read.
    tl.debug_barrier()
    tl.store(state_ptrs[:, None] + steps * stride_st, state, mask=keep)
