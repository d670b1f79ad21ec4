"""Masks with conditions that hold for a whole tile or not at all."""

import triton
import triton.language as tl

__all__ = ["both"]


@triton.jit
def both(a, b):
    """`a & b`, of which one may be a condition on the whole tile.

    Triton's interpreter gives the conjunction of a tile and a scalar the type of what the scalar has compared, and from
    version 3.9 on takes no mask but a boolean one.
    """
    if not a.type.is_block():
        if b.type.is_block():
            a = everywhere(a, b.shape)
    elif not b.type.is_block():
        b = everywhere(b, a.shape)
    return a & b


@triton.jit
def everywhere(condition, shape: tl.constexpr):
    """A scalar condition as a tile."""
    return condition.to(tl.int32) + tl.zeros(shape, tl.int32) != 0
