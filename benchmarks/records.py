"""What result files say, for benchmarks/report.py: the newest records, and layers with each way to compute them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tritonconv.bench.cases import DTYPES, Case
from tritonconv.bench.layers import OURS
from tritonconv.bench.registry import operation_for
from tritonconv.bench.results import KEY, read_records
from tritonconv.tuning import known_devices, products_of
from tritonconv.tuning.measured import MARGIN

__all__ = [
    "DRAW", "KINDS", "Outcome", "Record", "Row", "bound_of", "by_family", "ceilings_of", "expected", "gpu_of", "is_timed",
    "kind_of", "latest", "mean_of", "outcome_of", "read", "rows_of",
]  # fmt: skip

Record = dict[str, Any]
"""A line of a result file, with its run's header under "run"."""

Outcome = Literal["win", "draw", "loss"]

DRAW = MARGIN
"""Times within this factor are equal."""

KINDS = {"16": "fp16 and bf16", "tf32": "TF32", "fp32": "fp32", "fp64": "fp64"}
"""Arithmetic that has a ceiling of its own."""


def read(paths: Iterable[Path] | None = None) -> list[Record]:
    """The newest records of these files; None: of all in this repository."""
    if paths is None:
        paths = sorted(Path(__file__).with_name("results").glob("*/*.jsonl"))
    records = [record for path in paths for record in read_records(path)]
    return latest(sorted(records, key=lambda record: record["run"].get("date") or ""))


def latest(records: Iterable[Record]) -> list[Record]:
    """Without those that a later one of the same key and GPU replaces."""
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = (gpu_of(record), record.get("target"), record.get("suite"), *(record.get(name) for name in KEY))
        kept.pop(key, None)
        kept[key] = record
    return list(kept.values())


def gpu_of(record: Record) -> str | None:
    return record["run"].get("gpu")


def is_timed(record: Record) -> bool:
    """Whether it holds a time that a GPU's clock gave for a right result."""
    if gpu_of(record) is None or record["stage"] == "dry" or record.get("status") != "ok":
        return False
    return record.get("ms") is not None and (record["stage"] == "tune" or bool(record.get("timed")))


@dataclass(frozen=True)
class Row:
    """One layer, block or model, and each way in which it was computed."""

    id: str
    group: str
    """A layer's family; "blocks" or "models"."""
    pass_: str
    mode: str | None
    batch: int | None
    ways: dict[str, Record]
    """Records by column."""

    @property
    def ours(self) -> Record | None:
        """Our record, if it is timed."""
        record = self.ways.get(OURS)
        return record if record and is_timed(record) else None

    @property
    def peer(self) -> Record | None:
        """The fastest other way."""
        others = [r for column, r in self.ways.items() if not column.startswith(OURS) and is_timed(r)]
        return min(others, key=lambda record: record["ms"], default=None)

    @property
    def ratio(self) -> float | None:
        """The best peer's time by ours: above 1 ours is faster."""
        return self.peer["ms"] / self.ours["ms"] if self.ours and self.peer else None

    @property
    def outcome(self) -> Outcome | None:
        return None if self.ratio is None else outcome_of(self.ratio)

    def of_any(self, name: str) -> Any:
        """What is the same in all its records."""
        return next((record[name] for record in self.ways.values() if record.get(name) is not None), None)


def outcome_of(ratio: float) -> Outcome:
    return "win" if ratio > DRAW else "loss" if ratio * DRAW < 1 else "draw"


def rows_of(records: Iterable[Record], stage: str) -> list[Row]:
    """Layers ("layer") or blocks and models ("module"), worst ratio first, those that cannot be compared last."""
    ways: dict[tuple[str, str, str, str | None, int | None], dict[str, Record]] = {}
    for record in records:
        if record["stage"] == stage:
            group = record.get("family") or record.get("suite") or ""
            key = (record["id"], group, record.get("pass") or "fprop", record.get("mode"), record.get("batch"))
            ways.setdefault(key, {})[record["column"]] = record
    rows = [Row(*key, by_column) for key, by_column in ways.items()]
    return sorted(rows, key=lambda row: (row.ratio is None, row.ratio or 0.0))


def expected(records: Iterable[Record], cases: Iterable[Case]) -> list[tuple[Case, str, Row | None]]:
    """Each case and pass that could be timed, and what is known of it; gradients once any was measured."""
    rows = {(row.id, row.pass_): row for row in reversed(rows_of(records, "layer"))}
    seen = {pass_ for _, pass_ in rows}
    found: list[tuple[Case, str, Row | None]] = []
    for case in cases:
        operation = operation_for(case)
        passes = [p for p in operation.passes if p == "fprop" or p in seen] if operation else ["fprop"]
        found += [(case, pass_, rows.get((case.id, pass_))) for pass_ in passes]
    return found


def by_family(records: Iterable[Record]) -> dict[tuple[str, str], list[Row]]:
    """Compared layers by family and pass."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of(records, "layer"):
        if row.ratio is not None:
            groups.setdefault((row.group, row.pass_), []).append(row)
    return groups


def mean_of(rows: Iterable[Row]) -> float:
    """Geometric mean of the ratios."""
    return statistics.geometric_mean(row.ratio for row in rows if row.ratio is not None)


def ceilings_of(records: Iterable[Record]) -> dict[str, float]:
    """What the GPU was measured to sustain; empty if it was not."""
    for record in records:
        if record["stage"] == "ceilings" and record.get("bandwidth") and gpu_of(record):
            return {name: record[name] for name in ("bandwidth", *KINDS) if record.get(name)}
    return {}


def kind_of(record: Record) -> str:
    """Which of the ceilings bounds a layer's arithmetic."""
    return products_of(DTYPES.get(record.get("dtype", ""), "float32"), bool(record.get("tf32")))


def bound_of(record: Record, records: Iterable[Record]) -> Literal["arithmetic", "memory"] | None:
    """What keeps a timed layer from being faster, by its GPU's measured ceilings or else by its description."""
    ceilings: dict[Any, float] = ceilings_of(records)
    device = known_devices().get(gpu_of(record) or "")
    if not ceilings and device:
        ceilings = {"bandwidth": device.bandwidth, **device.flops}
    peak = ceilings.get(kind_of(record))
    if not peak:
        return None
    return "arithmetic" if 1e12 * record["tflops"] / peak >= 1e9 * record["gbps"] / ceilings["bandwidth"] else "memory"
