"""Which configs a problem may be launched with."""

from __future__ import annotations

import importlib
from typing import Any

from tritonconv.tuning.problem import Problem

__all__ = ["candidates", "possible"]


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
        turned=problem.kernel == "conv_wgrad", computed=problem.computed,
        scattered=problem.pass_ == "dgrad" and max(problem.geometry.stride) > 1, statistics=problem.statistics,
        arch=problem.device.arch,
    )  # fmt: skip
