"""Gluon by one set of names: Triton 3.6 to 3.9 call some of them differently. Device code imports Gluon from here alone."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = [
    "barrier", "fence_async_shared", "gl", "jit", "load_box", "mbarrier", "store_box", "store_wait", "warpgroup_mma",
    "warpgroup_mma_wait",
]  # fmt: skip

jit = gluon.jit
store_wait = tma.store_wait


def _either(owner: Any, new: str, old: str) -> Any:
    return getattr(owner, new) if hasattr(owner, new) else getattr(owner, old)


# Of the threads of a partition: from 3.7 on, before that.
barrier = _either(gl, "barrier", "thread_barrier")
# From 3.8 on, before that.
load_box = _either(tma, "async_load", "async_copy_global_to_shared")
store_box = _either(tma, "async_store", "async_copy_shared_to_global")
