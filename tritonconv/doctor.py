"""What `tritonconv doctor` looks at: versions, devices, what was measured, and every kernel on a small layer."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass, replace
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

import tritonconv
from tritonconv.bench.cases import Case
from tritonconv.bench.layers import check_layer
from tritonconv.bench.registry import operations
from tritonconv.measure.worker import Worker, WorkerError
from tritonconv.ops.core.backend import HAS_TRITON, capability, current_backend, interpreting
from tritonconv.tuning import device_named
from tritonconv.tuning.tables import is_current

__all__ = ["SUPPORTED", "Finding", "checked_kernels", "first_checks", "in_range", "report"]

# First version that is supported, and first that is not known to be.
SUPPORTED: dict[str, tuple[str, str | None]] = {"torch": ("2.11", None), "triton": ("3.6", "3.10")}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    good: bool = True


def report() -> bool:
    """Print all findings; whether all are good."""
    findings = [*versions(), *devices(), *measurements(), *checked_kernels()]
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
    findings = [Finding("python", platform.python_version()), Finding("tritonconv", tritonconv.__version__)]
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


def measurements() -> list[Finding]:
    """The user's tuning cache and the shipped table for this GPU: where configs come from."""
    from tritonconv.tuning.cache import cache_folder, cache_path, read
    from tritonconv.tuning.tables import shipped_table

    if not torch.cuda.is_available():
        kept = sorted(path.name for path in cache_folder().glob("*.json"))
        return [Finding("tuning cache", f"{cache_folder()}: {', '.join(kept) or 'empty'}, of no use without a GPU")]
    gpu = torch.cuda.get_device_name()
    path = cache_path(gpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = read(path, gpu)
    if caught:
        cache = Finding("tuning cache", f"{caught[0].message}", False)
    elif table is None:
        cache = Finding("tuning cache", f"{path}: nothing measured here yet (tritonconv tune measures a model's layers)")
    else:
        cache = Finding("tuning cache", f"{path}: {len(table.entries)} layers measured")
    shipped = shipped_table(gpu)
    if shipped is None:
        found = f"none for {gpu}: the cost model chooses where nothing was measured here"
    else:
        current = sum(is_current(entry) for entry in shipped.entries.values())
        found = f"{len(shipped.entries)} layers measured with triton {shipped.triton}, {current} of them on today's kernels"
    return [cache, Finding("shipped table", found)]


def first_checks() -> list[Case]:
    """For each kernel of each operation the first of its small layers that it computes, in half precision."""
    cases: dict[str, Case] = {}
    for operation in operations().values():
        for case in operation.checks():
            half = replace(case, dtype="fp16")
            for launch in operation.launches(half, device_named("H200")):
                cases.setdefault(launch.kernel.__name__, half)
    # Several kernels may share one.
    return list(dict.fromkeys(cases.values()))


def checked_kernels() -> list[Finding]:
    """Every kernel on a small layer against fp64, in a process with the interpreter where none can run in this one."""
    if not HAS_TRITON:
        return [Finding("kernels", "not checked: triton is not installed", False)]
    here = torch.cuda.is_available() or interpreting()
    where = "on the GPU" if torch.cuda.is_available() and not interpreting() else "in the interpreter"
    findings = []
    with Worker({} if here else {"TRITON_INTERPRET": "1"}) as worker:
        for case in first_checks():
            try:
                found = worker.call(check_layer, case, None, True, timeout=120)
            except WorkerError as error:
                findings.append(Finding(case.id, f"failed {where}: {error}", False))
                continue
            what = found["kernels"][0] if found["kernels"] else "a kernel"
            text = f"{case.id} {where}: " + (found.get("reason") or f"relative error {found['error']:.1e}")
            findings.append(Finding(what, text, found["status"] == "ok"))
    return findings
