"""What the compiled code of a config takes: resources.json, which benchmarks/codegen.py writes."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

from tritonconv.tuning.configs import config_name
from tritonconv.tuning.problem import Problem

__all__ = ["HOPPER_FLOP_PER_CLOCK", "Blocks", "Resources", "blocks_of", "resources_of", "variant"]

# Dense bf16 flop per clock and multiprocessor of Hopper, in which resources.json counts issue ratios.
HOPPER_FLOP_PER_CLOCK = 4096

Blocks = tuple[int, int, int, int, int, bool]
"""BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, and whether operands come by TMA."""


class Resources(NamedTuple):
    """What a program of the compiled code takes."""

    registers: int
    """Of a thread."""
    shared: int
    issue_cycles: float | None
    """Clocks that a step's instructions take, on a multiprocessor of their own; None where it was not counted."""


def blocks_of(c: dict[str, Any]) -> Blocks:
    """Of a config as `as_dict` gives it; kernels without a choice of TMA always have it."""
    return c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], c["num_warps"], c["num_stages"], bool(c.get("USE_TMA", True))


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
