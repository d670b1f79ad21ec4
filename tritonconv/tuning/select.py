"""The choice of a config, behind one function."""

from __future__ import annotations

import functools
from typing import Any

from tritonconv.geometry import power
from tritonconv.tuning.bands import band_tile
from tritonconv.tuning.candidates import candidates
from tritonconv.tuning.cost import predict
from tritonconv.tuning.devices import INTERPRETER
from tritonconv.tuning.measured import measured_config
from tritonconv.tuning.problem import Problem

__all__ = ["choose", "interpreter_tile"]


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> Any:
    """The triton.Config to launch this problem with: the one that was measured as the best, else the cost model's.

    The model's times are predictions (tuning/cost.py); none was measured on a GPU.
    """
    if problem.banded and problem.device.arch == INTERPRETER.arch:
        return band_tile(problem)
    allowed = candidates(problem)
    if problem.device.arch == INTERPRETER.arch:
        return allowed[0] if problem.direct else interpreter_tile(problem)
    measured = measured_config(problem)
    if measured is not None:
        return measured
    return min(allowed, key=lambda config: predict(problem, config).seconds)


def interpreter_tile(problem: Problem) -> Any:
    """One large tile: the interpreter's time goes per operation, hardly per element."""
    from tritonconv.kernels.tiles import tile

    rows, filters, _ = problem.gemm

    n, k = power(filters, 256, least=16), power(problem.run, 256, least=16)
    if problem.kernel == "conv_fprop":
        k = min(k, problem.run & -problem.run)
    # numpy's temporaries stay in the cache's reach, and Triton allows 2^20 elements a block.
    m = power(rows, (1 << 18) // max(n, k), least=16)
    return tile(m, n, k, warps=4, stages=2)
