"""Masks with conditions that hold for a whole tile or not at all."""

import triton
import triton.language as tl

__all__ = ["only_if"]


@triton.jit
def only_if(condition, mask):
    """The mask where a condition of the same shape, or of the whole tile, holds.

    It is `mask & condition`, which Triton's interpreter gives the type of what a scalar condition has compared; version 3.9
    takes no mask but a boolean one.
    """
    return mask & (condition.to(tl.int32) + tl.zeros(mask.shape, tl.int32) != 0)
