"""What measurements say of a problem: the user's cache first, then the tables that ship with the library."""

from __future__ import annotations

from typing import Any, NamedTuple

from tritonconv.tuning.cache import cached_table
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.devices import INTERPRETER
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.tables import NEAR_CONFIG, NEAR_VERDICT, Entry, shipped_table

__all__ = ["MARGIN", "Verdict", "find_entry", "judge", "measured_config", "mostly_zeros"]

# Torch runs a layer only where it was faster by more than noise.
MARGIN = 1.03
# The general kernels compute so many filters of a group at least; ours run unmeasured unless all but an eighth are zeros.
LEAST_TILE, MOSTLY_ZEROS = 16, 8


def find_entry(problem: Problem, epilogue: str | None, reach: float) -> Entry | None:
    """The measured layer that stands for this one: of equal size if there is one, else the nearest within `reach`."""
    name = problem.device.name
    tables = [table for table in (cached_table(name), shipped_table(name)) if table is not None]
    for near in (1.0, reach):
        for table in tables:
            entry = table.find(problem, epilogue, near)
            if entry is not None:
                return entry
    return None


def measured_config(problem: Problem, candidates: list[Any]) -> Any:
    """The candidate that was measured as the best for this layer or one near it; None without such a measurement.

    Epilogues hardly change which config is the best, so that any will do.
    """
    entry = find_entry(problem, None, NEAR_CONFIG)
    if entry is None:
        return None
    for config in candidates:
        if entry.config == as_dict(config):
            return config
    return None


class Verdict(NamedTuple):
    """Who should run a layer that both can, and why."""

    torch: bool
    reason: str


def judge(problem: Problem, epilogue: str) -> Verdict:
    """Torch where it was measured faster with the same epilogue, ours elsewhere.

    Where nothing was measured ours runs too, but for groups of so few filters that the general kernels' tiles are mostly
    zeros. In the interpreter there is nothing to judge.
    """
    if problem.device.arch == INTERPRETER.arch:
        return Verdict(False, "")
    entry = find_entry(problem, epilogue, NEAR_VERDICT)
    if entry is not None and entry.peer_ms is not None:
        if entry.ms > MARGIN * entry.peer_ms:
            return Verdict(True, f"torch was faster: {entry.peer_ms:.4f} ms, {problem.kernel} {entry.ms:.4f} ms")
        return Verdict(False, f"{entry.ms:.4f} ms, torch {entry.peer_ms:.4f} ms")
    filters = problem.gemm[1]
    if mostly_zeros(problem.geometry.groups, filters):
        share = f"1/{LEAST_TILE // filters} of {problem.kernel}'s tile"
        return Verdict(True, f"not measured, and groups of {filters} fill {share}")
    return Verdict(False, "not measured")


def mostly_zeros(groups: int, filters: int) -> bool:
    """Whether the general kernels would compute zeros mostly, for groups of so many filters."""
    return groups > 1 and filters * MOSTLY_ZEROS <= LEAST_TILE
