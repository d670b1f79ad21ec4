"""Fused convolution kernels in Triton behind torch's own modules and functions."""

from tritonconv import functional, nn
from tritonconv.convert import convert, explain, revert
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.backend import set_backend

__all__ = ["ConvGeometry", "convert", "explain", "functional", "nn", "revert", "set_backend"]

__version__ = "0.1.0"
