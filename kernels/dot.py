"""The one matrix product that all kernels call."""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "matmul_acc", "zero_tile"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def matmul_acc(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with a [M, K], b [K, N]; PRECISION is "ieee" or "tf32" and matters for fp32 operands alone."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16 (triton#11584), so operands are widened first.
        if acc.dtype == tl.float32:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def zero_tile(y_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Accumulators for an output of this type: fp64 sums fp64, fp32 sums everything else."""
    if y_ptr.dtype.element_ty == tl.float64:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return acc
