"""Progress on the console: a bar, or lines now and then where no bar can be drawn."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["track"]

T = TypeVar("T")
# Seconds between two lines of progress where no bar can be drawn.
EVERY = 10.0


def track(items: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    """The items, with a progress bar and the time that is left; redirected, with a line now and then."""
    if console.is_terminal:
        with bar(console) as progress:
            yield from progress.track(items, total=total, description=what)
        return
    begin = shown = time.monotonic()
    # rich flushes what it prints.
    console.print(f"{what}: {total}", highlight=False)
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= EVERY or number == total:
            console.print(f"{what}: {number} of {total}, {now - begin:.0f} s", highlight=False)
            shown = now


def bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)
