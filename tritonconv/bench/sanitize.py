"""A few layers under NVIDIA's compute-sanitizer, where it is installed: bad accesses and races that results may hide."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

from tritonconv.bench.layers import OURS, way
from tritonconv.bench.registry import dtype_of, operations
from tritonconv.bench.session import Job
from tritonconv.measure.torch_settings import prepare_torch

__all__ = ["TOOL", "run_one", "sanitize_jobs", "sanitized"]

TOOL = "compute-sanitizer"
# Of its exit status, which is the program's own otherwise.
FOUND = 99
# Importing torch under the tool takes most of them.
SECONDS = 90


def sanitize_jobs() -> list[Job]:
    """Each operation's first layers, for bad accesses; the first of them for races in shared memory too."""
    jobs = []
    for kind, operation in operations().items():
        for number, case in enumerate(operation.checks()[:4]):
            for tool in ("memcheck", "racecheck") if number == 0 else ("memcheck",):
                identity = dict(stage="check", id=case.id, column=f"{TOOL} {tool}") | {"pass": "fprop"}
                jobs.append(Job(identity, sanitized, (kind, number, tool), timeout=SECONDS + 20.0))
    return jobs


def sanitized(kind: str, number: int, tool: str) -> dict[str, Any]:
    """Run one layer in a process under the tool; "skipped" where it is not installed or cannot watch this GPU."""
    path = shutil.which(TOOL)
    if path is None:
        return dict(status="skipped", reason=f"{TOOL} is not installed")
    script = f"from tritonconv.bench.sanitize import run_one; run_one({kind!r}, {number})"
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return dict(status="skipped", reason=f"{TOOL} took longer than {SECONDS} s")
    if "Device not supported" in done.stdout + done.stderr:
        return dict(status="skipped", reason=f"{TOOL} cannot watch this GPU here")
    if done.returncode == 0:
        return dict(status="ok")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "=====" in line]
    return dict(status="wrong" if done.returncode == FOUND else "failed", reason=" ".join(lines[1:5]) or done.stderr[-300:])


def run_one(kind: str, number: int) -> None:
    """What the tool watches: our kernel alone, on one layer in bf16; what it computes is checked elsewhere."""
    operation = operations()[kind]
    case = replace(operation.checks()[number], dtype="bf16")
    # Torch's kernels are watched too, and cost time: random numbers come from the host.
    tensors = [t.to(prepare_torch()) for t in operation.tensors(case, "cpu", dtype_of(case), True)]
    way(operation, OURS, case)(*tensors)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
