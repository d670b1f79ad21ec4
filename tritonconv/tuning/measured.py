"""What measurements say of a problem: the user's cache first, then the tables that ship with the library."""

from __future__ import annotations

from typing import Any, NamedTuple

from tritonconv.tuning.cache import cached_table
from tritonconv.tuning.candidates import candidates
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.devices import INTERPRETER
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.tables import NEAR_CONFIG, NEAR_VERDICT, Entry, shipped_table

__all__ = ["MARGIN", "Verdict", "find_entry", "judge", "measured_config"]

# Torch runs a layer only where it was faster by more than noise.
MARGIN = 1.03


def find_entry(problem: Problem, conditions: str | None, reach: float) -> Entry | None:
    """The measured layer that stands for this one: of equal size if there is one, else the nearest within `reach`."""
    name = problem.device.name
    tables = [table for table in (cached_table(name), shipped_table(name)) if table is not None]
    if not tables:
        return None
    # A config that is gone, or not possible here, was not measured.
    allowed = [as_dict(config) for config in candidates(problem)]
    for near in (1.0, reach):
        for table in tables:
            entry = table.find(problem, conditions, near, allowed)
            if entry is not None:
                return entry
    return None


def measured_config(problem: Problem) -> Any:
    """The candidate that was measured as the best for this layer or one near it; None without such a measurement.

    What follows in the same kernel hardly changes which config is the best, so that any conditions will do.
    """
    entry = find_entry(problem, None, NEAR_CONFIG)
    if entry is None:
        return None
    return next(config for config in candidates(problem) if entry.config == as_dict(config))


class Verdict(NamedTuple):
    """Who should run a layer that both can, and why."""

    torch: bool
    reason: str


def judge(problem: Problem, conditions: str) -> Verdict:
    """Torch where it was measured faster under the same conditions (as `Prepared.conditions` gives them), ours elsewhere.

    Where nothing was measured ours runs too. In the interpreter there is nothing to judge.
    """
    if problem.device.arch == INTERPRETER.arch:
        return Verdict(False, "")
    entry = find_entry(problem, conditions, NEAR_VERDICT)
    if entry is not None and entry.peer_ms is not None:
        if entry.ms > MARGIN * entry.peer_ms:
            return Verdict(True, f"torch was faster: {entry.peer_ms:.4f} ms, {problem.kernel} {entry.ms:.4f} ms")
        return Verdict(False, f"{entry.ms:.4f} ms, torch {entry.peer_ms:.4f} ms")
    return Verdict(False, "not measured")
