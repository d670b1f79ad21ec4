"""How the pixels of a weight gradient are divided among programs."""

from __future__ import annotations

import math

from tritonconv.tuning.problem import Problem

__all__ = ["WORKSPACE", "ranges"]

# Sums of all ranges together take at most so many bytes, whatever the layer.
WORKSPACE = 256 * 2**20
# A range is worth its workspace from so many steps on; so many tiles of programs a multiprocessor hide each other's ends.
LEAST_STEPS, WAVES = 8, 2


def ranges(problem: Problem, block_m: int, block_n: int, block_k: int) -> tuple[int, int]:
    """(number of ranges, pixels of each but the last), a whole number of steps each."""
    filters, columns, pixels = problem.gemm
    groups = problem.geometry.groups
    tiles = math.ceil(filters / block_m) * math.ceil(columns / block_n) * groups
    steps = math.ceil(pixels / block_k)
    wanted = math.ceil(WAVES * problem.device.multiprocessors / tiles)
    room = WORKSPACE * problem.pack // (4 * groups * filters * columns)
    count = max(1, min(wanted, steps // LEAST_STEPS, room))
    size = math.ceil(steps / count) * block_k
    return max(1, math.ceil(pixels / size)), size
