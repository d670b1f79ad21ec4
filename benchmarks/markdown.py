"""Text of tables and numbers, for benchmarks/report.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["counted", "number", "shortened", "table"]


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: titles separated by commas, and cells, of which None is empty."""
    signs = str.maketrans({"|": r"\|", "<": "&lt;", "*": r"\*", "\n": " "})
    titles = header.split(", ")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join('' if c is None else str(c).translate(signs) for c in line)} |" for line in lines)


def number(value: float | None) -> str | None:
    """Three digits."""
    return None if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def counted(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def shortened(reason: str | None, limit: int = 300) -> str:
    text = " ".join((reason or "").split())
    return text if len(text) <= limit else text[:limit] + " ..."
