"""Right or wrong: the one comparison with fp64 that tests, benchmarks and the tuner share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Comparison", "compare"]

# Of the whole tensor: ||out - ref|| / ||ref||. fp32 and fp64 grow with the root of the sum's length.
RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-14}
TF32_RELATIVE = 1e-3
# Interpreted conversions to bf16 truncate, so that its unit is a whole last place.
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22, torch.float64: 2**-51}
TF32_EPS = 2**-10


@dataclass(frozen=True)
class Comparison:
    """How far a result is from its reference."""

    error: float
    """||out - ref|| / ||ref||; NaN where they differ in being finite."""
    complaint: str | None
    """What is wrong; None if all is right."""


def compare(out: Tensor, ref: Tensor, *, depth: int = 1, tf32: bool = False) -> Comparison:
    """Bound the error of `out` against the fp64 (or, for low-precision results, fp32) `ref`, as a whole and by elements.

    Args:
        depth: length of the sum behind an element.
        tf32: fp32 products were computed in TF32.
    """
    if out.shape != ref.shape:
        return Comparison(math.nan, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    if ref.numel() == 0:
        return Comparison(0.0, None)
    wide = out.to(ref.dtype)
    finite = torch.isfinite(ref)
    same = torch.where(finite, torch.isfinite(wide), (wide == ref) | (wide.isnan() & ref.isnan()))
    if not same.all():
        return Comparison(math.nan, f"{int((~same).sum())} elements differ in being finite, first at {_first(~same)}")
    scale = torch.where(finite, ref, 0)
    error = torch.where(finite, wide - scale, 0).abs()
    rms = scale.pow(2).mean().sqrt()
    relative = (error.norm() / scale.norm().clamp(min=1e-30)).item()
    rounded = tf32 and out.dtype == torch.float32
    grow = math.sqrt(depth) if out.dtype in (torch.float32, torch.float64) and not rounded else 1.0
    bound = (TF32_RELATIVE if rounded else RELATIVE[out.dtype]) * grow
    if not relative <= bound:
        return Comparison(relative, f"relative error {relative:.2e}, bound {bound:.2e}")
    # One wrong pixel cannot hide in the norm.
    element = 4 * (TF32_EPS if rounded else EPS[out.dtype]) * (scale.abs() + rms * grow)
    worst = error - element
    if not (worst <= 0).all():
        at = worst.argmax()
        return Comparison(
            relative,
            f"element {_first(worst > 0)} is {wide.flatten()[at]}, expected {ref.flatten()[at]} within "
            f"{element.flatten()[at]:.2e}",
        )
    return Comparison(relative, None)


def _first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()
