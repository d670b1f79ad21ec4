"""What `tritonconv doctor` looks at: versions, devices, and one convolution on our own kernel."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from tritonconv.functional import conv2d
from tritonconv.ops.backend import HAS_TRITON, capability, current_backend, interpreting, set_backend
from tritonconv.ops.launch import record_launches

__all__ = ["SUPPORTED", "Finding", "in_range", "report", "self_check"]

# First version that is supported, and first that is not known to be.
SUPPORTED: dict[str, tuple[str, str | None]] = {"torch": ("2.11", None), "triton": ("3.6", "3.10")}

# Rounding of a half-precision result is 2^-11 at most.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    good: bool = True


def report() -> bool:
    """Print all findings; whether all are good."""
    findings = [*versions(), *devices(), checked_kernel()]
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.what, finding.found, "" if finding.good else "[bold red]wrong[/]")
    Console(soft_wrap=True).print(table)
    return all(finding.good for finding in findings)


def in_range(version: str, least: str, below: str | None) -> bool:
    """Whether least <= version < below, by numbers alone.

    >>> in_range("2.13.0+cpu", "2.11", None), in_range("3.10.0", "3.6", "3.10")
    (True, False)
    """

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("+")[0].split(".")[:2])

    return numbers(least) <= numbers(version) and (below is None or numbers(version) < numbers(below))


def versions() -> list[Finding]:
    """Versions of what we stand on."""
    findings = [Finding("python", platform.python_version()), Finding("tritonconv", metadata.version("tritonconv"))]
    for name in ("torch", "triton", "numpy"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed: everything runs on torch", name != "triton"))
            continue
        least, below = SUPPORTED.get(name, ("0.0", None))
        wanted = f" (supported: from {least} on{f', below {below}' if below else ''})" if name in SUPPORTED else ""
        findings.append(Finding(name, version + wanted, in_range(version, least, below)))
    return findings


def devices() -> list[Finding]:
    """GPUs, and where kernels run on GPU and on CPU tensors."""
    findings = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        if torch.version.hip is not None:
            findings.append(Finding(f"GPU {index}", f"{name}, {torch.cuda.get_device_properties(index).gcnArchName}"))
            continue
        major, minor = capability(torch.device("cuda", index))
        good = (major, minor) >= (8, 0)
        findings.append(
            Finding(f"GPU {index}", f"{name}, compute capability {major}.{minor}{'' if good else ', below 8.0'}", good)
        )
    if not findings:
        findings.append(Finding("GPU", f"none that torch {torch.__version__} sees"))
    if not HAS_TRITON:
        where = "on torch, since triton is not installed"
    elif interpreting():
        where = f"in Triton's interpreter, since TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}"
    elif torch.cuda.is_available():
        where = "on the GPU for tensors there; CPU tensors run on torch"
    else:
        where = "nowhere: CPU tensors run on torch; TRITON_INTERPRET=1, set before python starts, interprets the kernels"
    findings.append(Finding("kernels run", where))
    findings.append(Finding("backend", current_backend()))
    return findings


def self_check() -> tuple[str, float]:
    """(kernel, relative error) of a half-precision conv2d on our kernel against torch in fp64.

    Raises:
        RuntimeError: the kernel cannot run here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 14, 14, generator=generator).to(device, torch.float16)
    weight = torch.randn(128, 64, 3, 3, generator=generator).to(device, torch.float16)
    with torch.no_grad(), set_backend("triton"), record_launches() as launches:
        y = conv2d(x, weight, padding=1)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    return launches[0], float((y.double() - expected).norm() / expected.norm())


def checked_kernel() -> Finding:
    """The self-check, in a process with the interpreter where no kernel can run in this one."""
    what = "conv2d against fp64"
    if not HAS_TRITON:
        return Finding(what, "not checked: triton is not installed", False)
    if torch.cuda.is_available() or interpreting():
        try:
            kernel, error = self_check()
        except Exception as failure:
            return Finding(what, f"failed: {type(failure).__name__}: {failure}", False)
        where = "in the interpreter" if interpreting() else "on the GPU"
    else:
        script = "from tritonconv.doctor import self_check; print(*self_check())"
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            return Finding(what, f"failed in the interpreter: {last[0]}", False)
        kernel, number = done.stdout.split()
        error, where = float(number), "in the interpreter"
    return Finding(what, f"{kernel} {where}: relative error {error:.1e} (at most {TOLERANCE:.0e})", error <= TOLERANCE)
