"""Compile kernels ahead in parallel processes: the JIT then finds them in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any

import torch
from rich.console import Console

from tritonconv.measure.progress import track
from tritonconv.measure.worker import hidden_main
from tritonconv.ops.core.launch import Launch
from tritonconv.tuning import Device

__all__ = ["Compilation", "compile_ahead", "compile_pool", "without_variable"]

# Processes to compile in take so long to start.
START_SECONDS = 2.0

Compilation = tuple[str, Callable[[], list[Launch]]]
"""What it is, for messages, and a picklable function that builds its launches from meta tensors."""


def compile_ahead(
    tasks: Sequence[Compilation], device: Device, console: Console, *, seconds: float = float("inf")
) -> dict[str, str]:
    """Compile these launches for a device, which need not be there.

    Returns:
        What failed, and how. Whatever is not compiled when `seconds` are over is left to the JIT.
    """
    failures: dict[str, str] = {}
    if not tasks or seconds < START_SECONDS:
        return failures
    with compile_pool() as processes:
        # They start with the first task, and need nothing of the script that this is called from.
        with hidden_main():
            waiting = {processes.submit(compile_all, launches, device): what for what, launches in tasks}
        try:
            finished = as_completed(waiting, timeout=None if seconds == float("inf") else max(0.0, seconds))
            for done in track(finished, len(tasks), "compiling", console):
                error = done.exception()
                # A compiler that dies takes the pool with it; the launch that it died of dies in a worker again.
                if error is not None and not isinstance(error, BrokenProcessPool):
                    failures[waiting[done]] = f"{type(error).__name__}: {error}"
        except TimeoutError:
            processes.shutdown(wait=False, cancel_futures=True)
    return failures


def compile_all(launches: Callable[[], list[Launch]], device: Device) -> None:
    from tritonconv.measure.offline import compile_launch

    for launch in launches():
        kernel = compile_launch(launch, device)
        if torch.cuda.is_available():
            build_launcher(kernel)


def build_launcher(kernel: Any) -> None:
    """Before Triton 3.7 each signature has a launcher in C, which takes gcc as long as the kernel takes."""
    # What fails here fails again where the kernel is launched, and is reported there.
    with suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher, make_launcher  # noqa: F401 - later ones have no such function

        CudaLauncher(kernel.src, kernel.metadata)


@contextmanager
def compile_pool() -> Iterator[ProcessPoolExecutor]:
    """A process for each core, in which kernels can be compiled: interpreted ones cannot, and forked processes would share
    a GPU's context."""
    with (
        without_variable("TRITON_INTERPRET"),
        ProcessPoolExecutor(
            os.cpu_count() or 1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as processes,
    ):
        yield processes


@contextmanager
def without_variable(name: str) -> Iterator[None]:
    """Without an environment variable, for processes that are started meanwhile."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
