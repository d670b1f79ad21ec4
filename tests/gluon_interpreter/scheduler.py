"""One program: partitions as threads of which one runs at a time, and copies and products that happen later.

What a thread may rely on is known from vector clocks and not from what happened to have happened: an arrival on a barrier
publishes what the arriving thread knows, a wait acquires it. So a race is found in every schedule, not only in one that
shows it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, Protocol

from .errors import Abandoned, Fault, place
from .trace import Event, Trace

__all__ = ["Machine", "Operation", "Schedule", "Thread", "join", "machine"]

Clock = dict[Any, int]
"""What is known: events of each thread, products and stores that are done, phases that are complete."""


def join(clock: Clock, other: Clock) -> None:
    """Add another clock's knowledge."""
    for key, number in other.items():
        if clock.get(key, -1) < number:
            clock[key] = number


class Operation:
    """A copy or a product that has been issued, and what its completion does."""

    __slots__ = (
        "barrier", "begin", "buffers", "complete", "done", "finish", "issued", "kind", "number", "phase", "thread", "value",
        "what", "where",
    )  # fmt: skip

    def __init__(self, kind: str, thread: Thread, number: int, what: str, buffers: Sequence[str]) -> None:
        self.kind, self.thread, self.number, self.what = kind, thread, number, what
        self.buffers = tuple(buffers)
        self.where: tuple[CodeType, int] | None = place()
        self.complete: Callable[[], None]
        self.issued = self.begin = self.finish = 0.0
        self.done = False
        # A load's barrier, and the phase of it that announces the load; a product's result.
        self.barrier: Any = None
        self.phase = -1
        self.value: Any = None


class Thread:
    """A partition: a thread of the host that runs when it is its turn."""

    def __init__(self, number: int, name: str, num_warps: int) -> None:
        self.number, self.name, self.num_warps = number, name, num_warps
        # Held unless it is this thread's turn.
        self.turn = threading.Lock()
        self.turn.acquire()
        self.time = 0.0
        self.finished = False
        self.ready: Callable[[], bool] | None = None
        self.reason: Callable[[], str] = lambda: ""
        # Rounds of the unrolled loops that the thread is in.
        self.unrolled: list[int] = []
        self.epoch = 0
        self.clock: Clock = {}
        # Up to which epoch what the thread did has come back to it through a barrier, and has been fenced.
        self.returned = self.fenced = -1
        self.fence_key = ("fence", number)
        self.keys: dict[str, Any] = {"thread": number, "product": ("product", number), "store": ("store", number)}
        self.issued = {"product": 0, "store": 0}
        self.executed = 0
        self.latest: dict[str, Operation] = {}
        self.products: deque[Operation] = deque()

    def publish(self) -> Clock:
        """What others may know once they have acquired it; later events are of the next epoch."""
        clock = dict(self.clock)
        clock[self.number] = self.epoch
        clock[self.fence_key] = self.fenced
        self.epoch += 1
        return clock

    def acquire(self, clock: Clock) -> None:
        self.returned = max(self.returned, clock.get(self.number, -1))
        join(self.clock, clock)

    def rendezvous(self) -> None:
        """The barrier of the thread's own warps."""
        self.acquire(self.publish())

    def knows(self, kind: str, other: Thread, number: int) -> bool:
        """Whether an event of a thread has happened for sure, before this thread's next one."""
        if other is self and kind == "thread":
            return self.returned >= number
        return self.clock.get(other.keys[kind], -1) >= number

    def wait_for_own(self, kind: str, outstanding: int) -> None:
        key = self.keys[kind]
        self.clock[key] = max(self.clock.get(key, 0), self.issued[kind] - outstanding)


class Schedule(Protocol):
    """Decides what happens next."""

    def begin(self) -> None:
        """A program starts."""

    def choose(self, machine: Machine) -> Operation | Thread | None:
        """The next one among what may happen; none where nothing can."""

    def issue(self, machine: Machine, operation: Operation, size: float) -> None:
        """An operation of so many bytes or floating-point operations is issued."""

    def work(self, machine: Machine, nbytes: int) -> None:
        """The running thread moves bytes between registers and memory."""


