"""Tiles: candidate configs, which of them suit a problem, and which tile a program owns."""

import triton
import triton.language as tl

__all__ = ["fitting", "grouped_tile", "tile"]


def tile(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    """A candidate of BLOCK_M x BLOCK_N outputs, BLOCK_K deep."""
    return triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8), num_warps=warps, num_stages=stages)


def fitting(
    candidates: list[triton.Config], *, m: int, n: int, k: int, itemsize: int, shared: int
) -> list[triton.Config]:
    """The candidates that suit an M x N output with a reduction in runs of K elements of `itemsize` bytes.

    `shared` is the shared memory of a program in bytes. This is the one statement of what is valid; kernels' `prune`
    functions, the cost model and the tuner all call it. The smallest candidate is kept whatever the sizes.
    """
    kept = []
    for config in candidates:
        m_, n_, k_ = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        # More than twice as large as the output or the reduction: mostly zeros are computed.
        if m_ > max(64, 2 * m - 1) or n_ > max(16, 2 * n - 1) or k_ > max(16, 2 * k - 1):
            continue
        # The pipeline's buffers must fit.
        if (m_ + n_) * k_ * itemsize * config.num_stages > shared:
            continue
        # fp64 accumulators of larger tiles spill.
        if itemsize == 8 and m_ * n_ > 64 * 32:
            continue
        # So do plain fp32 products, which have no tensor cores and hold their operands in registers.
        if itemsize == 4 and m_ * n_ > 128 * 64:
            continue
        kept.append(config)
    return kept


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) in an order that walks GROUP_M rows of tiles before the next column.

    Programs in flight then share image rows and weights in L2 instead of streaming either one.
    """
    band = GROUP_M * tiles_n
    first = pid // band * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % band % rows, pid % band // rows
