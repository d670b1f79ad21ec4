"""Powers of two around sizes: what tiles and vectors are made of."""

from __future__ import annotations

import math

__all__ = ["power", "power_of_two_divisor", "width"]

# A tile may be wider than what it covers by this factor.
WASTE = 1.125


def power(n: int, most: int, least: int = 1) -> int:
    """The least power of two that is not below n, within [least, most].

    >>> power(5, 64), power(100, 64), power(3, 64, least=16)
    (8, 64, 16)
    """
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


def power_of_two_divisor(*values: int) -> int:
    """The largest power of two up to 16 that divides all values.

    >>> power_of_two_divisor(24, 40), power_of_two_divisor(64), power_of_two_divisor(7)
    (8, 16, 1)
    """
    return math.gcd(16, *values)


def width(size: int, most: int, least: int) -> int:
    """The widest power of two within [least, most] of which, in blocks over `size`, little lies outside.

    >>> width(96, 64, 8), width(24, 64, 8)
    (32, 8)
    """
    widths = [most >> k for k in range(most.bit_length()) if most >> k >= least]
    covers = {w: -(-size // w) * w for w in widths}
    return next((w for w in widths if covers[w] <= WASTE * size), min(widths, key=lambda w: (covers[w], -w)))
