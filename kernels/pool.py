"""Pooling over windows, forward: maximum, minimum, sum or average, and sum of powers, 1-d to 3-d.

    y[n, c, o, p, q] = reduced over taps (t, r, s) of x[n, c, d, h, w] with h = p * stride + r * dilation - padding, ...

A thread holds a patch of PATCH_P x PATCH_Q results of some neighboring channels (8 of 16 bits) in registers, and loads and
converts each element of x once for it. Rows are reduced across first, then down: 5x5 with 4x2 results costs 12 operations a
result and not 25, in the order in which torch scans a window, so that ties and NaN have its indices. A program owns BLOCK_T
patches of BLOCK_C channels. In a channels-last image patches follow each other over all images, and lanes lie along
channels; in a contiguous one a program has a part of a row of several planes, and lanes lie along the row. Strides of 2 or 4
are loaded as vectors there and cut into phases. Windows of up to WHOLE taps are unrolled, larger ones walked row by row, and
planes one by one. x is read once from memory; every result is written once, with its index where one is asked for: the number of its
tap within the window, or its flat position in the image as torch has it.
"""

import triton
import triton.language as tl

from .batch_norm import widened
from .masks import both
from .patches import exists, last_place, locate, reach

__all__ = ["COLUMNS", "WHOLE", "configs", "patch", "pool_kernel", "raised", "window_size"]

# Rows x columns of a window that are unrolled whole; columns of a wider one that are walked at once.
WHOLE, COLUMNS = 25, 16


