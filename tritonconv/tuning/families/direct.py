"""Direct depthwise convolutions, which multiply no matrices: their configs are patches of results, not tiles."""

from __future__ import annotations

import functools
import math
from typing import Any

from tritonconv.tuning.devices import ISSUE_SLOTS, LAUNCH
from tritonconv.tuning.families.dense import UNLIMITED
from tritonconv.tuning.families.family import KernelFamily, kernel_module
from tritonconv.tuning.model import FIRST_LATENCY, OVERLAP, PROGRAM_START, Prediction, traffic
from tritonconv.tuning.problem import Problem

__all__ = ["DIRECT"]

# Beside its conversions, a load's address, mask and zeros; a program's start.
LOAD_INSTRUCTIONS, DECODING = 6, 120


def _fitting(problem: Problem, p: int, q: int) -> list[Any]:
    from tritonconv.kernels.depthwise import fitting

    g = problem.geometry
    return fitting(
        kernel_module(problem).configs(), p=p, q=q, planes=g.kernel[0], taps=g.kernel[1:], stride=g.stride[1:],
        dilation=g.dilation[1:], transposed=problem.pass_ == "dgrad", channels_last=problem.vectors,
        summed=problem.pass_ == "wgrad",
    )  # fmt: skip


def direct_candidates(problem: Problem) -> list[Any]:
    return _fitting(problem, *problem.result[1:])


def direct_possible(problem: Problem) -> list[Any]:
    return _fitting(problem, UNLIMITED, UNLIMITED)


def direct_tile(problem: Problem) -> Any:
    """The first patch that fits: how many of them a program has is no part of the config."""
    return direct_candidates(problem)[0]


def predict_direct(problem: Problem, config: Any) -> Prediction:
    """Instructions of patches against bytes."""
    return _predict(problem, (config.kwargs["PATCH_P"], config.kwargs["PATCH_Q"]), config.num_warps)


@functools.lru_cache(maxsize=65536)
def _predict(problem: Problem, patch: tuple[int, int], warps: int) -> Prediction:
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
        "memory": traffic(problem) / device.bandwidth,
    }  # fmt: skip
    longest = max(terms.values())
    seconds = longest + OVERLAP * (terms["memory"] + terms["instructions"]) + PROGRAM_START + LAUNCH
    return Prediction(seconds, max(terms, key=lambda name: terms[name]), terms, programs, 1, 1)


DIRECT = KernelFamily(direct_candidates, direct_possible, predict_direct, direct_tile)
