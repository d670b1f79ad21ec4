"""Launches: arguments as a kernel sees them, programs one after another, and which results have been written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .copies import Descriptor
from .errors import Fault, Refused
from .load import Device, interpreted
from .scalars import Flag, Scalar, Wide, fits
from .scheduler import Current, Machine, Schedule
from .schedules import Random
from .tensors import Pointer, Tensor
from .trace import Trace

__all__ = ["run"]


class Written:
    """Which elements of global memory a launch has written."""

    def __init__(self, overwrites: bool) -> None:
        self.overwrites = overwrites
        self.masks: dict[Any, torch.Tensor] = {}
        self.ids: dict[Any, torch.Tensor] = {}

    def mask(self, tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.element_size()
        if key not in self.masks:
            self.masks[key] = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.bool)
        return key, self.masks[key]

    def box(self, descriptor: Descriptor, there: tuple[slice, ...], corner: list[int], where: Any) -> None:
        if self.overwrites:
            return
        part = torch.as_strided(self.mask(descriptor.tensor)[1], *descriptor.place)[there]
        if bool(part.any()):
            raise Fault(f"written twice: elements of the box at {corner} of {descriptor.name}", where)
        part.fill_(True)

    def elements(self, pointer: Pointer, offsets: torch.Tensor) -> None:
        if self.overwrites or not offsets.numel():
            return
        key, mask = self.mask(pointer.data)
        offsets = offsets + int(pointer.data.storage_offset())
        if key not in self.ids:
            self.ids[key] = torch.empty(mask.numel(), dtype=torch.int32)
        # Of equal offsets, one number survives.
        numbers = torch.arange(offsets.numel(), dtype=torch.int32)
        self.ids[key][offsets] = numbers
        if bool(mask[offsets].any()) or not torch.equal(self.ids[key][offsets], numbers):
            raise Fault(f"written twice: elements of {pointer.name}")
        mask[offsets] = True


def argument(value: Any, name: str, written: Written, constant: bool = False) -> Any:
    """An argument of a launch as device code sees it."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise Refused(f"{name} is on {value.device}")
        count = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
        return Pointer(torch.as_strided(value.detach(), (count,), (1,), value.storage_offset()), 0, name)
    if isinstance(value, TensorDescriptor):
        return Descriptor(value, name, written)
    if isinstance(value, tuple | list):
        return tuple(argument(item, f"{name}[{i}]", written, constant) for i, item in enumerate(value))
    if constant or value is None:
        return interpreted(value)
    if isinstance(value, bool):
        return Flag(value)
    if isinstance(value, int):
        return Scalar(value) if fits(value, 32) else Wide(value)
    if isinstance(value, float):
        return Tensor.of(value)
    return interpreted(value)


def run(
    kernel: Any, programs: int, arguments: Mapping[str, Any], schedule: Schedule | None = None, num_warps: int = 8,
    overwrites: bool = False,
) -> Trace:  # fmt: skip
    """Interpret a launch.

    Args:
        kernel: a function decorated with gluon.jit; its module is not loaded again.
        programs: the grid, of one dimension. Programs run one after another, in random order.
        arguments: by name. CPU tensors are pointers, TensorDescriptors descriptors, and tuples of any of these tuples.
        schedule: `Random(seed)` or `Timed()`.
        num_warps: of the kernel, and of its default partition.
        overwrites: an element of a result may be written more than once.

    Raises:
        Fault: the program would hang, race or read garbage on a GPU.
        Refused: it does something that the interpreter does not know.
    """
    schedule = schedule or Random(0)
    fn = interpreted(kernel)
    if not isinstance(fn, Device):
        raise Refused(f"{kernel!r} is no device function")
    written = Written(overwrites)
    bound = {name: argument(value, name, written, name in fn.constants) for name, value in arguments.items()}
    trace = Trace()
    order = list(range(programs))
    if isinstance(schedule, Random):
        schedule.random.shuffle(order)
    for program in order:
        trace.starts.append((program, len(trace.events)))
        launch(fn, bound, Machine(schedule, trace, written, program, programs, num_warps))
    return trace


def launch(fn: Device, bound: Mapping[str, Any], machine: Machine) -> None:
    if Current.machine is not None:
        raise Refused("a launch within a launch")
    Current.machine = machine
    try:
        fn(**bound)
        machine.end()
    finally:
        Current.machine = None
