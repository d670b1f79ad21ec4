"""Result files: JSON lines, each run headed by what it ran on."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["KEY", "OURS", "Results", "describe_run", "is_bad", "is_peer", "read_records"]

OURS = "tritonconv"
"""The column of our kernels; what else there is of ours begins with it."""

KEY = ("stage", "id", "pass", "column", "mode", "batch")
"""What tells records of one run apart."""

# Runs that agree in these continue one another.
SAME_RUN = ("gpu", "driver", "torch", "triton", "cudnn", "sources")


def describe_run() -> dict[str, Any]:
    """What results depend on: GPU, driver, versions, commit, date. Without a GPU `gpu` is None: nothing is timed."""
    import tritonconv
    from tritonconv.bench.registry import operations
    from tritonconv.tuning.cache import triton_version
    from tritonconv.tuning.sources import kernel_hash

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    kernels = sorted(kernel for operation in operations().values() for kernel in operation.kernels)
    return dict(
        stage="run", gpu=gpu, driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader,nounits"),
        cuda=torch.version.cuda, hip=torch.version.hip, torch=torch.__version__, triton=triton_version(),
        cudnn=torch.backends.cudnn.version() if gpu else None, python=platform.python_version(),
        tritonconv=tritonconv.__version__, commit=_commit(),
        sources={kernel: kernel_hash(kernel) for kernel in kernels},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _commit() -> str | None:
    folder = str(Path(__file__).parent)
    commit = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, changed" if commit and changed else commit


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file, each with its run's header under "run"; a last line that was cut off is left out."""
    header: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["stage"] == "run":
            header = record
        else:
            yield record | {"run": header}


@dataclass
class Results:
    """A result file that grows line by line, so that a run that is stopped keeps what it has."""

    path: Path
    header: dict[str, Any]
    done: set[tuple[Any, ...]] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> Results:
        """Start a file, or continue it: what an equal run has in it already is not measured again.

        Raises:
            FileExistsError: there is a file, and `resume` was not asked for.
        """
        if path.exists() and not resume:
            raise FileExistsError(f"{path} has results already: continue it with --resume, or choose another place")
        header = describe_run()
        results = cls(path, header)
        if path.exists():
            for record in read_records(path):
                same = all(record["run"].get(name) == header[name] for name in SAME_RUN)
                # What found no time the last time is tried again.
                if same and record.get("status") != "stopped":
                    results.done.add(key_of(record))
            text = path.read_text()
            if text and not text.endswith("\n"):
                path.write_text(text[: text.rfind("\n") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        results._append(header)
        return results

    def add(self, record: dict[str, Any]) -> None:
        self.done.add(key_of(record))
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def is_peer(record: dict[str, Any]) -> bool:
    """Whether somebody else's kernels computed it: layers and modules are computed in several ways for comparison."""
    return record["stage"] in ("layer", "module") and not record["column"].startswith(OURS)


def is_bad(record: dict[str, Any]) -> bool:
    return record.get("status") in ("wrong", "failed")


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)
