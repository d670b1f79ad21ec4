"""Pictures of measured times, for benchmarks/report.py."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import KINDS, Outcome, Record, by_family, ceilings_of, gpu_of, kind_of, mean_of, outcome_of, rows_of

__all__ = ["plots", "write_plots"]

Point = tuple[float, float]
"""Arithmetic intensity in flop a byte, and TFLOP/s."""

Bar = tuple[str, float, Outcome, str]
"""Label, ratio, its color, and what is written at its end."""

COLORS: dict[Outcome, str] = {"win": "tab:green", "draw": "tab:gray", "loss": "tab:red"}


def plots(gpu: str, records: Sequence[Record]) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """A GPU's plots by file name, each a title and what saves it; none where nothing was timed.

    Args:
        records: this GPU's.
    """
    rows = [row for row in rows_of(records, "layer") if row.ours]
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    found: dict[str, tuple[str, Callable[[Path], None]]] = {}
    means = sorted((mean_of(group), *key, len(group)) for key, group in by_family(records).items())
    if means:
        title = f"{gpu}: geometric mean by family"
        bars = [(f"{family}, {pass_}", mean, outcome_of(mean), f"{mean:.2f} of {n}") for mean, family, pass_, n in means]
        found[f"{slug}-families.png"] = title, functools.partial(save_bars, title=title, bars=bars)
        title = f"{gpu}: each layer and its best peer"
        bars = [(f"{r.id}, {r.pass_}", r.ratio, r.outcome, f"{r.ratio:.2f}") for r in rows if r.ratio and r.outcome]
        found[f"{slug}-layers.png"] = title, functools.partial(save_bars, title=title, bars=bars)
    if rows:
        title = f"{gpu}: roofline"
        ours = [point(row.ours) for row in rows if row.ours]
        peers = [point(row.peer) for row in rows if row.peer]
        roof = ceilings_of(records)
        kinds = dict.fromkeys(["bandwidth", *(kind_of(row.ours) for row in rows if row.ours)])
        roof = {kind: roof[kind] for kind in kinds if kind in roof}
        found[f"{slug}-roofline.png"] = (
            title, functools.partial(save_roofline, title=title, ours=ours, peers=peers, roof=roof),
        )  # fmt: skip
    return found


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Save the plots of every GPU.

    Raises:
        ImportError: there is something to draw, and matplotlib is not installed.
    """
    paths = []
    for gpu in filter(None, dict.fromkeys(map(gpu_of, records))):
        for name, (_, save) in plots(gpu, [record for record in records if gpu_of(record) == gpu]).items():
            save(folder / name)
            paths.append(folder / name)
    return paths


def point(record: Record) -> Point:
    return 1e3 * record["tflops"] / record["gbps"], record["tflops"]


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'tritonconv[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_bars(path: Path, title: str, bars: Sequence[Bar]) -> None:
    """Ratios as bars that begin at 1, so that a loss points the other way."""
    figure = new_figure(8, 1.5 + 0.22 * len(bars))
    axes = figure.subplots()
    # As far to the left as to the right, and on a log axis: a loss is as large as a win. With room for the numbers.
    reach = 1.5 * max(1.5, *(max(ratio, 1 / ratio) for _, ratio, _, _ in bars))
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / reach, reach)
    for outcome, color in COLORS.items():
        at = [i for i, bar in enumerate(bars) if bar[2] == outcome]
        if at:
            drawn = axes.barh(at, [bars[i][1] - 1 for i in at], left=1, color=color, label=f"{outcome} ({len(at)})")
            axes.bar_label(drawn, [bars[i][3] for i in at], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    halves = int(2 * math.log2(reach))
    ticks = [2 ** (i / 2) for i in range(-halves, halves + 1) if halves < 5 or i % (2 * math.ceil(halves / 12)) == 0]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("best peer's time / ours: right of 1 ours is faster")
    axes.set_title(title)
    axes.legend(fontsize=7)
    save(figure, path)


def save_roofline(path: Path, title: str, ours: Sequence[Point], peers: Sequence[Point], roof: Mapping[str, float]) -> None:
    """Layers under the roofs of their types, as far as those were measured: `roof` as in a record of ceilings."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    rates = {kind: rate for kind, rate in roof.items() if kind in KINDS}
    at = [intensity for intensity, _ in (*ours, *peers)]
    ridges = [rate / roof["bandwidth"] for rate in rates.values()]
    low, high = min(at + ridges) / 3, 3 * max(at + ridges)
    for (kind, rate), ridge in zip(rates.items(), ridges, strict=True):
        axes.plot([low, ridge, high], [low * roof["bandwidth"] / 1e12, *[rate / 1e12] * 2], color="black", linewidth=0.8)
        axes.annotate(f"{KINDS[kind]}, measured", (high, rate / 1e12), ha="right", va="bottom", fontsize=7)
    for label, marker, color, points in (("best peer", "x", "tab:gray", peers), ("tritonconv", "o", "tab:green", ours)):
        axes.scatter([x for x, _ in points], [y for _, y in points], s=18, marker=marker, color=color, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity: flop a byte of the least traffic")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title)
    axes.legend()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The version of matplotlib is no part of a result.
    figure.savefig(path, dpi=120, metadata={"Software": None})