def patch(p: int, q: int, warps: int) -> triton.Config:
    """A candidate: patches of p x q results. How many of them are a program's follows from its threads."""
    return triton.Config(dict(PATCH_P=p, PATCH_Q=q), num_warps=warps, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for every pooling, for patches are cut to what a thread can hold (ops/pool)."""
    return [
        # Windows that overlap share rows.
        patch(4, 2, 4),
        patch(2, 2, 4),
        # Windows walked row by row, 1-d, and those apart: more loads in flight.
        patch(1, 4, 4),
        patch(1, 2, 4),
        # Small images.
        patch(1, 1, 4),
        # Contiguous: lanes lie along the row.
        patch(4, 1, 4),
        patch(2, 1, 4),
    ]


@triton.constexpr_function
def position(place, results, taps, stride, dilation):
    """How many elements of a row that reach a patch lie before this place."""
    return sum(exists(v, results, taps, stride, dilation, False) for v in range(place))


@triton.constexpr_function
def group_of(tap, stride, pad, dilation):
    """The group of a stride's elements in which a tap lies, counted from that of the result's number."""
    return (tap * dilation - pad) // stride


@triton.constexpr_function
def phase_of(tap, stride, pad, dilation):
    """Its place in that group."""
    return (tap * dilation - pad) % stride


@triton.constexpr_function
def is_group(group, taps, stride, pad, dilation):
    """Whether a tap lies in it."""
    return any(group_of(tap, stride, pad, dilation) == group for tap in range(taps))


@triton.constexpr_function
def groups_before(group, taps, stride, pad, dilation):
    """How many groups before this one have taps."""
    return len({group_of(tap, stride, pad, dilation) for tap in range(taps)} & set(range(-pad, group)))


@triton.constexpr_function
def integral(power):
    """A small whole power as an integer, else 0."""
    return int(power) if power == int(power) and 1 <= power <= 16 else 0


@triton.jit
def raised(x, POWER: tl.constexpr):
    """x ** POWER; NaN for negative x where POWER is not whole."""
    if integral(POWER) > 0:
        result = x
        for _ in tl.static_range(integral(POWER) - 1):
            result = result * x
    else:
        result = tl.exp2(POWER * tl.log2(x))
    return result


@triton.jit
def rooted(x, POWER: tl.constexpr):
    """x ** (1 / POWER); NaN for negative x unless POWER is 1."""
    if POWER == 1.0:
        result = x
    elif POWER == 2.0:
        result = tl.sqrt(x)
    else:
        result = tl.exp2(tl.log2(x) / POWER)
    return result


@triton.jit
def read(ptrs, mask, KIND: tl.constexpr, POWER: tl.constexpr):
    """What is reduced, in fp32 (fp64 for fp64); of a minimum the negated elements, whose maximum it is."""
    if KIND == "max":
        result = widened(tl.load(ptrs, mask=mask, other=float("-inf")))
    elif KIND == "min":
        result = -widened(tl.load(ptrs, mask=mask, other=float("inf")))
    elif KIND == "power":
        result = raised(widened(tl.load(ptrs, mask=mask, other=0.0)), POWER)
    else:
        result = widened(tl.load(ptrs, mask=mask, other=0.0))
    return result


@triton.jit
def joined(a, b, KIND: tl.constexpr):
    if KIND == "max" or KIND == "min":
        # One instruction, where comparisons that let NaN pass are three.
        result = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        result = a + b
    return result


@triton.jit
def phases(tile, STRIDE: tl.constexpr):
    """A tile [C, T * STRIDE] as STRIDE tiles [C, T], by an element's place modulo STRIDE (2 or 4)."""
    C: tl.constexpr = tile.shape[0]
    T: tl.constexpr = tile.shape[1] // STRIDE
    if STRIDE == 2:
        a, b = tl.split(tl.reshape(tile, (C, T, 2)))
        return a, b
    else:
        even, odd = tl.split(tl.reshape(tile, (C, T, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def load_row(
    ptrs, w0, row_inside, mask_c, W, stride_w, KIND: tl.constexpr, POWER: tl.constexpr,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, RESULTS: tl.constexpr,
    GROUPED: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The elements of a row that reach a patch, in order; grouped: all phases of the groups in which taps lie."""
    values = ()
    if GROUPED:
        for k in tl.static_range(group_of(TAPS - 1, STRIDE, PAD, DIL) - group_of(0, STRIDE, PAD, DIL) + 1):
            if is_group(k + group_of(0, STRIDE, PAD, DIL), TAPS, STRIDE, PAD, DIL):
                place = (k + group_of(0, STRIDE, PAD, DIL)) * STRIDE
                mask = tl.expand_dims(both(row_inside, (w0 + place).to(tl.uint32) < W), 0) & mask_c
                values = values + phases(read(ptrs + place, mask, KIND, POWER), STRIDE)
    else:
        for v in tl.static_range(last_place(RESULTS, TAPS, STRIDE, DIL, False) + 1):
            if exists(v, RESULTS, TAPS, STRIDE, DIL, False):
                # Unsigned comparison: a negative coordinate is a large number.
                mask = tl.expand_dims(both(row_inside, (w0 + v).to(tl.uint32) < W), 1 - AXIS) & mask_c
                values = values + (read(ptrs + v * stride_w, mask, KIND, POWER),)
    return values


@triton.constexpr_function
def index_in_row(result, tap, results, taps, stride, pad, dilation, grouped):
    """Which of `load_row`'s elements a tap of a result is."""
    if grouped:
        group = group_of(tap, stride, pad, dilation)
        return groups_before(group, taps, stride, pad, dilation) * stride + phase_of(tap, stride, pad, dilation)
    return position(result * stride + tap * dilation, results, taps, stride, dilation)


@triton.jit
def fold(
    state, ptrs, h0, w0, inside, mask_c, tap, stride_h, stride_w, H, W,
    KIND: tl.constexpr, POWER: tl.constexpr, INDEXED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, GROUPED: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The results with ROWS x COLS taps, of which the first has this number; behind them the winning taps if INDEXED."""
    RESULTS: tl.constexpr = PATCH_P * PATCH_Q
    for h in tl.static_range(last_place(PATCH_P, ROWS, STRIDE_H, DIL_H, False) + 1):
        if exists(h, PATCH_P, ROWS, STRIDE_H, DIL_H, False):
            row_inside = inside & ((h0 + h).to(tl.uint32) < H)
            row = load_row(
                ptrs + h * stride_h, w0, row_inside, mask_c, W, stride_w, KIND, POWER, COLS, STRIDE_W, PAD_W, DIL_W,
                PATCH_Q, GROUPED, AXIS,
            )  # fmt: skip
            across = ()
            columns = ()
            for j in tl.static_range(PATCH_Q):
                value = row[index_in_row(j, 0, PATCH_Q, COLS, STRIDE_W, PAD_W, DIL_W, GROUPED)]
                column = tl.zeros(value.shape, tl.int32)
                for s in tl.static_range(1, COLS):
                    other = row[index_in_row(j, s, PATCH_Q, COLS, STRIDE_W, PAD_W, DIL_W, GROUPED)]
                    if INDEXED:
                        taken = (other > value) | (other != other)
                        value = tl.where(taken, other, value)
                        column = tl.where(taken, s, column)
                    else:
                        value = joined(value, other, KIND)
                across = across + (value,)
                columns = columns + (column,)
            fed = ()
            found = ()
            for i in tl.static_range(PATCH_P):
                for j in tl.static_range(PATCH_Q):
                    old = state[i * PATCH_Q + j]
                    if INDEXED:
                        which = state[RESULTS + i * PATCH_Q + j]
                        if reach(h, i, ROWS, STRIDE_H, DIL_H, False) >= 0:
                            taken = (across[j] > old) | (across[j] != across[j])
                            old = tl.where(taken, across[j], old)
                            here = columns[j] + (tap + reach(h, i, ROWS, STRIDE_H, DIL_H, False) * S)
                            which = tl.where(taken, here, which)
                        found = found + (which,)
                    elif reach(h, i, ROWS, STRIDE_H, DIL_H, False) >= 0:
                        old = joined(old, across[j], KIND)
                    fed = fed + (old,)
            state = fed + found
    return state


@triton.jit
def window_size(first, size, TAPS: tl.constexpr, PAD: tl.constexpr, PADDED: tl.constexpr):
    """How many places of an axis a window counts, of those before the padding's end or of the image's own alone."""
    last = tl.minimum(first + TAPS, size + PAD)
    if PADDED:
        result = last - first
    else:
        result = tl.minimum(last, size) - tl.maximum(first, 0)
    return result


@triton.jit
def first_tap(first, PAD: tl.constexpr, DIL: tl.constexpr):
    """The first tap of an axis that lies inside the image."""
    if PAD == 0:
        result = first * 0
    else:
        result = tl.where(first < 0, (DIL - 1 - first) // DIL, 0)
    return result


@triton.jit
def pool_kernel(
    x_ptr, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    y_ptr, stride_y,  # of a pixel, channels-last; contiguous, y is dense
    index_ptr,  # as y, dense; None: not asked for
    # sizes: x is [N, C, D, H, W], y is [N, C, O, P, Q]
    N, C, D, H, W, O, P, Q,
    # geometry
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # flags; KIND: max, min, sum or power; DIVISOR: of a sum, None: how many places a window has, those of the padding
    # included if PADDED; FLAT: indices are positions in the image
    KIND: tl.constexpr, POWER: tl.constexpr, DIVISOR: tl.constexpr, PADDED: tl.constexpr, FLAT: tl.constexpr,
    ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_X: tl.constexpr, VEC_Y: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    INDEXED: tl.constexpr = index_ptr is not None
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    stride_xn = stride_xn // VEC_X * VEC_X
    stride_xd = stride_xd // VEC_X * VEC_X
    stride_xh = stride_xh // VEC_X * VEC_X
    if CHANNELS_LAST:
        stride_xw = stride_xw // VEC_X * VEC_X
        stride_y = stride_y // VEC_Y * VEC_Y
        C = C // VEC_Y * VEC_Y
    else:
        stride_xc = stride_xc // VEC_X * VEC_X
        Q = Q // VEC_Y * VEC_Y
    tiles_c = tl.cdiv(C, BLOCK_C)
    across = tl.cdiv(Q, PATCH_Q)
    slot = tl.program_id(0) // tiles_c
    plane, row, place, there = locate(slot, N * O, tl.cdiv(P, PATCH_P), across, BLOCK_T, CHANNELS_LAST)
    n = plane // O
    o = plane % O
    p0 = row * PATCH_P
    q0 = place * PATCH_Q
    d0 = o * STRIDE_D - PAD_D
    h0 = p0 * STRIDE_H - PAD_H
    w0 = q0 * STRIDE_W - PAD_W
    if GROUPED:
        # Whole strides of the block's results, and no longer the first tap's place of each.
        w0 = slot % tl.cdiv(across, BLOCK_T) * (BLOCK_T * STRIDE_W) + tl.arange(0, BLOCK_T * STRIDE_W)
    if INDEX_64:
        n = n.to(tl.int64)

    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = tl.expand_dims(offs_c < C, AXIS)
    offs_x = n * stride_xn + h0.to(n.dtype) * stride_xh + w0.to(n.dtype) * stride_xw
    x_ptrs = x_ptr + (tl.expand_dims(offs_x, 1 - AXIS) + tl.expand_dims(offs_c.to(n.dtype) * stride_xc, AXIS))

    if CHANNELS_LAST:
        blank = tl.zeros((BLOCK_T, BLOCK_C), tl.int32)
    else:
        blank = tl.zeros((BLOCK_C, BLOCK_T), tl.int32)
    initial: tl.constexpr = float("-inf") if KIND == "max" or KIND == "min" else 0.0
    state = ()
    for _ in tl.static_range(PATCH_P * PATCH_Q):
        if x_ptr.dtype.element_ty == tl.float64:
            state = state + (tl.full(blank.shape, initial, tl.float64),)
        else:
            state = state + (tl.full(blank.shape, initial, tl.float32),)
    if INDEXED:
        t0 = first_tap(d0, PAD_D, DIL_D)
        for k in tl.static_range(PATCH_P * PATCH_Q):
            r0 = first_tap(h0 + k // PATCH_Q * STRIDE_H, PAD_H, DIL_H)
            s0 = first_tap((q0 + k % PATCH_Q) * STRIDE_W - PAD_W, PAD_W, DIL_W)
            # Of a window of infinities the first place wins, as no comparison does.
            state = state + (blank + tl.expand_dims((t0 * R + r0) * S + s0, 1 - AXIS),)

    for t in tl.range(T):
        d = d0 + t * DIL_D
        inside = d.to(tl.uint32) < D
        if CHANNELS_LAST:
            inside = inside & there
            plane_ptrs = x_ptrs + (d.to(n.dtype) * stride_xd)[:, None]
        else:
            plane_ptrs = x_ptrs + d.to(n.dtype) * stride_xd
        for step in tl.range(R // STEP_R):
            h = h0 + step * (STEP_R * DIL_H)
            row_ptrs = plane_ptrs + step * (STEP_R * DIL_H) * stride_xh
            tap = (t * R + step * STEP_R) * S
            for part in tl.range(S // STEP_S):
                state = fold(
                    state, row_ptrs + part * (STEP_S * DIL_W) * stride_xw, h, w0 + part * (STEP_S * DIL_W), inside, mask_c,
                    tap + part * STEP_S, stride_xh, stride_xw, H, W, KIND, POWER, INDEXED, STEP_R, STEP_S, S, STRIDE_H,
                    STRIDE_W, PAD_W, DIL_H, DIL_W, PATCH_P, PATCH_Q, GROUPED, AXIS,
                )  # fmt: skip
            if S % STEP_S > 0:
                LAST: tl.constexpr = S // STEP_S * STEP_S
                state = fold(
                    state, row_ptrs + LAST * DIL_W * stride_xw, h, w0 + LAST * DIL_W, inside, mask_c, tap + LAST, stride_xh,
                    stride_xw, H, W, KIND, POWER, INDEXED, STEP_R, S % STEP_S, S, STRIDE_H, STRIDE_W, PAD_W, DIL_H, DIL_W,
                    PATCH_P, PATCH_Q, GROUPED, AXIS,
                )  # fmt: skip

    for k in tl.static_range(PATCH_P * PATCH_Q):
        p = p0 + k // PATCH_Q
        q = q0 + k % PATCH_Q
        mask = tl.expand_dims(both(there, p < P) & (q < Q), 1 - AXIS) & mask_c
        if CHANNELS_LAST:
            pixel = (n * O + o) * (P * Q) + (p * Q + q)
            offs_y = (pixel * stride_y)[:, None] + offs_c[None, :]
            offs_index = (pixel * C)[:, None] + offs_c[None, :]
        else:
            offs_y = ((n * C + offs_c) * O + o)[:, None] * (P * Q) + (p * Q + q)[None, :]
            offs_index = offs_y
        v = state[k]
        if KIND == "sum" or KIND == "power":
            if DIVISOR is None:
                count = window_size(d0, D, T, PAD_D, PADDED) * window_size(p * STRIDE_H - PAD_H, H, R, PAD_H, PADDED)
                count = count * window_size(q * STRIDE_W - PAD_W, W, S, PAD_W, PADDED)
                v = v / tl.expand_dims(count, 1 - AXIS).to(v.dtype)
            elif DIVISOR != 1.0:
                v = v / DIVISOR
        if KIND == "power":
            # As torch has it: a mean, and times the window's size.
            if DIVISOR is None:
                v = v * (T * R * S)
            v = rooted(v, POWER)
        if KIND == "min":
            v = -v
        v = ACT(v, ACT_A, ACT_B)
        if y_ptr.dtype.element_ty != v.dtype:
            v = v.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_y, v, mask=mask)
        if INDEXED:
            which = state[PATCH_P * PATCH_Q + k]
            if FLAT:
                rest = which
                depth = d0
                if T > 1:
                    depth = tl.expand_dims(d0 + tl.zeros_like(q), 1 - AXIS) + which // (R * S) * DIL_D
                    rest = which % (R * S)
                else:
                    depth = tl.expand_dims(d0 + tl.zeros_like(q), 1 - AXIS)
                line = tl.expand_dims(p * STRIDE_H - PAD_H + tl.zeros_like(q), 1 - AXIS) + rest // S * DIL_H
                at = tl.expand_dims(q * STRIDE_W - PAD_W, 1 - AXIS) + rest % S * DIL_W
                if INDEX_64:
                    depth = depth.to(tl.int64)
                which = (depth * H + line) * W + at
            tl.store(index_ptr + offs_index, which.to(index_ptr.dtype.element_ty), mask=mask)
