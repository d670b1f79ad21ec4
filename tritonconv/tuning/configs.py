"""Configs as values: what a triton.Config is called, and what of it tables keep."""

from __future__ import annotations

from typing import Any

__all__ = ["as_dict", "config_name", "name_of"]

# Of a config's numbers, in the order that its name has them.
NAMES = (
    "BLOCK_O", "BLOCK_M", "BLOCK_N", "BLOCK_K", "PATCH_P", "PATCH_Q", "BLOCK_P", "BLOCK_S", "BLOCK_C", "WALK", "BACK",
    "PATCH", "BYTES", "ELEMENTS",
)  # fmt: skip


def as_dict(config: Any) -> dict[str, int | bool]:
    """A triton.Config as tables keep it."""
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def name_of(config: Any) -> str:
    """What a triton.Config is called, None for a kernel without a choice."""
    return "its only config" if config is None else config_name(as_dict(config))


def config_name(config: dict[str, int | bool]) -> str:
    """A config, as `as_dict` gives it, in one word.

    >>> config_name(dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, USE_TMA=False, num_warps=8, num_stages=3))
    '128x128x64 w8 s3 pointers'
    """
    # In this order, whatever the dictionary's.
    blocks = (config[name] for name in NAMES if name in config)
    suffix = "" if config.get("USE_TMA", True) else " pointers"
    return f"{'x'.join(map(str, blocks))} w{config['num_warps']} s{config['num_stages']}{suffix}"
