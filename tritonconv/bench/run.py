"""A whole run, in order of priority: checks, layers, tuning, models. `tritonconv bench` and benchmarks/gpu.py call it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tritonconv.bench.cases import Case
from tritonconv.bench.dry import dry_records, prediction_table, verdict
from tritonconv.bench.layers import COLUMNS, HOPPER, OURS, Ceilings, measure_ceilings
from tritonconv.bench.registry import operations
from tritonconv.bench.results import Results, is_bad, is_peer, read_records
from tritonconv.bench.sanitize import sanitize_jobs
from tritonconv.bench.session import Job, Session
from tritonconv.bench.suites import (
    check_compilations,
    check_jobs,
    layer_compilations,
    layer_jobs,
    module_jobs,
    not_built,
)
from tritonconv.measure.ahead import compile_ahead
from tritonconv.measure.clock import can_time
from tritonconv.ops.core.launch import device_of
from tritonconv.tuning import Device, device_named
from tritonconv.tuning.measured import MARGIN

__all__ = ["STAGES", "columns_of", "dry_run", "measure", "summary"]

STAGES = ("check", "layers", "tune", "blocks", "models")
# Peers that are there at once, and those that torch.compile makes in minutes.
QUICK, SLOW = COLUMNS[:3], COLUMNS[3:]
# How far into the budget each stage may go.
SHARES = {"check": 0.35, "layers": 0.65, "tune": 0.8, "blocks": 0.85, "models": 1.0}
# How much of a stage's time may go into compiling ahead.
COMPILING = 0.6


def measure(
    cases: Sequence[Case], out: Path, *, stages: Sequence[str] = STAGES, columns: Sequence[str] = COLUMNS,
    budget: float | None = None, resume: bool = False, console: Console | None = None,
) -> int:  # fmt: skip
    """Measure on the GPU that is here, into OUT/results.jsonl; returns how many records of ours are wrong or failed.

    Args:
        cases: the layers of the stages "layers" and "tune".
        budget: seconds in all; what finds no time is done when the run is continued with `resume`.

    Raises:
        RuntimeError: there is no GPU.
        FileExistsError: there are results, and `resume` was not asked for.
    """
    console = console or Console(stderr=True)
    if not can_time():
        raise RuntimeError("torch sees no GPU: nothing can be measured (--dry-run does everything but the clock)")
    device = this_device()
    results = Results.open(out / "results.jsonl", resume=resume)
    share = SHARES if set(stages) == set(STAGES) else dict.fromkeys(STAGES, 1.0)
    with Session(results, console, budget) as session:
        ceilings = ceilings_of(session)
        if "check" in stages:
            checks = check_jobs(device)
            tasks = check_compilations(session.waiting(checks), device)
            failed = compile_ahead(tasks, device, console, seconds=session.left(COMPILING * share["check"]))
            for what, why in failed.items():
                results.add(
                    dict(stage="check", id=what, column="compiler", status="failed", reason=why) | {"pass": "fprop"}
                )
            session.run("checking", checks, share["check"])
        if "layers" in stages:
            for record in not_built(cases):
                results.add(record)
            quick = [column for column in columns if column in QUICK]
            if OURS in quick and device.arch == "sm_90":
                quick.append(HOPPER)
            jobs = layer_jobs(cases, quick, ceilings)
            tasks = layer_compilations(session.waiting(jobs), device)
            compile_ahead(tasks, device, console, seconds=session.left(share["layers"]))
            session.run("layers", jobs, share["layers"])
        if "tune" in stages:
            tune_layers(session, cases, device, out, share["tune"])
        for suite in ("blocks", "models"):
            if suite in stages:
                session.run(suite, module_jobs(suite, [c for c in columns if c in QUICK]), share[suite])
        if "check" in stages:
            session.run("compute-sanitizer", sanitize_jobs())
        if "layers" in stages:
            session.run("torch.compile", layer_jobs(cases, [c for c in columns if c in SLOW], ceilings))
        for suite in ("blocks", "models"):
            if suite in stages:
                session.run(f"{suite}, torch.compile", module_jobs(suite, [c for c in columns if c in SLOW]))
        if session.left_out:
            console.print(f"{session.left_out} measurements found no time: continue with --resume")
    records = [r for r in read_records(results.path) if r["run"].get("gpu") == results.header["gpu"]]
    Console().print(summary(records))
    return sum(is_bad(r) and not is_peer(r) for r in records)


def this_device() -> Device:
    """The GPU that is measured: torch's current one."""
    return device_of(torch.device("cuda", torch.cuda.current_device()))


def ceilings_of(session: Session) -> Ceilings | None:
    """What this device sustains, measured in this run."""
    job = Job(dict(stage="ceilings", id="device"), measure_ceilings_record, ())
    found = session.run("ceilings", [job])
    if not found:
        found = [r for r in read_records(session.results.path) if r["stage"] == "ceilings"][-1:]
    if not found or found[0]["status"] != "ok":
        return None
    return {name: found[0][name] for name in ("bandwidth", "16", "tf32", "fp32", "fp64")}


def measure_ceilings_record() -> dict[str, Any]:
    return dict(status="ok", **measure_ceilings())


