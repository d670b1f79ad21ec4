"""Shared memory: views that know which cells they cover, and cells that know who filled and who reads them.

An allocation is one cell until a view covers a part of it; then it is cut, so that views and cells always match exactly,
whatever index, slice, reshape and permute they came by.
"""

from __future__ import annotations

import linecache
import math
import re
import sys
from typing import Any

import torch

from .errors import MARK, Fault, Refused
from .scalars import Scalar
from .scheduler import Operation, Thread, machine
from .tensors import Tensor, torch_dtype

__all__ = ["LIMIT", "Cell", "View", "allocate", "read_async", "write_async"]

# Bytes of shared memory that a program may have on Hopper.
LIMIT = 232448


class Cell:
    """A part of an allocation that has one state.

    `fill` is the TMA load that fills or has filled it, `writer` the thread that wrote it and when; `reads` has the last
    one of each kind and thread since then.
    """

    __slots__ = ("fill", "reads", "size", "used", "writer")

    def __init__(self, size: int) -> None:
        self.size = size
        self.fill: Operation | None = None
        self.writer: tuple[Thread, int] | None = None
        self.reads: dict[tuple[str, Thread], int] = {}
        self.used = False

    def cut(self, size: int) -> Cell:
        other = Cell(size)
        self.size -= size
        other.fill, other.writer, other.reads, other.used = self.fill, self.writer, dict(self.reads), self.used
        return other

    def refill(self) -> None:
        self.reads = {}
        self.used = False


class Allocation:
    """Poisoned memory and its cells.

    Cells are ranges of elements until a view covers elements that do not follow each other; from then on `owner` has each
    element's cell.
    """

    def __init__(self, name: str, dtype: Any, count: int) -> None:
        kind = torch_dtype(dtype)
        self.name, self.dtype = name, dtype
        self.storage = torch.full((count,), float("nan") if kind.is_floating_point else -1, dtype=kind)
        self.cells = [Cell(count)]
        self.ranges = [(0, count, self.cells[0])]
        self.owner: torch.Tensor | None = None
        self.barriers: dict[int, Any] = {}
        self.cuts = 0

    @property
    def nbytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    def cut(self, cell: Cell, size: int) -> Cell:
        self.cuts += 1
        self.cells.append(cell.cut(size))
        return self.cells[-1]

    def cover(self, data: torch.Tensor) -> list[Cell]:
        """The cells of a view, which are cut where it covers them in part."""
        last = sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
        if self.owner is None and last == data.numel() - 1:
            start = int(data.storage_offset())
            return self.cover_range(start, start + data.numel())
        if self.owner is None:
            self.owner = torch.empty(self.storage.numel(), dtype=torch.int64)
            for low, high, cell in self.ranges:
                self.owner[low:high] = self.cells.index(cell)
        part = torch.as_strided(self.owner, data.shape, data.stride(), data.storage_offset())
        counts = torch.bincount(part.reshape(-1), minlength=len(self.cells)).tolist()
        covered = []
        for i, count in enumerate(counts):
            if count == self.cells[i].size:
                covered.append(self.cells[i])
            elif count:
                part.masked_fill_(part == i, len(self.cells))
                covered.append(self.cut(self.cells[i], count))
        return covered

    def cover_range(self, start: int, end: int) -> list[Cell]:
        covered, ranges = [], []
        for low, high, cell in self.ranges:
            if high <= start or end <= low:
                ranges.append((low, high, cell))
                continue
            inner = max(low, start), min(high, end)
            part = cell if inner == (low, high) else self.cut(cell, inner[1] - inner[0])
            covered.append(part)
            rest = self.cut(cell, high - inner[1]) if low < inner[0] and inner[1] < high else cell
            pieces = (low, inner[0], cell), (*inner, part), (inner[1], high, rest)
            ranges += [piece for piece in pieces if piece[0] < piece[1]]
        self.ranges = ranges
        return covered


