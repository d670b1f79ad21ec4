"""The choice of a config, behind one function."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Problem", "choose", "interpreter_tile"]


@dataclass(frozen=True)
class Problem:
    """What a choice may depend on: the product of one group, and the device."""

    kernel: str
    m: int
    n: int
    k: int
    """Length of the reduction."""
    run: int
    """Length of its contiguous runs: input channels of a tap."""
    groups: int
    itemsize: int
    tensor_cores: bool
    """Whether products run there: not for fp64 and IEEE fp32."""
    vectors: bool
    """Whether the image is read by vectors."""
    multiprocessors: int
    shared: int


# What a block costs beside its products, in units of a 64 x 64 x 16 product: filling the pipeline, and the epilogue.
OVERHEAD = 24.0
# Products per block below which the loop's other instructions outweigh them (benchmarks/codegen.json's issue ratios).
SMALL_TILE = 64 * 128


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, interpreting: bool) -> Any:
    """The triton.Config to launch this problem with, found without benchmarking.

    Counts waves of tiles over the multiprocessors, weighs each by its padded work, and prefers large tiles, whose loops
    issue fewer instructions per product. These are estimates; none was measured on a GPU.
    """
    from tritonconv.kernels import conv_flat, conv_fprop, matmul
    from tritonconv.kernels.tiles import fitting

    if interpreting:
        return interpreter_tile(problem)
    module = {"conv_fprop": conv_fprop, "conv_flat": conv_flat, "matmul": matmul}[problem.kernel]
    candidates = fitting(
        module.configs(), m=problem.m, n=problem.n, k=problem.run, itemsize=problem.itemsize,
        tensor_cores=problem.tensor_cores, shared=problem.shared, even=problem.kernel == "conv_fprop",
        vectors=problem.vectors,
    )  # fmt: skip

    def cost(config: Any) -> float:
        m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = math.ceil(problem.m / m) * math.ceil(problem.n / n) * problem.groups
        # Programs with small buffers share a multiprocessor.
        buffers = (m + n) * k * problem.itemsize * config.num_stages
        slots = problem.multiprocessors * max(1, min(4, problem.shared // buffers))
        depth = (problem.k // problem.run) * math.ceil(problem.run / k) * k
        work = (m / 64) * (n / 64) * (depth / 16)
        instructions = 1.0 + SMALL_TILE / (2 * m * n)
        concurrency = min(slots, tiles) / problem.multiprocessors if tiles > problem.multiprocessors else 1.0
        return math.ceil(tiles / slots) * (work * instructions * max(1.0, concurrency) + OVERHEAD)

    return min(candidates, key=cost)


def interpreter_tile(problem: Problem) -> Any:
    """One large tile: the interpreter's time goes per operation, hardly per element."""
    from tritonconv.kernels.tiles import tile

    def power(n: int, least: int, most: int) -> int:
        return max(least, min(most, 1 << max(0, n - 1).bit_length()))

    n, k = power(problem.n, 16, 256), power(problem.run, 16, 256)
    if problem.kernel == "conv_fprop":
        k = min(k, problem.run & -problem.run)
    # numpy's temporaries stay in the cache's reach, and Triton allows 2^20 elements a block.
    m = power(problem.m, 16, (1 << 18) // max(n, k))
    return tile(m, n, k, warps=4, stages=2)
