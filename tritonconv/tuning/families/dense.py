"""Dense convolutions as implicit products, and plain products: tiles of results, which walk a reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tritonconv.geometry import power
from tritonconv.tuning.compiled import Blocks, blocks_of
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.families.family import KernelFamily, kernel_module
from tritonconv.tuning.model import UNCOUNTED, Prediction, Step, StepModel, predict_products
from tritonconv.tuning.problem import Problem

__all__ = [
    "CONV_FLAT", "CONV_FPROP", "CONV_WGRAD", "DENSE", "MATMUL", "UNLIMITED", "dense_family", "dense_step", "product_tile",
]  # fmt: skip

# Rows and columns that every tile suits.
UNLIMITED = 10**9
Run = Callable[[Problem], int]
"""Length of the reduction's contiguous runs, which blocks do not cross."""


def _run(problem: Problem) -> int:
    return problem.run


def _whole_run(problem: Problem) -> int:
    """Of a kernel whose blocks go across taps."""
    return problem.gemm[2]


def _fitting(
    problem: Problem, m: int, n: int, run: Run, even: bool, turned: bool, by_operand: bool
) -> list[Any]:  # fmt: skip
    from tritonconv.kernels.tiles import fitting

    configs = kernel_module(problem).configs()
    if by_operand:
        # Rows that are computed on their way in come by pointers alone, and have tiles of their own.
        configs = [config for config in configs if config.kwargs["USE_TMA"] != problem.computed]
    return fitting(
        configs, m=m, n=n, k=run(problem), itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
        shared=problem.device.shared_memory, even=even, vectors=problem.vectors, turned=turned, computed=problem.computed,
        scattered=problem.pass_ == "dgrad" and max(problem.geometry.stride) > 1, statistics=problem.statistics,
        arch=problem.device.arch,
    )  # fmt: skip


def dense_step(problem: Problem, blocks: Blocks, products: float, cycles: float | None) -> Step:
    """Both operands are read; one that is computed on its way in comes from two tensors."""
    block_m, block_n, *_ = blocks
    instructions = UNCOUNTED * products if cycles is None else cycles / problem.device.clock
    return Step(instructions, 2 * block_m if problem.computed else block_m, block_n)


def product_tile(problem: Problem, run: Run = _run, even: bool = False) -> Any:
    """One large tile for the interpreter."""
    from tritonconv.kernels.tiles import tile

    rows, filters, _ = problem.gemm
    n, k = power(filters, 256, least=16), power(run(problem), 256, least=16)
    if even:
        k = min(k, run(problem) & -run(problem))
    # numpy's temporaries stay in the cache's reach, and Triton allows 2^20 elements a block.
    m = power(rows, (1 << 18) // max(n, k), least=16)
    return tile(m, n, k, warps=4, stages=2)


def dense_family(
    *, run: Run = _run, even: bool = False, turned: bool = False, by_operand: bool = False, step: StepModel = dense_step
) -> KernelFamily:
    """The family of a kernel.

    Args:
        even: whether blocks must divide the reduction's runs.
        turned: whether operands lie across the reduction.
        by_operand: whether configs with descriptors are for operands as they are, the others for computed ones.
        step: what a step needs.
    """
    fit = functools.partial(_fitting, run=run, even=even, turned=turned, by_operand=by_operand)

    def candidates(problem: Problem) -> list[Any]:
        m, n, _ = problem.gemm
        return fit(problem, m, n)

    def possible(problem: Problem) -> list[Any]:
        return fit(problem, UNLIMITED, UNLIMITED)

    def predict(problem: Problem, config: Any) -> Prediction:
        return predict_products(problem, blocks_of(as_dict(config)), run(problem), step)

    return KernelFamily(candidates, possible, predict, functools.partial(product_tile, run=run, even=even))


DENSE = dense_family()
CONV_FPROP = dense_family(even=True)
CONV_FLAT = dense_family(run=_whole_run)
MATMUL = dense_family(by_operand=True)
CONV_WGRAD = dense_family(turned=True)
