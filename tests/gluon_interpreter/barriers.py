"""mbarriers: pending arrivals and bytes, phases, and what a thread learns by waiting for one."""

from __future__ import annotations

from typing import Any

from .errors import Fault, Refused
from .memory import View, allocate
from .scheduler import Clock, Thread, join, machine

__all__ = ["Barrier", "allocate_mbarrier", "arrive", "barrier_of", "expect", "init", "invalidate", "wait"]


class Barrier:
    """A phase completes when neither arrivals nor bytes are pending.

    `phase` is the number of the one that is incomplete. `clock` is what the threads that arrived have published up to now,
    `published` what it was when the last phase was completed, and `waits` when each thread came to wait for a phase.
    """

    def __init__(self, name: str, count: int, thread: Thread) -> None:
        self.name, self.count, self.pending = name, count, count
        self.initialized = thread, thread.epoch
        self.bytes = self.phase = self.copies = 0
        self.clock: Clock = {}
        self.published: Clock = {}
        self.waits: dict[int, dict[Thread, int]] = {}

    def arrive(self, thread: Thread, count: int) -> None:
        if count > self.pending:
            raise Fault(
                f"barrier {self.name} is arrived on more often than its count of {self.count}: {count} arrivals by"
                f" {thread.name} in phase {self.phase}, which has {self.pending} pending"
            )
        self.pending -= count
        join(self.clock, thread.publish())
        self.settle()

    def arrive_bytes(self, nbytes: int) -> None:
        self.bytes -= nbytes
        self.settle()

    def settle(self) -> None:
        """Complete the phase if it is complete."""
        if self.pending:
            return
        if self.bytes < 0:
            raise Fault(f"barrier {self.name}: {-self.bytes} more bytes arrived than expected in phase {self.phase}")
        if self.bytes:
            return
        if self.copies:
            raise Fault(
                f"barrier {self.name}: phase {self.phase} completes with a copy in flight: fewer bytes expected than copied"
            )
        for thread, epoch in self.waits.pop(self.phase - 1, {}).items():
            if self.clock.get(thread.number, -1) < epoch:
                raise Fault(
                    f"phase error: barrier {self.name} completes phase {self.phase} while {thread.name} may still wait for"
                    f" phase {self.phase - 1}"
                )
        self.phase += 1
        self.pending = self.count
        self.published = dict(self.clock)

    def wait(self, thread: Thread, parity: int) -> None:
        """Each thread passes the phases that it knows of one after another; a fresh barrier has passed phase -1."""
        phase = thread.clock.get(self, -1) + 1
        if phase & 1 != parity:
            phase -= 1
        self.check_overtaken(thread, phase)
        self.waits.setdefault(phase, {})[thread] = thread.epoch

        def reason() -> str:
            return f"waits for {self.name} to complete phase {phase} (parity {parity}; {self.state()})"

        machine().wait(lambda: self.phase > phase, self.name, reason)
        self.check_overtaken(thread, phase)
        if phase >= 0:
            thread.acquire(self.published)
            thread.clock[self] = phase

    def check_overtaken(self, thread: Thread, phase: int) -> None:
        if self.phase > phase + 1:
            raise Fault(
                f"phase error: {thread.name} waits for phase {phase} of barrier {self.name}, which has completed phase"
                f" {self.phase - 1}"
            )

    def state(self) -> str:
        flight = f"{self.copies} copies in flight" if self.copies else "no copy is in flight"
        return (
            f"barrier {self.name} in phase {self.phase} waits for {self.pending} of {self.count} arrivals and"
            f" {self.bytes} more bytes, {flight}"
        )


def place_of(view: View) -> int:
    return int(view.data.storage_offset())


def barrier_of(view: View) -> Barrier:
    """The barrier in a view, which must be initialized, and known to be by the running thread."""
    barrier: Barrier | None = view.allocation.barriers.get(place_of(view))
    me = machine().current
    if barrier is None:
        raise Fault(f"barrier {view.name} is not initialized")
    thread, epoch = barrier.initialized
    if thread is not me and me.clock.get(thread.number, -1) < epoch:
        raise Fault(f"barrier {view.name} was initialized by {thread.name}, and {me.name} cannot see that yet")
    return barrier


def init(mbarrier: View, count: int) -> None:
    m = machine()
    m.switch()
    if mbarrier.numel != 1:
        raise Refused(f"a barrier of shape {mbarrier.shape}")
    where = place_of(mbarrier)
    if where in mbarrier.allocation.barriers:
        raise Fault(f"barrier {mbarrier.name} is initialized again, and was not invalidated")
    mbarrier.allocation.barriers[where] = Barrier(mbarrier.name, int(count), m.current)


def invalidate(mbarrier: View) -> None:
    m = machine()
    m.switch()
    barrier = barrier_of(mbarrier)
    waiting = [t.name for t in m.threads if t.ready is not None and t is not m.current and barrier.name in t.reason()]
    used = barrier.copies or barrier.bytes or barrier.pending != barrier.count
    # The last phase is known to be complete to who invalidates, whatever has happened already.
    if waiting or used or m.current.clock.get(barrier, -1) < barrier.phase - 1:
        raise Fault(f"barrier {barrier.name} is invalidated while in use: {barrier.state()}")
    for waits in barrier.waits.values():
        for thread, epoch in waits.items():
            if thread is not m.current and not m.current.knows("thread", thread, epoch):
                raise Fault(f"barrier {barrier.name} is invalidated while {thread.name} may still wait for it")
    del mbarrier.allocation.barriers[place_of(mbarrier)]


def expect(mbarrier: View, bytes_per_cta: Any = None, pred: Any = True, *, from_cta: Any = None, **older: Any) -> None:
    """Arrive once, and announce bytes."""
    nbytes = older.get("bytes", bytes_per_cta)
    if nbytes is None or from_cta is not None:
        raise Refused("mbarrier.expect without a number of bytes, or for another CTA")
    m = machine()
    m.switch()
    if pred:
        barrier = barrier_of(mbarrier)
        barrier.bytes += int(nbytes)
        barrier.arrive(m.current, 1)


def arrive(mbarrier: View, *, count: int = 1, pred: Any = True, from_cta: Any = None) -> None:
    if from_cta is not None:
        raise Refused("mbarrier.arrive of another CTA")
    m = machine()
    m.switch()
    if pred:
        barrier_of(mbarrier).arrive(m.current, int(count))
        m.trace.instant("arrive", m.current.time, m.current.name, mbarrier.name)


def wait(mbarrier: View, phase: int, pred: Any = True, deps: Any = ()) -> None:
    del deps
    m = machine()
    if pred:
        if int(phase) not in (0, 1):
            raise Fault(f"barrier {mbarrier.name}: a wait for parity {int(phase)}, which is neither 0 nor 1")
        barrier_of(mbarrier).wait(m.current, int(phase))


def allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> View:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    if two_ctas:
        raise Refused("barriers of two CTAs")
    return allocate(gl.int64, [1] if batch is None else [batch, 1], mbarrier.MBarrierLayout())
