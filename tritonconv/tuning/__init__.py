"""Which config a kernel runs with: what is known of GPUs, a model of the time, and what was measured."""

from tritonconv.tuning.candidates import candidates
from tritonconv.tuning.devices import INTERPRETER, Device, Products, device_named, known_devices, like, products_of
from tritonconv.tuning.measured import Verdict, judge
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.select import choose

__all__ = [
    "INTERPRETER", "Device", "Problem", "Products", "Verdict", "candidates", "choose", "device_named", "judge",
    "known_devices", "like", "products_of",
]  # fmt: skip
