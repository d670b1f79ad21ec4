"""Which configs a problem may be launched with."""

from __future__ import annotations

from typing import Any

from tritonconv.tuning.families import family_of
from tritonconv.tuning.problem import Problem

__all__ = ["candidates", "possible"]


def candidates(problem: Problem) -> list[Any]:
    """Every triton.Config of the problem's kernel that suits its sizes, its type and its device."""
    return family_of(problem).candidates(problem)


def possible(problem: Problem) -> list[Any]:
    """Every triton.Config that computes the problem rightly on its device, also those much larger than it."""
    return family_of(problem).possible(problem)
