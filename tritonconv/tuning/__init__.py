"""Which config a kernel runs with."""

from tritonconv.tuning.select import Problem, choose

__all__ = ["Problem", "choose"]
