"""Fused convolution kernels in Triton, called through torch's own modules and functions."""

import warnings
from pathlib import Path
from typing import Any

# In a clone kernels/ is next to this folder; in an installed package it is inside.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from tritonconv import functional, nn
from tritonconv.convert import convert, explain, revert
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.core.backend import set_backend
from tritonconv.ops.deform.gradients import set_deform_scatter

__all__ = [
    "ConvGeometry", "convert", "enable_inductor", "explain", "functional", "fuse", "nn", "revert", "set_backend",
    "set_deform_scatter", "tune",
]  # fmt: skip

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Measuring imports many modules that running does not need.
    if name == "tune":
        from tritonconv.measure.tune import tune

        return tune
    # Graphs need parts of torch that take time to import.
    if name == "fuse":
        from tritonconv.graph.export import fuse

        return fuse
    if name == "enable_inductor":
        from tritonconv.graph.inductor import enable_inductor

        return enable_inductor
    if name == "set_scatter":
        warnings.warn("tritonconv.set_scatter is called set_deform_scatter now", DeprecationWarning, stacklevel=2)
        return set_deform_scatter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