def tune_layers(session: Session, cases: Sequence[Case], device: Device, out: Path, share: float) -> None:
    """Tune the layers that are furthest from their roofline first, and write the table for this GPU."""
    from tritonconv.bench.tune import case_compilations, tune_case
    from tritonconv.tuning.cache import write
    from tritonconv.tuning.tables import Entry, Table

    layers = [
        r for r in read_records(session.results.path) if r["stage"] == "layer" and r["pass"] == "fprop" and r.get("timed")
    ]
    ours = {r["id"]: r for r in layers if r["column"] == OURS}
    peers: dict[str, tuple[float, str]] = {}
    for r in layers:
        if not r["column"].startswith(OURS):
            peers[r["id"]] = min(peers.get(r["id"], (math.inf, "")), (r["ms"], r["column"]))
    tunable = [case for case in cases if case.id in ours and operations()[case.kind].products]
    order = sorted(tunable, key=lambda case: ours[case.id]["percent"])
    jobs = [
        Job(dict(stage="tune", id=case.id, column=OURS, batch=case.batch) | {"pass": "fprop"}, tune_case,
            (case, *peers.get(case.id, (None, None))), 120.0)
        for case in order
    ]  # fmt: skip
    waiting = [job.arguments[0] for job in session.waiting(jobs)]
    # Of the first ones all candidates, by so many processes; each layer by itself would compile in one.
    tasks = [task for case in waiting for task in case_compilations(case, device)]
    compile_ahead(tasks, device, session.console, seconds=COMPILING * session.left(share))
    session.run("tuning", jobs, share)
    table = Table(device.name, session.results.header["triton"])
    for record in read_records(session.results.path):
        for row in record.get("entries", ()):
            table.add(Entry(**row | dict(input=tuple(row["input"]))))
    if table.entries:
        write(out / "table.json", table)


def columns_of(peers: Sequence[str]) -> tuple[str, ...]:
    """The columns that these words name, ours among them; all where there are none.

    >>> columns_of(["compile"])
    ('tritonconv', 'compile')

    Raises:
        ValueError: a word is none of cudnn, compile and max-autotune.
    """
    words = {"cudnn": COLUMNS[:2], "compile": COLUMNS[3:4], "max-autotune": COLUMNS[4:]}
    for word in peers:
        if word not in words:
            raise ValueError(f"--peer {word!r} is unknown: expected {', '.join(words)}")
    return tuple(c for c in COLUMNS if not peers or c == OURS or any(c in words[word] for word in peers))


def dry_run(
    cases: Sequence[Case], small: Sequence[Job], target: str, out: Path | None, *, resume: bool = False,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Geometry, offline compilation and predictions of the cases, and the measuring code itself in the interpreter.

    Args:
        small: jobs that the interpreter can do: `dry.small_jobs`.

    Returns:
        How many cases failed, and how many small layers of ours are wrong.
    """
    console = console or Console(stderr=True)
    target = device_named(target).name
    with contextlib.ExitStack() as stack:
        # Without a place to keep them results go the same way, and are gone with it.
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = Results.open(folder / "results.jsonl", resume=resume)
        records = dry_records(cases, target, console) if cases else []
        for record in records:
            results.add(record)
        with Session(results, console, environment={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}) as session:
            done = session.run("small layers in the interpreter", small)
    if cases:
        shown = Console(width=160) if not Console().is_terminal else Console()
        shown.print(prediction_table(records, target))
    wrong = print_small([r for r in done if not is_peer(r)], "small layers in Triton's interpreter, not timed")
    if peers := [r for r in done if is_peer(r)]:
        print_small(peers, "of them computed by torch too, whose errors fail nothing")
    for record in records:
        if record["status"] == "failed":
            print(f"  {record['id']}: {record['reason']}")
    print(verdict(records))
    return sum(record["status"] == "failed" for record in records) + wrong


def print_small(records: Sequence[dict[str, Any]], what: str) -> int:
    """How many layers are right, and which are not and why; returns the number of those."""
    wrong = [r for r in records if r["status"] != "ok"]
    print(f"{len(records)} {what}: {len(records) - len(wrong)} right, {len(wrong)} wrong")
    for r in wrong:
        print(f"  {r['id']}, {r['column']}: {r.get('reason')}")
    return len(wrong)


def summary(records: Sequence[dict[str, Any]]) -> Table:
    """One screen: what of ours was right, and how it compares, by family; a peer that is wrong is counted and left out."""
    table = Table(title="summary (a failure counts as wrong)", title_justify="left", box=None, pad_edge=False)
    for name in ("what", "right", "wrong", "peers wrong", "wins", "losses", "ours / best peer"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def add(what: str, rows: Sequence[dict[str, Any]]) -> None:
        ours = [r for r in rows if not is_peer(r)]
        good, bad = sum(r.get("status") == "ok" for r in ours), sum(map(is_bad, ours))
        peers = sum(is_bad(r) and is_peer(r) for r in rows)
        best: dict[tuple[Any, ...], dict[str, float]] = {}
        for r in rows:
            if r.get("timed") and r["column"] != HOPPER:
                key = (r["id"], r["pass"], r.get("batch"), r.get("mode"))
                side = "ours" if r["column"] == OURS else "peer"
                times = best.setdefault(key, {})
                times[side] = min(times.get(side, math.inf), r["ms"])
        ratios = [t["peer"] / t["ours"] for t in best.values() if len(t) == 2]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        table.add_row(
            what, *map(str, (good, bad, peers, sum(r > MARGIN for r in ratios), sum(r * MARGIN < 1 for r in ratios))),
            f"{mean:.2f}x" if mean else "not measured",
        )  # fmt: skip

    add("checks of candidates", [r for r in records if r["stage"] == "check"])
    layers = [r for r in records if r["stage"] == "layer"]
    for family in dict.fromkeys(r["family"] for r in layers):
        add(family, [r for r in layers if r["family"] == family])
    for suite in ("blocks", "models"):
        for pass_ in ("inference", "training"):
            rows = [r for r in records if r["stage"] == "module" and r["suite"] == suite and r["pass"] == pass_]
            if rows:
                add(f"{suite}, {pass_}", rows)
    return table
