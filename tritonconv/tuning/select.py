"""The choice of a config, behind one function."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from tritonconv.tuning.cost import predict
from tritonconv.tuning.devices import INTERPRETER
from tritonconv.tuning.measured import measured_config
from tritonconv.tuning.problem import Problem

__all__ = ["candidates", "choose", "interpreter_tile", "possible"]


def candidates(problem: Problem) -> list[Any]:
    """Every triton.Config of the problem's kernel that suits its sizes, its type and its device."""
    m, n, _ = problem.gemm
    return _fitting(problem, m, n)


def possible(problem: Problem) -> list[Any]:
    """Every triton.Config that computes the problem rightly on its device, also those much larger than it."""
    return _fitting(problem, 10**9, 10**9)


def _fitting(problem: Problem, m: int, n: int) -> list[Any]:
    from tritonconv.kernels.tiles import fitting

    return fitting(
        importlib.import_module(f"tritonconv.kernels.{problem.kernel}").configs(),
        m=m, n=n, k=problem.run, itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
        shared=problem.device.shared_memory, even=problem.kernel == "conv_fprop", vectors=problem.vectors,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> Any:
    """The triton.Config to launch this problem with: the one that was measured as the best, else the cost model's.

    The model's times are predictions (tuning/cost.py); none was measured on a GPU.
    """
    if problem.device.arch == INTERPRETER.arch:
        return interpreter_tile(problem)
    allowed = candidates(problem)
    measured = measured_config(problem, allowed)
    if measured is not None:
        return measured
    return min(allowed, key=lambda config: predict(problem, config).seconds)


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
