"""A kernel whose mask has a condition on a scalar, rightly and wrongly."""

import triton
import triton.language as tl
from tritonconv.kernels.masks import both

__all__ = ["copy_kernel"]


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, BOOLEAN: tl.constexpr):
    offs = tl.arange(0, 4)
    first = tl.program_id(0) == 0
    mask = both(offs < N, first) if BOOLEAN else (offs < N) & first
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)
