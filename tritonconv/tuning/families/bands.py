"""Banded depthwise products (kernels/depthwise_bands.py): which tiles a problem may have, and a model of their time."""

from __future__ import annotations

import functools
import math
from typing import Any

from tritonconv.geometry import power
from tritonconv.tuning.devices import ISSUE_SLOTS, LAUNCH
from tritonconv.tuning.families.family import KernelFamily, kernel_module
from tritonconv.tuning.model import Prediction
from tritonconv.tuning.problem import Problem

__all__ = ["BANDS", "BAND_WAVES", "shape_of"]

# Programs a multiprocessor, of the weight gradient.
BAND_WAVES = 4
# Instructions of a thread: a step's own, those of a load of the image and of an element of the band (counted in the code
# for sm_90).
STEP, LOAD, BAND = 50, 7, 2
# Those before and behind the steps: a program's own, for a place of the band, for a result.
START, PLACE, RESULT = 200, 12, 10


def shape_of(problem: Problem) -> dict[str, Any]:
    """A problem's geometry as the kernels' `divide` takes it."""
    g, back = problem.geometry, problem.pass_ == "dgrad"
    return dict(
        batch=g.batch, source=g.output if back else g.input, result=g.input if back else g.output, kernel=g.kernel,
        stride=g.stride, padding=g.padding, dilation=g.dilation, align=align_of(problem),
        **({} if problem.pass_ == "wgrad" else dict(transposed=back)),
    )  # fmt: skip


def align_of(problem: Problem) -> int:
    """Elements of the source that may be read at once."""
    g = problem.geometry
    width = g.output[2] if problem.pass_ == "dgrad" else g.input[2]
    return math.gcd(16 // problem.itemsize, width) if problem.vectors else 1


def band_candidates(problem: Problem) -> list[Any]:
    """Every config of the problem's kernel that suits it."""
    from tritonconv.kernels import bands, depthwise_bands_wgrad

    module = kernel_module(problem)
    fitting = depthwise_bands_wgrad.fitting if problem.pass_ == "wgrad" else bands.fitting
    return list(
        fitting(
            module.configs(), itemsize=problem.itemsize, tensor_cores=problem.tensor_cores,
            shared=problem.device.shared_memory, arch=problem.device.arch, **shape_of(problem),
        )
    )  # fmt: skip


def band_tile(problem: Problem) -> Any:
    """One large tile: the interpreter's time goes per operation, hardly per element."""
    from tritonconv.kernels import bands, depthwise_bands_wgrad
    from tritonconv.kernels.tiles import tile

    shape = shape_of(problem)
    if problem.pass_ == "wgrad":
        for m in (1 << k for k in range(6, 13)):
            if depthwise_bands_wgrad.divide(m, 32, 64, **shape):
                return tile(m, 32, 64, 4, 2, tma=False)
    for k in (1 << k for k in range(7, 12)):
        found = bands.divide(1, 64, k, **shape)
        if found:
            return tile(power(found.rows, 1 << 10), 64, k, 4, 2, tma=False)
    raise AssertionError(f"no tile holds a window of {problem.geometry}")


@functools.lru_cache(maxsize=4096)
def _seconds(problem: Problem, m: int, n: int, k: int, warps: int, stages: int) -> float:
    from tritonconv.kernels import bands, depthwise_bands_wgrad

    g, device, shape = problem.geometry, problem.device, shape_of(problem)
    threads = device.warp_size * warps
    # A step, in clocks of a multiprocessor of its own: products; instructions of image and band; operands from L2.
    products = 2 * m * n * k / (device.flops[problem.products] / device.multiprocessors)
    if problem.pass_ == "wgrad":
        *_, width, groups, steps = depthwise_bands_wgrad.divide(m, n, k, **shape)
        vector = math.gcd(shape["align"], width.first, width.move if width.blocks > 1 else 0)
        instructions = STEP + LOAD * (m / vector + n / math.gcd(16 // problem.itemsize, g.output[2], n)) * k / threads
        total, programs = steps * groups * g.kernel[0] * g.out_channels, BAND_WAVES * device.multiprocessors
        operands = (m + n) * k * problem.itemsize
    else:
        found = bands.divide(m, n, k, **shape)
        instructions = STEP + LOAD * m * k / found.vector(shape["align"]) / threads + BAND * n * k / threads
        channels = g.out_channels if problem.pass_ == "fprop" else g.in_channels * (g.out_channels // g.groups)
        programs = -(-found.rows // m) * channels
        total = programs * found.steps * g.kernel[0]
        operands = m * k * problem.itemsize
    resident = max(1, min(device.shared_per_multiprocessor // ((m + n) * k * problem.itemsize * stages), 16 // warps))
    issue = instructions * warps / ISSUE_SLOTS / device.clock
    l2 = operands / (device.l2_bandwidth / device.multiprocessors)
    # A program of its own waits for its band before its products; neighbors on the multiprocessor fill that time.
    step = max(products, issue, l2) + min(products, issue) / resident
    waves = -(-programs // device.multiprocessors) * device.multiprocessors / programs
    ends = (START + PLACE * n * k / threads * (problem.pass_ != "wgrad") + RESULT * m * n / threads) * warps
    busy = (total * step + programs * ends / ISSUE_SLOTS / device.clock) / device.multiprocessors * waves
    return max(busy, g.bytes(problem.itemsize, problem.pass_) / device.bandwidth) + LAUNCH


def predict_bands(problem: Problem, config: Any) -> Prediction:
    """A time alone: what it is made of is not told apart."""
    blocks = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    seconds = _seconds(problem, *blocks, config.num_warps, config.num_stages)
    return Prediction(seconds, "products", {"products": seconds}, 1, 1, 1)


# Tiles are divided by the geometry, so that those that suit a problem are those that are possible.
BANDS = KernelFamily(band_candidates, band_candidates, predict_bands, band_tile)
