"""The least time that a layer needs on the GPU that this library is tuned for first."""

from __future__ import annotations

from typing import Literal

import torch

from tritonconv.ops.core.launch import precision
from tritonconv.tuning import device_named, products_of

__all__ = ["ASSUMPTION", "roofline_us"]

_device = device_named("NVIDIA H200")
_rates = {kind: f"{rate / 1e12:g}" for kind, rate in _device.flops.items()}

ASSUMPTION = (
    f"Roofline of an H200: {_rates['16']} TFLOP/s fp16 and bf16, {_rates['tf32']} TF32, {_rates['fp32']} fp32 and fp64, "
    f"{_device.bandwidth / 1e12:g} TB/s; every tensor moved once. Not a measurement."
)


def roofline_us(macs: int, size: int, dtype: torch.dtype, kind: Literal["conv", "matmul"]) -> float:
    """Microseconds for so many multiply-adds and bytes; fp32 follows torch's TF32 switch for this kind of layer.

    >>> round(roofline_us(0, 43_000_000, torch.float16, "conv"), 6)
    10.0
    """
    return _device.roofline(macs, size, products_of(str(dtype)[6:], precision(dtype, kind) == "tf32")) * 1e6
