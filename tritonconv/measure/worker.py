"""A process that measures, so that a crash, a hang or a broken GPU context costs one measurement and not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

__all__ = ["Worker", "WorkerError", "hidden_main"]

# Errors of the device and of its libraries name one of these.
DEVICE_ERRORS = ("CUDA", "cuDNN", "CUBLAS", "HIP", "MIOpen")


class WorkerError(RuntimeError):
    """A task has failed: it raised, took too long, or its process died."""


class Worker:
    """One process at a time; functions and arguments must be importable and picklable.

    Args:
        environment: variables that the process has besides ours; None takes one away.
    """

    def __init__(self, environment: dict[str, str | None] | None = None) -> None:
        self._environment = environment or {}
        self._process: Any = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """The function's result.

        Raises:
            WorkerError: it raised, ended its process, or took longer than `timeout` seconds (then it is killed).
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(timeout):
                self.close()
                raise WorkerError(f"stopped after {timeout:.0f} s")
            good, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            raise WorkerError(f"the process died with exit code {code}") from None
        if not good:
            # An error of the device stays in its context: whatever runs there next would fail too.
            if any(name in value for name in DEVICE_ERRORS):
                self.close()
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """End the process and what it has started; the next call starts another."""
        if self._process is not None:
            # Its group is its own as soon as it serves; what it has started would disturb the next measurement.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        try:
            self._process = context.Process(target=_serve, args=(theirs,), daemon=False)
            with hidden_main():
                self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()


@contextmanager
def hidden_main() -> Iterator[None]:
    """Processes that are started meanwhile do not run the user's script again, as spawned ones do."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection) -> None:
    os.setpgid(0, 0)
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = True, function(*args)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}".strip()
            answer = False, f"{text} ({os.path.basename(place.filename)}, line {place.lineno})"
        pipe.send(answer)
