"""Configs of batch norm's kernels, which squeeze-excite's products share, and the blocks of squeeze-excite's gate."""

from __future__ import annotations

import functools
import math
from typing import Any

from tritonconv.geometry import power
from tritonconv.geometry.powers import WASTE
from tritonconv.tuning.devices import INTERPRETER, Device
from tritonconv.tuning.rules.blocks import slot_block

__all__ = ["batch_norm_config", "excite_block", "norm_join_config"]

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


def excite_block(channels: int, block_r: int, device: Device) -> int:
    """Channels of a tile of squeeze-excite's weights, `block_r` hidden ones wide."""
    return power(channels, 1 << 12 if device.arch == INTERPRETER.arch else max(16, TILE // block_r))
