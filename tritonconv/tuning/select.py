"""The choice of a config, behind one function."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

from tritonconv.tuning.problem import Problem

__all__ = ["candidates", "choose", "interpreter_tile"]


# What a block costs beside its products, in units of a 64 x 64 x 16 product: filling the pipeline, and the epilogue.
OVERHEAD = 24.0
# Products per block below which the loop's other instructions outweigh them (benchmarks/codegen.json's issue ratios).
SMALL_TILE = 64 * 128


def candidates(problem: Problem) -> list[Any]:
    """Every triton.Config of the problem's kernel that its sizes, its dtype and its device allow."""
    from tritonconv.kernels.tiles import fitting

    m, n, _ = problem.gemm
    return fitting(
        importlib.import_module(f"tritonconv.kernels.{problem.kernel}").configs(),
        m=m, n=n, k=problem.run, itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
        shared=problem.device.shared_memory, even=problem.kernel == "conv_fprop", vectors=problem.vectors,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, interpreting: bool) -> Any:
    """The triton.Config to launch this problem with, found without benchmarking.

    Counts waves of tiles over the multiprocessors, weighs each by its padded work, and prefers large tiles, whose loops
    issue fewer instructions per product. These are estimates; none was measured on a GPU.
    """
    if interpreting:
        return interpreter_tile(problem)

    rows, filters, depth_of_all = problem.gemm
    device = problem.device

    def cost(config: Any) -> float:
        m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = math.ceil(rows / m) * math.ceil(filters / n) * problem.geometry.groups
        # Programs with small buffers share a multiprocessor.
        buffers = (m + n) * k * problem.itemsize * config.num_stages
        slots = device.multiprocessors * max(1, min(4, device.shared_memory // buffers))
        depth = (depth_of_all // problem.run) * math.ceil(problem.run / k) * k
        work = (m / 64) * (n / 64) * (depth / 16)
        instructions = 1.0 + SMALL_TILE / (2 * m * n)
        concurrency = min(slots, tiles) / device.multiprocessors if tiles > device.multiprocessors else 1.0
        return math.ceil(tiles / slots) * (work * instructions * max(1.0, concurrency) + OVERHEAD)

    return min(candidates(problem), key=cost)


def interpreter_tile(problem: Problem) -> Any:
    """One large tile: the interpreter's time goes per operation, hardly per element."""
    from tritonconv.kernels.tiles import tile

    rows, filters, _ = problem.gemm

    def power(n: int, least: int, most: int) -> int:
        return max(least, min(most, 1 << max(0, n - 1).bit_length()))

    n, k = power(filters, 16, 256), power(problem.run, 16, 256)
    if problem.kernel == "conv_fprop":
        k = min(k, problem.run & -problem.run)
    # numpy's temporaries stay in the cache's reach, and Triton allows 2^20 elements a block.
    m = power(rows, 16, (1 << 18) // max(n, k))
    return tile(m, n, k, warps=4, stages=2)
