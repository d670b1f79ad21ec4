"""Adding up what many output pixels give one input pixel, in an order that does not matter.

Float atomics add in whatever order they come, and round each time: other bits on every run. Integers do not round, so that
their order is no matter: each value is scaled by a power of two and becomes a 64-bit integer, and the sum is scaled back.
The scale is chosen on the device, from a bound of any sum (ops/deform/gradients.py: scale_of), so that none overflows. What
a value loses is at most half a unit, 2^-62 of that bound. For fp64 a second integer holds the next 36 bits.

A bound that is infinite or NaN gives the scale 0, which stands for float atomics in fp64: then NaN and infinity arrive
where they belong, and what is finite has no fixed order.
"""

import triton
import triton.language as tl

__all__ = ["deform_scatter_kernel", "scatter"]

# The second integer's units in one of the first's: 2^26 of them may add up, with a bit for the sign.
LOW_UNITS = tl.constexpr(float(1 << 36))


@triton.jit
def scatter(sums_ptr, offs, values, mask, scale, size, FIXED: tl.constexpr):
    """Add values to sums, in fixed point if FIXED and the scale is not 0; `size`: from an integer to its second one."""
    if FIXED:
        if scale == 0.0:
            floats = sums_ptr.to(tl.pointer_type(tl.float64))
            tl.atomic_add(floats + offs, values.to(tl.float64), mask=mask, sem="relaxed")
        else:
            scaled = values * scale
            if size is None:
                tl.atomic_add(sums_ptr + offs, tl.floor(scaled + 0.5).to(tl.int64), mask=mask, sem="relaxed")
            else:
                whole = tl.floor(scaled)
                tl.atomic_add(sums_ptr + offs, whole.to(tl.int64), mask=mask, sem="relaxed")
                rest = tl.floor((scaled - whole) * LOW_UNITS + 0.5)
                tl.atomic_add(sums_ptr + (size + offs), rest.to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(sums_ptr + offs, values, mask=mask, sem="relaxed")


@triton.jit
def deform_scatter_kernel(
    sums_ptr,  # [1 or 2, PIXELS, C]
    scale_ptr,  # the scale; None: the sums are floats
    dx_ptr,  # [PIXELS, C], or [images, C, pixels of an image]
    # sizes
    PIXELS, IMAGE, C: tl.constexpr,
    # flags
    LOW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the sums as the gradient lies: 8 bytes in (16 for fp64) and an element out."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    there = offs_p < PIXELS
    mask = there[:, None] & (offs_c < C)[None, :]
    offs_p = offs_p.to(tl.int64)
    offs = offs_p[:, None] * C + offs_c[None, :]
    sums = tl.load(sums_ptr + offs, mask=mask, other=0)
    if scale_ptr is None:
        dx = sums
    else:
        scale = tl.load(scale_ptr)
        if scale == 0.0:
            dx = sums.to(tl.float64, bitcast=True)
        else:
            dx = sums.to(tl.float64)
            if LOW:
                low = tl.load(sums_ptr + (PIXELS.to(tl.int64) * C + offs), mask=mask, other=0)
                dx += low.to(tl.float64) * (1.0 / LOW_UNITS)
            dx = dx * (1.0 / scale)
        if dx_ptr.dtype.element_ty != tl.float64:
            dx = dx.to(tl.float32)
    dx = dx.to(dx_ptr.dtype.element_ty)
    if CHANNELS_LAST:
        tl.store(dx_ptr + offs, dx, mask=mask)
    else:
        # Neighboring threads take neighboring pixels, which lie side by side in memory.
        place = (offs_p // IMAGE * C) * IMAGE + offs_p % IMAGE
        ptrs = dx_ptr + (place[None, :] + (offs_c.to(tl.int64) * IMAGE)[:, None])
        tl.store(ptrs, tl.trans(dx), mask=tl.trans(mask))
