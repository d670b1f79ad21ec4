"""Which config a kernel runs with: what is known of GPUs, a model of the time, and what was measured."""

from tritonconv.tuning.devices import INTERPRETER, Device, device_named, known_devices, like
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.select import candidates, choose

__all__ = ["INTERPRETER", "Device", "Problem", "candidates", "choose", "device_named", "known_devices", "like"]
