"""Calls over several processes, each of them run once whatever becomes of the others."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

__all__ = ["Record", "run", "run_one"]

Record = dict[str, Any]


def run_one(part: str, seed: int, i: int) -> Record:
    """The record of call i of a part."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"{__package__}.{part}")
    before = time.monotonic()
    return dict(part=part, seed=seed, i=i) | module.run(seed, i) | dict(seconds=round(time.monotonic() - before, 3))


def run(part: str, seed: int, todo: Iterable[int], processes: int, end: float | None) -> Iterator[Record]:
    """Records as they come, of calls that start before `end` on the monotonic clock."""
    # Several processes with several threads each wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    waiting = iter(todo)
    lost: list[int] = []
    while True:
        with _pool(processes) as pool:
            yield from _fill(pool, part, seed, waiting, 2 * processes, end, lost)
        if not lost:
            return
        for i in lost:
            yield _alone(part, seed, i)
        lost.clear()


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def _fill(
    pool: ProcessPoolExecutor, part: str, seed: int, waiting: Iterator[int], most: int, end: float | None, lost: list[int]
) -> Iterator[Record]:
    """Keep a pool busy until nothing waits; calls that were running when a process of it died are lost."""
    running: dict[Future[Record], int] = {}
    while True:
        room = most - len(running) if end is None or time.monotonic() < end else 0
        for i in itertools.islice(waiting, 0 if lost else room):
            running[pool.submit(run_one, part, seed, i)] = i
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            i = running.pop(future)
            try:
                yield future.result()
            except BrokenProcessPool:
                lost.append(i)


def _alone(part: str, seed: int, i: int) -> Record:
    """A call in a process of its own, which it may end."""
    with _pool(1) as pool:
        try:
            return pool.submit(run_one, part, seed, i).result()
        except BrokenProcessPool as error:
            why = dict(result="crash", why=repr(error))
            return dict(part=part, seed=seed, i=i, operator="", dtype="", layout="", backend="", seconds=0.0) | why
