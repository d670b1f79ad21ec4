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
# So many elements are compared at once: several fp64 copies of a large result would fill the GPU.
PIECE = 2**27


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
    if ref.dim() == 0:
        out, ref = out[None], ref[None]
    rows = max(1, PIECE * len(ref) // ref.numel())
    pieces = [(row, out[row : row + rows], ref[row : row + rows]) for row in range(0, len(ref), rows)]
    errors = scales = 0.0
    for row, piece, expected in pieces:
        different = _differ_in_being_finite(piece, expected)
        if different.any():
            count = sum(int(_differ_in_being_finite(p, e).sum()) for _, p, e in pieces)
            return Comparison(math.nan, f"{count} elements differ in being finite, first at {_first(different, row)}")
        error, scale = _error_and_scale(piece, expected)
        errors += error.pow(2).sum(dtype=torch.float64).item()
        scales += scale.pow(2).sum(dtype=torch.float64).item()
    rms = math.sqrt(scales / ref.numel())
    relative = math.sqrt(errors) / max(math.sqrt(scales), 1e-30)
    rounded = tf32 and out.dtype == torch.float32
    grow = math.sqrt(depth) if out.dtype in (torch.float32, torch.float64) and not rounded else 1.0
    bound = (TF32_RELATIVE if rounded else RELATIVE[out.dtype]) * grow
    if not relative <= bound:
        return Comparison(relative, f"relative error {relative:.2e}, bound {bound:.2e}")
    # One wrong pixel cannot hide in the norm.
    unit = 4 * (TF32_EPS if rounded else EPS[out.dtype])
    for row, piece, expected in pieces:
        error, scale = _error_and_scale(piece, expected)
        bound_of_each = unit * (scale.abs() + rms * grow)
        over = ~(error <= bound_of_each)
        if over.any():
            at = tuple(_first(over))
            return Comparison(
                relative,
                f"element {_first(over, row)} is {piece[at].item()}, expected {expected[at].item()} within "
                f"{bound_of_each[at].item():.2e}",
            )
    return Comparison(relative, None)


def _differ_in_being_finite(out: Tensor, ref: Tensor) -> Tensor:
    same = (out == ref) | (out.isnan() & ref.isnan())
    return ~torch.where(torch.isfinite(ref), torch.isfinite(out), same)


def _error_and_scale(out: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(ref)
    scale = torch.where(finite, ref, 0)
    return torch.where(finite, out.to(ref.dtype) - scale, 0).abs(), scale


def _first(mask: Tensor, row: int = 0) -> list[int]:
    """Where the first True is, in a tensor of which this is what begins at `row`."""
    first, *others = mask.nonzero()[0].tolist()
    return [row + first, *others]
