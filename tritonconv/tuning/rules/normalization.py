"""Configs of batch norm's kernels, which others share, tiles of group norm's, and the blocks of squeeze-excite's gate."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from tritonconv.geometry import power, power_of_two_divisor
from tritonconv.geometry.powers import WASTE
from tritonconv.tuning.devices import INTERPRETER, Device
from tritonconv.tuning.rules.blocks import slot_block

__all__ = [
    "Tile",
    "batch_norm_config",
    "eight_warps",
    "excite_block",
    "group_tile",
    "join_tile",
    "most_channels",
    "norm_join_config",
]

# Elements of a tile of whole groups that fit into registers, for each tensor that a program holds, and fp64's.
HELD, WIDE = 1 << 15, 1 << 12
# Elements of a thread: more would spill, and fewer not hide latencies.
EACH = 32
# Channels of a pixel's group.
PIXEL = 1 << 14
# Channels of a program that joins slots of groups.
JOINED = 64

# Elements of a tile of squeeze-excite's weights.
TILE = 4096


@functools.lru_cache(maxsize=4096)
def batch_norm_config(pixels: int, channels: int, channels_last: bool, device: Device, walks: bool) -> Any:
    """The tile that is as long, along what lies side by side in memory, as it can be without much of it outside.

    Args:
        pixels: of a run of them.
        walks: whether a program goes over many blocks.
    """
    from tritonconv.kernels.batch_norm import configs, tile

    if device.arch == INTERPRETER.arch:
        # One large tile: the interpreter's time goes per operation, hardly per element.
        wide = power(channels, 256)
        return tile(power(pixels, (1 << 17) // wide), wide, 2)
    side, inner = (channels, "BLOCK_C") if channels_last else (pixels, "BLOCK_P")
    by_length = {config.kwargs[inner]: config for config in configs() if (config.num_stages > 1) == walks}
    covered = {length: math.ceil(side / length) * length for length in sorted(by_length, reverse=True)}
    fits = [length for length, cover in covered.items() if cover <= WASTE * side]
    return by_length[fits[0] if fits else min(covered, key=lambda length: covered[length])]


def norm_join_config(slots: int, columns: int, device: Device) -> Any:
    """Of kernels whose programs own some columns and join all slots of them."""
    import triton

    block_s, block_c = slot_block(device, slots, columns, 512)
    return triton.Config(dict(BLOCK_S=block_s, BLOCK_C=block_c), num_warps=8, num_stages=3)


class Tile(NamedTuple):
    """A tile of whole groups of channels, or of all channels of some pixels."""

    config: Any
    """The triton.Config."""
    pixels: int
    channels: int
    """Sizes of the tile, powers of two."""
    step: int
    """Channels that it owns."""
    groups: int
    """A power of two that is not below how many groups it has; 0: each channel is one."""
    candidates: tuple[Any, ...]
    """The configs that suit."""

    def constants(self) -> dict[str, int]:
        return dict(STEP=self.step, BLOCK_P=self.pixels, BLOCK_C=self.channels, BLOCK_G=self.groups)


@functools.lru_cache(maxsize=4096)
def group_tile(
    pixels: int, channels: int, size: int, per_pixel: bool, channels_last: bool, itemsize: int, held: int, walks: bool,
    device: Device, forced: Any = None,
) -> Tile | None:  # fmt: skip
    """The tile of a kernel that reads whole groups, or None if a group is too large for one.

    Args:
        pixels: of an image, or of all images where they are one run.
        size: channels of a group.
        per_pixel: whether a group is all channels of a pixel.
        held: how many tensors a program holds.
        walks: whether it goes over many tiles, and keeps two sums of each element's place.
        forced: a config to take if it suits.
    """
    from tritonconv.kernels.group_norm import whole

    wide = itemsize > 4
    block_p, block_c = power(pixels, 1 << 30), power(size, 1 << 30)
    least = block_c if per_pixel else block_p * block_c
    most = most_channels(itemsize) if per_pixel else WIDE if wide else HELD >> (held - 1)
    if device.arch in ("sm_80", "sm_86", "sm_89") and itemsize == 4 and held > 1 and not per_pixel:
        # Registers are handed out differently there, and a few bytes would spill.
        most //= 2
    if least > most:
        return None
    if per_pixel and not channels_last:
        # Sectors of 32 bytes at least, where pixels lie side by side.
        least = max(least, min(PIXEL, least * min(block_p, 32 // itemsize)))
    suiting = _whole_configs(least, EACH >> wide >> walks)
    if forced is not None and forced in suiting:
        config = forced
    else:
        # Small groups share a program, so that it has four full warps.
        config = next((c for c in suiting if c.kwargs["ELEMENTS"] >= 128 * (EACH >> wide >> walks)), suiting[0])
    if device.arch == INTERPRETER.arch and forced is None:
        # One large tile: the interpreter's time goes per operation, hardly per element.
        config = whole(1 << 17, 4)
    elements = max(least, config.kwargs["ELEMENTS"])
    if per_pixel:
        return Tile(config, min(block_p, elements // block_c), block_c, channels, 1, suiting)
    count = _groups_of_tile(channels // size, size, elements // block_p, elements, channels_last, itemsize)
    return Tile(config, block_p, power(count * size, 1 << 30), count * size, _compared(count, size), suiting)


def most_channels(itemsize: int) -> int:
    """How many channels a group of all channels of a pixel may have."""
    return PIXEL >> (itemsize > 4)


@functools.cache
def _whole_configs(least: int, each: int) -> tuple[Any, ...]:
    """The candidates for so many elements or more: those with at most `each` a thread, or the smallest one."""
    from tritonconv.kernels.group_norm import configs

    large = [c for c in configs() if c.kwargs.get("ELEMENTS", 0) >= least]
    return tuple(c for c in large if c.kwargs["ELEMENTS"] <= 32 * c.num_warps * each) or (large[0],)


@functools.cache
def eight_warps(config: Any) -> Any:
    """The same tile for 8 warps: half as many elements a thread, for fp64."""
    import triton

    return triton.Config(config.kwargs, num_warps=8, num_stages=config.num_stages)


def join_tile(channels: int, size: int, slots: int, device: Device) -> tuple[int, dict[str, int]]:
    """(channels, tile) of a program that joins all slots of some whole groups."""
    interpreted = device.arch == INTERPRETER.arch
    room, elements = (1 << 17, 1 << 17) if interpreted else (JOINED, 1 << 11)
    count = _groups_of_tile(channels // size, size, max(room, power(size, 1 << 30)), elements, False, 4)
    block = power(count * size, 1 << 30)
    blocks = dict(BLOCK_S=power(slots, max(1, elements // block)), BLOCK_C=block, BLOCK_G=_compared(count, size))
    return count * size, blocks


def _groups_of_tile(groups: int, size: int, room: int, elements: int, channels_last: bool, itemsize: int) -> int:
    """How many groups of `size` channels go into `room`: so that vectors start where tiles do, then as many as possible.

    The comparison of channels with groups may have as many places as the tile has elements.
    """

    def fits(count: int) -> bool:
        channels = power(count * size, 1 << 30)
        return channels <= room and channels * _compared(count, size) <= elements

    fitting = [count for count in range(1, min(groups, room // size) + 1) if fits(count)] or [1]
    vector = 16 // itemsize if channels_last else 1
    return max(fitting, key=lambda count: (min(vector, power_of_two_divisor(count * size)), count))


def _compared(count: int, size: int) -> int:
    return 0 if size == 1 else power(count, 1 << 30)


def excite_block(channels: int, block_r: int, device: Device) -> int:
    """Channels of a tile of squeeze-excite's weights, `block_r` hidden ones wide."""
    return power(channels, 1 << 12 if device.arch == INTERPRETER.arch else max(16, TILE // block_r))
