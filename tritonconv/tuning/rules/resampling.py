"""Configs of resampling and of shuffles."""

from __future__ import annotations

import functools
from typing import Any, Literal

from tritonconv.geometry import power
from tritonconv.tuning.devices import INTERPRETER, Device
from tritonconv.tuning.rules.blocks import outside_first

__all__ = ["resample_config", "shuffle_config"]


@functools.lru_cache(maxsize=4096)
def resample_config(
    direction: Literal["forward", "backward"], width: int, channels: int, channels_last: bool, device: Device
) -> Any:
    """The tile of which least lies outside; `width`: of the image that is written."""
    from tritonconv.kernels import resample, resample_backward

    module = resample if direction == "forward" else resample_backward

    if device.arch == INTERPRETER.arch:
        # One large tile: the interpreter's time goes per operation, hardly per element.
        pixels = power(width, 256)
        return module.tile(pixels, power(channels, (1 << 16) // pixels))
    # Channels-last, at least half a line of memory.
    allowed = (config for config in module.configs() if (config.kwargs["BLOCK_C"] >= 32) == channels_last)
    return min(allowed, key=lambda config: outside_first(config, width, channels, channels_last))


@functools.lru_cache(maxsize=4096)
def shuffle_config(device: Device, size: int) -> Any:
    """None was measured; in the interpreter one tile for all `size` bytes behind the outer axes that programs are for."""
    from tritonconv.kernels.shuffle import tile

    return tile(power(size, 1 << 17, least=1024) if device.arch == INTERPRETER.arch else 8192)
