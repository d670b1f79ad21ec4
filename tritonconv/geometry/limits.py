"""How far 32-bit offsets reach."""

from __future__ import annotations

__all__ = ["INT32_MAX", "needs_int64"]

INT32_MAX = 2**31 - 1


def needs_int64(elements: int) -> bool:
    """Whether offsets within so many elements need 64 bits.

    >>> needs_int64(2**31 - 1), needs_int64(2**31)
    (False, True)
    """
    return elements > INT32_MAX
