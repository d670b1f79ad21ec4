"""Which configs a problem may be launched with."""

from __future__ import annotations

import importlib
from typing import Any

from tritonconv.tuning.bands import band_candidates
from tritonconv.tuning.hopper import hopper_candidates
from tritonconv.tuning.problem import Problem

__all__ = ["candidates", "possible"]


def candidates(problem: Problem) -> list[Any]:
    """Every triton.Config of the problem's kernel that suits its sizes, its type and its device."""
    if problem.banded:
        return band_candidates(problem)
    if problem.hopper:
        return hopper_candidates(problem)
    if problem.direct:
        return _patches(problem, *problem.result[1:])
    m, n, _ = problem.gemm
    return _fitting(problem, m, n)


def possible(problem: Problem) -> list[Any]:
    """Every triton.Config that computes the problem rightly on its device, also those much larger than it."""
    if problem.banded:
        return band_candidates(problem)
    if problem.hopper:
        return hopper_candidates(problem)
    return _patches(problem, 10**9, 10**9) if problem.direct else _fitting(problem, 10**9, 10**9)


def _patches(problem: Problem, p: int, q: int) -> list[Any]:
    from tritonconv.kernels.depthwise import fitting

    g = problem.geometry
    return fitting(
        importlib.import_module(f"tritonconv.kernels.{problem.kernel}").configs(), p=p, q=q, planes=g.kernel[0],
        taps=g.kernel[1:], stride=g.stride[1:], dilation=g.dilation[1:], transposed=problem.pass_ == "dgrad",
        channels_last=problem.vectors, summed=problem.pass_ == "wgrad",
    )  # fmt: skip


def _fitting(problem: Problem, m: int, n: int) -> list[Any]:
    from tritonconv.kernels.tiles import fitting

    module = importlib.import_module(f"tritonconv.kernels.{problem.kernel}")
    configs = module.configs()
    if problem.sampled:
        return module.fitting(
            configs, m=m, n=n, k=problem.run, itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
            shared=problem.device.shared_memory, arch=problem.device.arch,
        )  # fmt: skip
    if problem.kernel == "matmul":
        # Rows that are computed on their way in come by pointers alone, and have tiles of their own.
        configs = [config for config in configs if config.kwargs["USE_TMA"] != problem.computed]
    return fitting(
        configs, m=m, n=n, k=problem.run, itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
        shared=problem.device.shared_memory, even=problem.kernel == "conv_fprop", vectors=problem.vectors,
        turned=problem.kernel == "conv_wgrad", computed=problem.computed,
        scattered=problem.pass_ == "dgrad" and max(problem.geometry.stride) > 1, statistics=problem.statistics,
        arch=problem.device.arch,
    )  # fmt: skip