class Machine:
    """A program's threads and its pending operations."""

    def __init__(
        self, schedule: Schedule, trace: Trace, written: Any, program: int, programs: int, num_warps: int
    ) -> None:  # fmt: skip
        self.schedule, self.trace, self.written, self.program, self.programs = schedule, trace, written, program, programs
        self.current = Thread(0, "kernel", num_warps)
        self.threads = [self.current]
        self.copies: list[Operation] = []
        self.allocations: dict[Any, Any] = {}
        self.now = 0.0
        self.failed: BaseException | None = None
        schedule.begin()

    def ready_threads(self) -> list[Thread]:
        return [t for t in self.threads if not t.finished and (t.ready is None or t.ready())]

    def ready_operations(self) -> list[Operation]:
        """Copies complete in any order, products of a thread in theirs."""
        return self.copies + [thread.products[0] for thread in self.threads if thread.products]

    def switch(self) -> None:
        """Let others go first, as the schedule has it; returns when it is this thread's turn."""
        me = self.current
        while True:
            choice = self.schedule.choose(self)
            if isinstance(choice, Operation):
                self.execute(choice)
            elif choice is me:
                self.trace.steps += 1
                return
            elif choice is None:
                raise Fault(self.deadlock())
            else:
                self.hand_over(choice)
                me.turn.acquire()
                if self.failed is not None:
                    raise Abandoned
                return

    def hand_over(self, thread: Thread) -> None:
        self.current = thread
        self.trace.steps += 1
        thread.turn.release()

    def wait(self, ready: Callable[[], bool], what: str, reason: Callable[[], str] | None = None) -> None:
        """Let others run until `ready()`; `reason()` says in a deadlock more than that the thread waits for `what`."""
        me = self.current
        begin = me.time
        me.ready, me.reason = ready, reason or (lambda: f"waits for {what}")
        self.switch()
        me.ready = None
        if me.time > begin:
            self.trace.add(Event("wait", begin, begin, me.time, me.name, what, ()))

    def execute(self, operation: Operation) -> None:
        if operation.kind == "product":
            operation.thread.products.popleft()
            operation.thread.executed += 1
        else:
            self.copies.remove(operation)
        operation.done = True
        operation.complete()
        self.trace.steps += 1
        self.trace.add(
            Event(operation.kind, operation.issued, operation.begin, self.now, operation.thread.name, operation.what,
                  operation.buffers)
        )  # fmt: skip

    def issue(self, operation: Operation, size: float) -> None:
        operation.issued = operation.begin = self.now
        operation.thread.latest[operation.kind] = operation
        self.schedule.issue(self, operation, size)
        if operation.kind == "product":
            operation.thread.products.append(operation)
        else:
            self.copies.append(operation)

    def deadlock(self) -> str:
        waits = [f"{t.name} {t.reason()}" for t in self.threads if not t.finished]
        return "deadlock: " + "; ".join(waits)

    def specialize(self, partitions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Sequence[int]) -> Any:
        """Run partitions, the first on the calling thread; returns what that one returns."""
        main = self.current
        if main is not self.threads[0] or not all(t.finished for t in self.threads[1:]):
            raise Fault("warp_specialize within a warp_specialize")
        names = unique([fn.__name__ for fn, _ in partitions])
        before = len(self.threads) - 1
        workers = [Thread(before + i, names[i], warps[i - 1]) for i in range(1, len(partitions))]
        start = main.publish()
        for worker in workers:
            worker.acquire(start)
            worker.time = main.time
        self.threads += workers
        hosts = [
            threading.Thread(target=self.work, args=(worker, *partition), name=worker.name, daemon=True)
            for worker, partition in zip(workers, partitions[1:], strict=True)
        ]
        for host in hosts:
            host.start()
        name, main.name = main.name, names[0]
        try:
            fn, args = partitions[0]
            result = fn(*args)
            self.wait(lambda: all(w.finished for w in workers), "the other partitions")
        except BaseException as error:
            self.fail(error)
        for host in hosts:
            host.join()
        if self.failed is not None:
            raise self.failed
        main.name = name
        for worker in workers:
            main.acquire(worker.publish())
        return result

    def work(self, thread: Thread, fn: Callable[..., Any], args: Sequence[Any]) -> None:
        """A worker's life on its own thread of the host."""
        thread.turn.acquire()
        try:
            if self.failed is not None:
                return
            fn(*args)
            self.leave(thread)
            thread.finished = True
            while isinstance(choice := self.schedule.choose(self), Operation):
                self.execute(choice)
            if choice is None:
                raise Fault(self.deadlock())
            self.hand_over(choice)
        except BaseException as error:
            self.fail(error)

    def leave(self, thread: Thread) -> None:
        """A thread's end: nothing of what it issued may still read shared memory."""
        for kind, call in (("product", "warpgroup_mma_wait(0)"), ("store", "store_wait(0)")):
            if thread.clock.get(thread.keys[kind], 0) < thread.issued[kind]:
                where = thread.latest[kind].where
                raise Fault(f"{thread.name} ends with a {kind} in flight: it has not called {call}", where)

    def end(self) -> None:
        """The kernel's end: copies have arrived, and somebody knows that they have."""
        main = self.threads[0]
        self.leave(main)
        while isinstance(choice := self.schedule.choose(self), Operation):
            self.execute(choice)
        for view in self.allocations.values():
            for cell in view.allocation.cells:
                load = cell.fill
                if load is not None and main.clock.get(load.barrier, -1) < load.phase:
                    raise Fault(f"the kernel ends with a copy to {view.name} that nobody has waited for", load.where)
            for barrier in view.allocation.barriers.values():
                if barrier.bytes:
                    raise Fault(f"the kernel ends and {barrier.state()}")
        self.trace.cycles += self.now

    def fail(self, error: BaseException) -> None:
        """The first error ends all threads."""
        if self.failed is None:
            self.failed = error
            for thread in self.threads:
                if thread is not self.current and thread.turn.locked():
                    thread.turn.release()


def unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}#{names[:i].count(name)}" for i, name in enumerate(names)]


class Current:
    """The machine that runs now: there is one at a time."""

    machine: Machine | None = None


def machine() -> Machine:
    if Current.machine is None:
        raise Fault("device code outside of a run")
    return Current.machine
