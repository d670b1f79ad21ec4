"""What a run did, for timelines and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "Trace"]


class Event:
    """Something that took a while.

    `kind` is "load", "store", "product" (of `buffers`), "wait" (of a thread), or "arrive" and "write", which take
    no time (on a barrier, and to shared memory by a thread).
    `issued`, `begin` and `end` are cycles of a Timed schedule, or steps of a Random one; a product begins when the tensor
    cores are free for it. Buffers are names with indices, as in "a_bufs[1]".
    """

    __slots__ = ("begin", "buffers", "end", "issued", "kind", "text", "thread")

    def __init__(
        self, kind: str, issued: float, begin: float, end: float, thread: str, text: str,
        buffers: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.kind, self.issued, self.begin, self.end, self.thread = kind, issued, begin, end, thread
        self.text, self.buffers = text, buffers

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.issued, self.begin, self.end, self.thread, self.text, self.buffers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{self.kind} {self.issued:g} {self.begin:g} {self.end:g} {self.thread} {self.text} {' '.join(self.buffers)}"


@dataclass
class Trace:
    """Events in the order of their ends, and counts.

    Attributes:
        events: those of all programs, one after another.
        starts: for each program in the order in which they ran, its id, and how many events there were before it.
        bytes_loaded, bytes_stored: by TMA; clipped boxes count as whole ones when loaded, as their barriers do.
        products: how many wgmma calls were executed.
        steps: how many turns the scheduler gave.
        cycles: of a Timed schedule, the programs' sum.
    """

    events: list[Event] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    products: int = 0
    steps: int = 0
    cycles: float = 0.0

    def add(self, event: Event) -> None:
        self.events.append(event)

    def instant(self, kind: str, time: float, thread: str, what: str) -> None:
        self.events.append(Event(kind, time, time, time, thread, what, ()))
