"""What stands in for Gluon's and Triton's modules while a kernel is interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as gl_mbarrier

from . import barriers, copies, functions, memory, products
from .errors import Fault, Refused
from .scalars import Scalar, loop
from .scheduler import machine
from .tensors import Tensor

__all__ = ["BUILTINS", "Namespace", "stand_in", "stand_in_module"]


class Namespace:
    """A module's stand-in: what it does not know is refused when it is used."""

    def __init__(self, name: str, members: dict[str, Any], real: Any = None) -> None:
        self._name, self._members, self._real = name, members, real

    def __getattr__(self, name: str) -> Any:
        if name in self._members:
            return self._members[name]
        if name.startswith("__"):
            # Whoever looks into objects asks for these; no device code does.
            raise AttributeError(name)
        real = getattr(self._real, name, None)
        # Types and layouts are the real ones.
        if isinstance(real, tl.dtype) or (isinstance(real, type) and name.endswith("Layout")):
            return real
        if isinstance(real, tl.constexpr):
            return real.value
        return Unknown(f"{self._name}.{name}")


class Unknown:
    """A name that the interpreter does not know: it may be passed around, and not be used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise Refused(self._name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Refused(f"{self._name}.{name}")


def barrier(*, cluster: bool = False) -> None:
    """Of the threads of the running partition."""
    if cluster:
        raise Refused("a barrier of a cluster")
    m = machine()
    m.switch()
    m.current.rendezvous()


def fence_async_shared(cluster: bool = False) -> None:
    """What this partition has written to shared memory may be published to the async proxy."""
    if cluster:
        raise Refused("a fence of a cluster")
    m = machine()
    m.switch()
    me = m.current
    me.fenced = me.epoch
    me.epoch += 1


def warp_specialize(
    functions_and_args: Sequence[tuple[Callable[..., Any], Sequence[Any]]], worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:  # fmt: skip
    """Partitions: the first one with the caller's warps, whose results are returned."""
    count = len(functions_and_args) - 1
    if len(worker_num_warps) != count or (worker_num_regs is not None and len(worker_num_regs) != count):
        raise Fault(f"warp_specialize: {count} workers, and warps {worker_num_warps}, registers {worker_num_regs}")
    for fn, args in functions_and_args[1:]:
        if any(isinstance(arg, Tensor) and arg.shape for arg in args):
            raise Fault(f"warp_specialize: {fn.__name__} is a worker, which takes no tensors")
    return machine().specialize(functions_and_args, worker_num_warps)


def builtin_extremum(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Python's min and max, of run-time values too."""

    def extremum(*values: Any) -> Any:
        if len(values) == 2 and any(isinstance(value, Scalar | Tensor) for value in values):
            return functions.FUNCTIONS[name](*values)
        return function(*values)

    return extremum


BUILTINS: dict[str, Any] = {
    "range": loop,
    "min": builtin_extremum("minimum", min),
    "max": builtin_extremum("maximum", max),
}


def same(value: Any) -> Any:
    return value


MBARRIER = Namespace(
    "mbarrier",
    {
        "MBarrierLayout": gl_mbarrier.MBarrierLayout, "allocate_mbarrier": barriers.allocate_mbarrier,
        "arrive": barriers.arrive, "expect": barriers.expect, "init": barriers.init, "invalidate": barriers.invalidate,
        "wait": barriers.wait,
    },
)  # fmt: skip

TMA = Namespace(
    "tma",
    {
        "async_copy_global_to_shared": copies.async_load, "async_copy_shared_to_global": copies.async_store,
        "async_load": copies.async_load, "async_store": copies.async_store, "store_wait": copies.store_wait,
    },
)  # fmt: skip

HOPPER = Namespace(
    "hopper",
    {
        "fence_async_shared": fence_async_shared, "mbarrier": MBARRIER, "tma": TMA,
        "warpgroup_mma": products.warpgroup_mma, "warpgroup_mma_init": products.warpgroup_mma_init,
        "warpgroup_mma_wait": products.warpgroup_mma_wait,
    },
)  # fmt: skip

LANGUAGE = {
    **functions.FUNCTIONS, "allocate_shared_memory": memory.allocate, "barrier": barrier, "constexpr": same,
    "num_ctas": lambda: 1, "range": loop, "thread_barrier": barrier, "warp_specialize": warp_specialize,
}  # fmt: skip
# Of Triton's own language, what Gluon has too.
SHARED = set(functions.FUNCTIONS) | {"constexpr", "range"}

GLUON = Namespace("gl", {**LANGUAGE, "nvidia": Namespace("gl.nvidia", {"hopper": HOPPER})}, gl)
TRITON_LANGUAGE = Namespace(
    "tl",
    {
        **{name: LANGUAGE[name] for name in SHARED}, "math": Namespace("tl.math", functions.FUNCTIONS),
        "PropagateNan": tl.PropagateNan,
    },
    tl,
)  # fmt: skip
TRITON = Namespace(
    "triton", {"cdiv": functions.cdiv, "language": TRITON_LANGUAGE, "next_power_of_2": triton.next_power_of_2}
)
GLUON_PACKAGE = Namespace("gluon", {"language": GLUON})

MODULES = {
    "triton": TRITON,
    "triton.language": TRITON_LANGUAGE,
    "triton.language.math": TRITON_LANGUAGE.math,
    "triton.experimental.gluon": GLUON_PACKAGE,
    "triton.experimental.gluon.language": GLUON,
    "triton.experimental.gluon.language.nvidia": GLUON.nvidia,
    "triton.experimental.gluon.language.nvidia.hopper": HOPPER,
    "triton.experimental.gluon.language.nvidia.hopper.mbarrier": MBARRIER,
    "triton.experimental.gluon.language.nvidia.hopper.tma": TMA,
    "triton.experimental.gluon.language.nvidia.ampere.mbarrier": MBARRIER,
}


def stand_in_module(name: str) -> Namespace:
    """A module of Triton's."""
    return MODULES.get(name) or Namespace(name, {})


def stand_in(module: str, name: str) -> Any:
    """A function of Triton's that was imported by name, found by where it comes from."""
    last = module.rsplit(".", 1)[-1]
    owner = {"mbarrier": MBARRIER, "tma": TMA, "hopper": HOPPER}.get(last)
    if owner is None:
        owner = TRITON_LANGUAGE if "gluon" not in module else GLUON
        if name in LANGUAGE:
            return LANGUAGE[name]
    return getattr(owner, name)
