"""What compiled code says of itself: instructions that are worth counting, loops, and what a loop's instructions cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from tritonconv.tuning.compiled import HOPPER_FLOP_PER_CLOCK
from tritonconv.tuning.devices import ISSUE_SLOTS

__all__ = ["AMDGCN", "SASS", "Code", "counts", "issue_ratio", "lane_instructions"]

# Groups of instructions worth counting; benchmarks/codegen.json keeps these names.
SASS = (
    r"\b(UTC\w*MMA\S*|HGMMA\S*|HMMA\S*|DMMA\S*|UTMALDG\S*|UTMASTG\S*|LDGSTS\S*|LDG\S*|STG\S*|LDSM\S*|STSM\S*|STS\b\S*"
    r"|LDL\S*|STL\S*|FFMA|DFMA)"
)
AMDGCN = r"\b(v_mfma\w+|global_load\w+|buffer_load\w+|global_store\w+|buffer_store\w+|ds_read\w+|ds_write\w+|scratch_\w+)"


def counts(groups: str, assembly: str) -> dict[str, int]:
    """How many instructions of these groups there are, by their names."""
    return dict(sorted(Counter(re.findall(groups, assembly)).items()))


class Code(NamedTuple):
    """A kernel's SASS."""

    instructions: int
    """Without those that do nothing."""
    loops: list[list[str]]
    """The instructions of each loop, the shortest first."""

    @classmethod
    def parse(cls, sass: str) -> Code:
        code = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)]
        loops = []
        for address, text in code:
            back = re.search(r"BRA.*?0x([0-9a-f]+)", text)
            # The code ends in a branch to itself.
            if back and int(back.group(1), 16) < address:
                loops.append([t for a, t in code if int(back.group(1), 16) <= a <= address])
        return cls(sum("NOP" not in text for _, text in code), sorted(loops, key=len))


def issue_ratio(code: Code, num_warps: int) -> float | None:
    """Share of the issue slots that the main loop takes while the tensor cores work; 1 is instruction-bound."""
    body = next((loop for loop in code.loops if any("HGMMA" in text for text in loop)), None)
    if body is None:
        return None
    shapes = re.findall(r"HGMMA\.64x(\d+)x(\d+)", "\n".join(body))
    # A step is 32 bytes deep whatever the type, so that bytes count as the 2-byte types' 16 elements do.
    cycles = sum(64 * int(n) * 16 * 2 for n, _ in shapes) * (num_warps // 4) / HOPPER_FLOP_PER_CLOCK
    return round(len(body) * num_warps / (ISSUE_SLOTS * cycles), 2)


def lane_instructions(code: Code, kernel: str, arguments: dict[str, Any], num_warps: int) -> float | None:
    """Instructions that a direct kernel's lanes execute for each result; of a separable one, for each element between.

    None for other kernels, and where the code's loops are not those of the source.
    """
    of_program = OF_PROGRAM.get(kernel)
    found = of_program and of_program(code.instructions, [len(loop) for loop in code.loops], arguments)
    if not found:
        return None
    executed, results = found
    return round(executed * 32 * num_warps / results, 1)


Executed = tuple[float, float]
"""Instructions that a lane executes, and results of its program."""


def _causal(total: int, loops: list[int], a: dict[str, Any]) -> Executed | None:
    """A step of the walk, and a step's share of what is around it."""
    if len(loops) != 1:
        return None
    return loops[0] + (total - loops[0]) / a["RANGE"], a["BLOCK_T"] * a["BLOCK_C"] * a["PATCH"]


def _separable(_total: int, loops: list[int], a: dict[str, Any]) -> Executed | None:
    """One pass of the loop over channels, in which the taps' runs once or row by row."""
    if len(loops) != 2:
        return None
    return loops[1] + loops[0] * (a["STEPS"] - 1), a["BLOCK_M"] * a["BLOCK_K"]


def _patches(a: dict[str, Any]) -> float:
    """Results of a program's patches: those that exist, of all patches of the image."""
    results = a["BLOCK_T"] * a["BLOCK_C"]
    for extent, patch in (("P", "PATCH_P"), ("Q", "PATCH_Q")):
        results *= a[extent] / -(-a[extent] // a[patch])
    return float(results)


def _depthwise_wgrad(_total: int, loops: list[int], a: dict[str, Any]) -> Executed | None:
    """One step, of as many programs as share the taps."""
    if len(loops) != 1:
        return None
    return loops[0] * a["T"] * -(-a["R"] // a["ROWS"]) * -(-a["S"] // a["COLUMNS"]), _patches(a)


def _depthwise(total: int, loops: list[int], a: dict[str, Any]) -> Executed | None:
    """All of a program; loops over taps are nested."""
    trips = [n for n in (a["S"] // a["STEP_S"], a["R"] // a["STEP_R"], a["T"]) if n > 1]
    if len(trips) != len(loops):
        return None
    length = executed = 0
    for inner, trip in zip(loops, trips, strict=True):
        length, executed = inner, (inner - length + executed) * trip
    return total - length + executed, _patches(a)


OF_PROGRAM: dict[str, Callable[[int, list[int], dict[str, Any]], Executed | None]] = {
    "depthwise_kernel": _depthwise, "depthwise_wgrad_kernel": _depthwise_wgrad, "separable_kernel": _separable,
    "causal_forward_kernel": _causal, "causal_backward_kernel": _causal,
}  # fmt: skip
