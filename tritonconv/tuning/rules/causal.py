"""Configs of short causal convolutions, and how their sequences are divided among programs."""

from __future__ import annotations

from typing import Any, NamedTuple

from tritonconv.geometry import power
from tritonconv.tuning.devices import INTERPRETER, Device

__all__ = ["CausalBlocks", "causal_blocks", "causal_config", "causal_update_block"]

# Programs a multiprocessor; least patches of a walk, whose ends cost K - 1 steps more, and most.
WAVES, LEAST_WALK, LONGEST_WALK = 6, 4, 64
# Time steps from which a contiguous sequence takes the longer patch.
SHORT = 512
# Channels of an update's program.
UPDATED = 128


class CausalBlocks(NamedTuple):
    """What of sequences (B, D, T) a program has."""

    block_t: int
    block_c: int
    range: int
    """Patches of a walk."""
    slots: int
    """Walks for each block of channels."""


def causal_config(steps: int, channels_last: bool, taps: int, itemsize: int, backward: bool) -> Any:
    """The config without a measurement: the first that fits, the last for contiguous sequences of few patches."""
    from tritonconv.kernels.causal_conv1d import fitting

    allowed = fitting(channels_last=channels_last, backward=backward, taps=taps, itemsize=itemsize)
    return allowed[-1] if not channels_last and steps < SHORT else allowed[0]


def causal_blocks(
    config: Any, patch: int, sizes: tuple[int, int, int], itemsize: int, channels_last: bool, device: Device
) -> CausalBlocks:
    """How sequences of `sizes` (B, D, T) are divided, in patches of `patch` time steps."""
    b, d, t = sizes
    vector = config.kwargs.get("BYTES", 16) // itemsize
    threads = device.warp_size * config.num_warps
    patches = -(-t // patch)
    if device.arch == INTERPRETER.arch:
        # One large block: the interpreter's time goes per operation, hardly per element.
        block_c = power(d, 256)
        block_t = power(b * patches if channels_last else patches, 64)
    elif channels_last:
        # A line of memory, if there are so many channels.
        block_c = power(d, 128 // itemsize)
        block_t = max(1, threads * vector // block_c)
    else:
        # A warp to a channel, so that walks are long; its vectors are side by side all the same.
        block_t = power(patches, device.warp_size)
        block_c = power(d, threads // block_t)
    tiles = -(-d // block_c)
    if channels_last:
        blocks, most = -(-b * patches // block_t) * tiles, patches
    else:
        most = -(-patches // block_t)
        blocks = b * most * tiles
    wanted = max(LEAST_WALK, min(LONGEST_WALK, blocks // (WAVES * device.multiprocessors)))
    # Powers of two, which divide most lengths: then no walk ends behind the last step.
    steps = min(1 << (wanted.bit_length() - 1), power(most, LONGEST_WALK))
    slots = -(-b * -(-t // (steps * patch)) // block_t) if channels_last else b * -(-most // steps)
    return CausalBlocks(block_t, block_c, steps, slots)


def causal_update_block(channels: int, device: Device) -> int:
    """Channels of a program that moves the state on."""
    return power(channels, 1024 if device.arch == INTERPRETER.arch else UPDATED)
