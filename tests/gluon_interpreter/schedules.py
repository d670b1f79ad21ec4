"""Who goes next: at random, or by a model's clock."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Machine, Operation, Thread

__all__ = ["Random", "Timed"]

EAGER, FAIR, LAZY = 2, 1, 0


class Random:
    """Any thread that can run, or any operation that may happen, at random.

    Args:
        seed: the same one gives the same order. It also draws a temper: loads, stores and products that come as early or as
            late as they can, threads that run ahead of the others, long turns or short ones.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ranks = {kind: self.random.choice((EAGER, FAIR, LAZY)) for kind in ("load", "store", "product")}
        self.threads = [self.random.choice((EAGER, FAIR, FAIR, LAZY)) for _ in range(16)]
        # How often the temper is ignored, and how often a thread that can go on does.
        self.whim = self.random.choice((0.0, 0.02, 0.2))
        self.stay = self.random.choice((0.0, 0.0, 0.5, 0.9))

    def begin(self) -> None:
        """Nothing is carried from program to program but the generator's state."""

    def choose(self, machine: Machine) -> Operation | Thread | None:
        machine.now += 1
        threads = machine.ready_threads()
        me = machine.current
        me.time = machine.now
        operations = machine.ready_operations()
        choice: Thread | Operation | None = None
        if not operations and len(threads) < 2:
            choice = threads[0] if threads else None
        elif me in threads and self.random.random() < self.stay:
            choice = me
        else:
            every: list[Thread | Operation] = [*threads, *operations]
            if self.random.random() >= self.whim:
                ranks = [self.threads[t.number % 16] for t in threads] + [self.ranks[o.kind] for o in operations]
                best = max(ranks)
                every = [one for one, rank in zip(every, ranks, strict=True) if rank == best]
            choice = every[int(self.random.random() * len(every))]
        for thread in threads:
            if thread is choice:
                thread.time = machine.now
        return choice

    def issue(self, machine: Machine, operation: Operation, size: float) -> None:
        """It may happen from now on."""

    def work(self, machine: Machine, nbytes: int) -> None:
        """Takes no time."""


class Timed:
    """The earliest goes first, by a model of one multiprocessor whose numbers are assumptions.

    Args:
        load_latency: cycles from a TMA load's issue to its first byte.
        load_bytes: bytes a cycle that arrive, of all loads together.
        flops: dense floating-point operations a cycle of the tensor cores.
        store_latency: cycles from a TMA store's issue until its buffer is read.
        store_bytes: bytes a cycle that leave.
        event: cycles of a thread's every step.
        thread_bytes: bytes a cycle between registers and memory.
    """

    def __init__(
        self, load_latency: float = 700.0, load_bytes: float = 48.0, flops: float = 4096.0, store_latency: float = 500.0,
        store_bytes: float = 48.0, event: float = 20.0, thread_bytes: float = 64.0,
    ) -> None:  # fmt: skip
        self.latency = {"load": load_latency, "store": store_latency, "product": 0.0}
        self.rate = {"load": load_bytes, "store": store_bytes, "product": flops}
        self.event, self.thread_bytes = event, thread_bytes
        self.free = dict.fromkeys(self.rate, 0.0)

    def begin(self) -> None:
        self.free = dict.fromkeys(self.rate, 0.0)

    def choose(self, machine: Machine) -> Operation | Thread | None:
        threads = machine.ready_threads()
        for thread in threads:
            # It could not go on before what it waited for had happened.
            if thread.ready is not None and thread.time < machine.now:
                thread.time = machine.now
        first = min(threads, key=lambda t: (t.time, t.number), default=None)
        operation = min(machine.ready_operations(), key=lambda o: o.finish, default=None)
        if operation is not None and (first is None or operation.finish <= first.time):
            machine.now = max(machine.now, operation.finish)
            return operation
        if first is not None:
            machine.now = max(machine.now, first.time)
            first.time += self.event
        return first

    def issue(self, machine: Machine, operation: Operation, size: float) -> None:
        kind = operation.kind
        operation.issued = machine.current.time
        operation.begin = max(operation.issued + self.latency[kind], self.free[kind])
        operation.finish = self.free[kind] = operation.begin + size / self.rate[kind]

    def work(self, machine: Machine, nbytes: int) -> None:
        machine.current.time += nbytes / self.thread_bytes