class View:
    """A shared memory descriptor."""

    def __init__(self, allocation: Allocation, data: torch.Tensor, name: str, layout: Any) -> None:
        self.allocation, self.data, self.name, self.layout = allocation, data, name, layout
        self.shape = list(data.shape)
        self.views: dict[Any, View] = {}
        self.cut = -1
        self.covered: list[Cell] = []

    @property
    def dtype(self) -> Any:
        return self.allocation.dtype

    @property
    def type(self) -> View:
        """Shape, element_ty and layout are found on it."""
        return self

    @property
    def element_ty(self) -> Any:
        return self.allocation.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    @property
    def cells(self) -> list[Cell]:
        if self.cut != self.allocation.cuts:
            self.covered = self.allocation.cover(self.data)
            self.cut = self.allocation.cuts
        return self.covered

    def part(self, key: Any, data: torch.Tensor, name: str) -> View:
        view = self.views[key] = View(self.allocation, data, name, self.layout)
        return view

    def index(self, index: int) -> View:
        i = int(index)
        if found := self.views.get(i):
            return found
        if not 0 <= i < self.shape[0]:
            raise Fault(f"{self.name}.index({i}) is outside of {self.shape}")
        return self.part(i, self.data[i], f"{self.name}[{i}]")

    def slice(self, start: int, length: int, dim: int = 0) -> View:
        if isinstance(start, Scalar):
            raise Refused("slice at a run-time position")
        if found := self.views.get((start, length, dim)):
            return found
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise Fault(f"{self.name}.slice({start}, {length}, {dim}) is outside of {self.shape}")
        where = ":, " * dim + f"{start}:{start + length}"
        return self.part((start, length, dim), self.data.narrow(dim, start, length), f"{self.name}[{where}]")

    def reshape(self, shape: Any) -> View:
        to = tuple(map(int, shape))
        if found := self.views.get(("reshape", to)):
            return found
        if math.prod(to) != self.numel:
            raise Fault(f"{self.name}: reshape of {self.shape} to {list(to)}")
        try:
            return self.part(("reshape", to), self.data.view(to), self.name)
        except RuntimeError:
            raise Refused(f"reshape of {self.name}, whose elements do not follow each other") from None

    def permute(self, order: Any) -> View:
        to = tuple(map(int, order))
        return self.views.get(("permute", to)) or self.part(("permute", to), self.data.permute(to), self.name)

    def load(self, layout: Any = None) -> Tensor:
        """Into registers, by the generic proxy."""
        m = machine()
        m.switch()
        me = m.current
        for cell in self.cells:
            check_filled(cell, me, self, "smem load", generic=True)
            cell.reads["thread", me] = me.epoch
            cell.used = True
        m.schedule.work(m, self.nbytes)
        value = self.data.clone()
        return Tensor(value if value.is_floating_point() else value.to(torch.int64), self.dtype, layout)

    def store(self, value: Any) -> None:
        """From registers, by the generic proxy."""
        m = machine()
        m.switch()
        me = m.current
        value = Tensor.of(value)
        if value.shape != self.shape or value.dtype != self.dtype:
            raise Fault(f"{self.name}: store of {value} to {self.shape} of {self.dtype}")
        for cell in self.cells:
            check_overwritten(cell, me, self, "smem store", generic=True)
            cell.refill()
            cell.fill, cell.writer = None, (me, me.epoch)
        m.schedule.work(m, self.nbytes)
        self.data.copy_(value.value)
        m.trace.instant("write", me.time, me.name, self.name)

    def _keep_alive(self) -> None:
        """For the compiler."""

    def __getattr__(self, name: str) -> Any:
        raise Refused(f"shared_memory_descriptor.{name}")

    def __repr__(self) -> str:
        return f"{self.name} {self.shape}"


def check_filled(cell: Cell, thread: Thread, view: View, what: str, generic: bool = False) -> None:
    """A thread may read a cell, or have it read, that it knows to be filled, and for the async proxy fenced."""
    if cell.fill is not None:
        barrier, phase = cell.fill.barrier, cell.fill.phase
        if thread.clock.get(barrier, -1) < phase or not cell.fill.done:
            state = "has arrived, but" if cell.fill.done else "is still in flight;"
            raise Fault(
                f"{what} reads {view.name} without having waited for its copy, which {state} phase {phase} of"
                f" {barrier.name} announces it to {thread.name}"
            )
    elif cell.writer is not None:
        writer, epoch = cell.writer
        if generic:
            if writer is not thread and not thread.knows("thread", writer, epoch):
                raise Fault(f"{what} reads {view.name}, which {writer.name} has written: no barrier between them")
        else:
            check_fenced(writer, epoch, thread, f"{what} reads {view.name}")
    else:
        raise Fault(f"{what} reads {view.name}, which is unfilled")


