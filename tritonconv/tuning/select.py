"""The choice of a config, behind one function."""

from __future__ import annotations

import functools
from typing import Any

from tritonconv.tuning.devices import INTERPRETER
from tritonconv.tuning.families import family_of
from tritonconv.tuning.measured import measured_config
from tritonconv.tuning.problem import Problem

__all__ = ["choose"]


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> Any:
    """The triton.Config to launch this problem with: the one that was measured as the best, else the cost model's.

    The model's times are predictions (tuning/model.py); none was measured on a GPU.
    """
    family = family_of(problem)
    if problem.device.arch == INTERPRETER.arch:
        return family.interpreter_tile(problem)
    measured = measured_config(problem)
    if measured is not None:
        return measured
    return min(family.candidates(problem), key=lambda config: family.predict(problem, config).seconds)
