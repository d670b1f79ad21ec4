"""Deformable convolutions: tiles of products, an operand or the results of which are interpolated."""

from __future__ import annotations

from typing import Any

from tritonconv.tuning.compiled import Blocks, blocks_of
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.devices import ISSUE_SLOTS
from tritonconv.tuning.families.dense import UNLIMITED, dense_step, product_tile
from tritonconv.tuning.families.family import KernelFamily, kernel_module
from tritonconv.tuning.model import UNCOUNTED, Prediction, Step, predict_products
from tritonconv.tuning.problem import Problem

__all__ = ["DEFORM"]

# For each sample: counted in the compiled code.
SAMPLE_INSTRUCTIONS = 14


def _fitting(problem: Problem, m: int, n: int) -> list[Any]:
    module = kernel_module(problem)
    return list(
        module.fitting(
            module.configs(), m=m, n=n, k=problem.run, itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
            shared=problem.device.shared_memory, arch=problem.device.arch,
        )
    )  # fmt: skip


def deform_candidates(problem: Problem) -> list[Any]:
    m, n, _ = problem.gemm
    return _fitting(problem, m, n)


def deform_possible(problem: Problem) -> list[Any]:
    return _fitting(problem, UNLIMITED, UNLIMITED)


def deform_step(problem: Problem, blocks: Blocks, products: float, cycles: float | None) -> Step:
    """Samples are the operand of rows, of a weight gradient that of columns: four elements are read for each."""
    block_m, block_n, block_k, *_ = blocks
    device = problem.device
    sampled, other = (block_n, block_m) if problem.pass_ == "wgrad" else (block_m, block_n)
    samples = SAMPLE_INSTRUCTIONS * sampled * block_k / (ISSUE_SLOTS * device.warp_size)
    counted = dense_step(problem, blocks, products, cycles).instructions
    return Step(max(counted, UNCOUNTED * products + samples / device.clock), 4 * sampled, other)


def predict_deform(problem: Problem, config: Any) -> Prediction:
    return predict_products(problem, blocks_of(as_dict(config)), problem.run, deform_step)


DEFORM = KernelFamily(deform_candidates, deform_possible, predict_deform, product_tile)
