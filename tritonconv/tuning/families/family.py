"""What the choice of a config asks of a family of kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tritonconv.tuning.model import Prediction
from tritonconv.tuning.problem import Problem

__all__ = ["KernelFamily", "kernel_module"]


@dataclass(frozen=True)
class KernelFamily:
    """Kernels whose configs are found and judged in one way; a config is a triton.Config."""

    candidates: Callable[[Problem], list[Any]]
    """Every config that suits a problem's sizes, its type and its device."""
    possible: Callable[[Problem], list[Any]]
    """Every config that computes a problem rightly on its device, also those much larger than it."""
    predict: Callable[[Problem, Any], Prediction]
    """A model of the time; nothing is measured."""
    interpreter_tile: Callable[[Problem], Any]
    """The config for Triton's interpreter, whose time goes per operation, hardly per element."""


def kernel_module(problem: Problem) -> Any:
    """The file of a problem's kernel."""
    return importlib.import_module(f"tritonconv.kernels.{problem.kernel}")
