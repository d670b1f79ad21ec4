"""A depthwise convolution and the 1x1 convolution behind it in one kernel: tiles of products whose rows are computed."""

from __future__ import annotations

from tritonconv.tuning.compiled import Blocks
from tritonconv.tuning.devices import ISSUE_SLOTS
from tritonconv.tuning.families.dense import dense_family, dense_step
from tritonconv.tuning.model import UNCOUNTED, Step
from tritonconv.tuning.problem import Problem

__all__ = ["BETWEEN_INSTRUCTIONS", "SEPARABLE"]

# For each element between, its epilogue among them: counted in the compiled code.
BETWEEN_INSTRUCTIONS = 40


def separable_step(problem: Problem, blocks: Blocks, products: float, cycles: float | None) -> Step:
    """The operand of rows is a depthwise tile."""
    block_m, _, block_k, *_ = blocks
    device = problem.device
    between = BETWEEN_INSTRUCTIONS * block_m * block_k / (ISSUE_SLOTS * device.warp_size)
    step = dense_step(problem, blocks, products, cycles)
    return step._replace(instructions=UNCOUNTED * products + between / device.clock)


SEPARABLE = dense_family(step=separable_step)
