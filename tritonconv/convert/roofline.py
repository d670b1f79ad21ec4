"""The least time that a layer needs on the GPU that this library is tuned for first."""

from __future__ import annotations

from typing import Literal

import torch

from tritonconv.ops.launch import precision

__all__ = ["ASSUMPTION", "roofline_us"]

# Dense matrix rates that an H200 sustains, and what it reads from memory: multiply and add counted as two.
HALF, TF32, FP32 = 790e12, 395e12, 67e12
BANDWIDTH = 4.3e12

ASSUMPTION = (
    f"Roofline of an H200: {HALF / 1e12:g} TFLOP/s fp16 and bf16, {TF32 / 1e12:g} TF32, {FP32 / 1e12:g} fp32 and fp64, "
    f"{BANDWIDTH / 1e12:g} TB/s; every tensor moved once. Not a measurement."
)


def roofline_us(macs: int, size: int, dtype: torch.dtype, kind: Literal["conv", "matmul"]) -> float:
    """Microseconds for so many multiply-adds and bytes; fp32 follows torch's TF32 switch for this kind of layer.

    >>> round(roofline_us(0, 43_000_000, torch.float16, "conv"), 6)
    10.0
    """
    half = dtype in (torch.float16, torch.bfloat16)
    peak = HALF if half else TF32 if precision(dtype, kind) == "tf32" else FP32
    return max(2 * macs / peak, size / BANDWIDTH) * 1e6
