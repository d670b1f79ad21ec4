"""Configs of adaptive and global pooling, and of their gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

from tritonconv.geometry import AdaptiveGeometry, power
from tritonconv.tuning.devices import INTERPRETER, Device
from tritonconv.tuning.rules.blocks import covered, outside_first, slot_block

__all__ = [
    "adaptive_pool_config", "adaptive_pool_gradient_config", "global_join_config", "global_pool_config",
    "global_spread_config",
]  # fmt: skip

# Elements of a program that writes memory in a row.
FLAT = 2048


@functools.lru_cache(maxsize=4096)
def global_pool_config(channels: int, pixels: int, channels_last: bool, device: Device, walks: bool) -> Any:
    """Of kernels over whole images: as long along what lies side by side as it can be without much of it outside.

    Args:
        walks: whether a program goes over many blocks.
    """
    from tritonconv.kernels.global_pool import configs, tile

    if device.arch == INTERPRETER.arch:
        # One large tile: the interpreter's time goes per operation, hardly per element.
        wide_c = power(channels, 256)
        return tile(power(pixels, (1 << 17) // wide_c), wide_c, 2 if walks else 1)
    allowed = [config for config in configs() if (config.num_stages > 1) == walks]
    side, inner = (channels, "BLOCK_C") if channels_last else (pixels, "BLOCK_P")
    return min(allowed, key=lambda config: _cover(side, config.kwargs[inner]))


def _cover(side: int, block: int) -> tuple[float, int]:
    """What blocks cover of a side, in eighths of it, and then the widest first."""
    return math.ceil(8 * math.ceil(side / block) * block / side), -block


def global_join_config(channels: int, slots: int, device: Device) -> Any:
    """Of the kernel that joins the parts of images."""
    import triton

    block_s, block_c = slot_block(device, slots, channels, 256)
    return triton.Config(dict(BLOCK_S=block_s, BLOCK_C=block_c), num_warps=4, num_stages=3)


def global_spread_config(elements: int, device: Device) -> Any:
    """Of the gradient that is written in a row."""
    import triton

    block = power(elements, 1 << 17) if device.arch == INTERPRETER.arch else FLAT
    return triton.Config(dict(BLOCK=block), num_warps=4, num_stages=1)


@functools.lru_cache(maxsize=4096)
def adaptive_pool_config(g: AdaptiveGeometry, longest: int, channels_last: bool, device: Device) -> Any:
    """The tile of which least lies outside, of bins of up to `longest` elements in a row."""
    from tritonconv.kernels.adaptive_pool import configs, tile

    if device.arch == INTERPRETER.arch:
        results, lanes = power(g.output[2], 32), power(longest, 16)
        return tile(results, lanes, power(g.channels, (1 << 16) // (results * lanes)))

    def cover(config: Any) -> tuple[int, int]:
        o, k, c = config.kwargs.values()
        return covered((g.output[2], o), (longest, k), (g.channels, c)), -k

    def fits(config: Any) -> bool:
        o, k, c = config.kwargs.values()
        # Side by side, a line of memory or half of one.
        return c >= 64 if channels_last else o * k >= 32

    return min(filter(fits, configs()), key=cover)


@functools.lru_cache(maxsize=4096)
def adaptive_pool_gradient_config(g: AdaptiveGeometry, channels_last: bool, device: Device) -> Any:
    """Of the gradient whose pixels ask the bins that cover them."""
    from tritonconv.kernels.adaptive_pool_backward import configs, tile

    if device.arch == INTERPRETER.arch:
        pixels = power(g.input[2], 256)
        return tile(pixels, power(g.channels, (1 << 16) // pixels))
    # Channels-last, at least half a line of memory.
    allowed = (config for config in configs() if (config.kwargs["BLOCK_C"] >= 32) == channels_last)
    return min(allowed, key=lambda config: outside_first(config, g.input[2], g.channels, channels_last))
