"""A model of a launch's time, from sizes, the config, the compiled code and the device. Nothing is measured.

A program walks its tile's reduction in steps. A step takes as long as the slowest of what it needs: its products on the
tensor cores (or FMA units), its instructions on the issue slots, its operands from L2, and, where too few loads are in
flight to hide it, the memory's latency. Programs that share a multiprocessor hide each other's latencies and share the
rest. Programs run in waves; the last wave may leave multiprocessors idle. No launch is faster than its bytes through device
memory. Registers, shared memory and instructions are those of the compiled code (tuning/compiled.py).

This is the part that families of kernels share; what a step of theirs needs they say themselves (tuning/families).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tritonconv.tuning.compiled import Blocks, Resources, resources_of
from tritonconv.tuning.devices import ISSUE_SLOTS, LAUNCH, Device
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.ranges import ranges

__all__ = [
    "FIRST_LATENCY", "OVERLAP", "PROGRAM_START", "UNCOUNTED", "Prediction", "Step", "StepModel", "predict_products",
    "traffic",
]  # fmt: skip

# Estimates. A load's way from L2 and back, and from device memory; a program's start.
LOAD_LATENCY = 350e-9
FIRST_LATENCY = 700e-9
PROGRAM_START = 0.8e-6
# The epilogue's instructions for each result of a thread: fold, activation, conversion, address and store.
EPILOGUE_INSTRUCTIONS = 10
# No layer reaches every ceiling at once: what overlaps imperfectly is added to the longest term.
OVERLAP = 0.15
# Time of a step's instructions where they were not counted, in times of its products.
UNCOUNTED = 1.3


@dataclass(frozen=True)
class Prediction:
    """A launch's predicted time, and what it is made of, in seconds."""

    seconds: float
    bound: str
    """The longest term: "products", "instructions", "latency", "L2" or "memory"."""
    terms: dict[str, float]
    programs: int
    resident: int
    """Programs on a multiprocessor at once."""
    waves: int


class Step(NamedTuple):
    """What a step of one program needs beside its products."""

    instructions: float
    """Seconds that they take on a multiprocessor of their own."""
    rows: int
    """Of BLOCK_K elements, that are read for the operand of rows."""
    columns: int
    """Likewise."""


StepModel = Callable[[Problem, Blocks, float, float | None], Step]
"""A family's step, from a problem, its blocks, the seconds of the products, and the clocks that were counted (or None)."""


@functools.lru_cache(maxsize=65536)
def predict_products(problem: Problem, blocks: Blocks, run: int, step_of: StepModel) -> Prediction:
    """The time of a kernel whose programs walk the reduction of a tile of products.

    Args:
        run: length of the reduction's contiguous runs.
        step_of: what a step of the kernel needs.
    """
    block_m, block_n, block_k, warps, stages, _ = blocks
    device, (m, n, k) = problem.device, problem.gemm
    steps = k // run * math.ceil(run / block_k)
    programs = math.ceil(m / block_m) * math.ceil(n / block_n) * problem.geometry.groups
    if problem.pass_ == "wgrad":
        count, size = ranges(problem, block_m, block_n, block_k)
        programs, steps = programs * count, math.ceil(size / block_k)
    elif problem.pass_ == "dgrad":
        # A phase of the stride has its share of the taps.
        steps = math.ceil(steps / math.prod(problem.geometry.stride))
    code = resources_of(problem, blocks)
    resident = _resident(device, code, warps)

    # One step of one program that has a multiprocessor's unit to itself.
    products = 2 * block_m * block_n * block_k / (device.flops[problem.products] / device.multiprocessors)
    instructions, rows, columns = step_of(problem, blocks, products, code.issue_cycles)
    operands = (rows + columns) * block_k * problem.itemsize / (device.l2_bandwidth / device.multiprocessors)
    latency = LOAD_LATENCY / max(1, stages - 1)
    results = block_m * block_n / (32 * warps)
    epilogue = EPILOGUE_INSTRUCTIONS * results * warps * (32 / device.warp_size) / ISSUE_SLOTS / device.clock

    def wave(neighbors: int) -> dict[str, float]:
        """Terms of a wave with so many programs on a multiprocessor."""
        return {
            "products": neighbors * steps * products, "instructions": neighbors * (steps * instructions + epilogue),
            "L2": neighbors * steps * operands, "latency": steps * latency + FIRST_LATENCY + epilogue,
        }  # fmt: skip

    slots = resident * device.multiprocessors
    full, rest = divmod(programs, slots)
    waves = [wave(resident)] * min(full, 1) + ([wave(math.ceil(rest / device.multiprocessors))] if rest else [])
    counts = [full] * min(full, 1) + ([1] if rest else [])
    terms = {name: sum(c * w[name] for c, w in zip(counts, waves, strict=True)) for name in wave(0)}
    busy = sum(c * max(w.values()) for c, w in zip(counts, waves, strict=True))
    terms["memory"] = traffic(problem) / device.bandwidth
    longest = max(busy, terms["memory"])
    seconds = longest + OVERLAP * min(busy, terms["memory"]) + PROGRAM_START + LAUNCH
    bound = max(terms, key=lambda name: terms[name])
    return Prediction(seconds, bound, terms, programs, resident, full + bool(rest))


def _resident(device: Device, code: Resources, warps: int) -> int:
    """Programs that fit a multiprocessor at once; at least one, since candidates fit."""
    # Registers are handed out to warps by 256.
    per_warp = math.ceil(code.registers * device.warp_size / 256) * 256
    # Each program's shared memory comes with a kilobyte for the system.
    return max(
        1,
        min(
            device.registers // (per_warp * warps), device.shared_per_multiprocessor // (code.shared + 1024),
            device.warps // warps, device.programs,
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def traffic(problem: Problem) -> int:
    """Bytes through device memory at least."""
    size = problem.geometry.bytes(problem.itemsize, problem.pass_)
    # Of a block diagonal the blocks alone.
    size -= problem.geometry.elements()[1] // problem.pack * (problem.pack - 1) * problem.itemsize
    # What is computed on the way in comes from a second tensor of the result's size.
    return size + (problem.geometry.elements()[2] * problem.itemsize if problem.computed else 0)
