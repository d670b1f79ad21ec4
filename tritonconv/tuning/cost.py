"""A model of a launch's time, from sizes, the config, the compiled code and the device. Nothing is measured.

A program walks its tile's reduction in steps. A step takes as long as the slowest of what it needs: its products on the
tensor cores (or FMA units), its instructions on the issue slots, its operands from L2, and, where too few loads are in
flight to hide it, the memory's latency. Programs that share a multiprocessor hide each other's latencies and share the
rest. Programs run in waves; the last wave may leave multiprocessors idle. No launch is faster than its bytes through device
memory. Registers, shared memory and instructions are those of the compiled code (resources.json, which
benchmarks/codegen.py writes).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from tritonconv.geometry import ConvGeometry
from tritonconv.tuning.bands import band_seconds
from tritonconv.tuning.configs import as_dict, config_name
from tritonconv.tuning.devices import ISSUE_SLOTS, LAUNCH, Device
from tritonconv.tuning.hopper import hopper_terms
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.ranges import ranges

__all__ = [
    "BETWEEN_INSTRUCTIONS", "HOPPER_FLOP_PER_CLOCK", "Prediction", "Resources", "perf_model", "predict", "resources_of",
    "variant",
]  # fmt: skip

# Estimates. A load's way from L2 and back, and from device memory; a program's start.
LOAD_LATENCY = 350e-9
FIRST_LATENCY = 700e-9
PROGRAM_START = 0.8e-6
# The epilogue's instructions for each result of a thread: fold, activation, conversion, address and store.
EPILOGUE_INSTRUCTIONS = 10
# Of a separable kernel, for each element between, its epilogue among them: counted in the compiled code.
BETWEEN_INSTRUCTIONS = 40
# Of a deformable convolution, for each sample: counted in the compiled code.
SAMPLE_INSTRUCTIONS = 14
# Of a direct kernel: beside its conversions, a load's address, mask and zeros; a program's start.
LOAD_INSTRUCTIONS, DECODING = 6, 120
# Dense bf16 flop per clock and multiprocessor of Hopper, in which resources.json counts issue ratios.
HOPPER_FLOP_PER_CLOCK = 4096
# No layer reaches every ceiling at once: what overlaps imperfectly is added to the longest term.
OVERLAP = 0.15


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


class Resources(NamedTuple):
    """What a program of the compiled code takes."""

    registers: int
    """Of a thread."""
    shared: int
    issue_cycles: float | None
    """Clocks that a step's instructions take, on a multiprocessor of their own; None where it was not counted."""


Blocks = tuple[int, int, int, int, int, bool]
"""BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, and whether operands come by TMA."""


@functools.lru_cache(maxsize=65536)
def _predict(problem: Problem, blocks: Blocks) -> Prediction:
    block_m, block_n, block_k, warps, stages, _ = blocks
    device, (m, n, k) = problem.device, problem.gemm
    steps = k // problem.run * math.ceil(problem.run / block_k)
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
    cycles = code.issue_cycles
    instructions = 1.3 * products if cycles is None else cycles / device.clock
    if problem.kernel == "separable":
        # The operand of rows is a depthwise tile.
        between = BETWEEN_INSTRUCTIONS * block_m * block_k / (ISSUE_SLOTS * device.warp_size)
        instructions = 1.3 * products + between / device.clock
    rows, columns = 2 * block_m if problem.computed else block_m, block_n
    if problem.sampled:
        # Samples are the operand of rows; of a weight gradient that of columns.
        sampled, other = (block_n, block_m) if problem.pass_ == "wgrad" else (block_m, block_n)
        rows, columns = 4 * sampled, other
        samples = SAMPLE_INSTRUCTIONS * sampled * block_k / (ISSUE_SLOTS * device.warp_size)
        instructions = max(instructions, 1.3 * products + samples / device.clock)
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
    terms["memory"] = _traffic(problem) / device.bandwidth
    longest = max(busy, terms["memory"])
    seconds = longest + OVERLAP * min(busy, terms["memory"]) + PROGRAM_START + LAUNCH
    bound = max(terms, key=lambda name: terms[name])
    return Prediction(seconds, bound, terms, programs, resident, full + bool(rest))


