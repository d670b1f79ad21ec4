"""A measuring session: jobs in order of priority, each in a worker, within a budget, into a file that can be continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from tritonconv.bench.results import Results, key_of
from tritonconv.measure.progress import track
from tritonconv.measure.worker import Worker, WorkerError

__all__ = ["Job", "Session"]

# A job that could not end before the budget does is not begun.
LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One measurement: what it is called in the results, and the function that makes it."""

    identity: dict[str, Any]
    """stage, id, pass, column, mode and batch, as far as they apply, and whatever else the record should bear."""
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    timeout: float = 120.0


@dataclass
class Session:
    """Runs jobs until its time is over.

    Args:
        results: where records go.
        console: for the progress bar.
        seconds: the budget from now on; None: no end.
        environment: variables of the worker.
    """

    results: Results
    console: Console
    seconds: float | None = None
    environment: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin = time.monotonic()
        self.worker = Worker(self.environment)
        self.left_out = 0
        """Jobs for which there was no time."""

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the budget is over."""
        return float("inf") if self.seconds is None else self.begin + share * self.seconds - time.monotonic()

    def waiting(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are not done yet."""
        return [job for job in jobs if key_of(job.identity) not in self.results.done]

    def run(self, title: str, jobs: Iterable[Job], share: float = 1.0) -> list[dict[str, Any]]:
        """Do the jobs that are not done yet, until this share of the budget is over; returns their records."""
        waiting = self.waiting(jobs)
        records = []
        for job in track(waiting, len(waiting), title, self.console):
            left = self.left(share)
            if left < LEAST_SECONDS:
                self.left_out += 1
                continue
            record = self._do(job, left)
            records.append(record)
            self.results.add(record)
        return records

    def _do(self, job: Job, left: float) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            outcome = self.worker.call(job.function, *job.arguments, timeout=min(job.timeout, left))
        except WorkerError as error:
            # What the budget has cut off is tried again when the run is continued.
            outcome = dict(status="stopped" if left < job.timeout and "stopped after" in str(error) else "failed")
            outcome["reason"] = str(error)
        # Whatever a job says, it is found again by what it was called.
        return job.identity | outcome | job.identity | dict(seconds=round(time.monotonic() - begin, 3))

    def close(self) -> None:
        self.worker.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