def check_fenced(writer: Thread, epoch: int, thread: Thread, what: str) -> None:
    if thread.clock.get(writer.fence_key, -1) >= epoch:
        return
    missing = "a barrier behind its fence_async_shared" if writer.fenced >= epoch else "fence_async_shared"
    raise Fault(f"{what}, which {writer.name} has written without {missing}")


def check_overwritten(cell: Cell, thread: Thread, view: View, what: str, generic: bool = False) -> None:
    """A thread may overwrite a cell, or have it overwritten, when it knows that all reads of it are done."""
    if cell.fill is not None and not cell.used:
        state = "was filled and never read" if cell.fill.done else "a copy in flight fills"
        raise Fault(f"{what} overwrites {view.name}, which {state}")
    for (kind, reader), number in cell.reads.items():
        if generic and kind == "thread" and reader is thread:
            continue
        if not thread.knows(kind, reader, number):
            reason = {
                "thread": "has read: no barrier between them",
                "product": "may still read in a product: it has not waited for it before handing the buffer over",
                "store": "may still read in a TMA store: it has not called store_wait before handing the buffer over",
            }
            raise Fault(f"{what} of {thread.name} overwrites {view.name}, which {reader.name} {reason[kind]}")
    if cell.writer is not None:
        writer, epoch = cell.writer
        if not generic:
            check_fenced(writer, epoch, thread, f"{what} overwrites {view.name}")
        elif writer is not thread and not thread.knows("thread", writer, epoch):
            raise Fault(f"{what} overwrites {view.name}, which {writer.name} has written: no barrier between them")


def read_async(view: View, thread: Thread, kind: str, number: int, what: str) -> None:
    """A product or a TMA store is issued that will read a view."""
    for cell in view.cells:
        check_filled(cell, thread, view, what)
        cell.reads[kind, thread] = number
        cell.used = True


def write_async(view: View, thread: Thread, load: Operation, what: str) -> None:
    """A TMA load is issued that will fill a view."""
    for cell in view.cells:
        check_overwritten(cell, thread, view, what)
        cell.refill()
        cell.fill, cell.writer = load, None


def site() -> tuple[Any, str]:
    """Where in device code an allocation stands: every line on the way there, and the variable it goes to."""
    lines = []
    name = ""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if MARK in frame.f_globals:
            # The instruction, since a line may have several.
            lines.append((frame.f_code, frame.f_lasti))
            if not name:
                found = re.match(r"\s*(\w+)\s*(:[^=]*)?=[^=]", linecache.getline(frame.f_code.co_filename, frame.f_lineno))
                name = found[1] if found else ""
        frame = frame.f_back
    return tuple(lines), name


def allocate(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> View:
    """gl.allocate_shared_memory: one place in memory for each place in the code, as the compiler has it."""
    m = machine()
    me = m.current
    where, name = site()
    shape = [int(x) for x in shape]
    key = (where, tuple(me.unrolled), me.number)
    barrier = type(layout).__name__ == "MBarrierLayout"
    view = m.allocations.get(key)
    if view is None:
        allocation = Allocation(name or ("barrier" if barrier else "shared memory"), element_ty, math.prod(shape))
        view = m.allocations[key] = View(allocation, allocation.storage.view(shape), allocation.name, layout)
        total = sum(v.allocation.nbytes for v in m.allocations.values())
        if total > LIMIT:
            raise Fault(f"{total} bytes of shared memory are more than {LIMIT}")
    elif not barrier:
        for cell in view.cells:
            check_overwritten(cell, me, view, "another allocation", generic=True)
            cell.refill()
            cell.fill = cell.writer = None
        view.data.fill_(float("nan") if view.data.is_floating_point() else -1)
    if value is not None:
        view.store(value)
    return view
