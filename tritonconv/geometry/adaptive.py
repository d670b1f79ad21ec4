"""Adaptive pooling: bins of an axis, which may be ragged, may overlap by an element, and may outnumber the elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tritonconv.geometry.convolution import Triple
from tritonconv.geometry.limits import INT32_MAX

__all__ = ["AdaptiveGeometry"]


class AdaptiveGeometry(NamedTuple):
    """Bin i of an axis with `size` elements and `count` bins is [floor(i size / count), ceil((i + 1) size / count)).

    1-d and 2-d are 3-d with unit sizes in front.

    >>> g = AdaptiveGeometry.parse((8, 2048, 65, 65), (6, None), nd=2)
    >>> g.output, g.bin(1, 1), g.longest(1), g.most_bins(1), g.even(1)
    ((1, 6, 65), (10, 22), 12, 2, False)
    """

    nd: int
    batch: int
    channels: int
    input: Triple
    output: Triple

    @classmethod
    def parse(cls, x_shape: Sequence[int], output_size: object, nd: int) -> AdaptiveGeometry:
        """From an input (N, C, *spatial) and the user's output size, in which None leaves an axis as it is.

        Raises:
            TypeError: a size that is no integer.
            ValueError: sizes that are not positive, or too few or too many.
        """
        batch, channels, *spatial = x_shape
        given = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * nd
        if len(given) != nd or len(spatial) != nd:
            raise ValueError(f"expected {nd} output sizes and spatial axes, but got {given} for input {list(x_shape)}")
        output: tuple[Any, ...] = tuple(size if o is None else o for o, size in zip(given, spatial, strict=True))
        # Symbolic sizes count as integers.
        if any(isinstance(o, bool) or not (isinstance(o, int) or hasattr(o, "__index__")) for o in output):
            raise TypeError(f"output_size must be integers or None, but got {output_size!r}")
        if any(o < 1 for o in output) or any(size < 1 for size in x_shape):
            raise ValueError(f"nothing to pool: output size {output} of input {list(x_shape)}")
        ones = (1,) * (3 - nd)
        return cls(nd, batch, channels, (*ones, *spatial), (*ones, *output))  # type: ignore[arg-type]

    def bin(self, axis: int, i: int) -> tuple[int, int]:
        """(first, last + 1) element of bin i of an axis, which counts from 0 to 2."""
        size, count = self.input[axis], self.output[axis]
        return i * size // count, -(-(i + 1) * size // count)

    def even(self, axis: int) -> bool:
        """Whether the bins are windows side by side."""
        return self.input[axis] % self.output[axis] == 0

    def longest(self, axis: int) -> int:
        """Elements of the longest bin."""
        return _longest(self.input[axis], self.output[axis])

    def most_bins(self, axis: int) -> int:
        """The most bins that share an element: by symmetry the longest bin where sizes are exchanged."""
        return _longest(self.output[axis], self.input[axis])

    @property
    def is_global(self) -> bool:
        """Whether one bin covers the image."""
        return self.output == (1, 1, 1)

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
        """Why kernels, which count in 32 bits within an image, cannot have it; None where they can."""
        if math.prod(self.input) > INT32_MAX or any(
            (i + 1) * (o + 1) > INT32_MAX for i, o in zip(self.input, self.output, strict=True)
        ):
            return "images of 2^31 pixels have no kernel"
        return None

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.input[3 - self.nd :])), "x".join(map(str, self.output[3 - self.nd :]))
        return f"{self.batch}x{self.channels} of {sizes[0]} to {sizes[1]}"


@functools.lru_cache(maxsize=4096)
def _longest(size: int, count: int) -> int:
    # Bins repeat once both sizes are divided by what they share.
    period = count // math.gcd(size, count)
    return max(-(-(i + 1) * size // count) - i * size // count for i in range(period))
