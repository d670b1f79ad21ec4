"""A picture of a program by the model's clock: buffers that fill, wait and are read, and who waits meanwhile."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from .trace import Event, Trace

__all__ = ["draw", "rows_of"]

Span = tuple[float, float, str]
"""Begin, end, and what it is: a key of COLORS."""

COLORS = {
    "requested": "#fde0c2",
    "filling": "#f0953f",
    "full": "#c6dbef",
    "read by a product": "#2171b5",
    "read by a store": "#41ab5d",
    "product": "#2171b5",
    "store": "#41ab5d",
    "waiting": "#bdbdbd",
}


def rows_of(events: list[Event]) -> dict[str, list[Span]]:
    """Rows of a program's picture, from the top: buffers, tensor cores, stores, threads."""
    buffers: dict[str, list[Span]] = defaultdict(list)
    tensor_cores: list[Span] = []
    stores: list[Span] = []
    waits: dict[str, list[Span]] = defaultdict(list)
    # Since when a buffer is full.
    full: dict[str, float] = {}
    for event in events:
        if event.kind == "load":
            for name in event.buffers:
                buffers[name] += [(event.issued, event.begin, "requested"), (event.begin, event.end, "filling")]
                full[name] = event.end
        elif event.kind in ("product", "store"):
            begin = event.begin if event.kind == "product" else event.issued
            for name in event.buffers:
                if name in full:
                    buffers[name].append((full[name], begin, "full"))
                buffers[name].append((begin, event.end, f"read by a {event.kind}"))
                # What a product has read may be read again; what was stored is done with.
                full.pop(name, None)
                if event.kind == "product":
                    full[name] = event.end
            (tensor_cores if event.kind == "product" else stores).append((begin, event.end, event.kind))
        elif event.kind == "write":
            full[event.text] = event.end
        elif event.kind == "wait":
            waits[event.thread].append((event.begin, event.end, "waiting"))
    rows = {name: buffers[name] for name in sorted(buffers, key=natural)}
    rows["tensor cores"] = tensor_cores
    rows["TMA stores"] = stores
    return {**rows, **{f"{name} waits": spans for name, spans in waits.items()}}


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def draw(trace: Trace, path: Path | str, program: int | None = None, cycles: tuple[float, float] | None = None) -> None:
    """Draw a program of a Timed run.

    Args:
        trace: of a Timed schedule.
        path: what to write; its suffix says in which format.
        program: by default the one that ran first.
        cycles: what part of it, by default all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    number = next((i for i, (id, _) in enumerate(trace.starts) if program in (None, id)), 0)
    first = trace.starts[number][1]
    last = trace.starts[number + 1][1] if number + 1 < len(trace.starts) else len(trace.events)
    events = trace.events[first:last]
    rows = rows_of(events)
    low, high = cycles or (0.0, max(event.end for event in events))
    figure = Figure(figsize=(10, 1.4 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    seen = set()
    for y, spans in enumerate(rows.values()):
        for kind, color in COLORS.items():
            parts = [
                (begin, end - begin) for begin, end, what in spans if what == kind and max(begin, low) < min(end, high)
            ]
            if parts:
                seen.add(kind)
                axes.broken_barh(parts, (y - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.3)
    boundary = next(i for i, name in enumerate(rows) if name == "tensor cores")
    for y in (boundary, boundary + 2):
        axes.axhline(y - 0.5, color="black", linewidth=0.6)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(low, high)
    axes.set_xlabel("cycles")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        f"Program {trace.starts[number][0]}: a model, made by the interpreter with assumed latencies, not measured",
        fontsize=9,
        loc="left",
    )
    legend = {COLORS[kind]: kind for kind in reversed(COLORS) if kind in seen and kind not in ("product", "store")}
    handles = [Patch(facecolor=color, label=label) for color, label in reversed(legend.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    # The version of matplotlib is no part of a result.
    figure.savefig(path, dpi=160, metadata={"Date": None} if str(path).endswith("svg") else {"Software": None})
