"""Boxes of pixels and phases of strides: how a convolution is cut into copies of neighbors.

A copy engine moves boxes of a tensor, with zeros where they leave it. A convolution with a stride is a sum over such boxes
too, of tensors that hold every stride-th pixel of an axis: its phases.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from tritonconv.geometry.convolution import ConvGeometry, Pass

__all__ = ["Box", "Taps", "best_box", "boxes_over", "pass_extents", "phase_size", "phases_of", "tap_hops", "tap_places"]

Box = tuple[int, int, int, int]
"""Pixels of [N, O, P, Q] in a box."""


class Taps(NamedTuple):
    """The filter positions along an axis that belong to one phase of a stride: first, first + step, ..."""

    pixel: int
    """The phase's first pixel."""
    first: int
    number: int
    shift: int
    """Where the other tensor is seen through the first of them from pixel 0 of a phase."""


def boxes_over(extents: Box, box: Box) -> int:
    """How many boxes cover so many pixels."""
    return math.prod(-(-size // side) for size, side in zip(extents, box, strict=True))


@functools.lru_cache(maxsize=4096)
def best_box(extents: Box, pixels: int) -> Box:
    """The box of so many pixels, a power of two, of which the least lies outside; of equals the one nearest to a square.

    Images take part as an axis like others, so that small ones waste nothing.

    >>> best_box((256, 1, 14, 14), 128), best_box((1, 1, 512, 512), 128)
    ((32, 1, 2, 2), (1, 1, 8, 16))
    """
    sides = [1 << k for k in range(pixels.bit_length())]
    fitting = ((pixels // (o * p * q), o, p, q) for o in sides for p in sides for q in sides if pixels % (o * p * q) == 0)
    # A square reaches the fewest pixels around it.
    return min(
        (box for box in fitting if max(box) <= 256),
        key=lambda box: (boxes_over(extents, box), -min(box[2], box[3]), -box[3], -box[2], -box[1]),
    )


def phases_of(taps: int, stride: int, padding: int, dilation: int, back: bool) -> tuple[Taps, ...]:
    """An axis's phases: forward those of the image that some tap sees, back all of the gradient's.

    >>> phases_of(3, 2, 1, 1, back=False)
    (Taps(pixel=0, first=1, number=1, shift=0), Taps(pixel=1, first=0, number=2, shift=-1))
    >>> phases_of(3, 2, 1, 1, back=True)
    (Taps(pixel=1, first=0, number=2, shift=1), Taps(pixel=0, first=1, number=1, shift=0))
    """
    result = []
    for phase in range(stride):
        offset = 0 if back else padding
        own = [tap for tap in range(taps) if (tap * dilation - offset) % stride == phase]
        first = own[0] if own else 0
        if back:
            pixel = (phase - padding) % stride
            shift = (pixel + padding - first * dilation) // stride if own else 0
            result.append(Taps(pixel, first, len(own), shift))
        elif own:
            result.append(Taps(phase, first, len(own), (first * dilation - padding - phase) // stride))
    return tuple(result)


def tap_hops(stride: int, dilation: int) -> tuple[int, int]:
    """(taps, pixels of the other tensor) from one tap of a phase to the next."""
    step = stride // math.gcd(stride, dilation)
    return step, step * dilation // stride


def tap_places(taps: int, stride: int, padding: int, dilation: int) -> tuple[tuple[int, int], ...]:
    """For each tap along an axis (which of `phases_of`'s forward phases, where it sees it from pixel 0).

    >>> tap_places(3, 2, 1, 1)
    ((1, -1), (0, 0), (1, 0))
    """
    phases = phases_of(taps, stride, padding, dilation, back=False)
    step, hop = tap_hops(stride, dilation)
    places = {
        phase.first + j * step: (index, phase.shift + j * hop)
        for index, phase in enumerate(phases) for j in range(phase.number)
    }  # fmt: skip
    return tuple(places[tap] for tap in range(taps))


def phase_size(size: int, pixel: int, stride: int) -> int:
    """Pixels of an axis from `pixel` on, every stride-th."""
    return max(0, -(-(size - pixel) // stride))


def pass_extents(g: ConvGeometry, pass_: Pass) -> Box:
    """[N, O, P, Q] that a pass's boxes cover: pixels of the result, of its largest phase, or of the sum."""
    if pass_ == "dgrad":
        d, h, w = (phase_size(size, 0, stride) for size, stride in zip(g.input, g.stride, strict=True))
        return g.batch, d, h, w
    return g.batch, *g.output
