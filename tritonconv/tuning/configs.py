"""Configs as values: what a triton.Config is called, and what of it tables keep."""

from __future__ import annotations

from typing import Any

__all__ = ["as_dict", "config_name"]


def as_dict(config: Any) -> dict[str, int | bool]:
    """A triton.Config as tables keep it."""
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def config_name(config: dict[str, int | bool]) -> str:
    """A config, as `as_dict` gives it, in one word.

    >>> config_name(dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, USE_TMA=False, num_warps=8, num_stages=3))
    '128x128x64 w8 s3 pointers'
    """
    c = config
    suffix = "" if c["USE_TMA"] else " pointers"
    return f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']} w{c['num_warps']} s{c['num_stages']}{suffix}"
