"""TMA: tiled descriptors, and copies of boxes between them and shared memory."""

from __future__ import annotations

from typing import Any

import torch

from .barriers import barrier_of
from .errors import Fault, Refused
from .memory import View, read_async, write_async
from .scalars import Wide, narrow
from .scheduler import Operation, machine
from .tensors import dtype_of

__all__ = ["Block", "Descriptor", "async_load", "async_store", "store_wait"]


class Block:
    """A descriptor's block_type."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.element_ty = self.scalar = dtype
        self.shape = shape
        self.numel = torch.Size(shape).numel()
        self.nbytes = self.numel * dtype.primitive_bitwidth // 8


class Descriptor:
    """A tiled TMA descriptor: boxes of a tensor in global memory."""

    def __init__(self, source: Any, name: str, written: Any) -> None:
        base = source.base
        self.name, self.written, self.layout = name, written, source.layout
        self.dtype = dtype_of(base.dtype)
        self.block_shape = [int(x) for x in source.block_shape]
        self.block_type = Block(self.dtype, self.block_shape)
        shape, strides = [int(x) for x in source.shape], [int(x) for x in source.strides]
        self.check(base, shape, strides)
        # As Triton passes them: sizes are 32 bits wide, strides 64.
        self.shape, self.strides = tuple(map(narrow, shape)), tuple(map(Wide, strides))
        self.fill = float("nan") if source.padding == "nan" else 0
        try:
            self.tensor = torch.as_strided(base, shape, strides, base.storage_offset())
        except RuntimeError:
            raise Fault(f"descriptor {name}: {shape} with strides {strides} reaches past its tensor") from None
        self.place = shape, strides, base.storage_offset()

    @property
    def nbytes_per_cta(self) -> int:
        return self.block_type.nbytes

    def check(self, base: torch.Tensor, shape: list[int], strides: list[int]) -> None:
        """TMA's own limits."""
        size = base.element_size()
        faults = [
            (not 1 <= len(shape) <= 5, f"rank {len(shape)} is not 1 to 5"),
            (len(shape) != len(strides) or len(shape) != len(self.block_shape), "ranks differ"),
            (max(self.block_shape) > 256, f"a block dimension of {self.block_shape} is more than 256"),
            (self.block_shape[-1] * size % 16 != 0, f"rows of {self.block_shape} are no multiple of 16 bytes"),
            (any(stride * size % 16 for stride in strides[:-1]), f"strides {strides} are no multiples of 16 bytes"),
            (any(not 0 <= stride * size < 2**40 for stride in strides), f"strides {strides} are not below 2**40 bytes"),
            (strides[-1] != 1, f"the innermost stride of {strides} is not 1"),
            (base.data_ptr() % 16 != 0, "the base is not aligned to 16 bytes"),
            (min(shape) < 1, f"an empty dimension in {shape}"),
        ]
        for fault, message in faults:
            if fault:
                raise Fault(f"descriptor {self.name}: {message}")

    def clip(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...], bool]:
        """The part of a box that lies in the tensor: where there, where in the box, and whether it is all of it."""
        there, here = [], []
        whole = True
        for start, length, size in zip(corner, self.block_shape, self.tensor.shape, strict=True):
            low = min(max(start, 0), size)
            high = max(min(start + length, size), low)
            there.append(slice(low, high))
            here.append(slice(low - start, high - start) if high > low else slice(0, 0))
            whole = whole and high - low == length
        return tuple(there), tuple(here), whole

    def corner(self, coordinates: Any) -> list[int]:
        corner = [int(x) for x in coordinates]
        if len(corner) != len(self.block_shape):
            raise Fault(f"descriptor {self.name}: {len(corner)} coordinates for rank {len(self.block_shape)}")
        # Triton's tutorial on TMA calls others illegal, and its sanitizer of illegal instructions looks for them.
        if corner[-1] * self.tensor.element_size() % 16:
            raise Fault(f"descriptor {self.name}: the innermost coordinate of {corner} is no multiple of 16 bytes")
        return corner

    def match(self, view: View) -> None:
        if view.shape != self.block_shape or view.dtype != self.dtype:
            raise Fault(
                f"{view.name} has shape {view.shape} of {view.dtype}, and boxes of {self.name} {self.block_shape} of"
                f" {self.dtype}"
            )

    def __getattr__(self, name: str) -> Any:
        raise Refused(f"tensor_descriptor.{name}")


def async_load(
    tensor_desc: Descriptor, coord: Any, barrier: View, result: View, pred: Any = True, multicast: bool = False,
    cache_policy: Any = None,
) -> None:  # fmt: skip
    """Copy a box to shared memory, zeros where it leaves the tensor; the barrier gets the block's bytes."""
    del cache_policy
    if multicast:
        raise Refused("multicast")
    m = machine()
    m.switch()
    if not pred:
        return
    me = m.current
    corner = tensor_desc.corner(coord)
    tensor_desc.match(result)
    announced = barrier_of(barrier)
    nbytes = tensor_desc.block_type.nbytes
    load = Operation("load", me, 0, f"{tensor_desc.name} {corner}", (result.name,))
    write_async(result, me, load, f"TMA load of {tensor_desc.name}")
    load.barrier, load.phase = announced, announced.phase
    announced.copies += 1

    def complete() -> None:
        there, here, whole = tensor_desc.clip(corner)
        if whole:
            result.data.copy_(tensor_desc.tensor[there])
        else:
            result.data.fill_(tensor_desc.fill)
            result.data[here] = tensor_desc.tensor[there]
        m.trace.bytes_loaded += nbytes
        load.phase = announced.phase
        announced.copies -= 1
        announced.arrive_bytes(nbytes)

    load.complete = complete
    m.issue(load, nbytes)


def async_store(tensor_desc: Descriptor, coord: Any, src: View, cache_policy: Any = None) -> None:
    """Copy a box from shared memory, as far as it lies in the tensor; a commit group of its own."""
    del cache_policy
    m = machine()
    m.switch()
    me = m.current
    corner = tensor_desc.corner(coord)
    tensor_desc.match(src)
    me.issued["store"] += 1
    store = Operation("store", me, me.issued["store"], f"{tensor_desc.name} {corner}", (src.name,))
    read_async(src, me, "store", store.number, f"TMA store to {tensor_desc.name}")

    def complete() -> None:
        there, here, _ = tensor_desc.clip(corner)
        part = tensor_desc.tensor[there]
        tensor_desc.written.box(tensor_desc, there, corner, store.where)
        part.copy_(src.data[here])
        m.trace.bytes_stored += part.numel() * part.element_size()

    store.complete = complete
    m.issue(store, tensor_desc.block_type.nbytes)


def store_wait(pendings: int, read_only: bool = True) -> None:
    """Wait until at most so many of this thread's latest stores may still read shared memory."""
    del read_only
    m = machine()
    me = m.current
    last = me.issued["store"] - int(pendings)

    def ready() -> bool:
        return not any(c.kind == "store" and c.thread is me and c.number <= last for c in m.copies)

    m.wait(ready, f"its TMA stores but {int(pendings)}")
    me.wait_for_own("store", int(pendings))
