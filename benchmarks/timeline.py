"""The picture in docs/hopper.md: `python -m benchmarks.timeline` runs a program of Hopper's convolution by a model's clock.

A 3x3 layer of 128 channels with a residual: one multiprocessor walks two tiles, so that the second tile's loads are seen
beside the end of the first. The clock's latencies and rates are assumptions (tests/gluon_interpreter/schedules.py).
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

# Kernels behind a workspace are imported with the others, and the interpreter's tensors are on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.hopper import hopper_convolution
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import captured, forced
from tritonconv.tuning import device_named

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "hopper.png"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    interpreter, timeline = map(importlib.import_module, ("gluon_interpreter", "gluon_interpreter.timeline"))

    from tritonconv.kernels.hopper.conv import tile

    def channels_last(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    x, w, residual = channels_last(1, 128, 16, 16), channels_last(256, 128, 3, 3), channels_last(1, 256, 16, 16)
    epilogue = Epilogue(residual=residual, activation=ActivationSpec("relu"))
    device = replace(device_named("H200"), multiprocessors=1)
    with captured(device) as launches, forced(config=tile(128, 256, 64, 8, 3)):
        result = hopper_convolution(x, w, epilogue, ConvGeometry.parse(x.shape, w.shape, nd=2, padding=1))
        if isinstance(result, str):
            raise RuntimeError(result)
    (launch,) = launches
    trace = interpreter.run(launch.kernel, 1, launch.arguments, interpreter.Timed(), num_warps=8)
    timeline.draw(trace, PICTURE)


if __name__ == "__main__":
    main()
