"""What a model's layers cost and who runs them: one observed run, one row for every call."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritonconv.convert.roofline import ASSUMPTION

__all__ = ["Gradient", "Report", "Row"]


@dataclass
class Entry:
    """A call of a layer, or of layers that ran as one kernel, in one pass."""

    name: str
    """As in named_modules; a fused row bears its convolution's name."""
    kind: str
    fused: list[str] = field(default_factory=list)
    """Names of the other members."""
    backend: str = "torch"
    reason: str = ""
    """The kernels, or why torch runs it: of a backward pass the nodes of its autograd."""


@dataclass
class Row(Entry):
    """The forward pass of one call."""

    params: int = 0
    """Parameters of all members that no row above has counted."""
    macs: int = 0
    """Multiply-adds of convolutions and linear layers."""
    bytes: int = 0
    """Least memory traffic."""
    copies: int = 0
    """Hidden layout copies."""
    receptive_field: int | list[int] | None = None
    """Pixels of the model's input along an axis that an element of the output sees; a list where axes differ."""
    roofline_us: float = 0.0
    """Microseconds that the arithmetic or the traffic takes at least."""


@dataclass
class Gradient(Entry):
    """The backward pass of one call."""

    of: list[str] = field(default_factory=list)
    """What it gave gradients for: "input", or names of parameters."""
    saved: int = 0
    """Bytes that its forward pass saved for it, which nothing before had saved."""


@dataclass(frozen=True)
class Report:
    """The table that `tritonconv.explain` gives; print it, or read it with `to_dict`."""

    model: str
    layers: list[Row]
    fusion: list[dict[str, Any]]
    """For every graph, every place where the trace stopped, and what calls before this one found: `root`, `how` (graph,
    graph break, not traced, traces), `chains`, `reason`."""
    gradients: list[Gradient] = field(default_factory=list)
    """The calls that compute gradients, in the order of the backward pass."""
    saved: int = 0
    """Bytes that a forward pass saves for the backward pass, besides parameters and buffers."""

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the rows, and how many of them run where."""
        rows = self.layers
        sums = {key: sum(getattr(row, key) for row in rows) for key in ("params", "macs", "bytes", "copies", "roofline_us")}
        counts = {
            "layers": len(rows),
            "triton": sum(row.backend == "triton" for row in rows),
            "torch": sum(row.backend == "torch" for row in rows),
            "fused": sum(bool(row.fused) for row in rows),
        }
        return counts | sums

    def to_dict(self) -> dict[str, Any]:
        """All in plain types: "model", "layers" and "gradients" (a dict for every row), "totals", "fusion", "saved"."""
        return {
            "model": self.model,
            "layers": [asdict(row) for row in self.layers],
            "totals": self.totals,
            "fusion": [dict(entry) for entry in self.fusion],
            "gradients": [asdict(row) for row in self.gradients],
            "saved": self.saved,
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.model}: what runs where", caption=ASSUMPTION, show_footer=True)
        totals = self.totals
        columns = [
            ("layer", "left", "total"), ("kind", "left", ""), ("fused with", "left", f"{totals['fused']} fused"),
            ("backend", "left", f"{totals['triton']} triton, {totals['torch']} torch"), ("reason", "left", ""),
            ("params", "right", _count(totals["params"])), ("MACs", "right", _count(totals["macs"])),
            ("bytes", "right", _count(totals["bytes"])), ("copies", "right", str(totals["copies"])),
            ("field", "right", ""), ("roofline us", "right", f"{totals['roofline_us']:.2f}"),
        ]  # fmt: skip
        for title, side, footer in columns:
            table.add_column(title, Text(footer), justify=side)  # type: ignore[arg-type]
        for row in self.layers:
            fields = (
                row.name, row.kind, " + ".join(row.fused), row.backend, row.reason, _count(row.params), _count(row.macs),
                _count(row.bytes), str(row.copies), _field(row.receptive_field), f"{row.roofline_us:.2f}",
            )  # fmt: skip
            table.add_row(*(Text(value) for value in fields))
        text = io.StringIO()
        console = Console(file=text, width=200, color_system=None)
        console.print(table)
        if self.gradients:
            console.print(self._gradient_table())
        for line in self._fusion_lines():
            console.print(Text(line))
        return text.getvalue().rstrip("\n")

    def _gradient_table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Gradients, in the order of the backward pass", show_footer=True)
        for title in ("layer", "fused with", "backend", "what ran", "gradients of"):
            table.add_column(title, Text("total" if title == "layer" else ""))
        table.add_column("bytes saved", Text(_count(self.saved)), justify="right")
        for row in self.gradients:
            fields = (row.name, " + ".join(row.fused), row.backend, row.reason, ", ".join(row.of), _count(row.saved))
            table.add_row(*(Text(value) for value in fields))
        return table

    def _fusion_lines(self) -> list[str]:
        lines = []
        for entry in self.fusion:
            where = entry["root"] or "the model"
            if entry["how"] == "graph":
                lines.append(f"{where}: a graph with {entry['chains']} fused chains")
            elif entry["how"] == "traces":
                lines.append(f"{where}: {entry['reason']}")
            else:
                lines.append(f"{where}: {entry['how']}, {entry['reason']}")
        return lines or ["nothing is fused"]

    def plot(self, path: str | Path) -> None:
        """Save bars of every row's roofline time, colored by backend.

        Args:
            path: where the figure goes; its ending says which format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        colors = {"triton": "tab:green", "torch": "tab:gray"}
        figure = figure_class()(figsize=(8, 1.5 + 0.22 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        for backend, color in colors.items():
            at = [i for i, row in enumerate(self.layers) if row.backend == backend]
            axes.barh(at, [self.layers[i].roofline_us for i in at], color=color, label=backend)
        labels = [f"{row.name} ({row.kind}{' + ' if row.fused else ''}{' + '.join(row.fused)})" for row in self.layers]
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("roofline time, us")
        axes.set_title(self.model)
        axes.legend()
        figure.supxlabel(ASSUMPTION, fontsize=6)
        figure.savefig(path)


def figure_class() -> Any:
    """matplotlib's Figure; raises ImportError, with a word on how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Report.plot needs matplotlib: pip install 'tritonconv[plot]'") from error
    return Figure


def _count(n: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _field(size: int | list[int] | None) -> str:
    return "" if size is None else "x".join(map(str, size)) if isinstance(size, list) else str(size)