def predict(problem: Problem, config: Any) -> Prediction:
    """The time of a problem with a triton.Config."""
    if problem.direct:
        return predict_direct(problem, config)
    if problem.banded:
        seconds = band_seconds(problem, config)
        return Prediction(seconds, "products", {"products": seconds}, 1, 1, 1)
    if problem.hopper:
        return predict_hopper(problem, config)
    return _predict(problem, blocks_of(as_dict(config)))


@functools.lru_cache(maxsize=65536)
def _predict_direct(problem: Problem, patch: tuple[int, int], warps: int) -> Prediction:
    g, device = problem.geometry, problem.device
    o, *extent = problem.result
    stride, taps = g.stride[1:], g.kernel[1:]
    transposed = problem.pass_ == "dgrad"
    if transposed:
        patch = (-(-patch[0] // stride[0]) * stride[0], -(-patch[1] // stride[1]) * stride[1])
    channels = g.in_channels if transposed else g.out_channels
    # A thread has 16 bytes of channels of a patch: it loads what reaches the patch, multiplies, and stores.
    vector = max(1, 16 // problem.itemsize) if problem.vectors else 1
    reached = [
        math.ceil((p + (t - 1) * d) / s) if transposed else (p - 1) * s + (t - 1) * d + 1
        for p, t, s, d in zip(patch, taps, stride, g.dilation[1:], strict=True)
    ]
    reached[0] = max(reached[0], patch[0] * taps[0]) if patch[0] == 1 else reached[0]
    results, phases = patch[0] * patch[1], math.prod(stride) if transposed else 1
    products = results * g.taps / phases * vector
    loads = g.kernel[0] * min(reached[0] * reached[1], products) + (results if problem.pass_ == "wgrad" else 0)
    # In a contiguous image a thread has so many patches of one element's width, which share their filters and their places.
    patches_of_thread = 1 if problem.vectors else max(1, 16 // problem.itemsize)
    instructions = products + loads * (LOAD_INSTRUCTIONS + vector) + results * (4 + vector)
    instructions += (g.taps * vector + DECODING) / patches_of_thread
    patches = g.batch * o * math.prod(math.ceil(n / p) for n, p in zip(extent, patch, strict=True))
    threads = patches * math.ceil(channels / vector) * (g.out_channels // g.groups if transposed else 1)
    programs = math.ceil(threads / (device.warp_size * warps))
    rate = ISSUE_SLOTS * device.warp_size * device.multiprocessors * device.clock
    # A launch that leaves multiprocessors idle takes as long as one program on each of the others.
    share = max(1.0, device.multiprocessors / programs)
    terms = {
        "instructions": threads * instructions * share / rate, "latency": 2 * FIRST_LATENCY,
        "memory": _traffic(problem) / device.bandwidth,
    }  # fmt: skip
    longest = max(terms.values())
    seconds = longest + OVERLAP * (terms["memory"] + terms["instructions"]) + PROGRAM_START + LAUNCH
    return Prediction(seconds, max(terms, key=lambda name: terms[name]), terms, programs, 1, 1)


def predict_direct(problem: Problem, config: Any) -> Prediction:
    """The time of a problem whose kernel multiplies no matrices: instructions of its patches against its bytes."""
    return _predict_direct(problem, (config.kwargs["PATCH_P"], config.kwargs["PATCH_Q"]), config.num_warps)


def predict_hopper(problem: Problem, config: Any) -> Prediction:
    """The time of a problem on Hopper's kernels: programs that walk tiles, one on a multiprocessor."""
    c = as_dict(config)
    blocks = c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], c["num_warps"], c["num_stages"], True
    cycles = resources_of(problem, blocks).issue_cycles
    if cycles is None:
        cycles = 0.2 * 2 * blocks[0] * blocks[1] * blocks[2] / HOPPER_FLOP_PER_CLOCK
    terms, beside, tiles, turns = hopper_terms(problem, config, cycles)
    bound = max(terms, key=lambda name: terms[name])
    busy = max(seconds for name, seconds in terms.items() if name != "memory")
    seconds = terms[bound] + OVERLAP * min(busy, terms["memory"]) + beside
    return Prediction(seconds, bound, terms, min(tiles, problem.device.multiprocessors), 1, turns)


def blocks_of(c: dict[str, Any]) -> Blocks:
    return c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], c["num_warps"], c["num_stages"], bool(c["USE_TMA"])


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
def _traffic(problem: Problem) -> int:
    size = problem.geometry.bytes(problem.itemsize, problem.pass_)
    # Of a block diagonal the blocks alone.
    size -= problem.geometry.elements()[1] // problem.pack * (problem.pack - 1) * problem.itemsize
    # What is computed on the way in comes from a second tensor of the result's size.
    return size + (problem.geometry.elements()[2] * problem.itemsize if problem.computed else 0)


def variant(problem: Problem) -> str:
    """What of a problem changes a config's code: the kind of products, and how the operand of rows is read."""
    return problem.products + ("" if problem.vectors else " elements") + (" computed" if problem.computed else "")


def resources_of(problem: Problem, blocks: Blocks) -> Resources:
    """What the compiled code takes; an estimate where this variant of it was not compiled."""
    table = _compiled().get(problem.kernel, {}).get(variant(problem), {})
    block_m, block_n, block_k, warps, stages, _ = blocks
    keys = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "USE_TMA"
    rows = table.get(config_name(dict(zip(keys, blocks, strict=True))))
    arch = problem.device.arch
    # Ada runs what Ampere runs, CDNA4 much like CDNA3.
    row = rows and (rows.get(arch) or rows.get("gfx942" if arch.startswith("gfx") else "sm_80"))
    if row:
        cycles = row[2] or (rows.get("sm_90") or (0, 0, None))[2]
        return Resources(row[0], row[1], cycles)
    shared = (block_m + block_n) * block_k * problem.itemsize * stages
    return Resources(min(255, block_m * block_n // (32 * warps) + 64), shared, None)


@functools.cache
def _compiled() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath("resources.json").read_text())
    return dict(data["kernels"])


def perf_model(kernel: str, device: Device) -> Callable[..., float]:
    """This model as `triton.autotune` wants it: `prune_configs_by={"perf_model": perf_model(kernel, device), "top_k": 4}`.

    Args:
        kernel: conv_fprop, conv_flat or matmul.
        device: the GPU that will run it, such as `device_named("H200")`.

    Returns:
        A function of the kernel's arguments by name, the config's among them, that gives milliseconds.
    """

    def milliseconds(**a: Any) -> float:
        image = a["x"] if kernel == "matmul" else a["x_ptr"]
        dtype = str(getattr(image, "base", image).dtype)[6:]
        if kernel == "matmul":
            geometry = ConvGeometry.parse((a["M"], a["C"], 1), (a["K"], a["C"], 1), nd=1)
            vectors = a["VEC_C"] > 1
        else:
            groups = a["GROUPS"]
            batch = a["M"] // (a["O"] * a["P"] * a["Q"])
            geometry = ConvGeometry.parse(
                (batch, a["C"] * groups, a["D"], a["H"], a["W"]), (a["K"] * groups, a["C"], a["T"], a["R"], a["S"]), nd=3,
                stride=(a["STRIDE_D"], a["STRIDE_H"], a["STRIDE_W"]), padding=(a["PAD_D"], a["PAD_H"], a["PAD_W"]),
                dilation=(a["DIL_D"], a["DIL_H"], a["DIL_W"]), groups=groups,
            )  # fmt: skip
            vectors = a["VEC_X"] > 1
        problem = Problem(kernel, geometry, dtype, a["PRECISION"] == "tf32", vectors, device, pack=a.get("PACK", 1))
        return _predict(problem, blocks_of(a)).seconds * 1e3

    return milliseconds
