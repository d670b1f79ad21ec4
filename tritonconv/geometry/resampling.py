"""Resampling: which elements of an axis a result is made of, with torch's own source coordinates."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tritonconv.geometry.convolution import Triple
from tritonconv.geometry.limits import INT32_MAX

__all__ = ["CORNERS", "EXACT", "LINEAR", "NEAREST", "SAME", "ResampleGeometry", "Resampling"]

Resampling = Literal["nearest", "nearest-exact", "linear", "linear-corners"]
"""How a result follows from its neighbors; "linear" has as many axes as the image has, "linear-corners" aligns corners."""
# How one axis is sampled, as the kernels count them.
SAME, NEAREST, EXACT, LINEAR, CORNERS = range(5)
RULES = {"nearest": NEAREST, "nearest-exact": EXACT, "linear": LINEAR, "linear-corners": CORNERS}


class ResampleGeometry(NamedTuple):
    """Result o of an axis lies at scale * o (nearest, aligned corners), at scale * (o + 1/2), or at that less 1/2 (linear).

    1-d and 2-d are 3-d with unit sizes in front. Scales follow from the sizes, or from the factor that a user gave.

    >>> g = ResampleGeometry.parse((8, 64, 10, 20), (15, 20), (1.55, 1.0), "linear")
    >>> g.rule(1), g.rule(2), g.scale(1, wide=True) == 1 / 1.55
    (3, 0, True)
    """

    nd: int
    batch: int
    channels: int
    input: Triple
    output: Triple
    factors: tuple[float, float, float]
    """Zero where the scale follows from the sizes."""
    mode: Resampling

    @classmethod
    def parse(
        cls, x_shape: Sequence[int], output: Sequence[int], factors: Sequence[float] | None, mode: Resampling
    ) -> ResampleGeometry:
        """From an input (N, C, *spatial), the result's spatial sizes, and the factors that a user gave, if any.

        Raises:
            ValueError: sizes that are not positive, or too few or too many numbers.
        """
        batch, channels, *spatial = x_shape
        nd = len(spatial)
        given = tuple(factors) if factors else (0.0,) * nd
        if not 1 <= nd <= 3 or len(output) != nd or len(given) != nd:
            raise ValueError(
                f"expected a size and a factor for each axis, but got {list(x_shape)} to {list(output)}, {given}"
            )
        if any(size < 1 for size in (*x_shape, *output)):
            raise ValueError(f"nothing to resample: {list(x_shape)} to {list(output)}")
        ones = (1,) * (3 - nd)
        # As torch has it, factors that are not positive do not count.
        scales = (*(0.0,) * (3 - nd), *(float(f) if f > 0 else 0.0 for f in given))
        return cls(nd, batch, channels, (*ones, *spatial), (*ones, *output), scales, mode)  # type: ignore[arg-type]

    def scale(self, axis: int, wide: bool) -> float:
        """Elements from a result to the next, in fp32 or fp64, which torch computes it in; axes count from 0 to 2."""
        size, count, factor = self.input[axis], self.output[axis], self.factors[axis]
        if self.mode == "linear-corners":
            return _quotient(size - 1, count - 1, wide) if count > 1 else 0.0
        if factor > 0:
            return 1.0 / factor if wide else _single(1.0 / factor)
        return _quotient(size, count, wide)

    def rule(self, axis: int) -> int:
        """How this axis is sampled."""
        rule, same = RULES[self.mode], self.input[axis] == self.output[axis]
        if same and (rule in (LINEAR, CORNERS) or self.scale(axis, False) == 1.0):
            return SAME
        return rule

    def inverse(self, axis: int) -> float:
        """Results from an element to the next, roughly."""
        scale = self.scale(axis, True)
        # All results lie on one element.
        return 1.0 / scale if scale > 0 else float(self.output[axis])

    @property
    def elements(self) -> int:
        return self.batch * self.channels * math.prod(self.input)

    @property
    def results(self) -> int:
        return self.batch * self.channels * math.prod(self.output)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the result, (N, C, *spatial)."""
        return (self.batch, self.channels, *self.output[3 - self.nd :])

    @property
    def limit(self) -> str | None:
        """Why kernels, which count pixels in 32 bits, cannot have it; None where they can."""
        if max(math.prod(self.input), math.prod(self.output)) > INT32_MAX:
            return "images of 2^31 pixels have no kernel"
        return None

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.input[3 - self.nd :])), "x".join(map(str, self.output[3 - self.nd :]))
        return f"{self.mode} of {self.batch}x{self.channels} of {sizes[0]} to {sizes[1]}"


@functools.lru_cache(maxsize=4096)
def _single(value: float) -> float:
    """The nearest number in fp32."""
    try:
        result: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        result = math.inf
    return result


def _quotient(a: int, b: int, wide: bool) -> float:
    # Rounded twice, a quotient of fp32 numbers is the same.
    return a / b if wide else _single(_single(float(a)) / _single(float(b)))
