"""Hopper's kernels (kernels/hopper): which tiles a problem may have, and a model of their time."""

from __future__ import annotations

import functools
import math
from typing import Any

from tritonconv.geometry import best_box, boxes_over, pass_extents
from tritonconv.tuning.compiled import HOPPER_FLOP_PER_CLOCK, blocks_of, resources_of
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.devices import ISSUE_SLOTS, LAUNCH
from tritonconv.tuning.families.family import KernelFamily, kernel_module
from tritonconv.tuning.model import OVERLAP, Prediction
from tritonconv.tuning.problem import Problem

__all__ = ["HOPPER", "hopper_ranges"]

# Estimates. From a copy's issue to its arrival; a program's start, with its barriers and descriptors.
ARRIVAL = 0.8e-6
START = 1.0e-6
# Instructions of a thread for each result: fold, activation, conversion, and its share of stores and barriers.
RESULT = 8
# Clocks of a slice's way out that its successor waits for: a fence, barriers, the issue of the copy.
SLICE_CLOCKS = 150
# Clocks of a step's instructions where they were not counted, in those of its products.
UNCOUNTED = 0.2
# Sums of all ranges of a weight gradient take at most so many bytes; a range is worth its workspace from so many steps on.
WORKSPACE, LEAST_STEPS = 256 * 2**20, 8


def hopper_candidates(problem: Problem) -> list[Any]:
    """Every config of the problem's kernel that suits it."""
    g = problem.geometry
    m, n, _ = problem.gemm
    if problem.pass_ == "wgrad":
        n //= g.taps
    # Pixels come by boxes, of which only whole ones waste nothing; channels by blocks, with zeros behind the last.
    run = m if problem.pass_ == "wgrad" else problem.run
    kept = []
    for config in kernel_module(problem).configs():
        m_, n_, k_ = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if m_ > max(64 if problem.pass_ == "wgrad" else 128, 2 * m - 1) or n_ > max(64, 2 * n - 1):
            continue
        # A group in depth has no axis of its own: a tile must not reach into its neighbor.
        if g.groups > 1 and g.nd == 3 and problem.pass_ != "wgrad" and (run % k_ or n % n_):
            continue
        kept.append(config)
    return kept


def hopper_ranges(problem: Problem, m: int, n: int, k: int) -> tuple[int, int]:
    """(ranges, boxes of each but the last) of a weight gradient's pixels."""
    g = problem.geometry
    filters, columns, _ = problem.gemm
    extents = pass_extents(g, "wgrad")
    boxes = boxes_over(extents, best_box(extents, k))
    tiles = math.ceil(filters / m) * math.ceil(columns // g.taps / n) * g.taps * g.groups
    room = WORKSPACE // (4 * g.groups * filters * columns)
    most = max(1, min(boxes // LEAST_STEPS, room, 2 * problem.device.multiprocessors // tiles + 1))

    def clocks(count: int) -> float:
        """Steps of the busiest program, and what its sums cost on their way to memory and back, in steps."""
        waves = math.ceil(tiles * count / problem.device.multiprocessors)
        return waves * (math.ceil(boxes / count) + (4 if count > 1 else 2))

    count = min(range(1, most + 1), key=lambda c: (clocks(c), c))
    size = math.ceil(boxes / count)
    return math.ceil(boxes / size), size


@functools.lru_cache(maxsize=65536)
def _terms(problem: Problem, blocks: tuple[int, int, int], cycles: float) -> tuple[dict[str, float], int, int]:
    m, n, k = blocks
    g, device = problem.geometry, problem.device
    extents = pass_extents(g, problem.pass_)
    if problem.pass_ == "wgrad":
        filters, columns, _ = problem.gemm
        ranges, steps = hopper_ranges(problem, m, n, k)
        tiles = math.ceil(filters / m) * math.ceil(columns // g.taps / n) * g.taps * g.groups * ranges
        itemsize, depth = problem.itemsize if ranges == 1 else 4, float(steps * k)
    else:
        _, columns, _ = problem.gemm
        phases = math.prod(g.stride) if problem.pass_ == "dgrad" else 1
        tiles = boxes_over(extents, best_box(extents, m)) * math.ceil(columns / n) * g.groups * phases
        steps = math.ceil(g.taps * math.ceil(problem.run / k) / phases)
        # Zeros behind the last channel are not read.
        itemsize, ranges, depth = problem.itemsize, 1, g.taps * problem.run / phases
    turns = math.ceil(tiles / device.multiprocessors)
    products = 2 * m * n * k / (device.flops[problem.products] / device.multiprocessors)
    operands = (m + n) * depth * problem.itemsize / (device.l2_bandwidth / device.multiprocessors)
    # Behind the last product, while only the loader works.
    slices = n * itemsize / 128
    finish = (RESULT * m * n / (32 * ISSUE_SLOTS) + SLICE_CLOCKS * slices) / device.clock
    size = g.bytes(problem.itemsize, problem.pass_)
    if ranges > 1:
        # Sums are written, read and added by a kernel of its own.
        size += 2 * 4 * ranges * g.elements()[1]
    terms = {
        "products": turns * (steps * products + finish), "instructions": turns * (steps * cycles / device.clock + finish),
        "L2": turns * operands, "latency": ARRIVAL + turns * finish, "memory": size / device.bandwidth,
    }  # fmt: skip
    return terms, tiles, ranges


def predict_hopper(problem: Problem, config: Any) -> Prediction:
    """Programs that walk tiles, one on a multiprocessor."""
    blocks = blocks_of(as_dict(config))
    m, n, k, *_ = blocks
    cycles = resources_of(problem, blocks).issue_cycles
    if cycles is None:
        cycles = UNCOUNTED * 2 * m * n * k / HOPPER_FLOP_PER_CLOCK
    terms, tiles, ranges = _terms(problem, (m, n, k), cycles)
    beside = START + ARRIVAL + LAUNCH * (2 if ranges > 1 else 1)
    multiprocessors = problem.device.multiprocessors
    bound = max(terms, key=lambda name: terms[name])
    busy = max(seconds for name, seconds in terms.items() if name != "memory")
    seconds = terms[bound] + OVERLAP * min(busy, terms["memory"]) + beside
    return Prediction(seconds, bound, terms, min(tiles, multiprocessors), 1, math.ceil(tiles / multiprocessors))


def hopper_tile(problem: Problem) -> Any:
    """The first one: Triton's interpreter has no Gluon, and tests interpret these kernels as for an H200."""
    return hopper_candidates(problem)[0]


# Candidates leave out what would reach beyond a group, and little of what is too large.
HOPPER = KernelFamily(hopper_candidates, hopper_candidates, predict_hopper, hopper_tile)
