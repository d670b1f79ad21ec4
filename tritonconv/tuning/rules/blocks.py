"""What the rules of several families share: blocks of patches, blocks of slots, and how much of a tile lies outside."""

from __future__ import annotations

import math
from typing import Any

from tritonconv.geometry import power, width
from tritonconv.tuning.devices import INTERPRETER, Device

__all__ = ["average_block", "covered", "outside_first", "patch_block", "slot_block"]

# Channels of a program that joins slots: sectors of 32 bytes at least, and many slots at once, for few programs must keep
# the memory busy.
JOINED = 8
# Channels of a program that averages sums.
AVERAGED = 64


def covered(*axes: tuple[int, int]) -> int:
    """Elements that blocks cover, of axes (size, block)."""
    return math.prod(-(-size // block) * block for size, block in axes)


def outside_first(config: Any, pixels: int, channels: int, channels_last: bool) -> tuple[int, int]:
    """A key that sorts tiles of BLOCK_P x BLOCK_C: the least outside first, then the longest of what lies side by side."""
    p, c = config.kwargs["BLOCK_P"], config.kwargs["BLOCK_C"]
    return covered((pixels, p), (channels, c)), -c if channels_last else -p


def patch_block(
    device: Device, channels_last: bool, channels: int, itemsize: int, across: int, lines: int, *, vectors: bool = True,
    warps: int = 4,
) -> tuple[int, int]:  # fmt: skip
    """(patches, channels) of a program: each thread has 16 bytes of channels of a patch.

    Half of that where they cannot be read by vectors: every element has an address of its own then.

    Args:
        across: patches in a row.
        lines: rows of patches in all images.
        vectors: whether the layout lets a thread read vectors.
    """
    vector = 16 // itemsize
    if not vectors or (channels_last and channels % vector):
        vector = max(1, vector // 2)
    if device.arch == INTERPRETER.arch:
        # One large block: the interpreter's time goes per operation, hardly per element.
        c = power(channels, 256)
        return power(across * lines if channels_last else across, (1 << 16) // c), c
    elements = device.warp_size * warps * vector
    if channels_last:
        c = width(channels, 128 // itemsize, 32 // itemsize)
    else:
        c = min(power(channels, elements), max(1, elements // power(across, device.warp_size * warps)))
    return elements // c, c


def slot_block(device: Device, slots: int, columns: int, most: int) -> tuple[int, int]:
    """(slots, columns) of a program that joins all slots of some columns, at most `most` slots at a time."""
    return power(slots, most), power(columns, 256) if device.arch == INTERPRETER.arch else JOINED


def average_block(device: Device, tiles: int, channels: int) -> tuple[int, int]:
    """(tiles, channels) of a program that adds the sums of an image's tiles."""
    return power(tiles, 64), power(channels, 256) if device.arch == INTERPRETER.arch else AVERAGED
