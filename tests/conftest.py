"""Every test runs on the GPU when there is one, else in Triton's interpreter."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

# Read when triton is first imported, so it is set before anything of ours is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from matrix import TEST_ALL

import tritonconv.ops.core.layout
import tritonconv.ops.core.recording
from tritonconv.ops.core.backend import HAS_TRITON
from tritonconv.ops.core.signature import clear_caches


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `all` stay out of `make test`, which has another one of their kind."""
    if TEST_ALL:
        return
    left_out = [item for item in items if item.get_closest_marker("all")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


# Seconds that each worker has spent.
spent: list[float] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    # pytest-xdist hands this to the process that waits for its workers.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cpu_seconds"] = sum(os.times()[:4])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    spent.append(getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    # Of this process, and of those that it waited for unless they are the workers.
    own = sum(os.times()[: 2 if spent else 4])
    terminalreporter.write_line(f"CPU time: {(own + sum(spent)) / 60:.1f} minutes")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seeded(device: str) -> Iterator[None]:
    """The same random numbers for every test; on a GPU tensors are made there, and fp32 products are IEEE's."""
    torch.manual_seed(0)
    if device == "cpu":
        yield
        return
    # By the older switches, which set the newer ones too: torch.compile fails where they contradict each other.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # Backward passes run on this thread, whose launches are recorded and forced.
    with torch.device(device), torch.autograd.set_multithreading_enabled(False):
        yield


@contextmanager
def poisoning() -> Iterator[None]:
    """Outputs hold NaN before a launch: whatever a kernel leaves unwritten shows."""
    empty_strided = torch.empty_strided

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        t = empty_strided(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

    # Calls that are recorded meanwhile allocate by the same function whenever they are replayed.
    recorded = {torch.ops.aten.empty_strided.default: poisoned}
    with (
        mock.patch.object(tritonconv.ops.core.layout.torch, "empty_strided", poisoned),
        mock.patch.dict(tritonconv.ops.core.recording.SHORTER, recorded),
    ):
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoning():
        yield


@pytest.fixture(autouse=True, scope="session")
def boolean_masks() -> Iterator[None]:
    """An interpreted access whose mask is not boolean fails: Triton 3.9 takes none, earlier ones do."""
    if not HAS_TRITON:
        yield
        return
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    # The place of the mask among the arguments.
    accesses = dict(create_masked_load=1, create_masked_store=2, create_atomic_rmw=3)

    def checked(access: Any, place: int) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Some versions give those of descriptors as plain arrays, which the interpreter itself has made.
            dtype = np.asarray(args[place].data).dtype if args[place] is not None else np.dtype(bool)
            if dtype != np.dtype(bool):
                raise TypeError(f"mask of {dtype}: combine it with scalars by masks.both")
            return access(self, *args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, place in accesses.items():
            patch.setattr(builder, name, checked(getattr(builder, name), place))
        yield


@pytest.fixture(autouse=True, scope="session")
def patches_are_seen() -> Iterator[None]:
    """What a test replaces in the library counts for calls that were seen before, too: they are resolved anew."""

    def anew(method: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> None:
            method(self, *args, **kwargs)
            clear_caches()

        return run

    kind = pytest.MonkeyPatch
    with mock.patch.multiple(kind, setattr=anew(kind.setattr), undo=anew(kind.undo)):
        yield


@pytest.fixture
def on_triton() -> object:
    """No call may fall back to torch."""
    with tritonconv.set_backend("triton"), torch.no_grad():
        yield
