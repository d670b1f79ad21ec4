"""Compile kernels ahead in parallel processes: the JIT then finds them in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import operations
from tritonconv.bench.session import bar
from tritonconv.ops.launch import Launch
from tritonconv.tuning import Device

__all__ = ["Compilation", "case_launches", "compile_ahead", "pool", "without"]

Compilation = tuple[str, Callable[[], list[Launch]]]
"""What it is, for messages, and a picklable function that builds its launches from meta tensors."""


def case_launches(case: Case, config: Any, channels_last: bool, device: Device) -> list[Launch]:
    """The launches of a layer, for a `Compilation`."""
    return operations()[case.kind].launches(case, device, config, channels_last)


def compile_ahead(
    tasks: Sequence[Compilation], device: Device, console: Console, *, seconds: float = float("inf")
) -> dict[str, str]:
    """Compile these launches for a device, which need not be there.

    Returns:
        What failed, and how. Whatever is not compiled when `seconds` are over is left to the JIT.
    """
    failures: dict[str, str] = {}
    with pool() as processes, bar(console) as progress:
        shown = progress.add_task("compiling", total=len(tasks))
        waiting = {processes.submit(compile_all, launches, device): what for what, launches in tasks}
        try:
            for done in as_completed(waiting, timeout=None if seconds == float("inf") else max(0.0, seconds)):
                error = done.exception()
                if error is not None:
                    failures[waiting[done]] = f"{type(error).__name__}: {error}"
                progress.advance(shown)
        except TimeoutError:
            processes.shutdown(wait=False, cancel_futures=True)
    return failures


def compile_all(launches: Callable[[], list[Launch]], device: Device) -> None:
    from tritonconv.bench.offline import compile_launch

    for launch in launches():
        compile_launch(launch, device)


@contextmanager
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process for each core, in which kernels can be compiled: interpreted ones cannot, and forked processes would share
    a GPU's context."""
    with (
        without("TRITON_INTERPRET"),
        ProcessPoolExecutor(
            os.cpu_count() or 1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as processes,
    ):
        yield processes


@contextmanager
def without(name: str) -> Iterator[None]:
    """Without an environment variable, for processes that are started meanwhile."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
