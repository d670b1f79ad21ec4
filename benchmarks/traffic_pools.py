"""Bytes that poolings move, forward: the table in docs/pooling.md, by `python -m benchmarks.traffic`.

For every pooling of cases.csv the floor (x once, y once) and what the launches move as they are built for an H200, if what
programs share comes from L2: each of their tensors once, sums between two launches once written and once read.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from benchmarks.markdown import table
from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.registry import operation_for
from tritonconv.tuning import device_named
from tritonconv.tuning.configs import name_of

__all__ = ["FAMILIES", "bytes_of", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "pooling.md"
FAMILIES = ("maxpool", "avgpool", "global pool")


def bytes_of(case: Case) -> tuple[str, int, int]:
    """(kernels and config, floor, bytes of all launches)."""
    operation = operation_for(case)
    assert operation is not None
    launches = operation.launches(case, device_named("H200"))
    moved = sum(t.numel() * t.element_size() for one in launches for t in one.arguments.values() if isinstance(t, Tensor))
    names = " + ".join(dict.fromkeys(one.kernel.__name__.removesuffix("_kernel") for one in launches))
    return f"{names} {name_of(launches[0].config)}", operation.count(case)[1], moved


def page() -> str:
    """The table."""
    rows = []
    for case in load_cases():
        if case.family in FAMILIES:
            launched, floor, moved = bytes_of(case)
            rows.append((case.id, launched, f"{floor / 1e6:.1f}", f"{moved / 1e6:.1f}", f"{moved / floor:.2f}"))
    return table("layer, launches, floor MB, moved MB, moved by floor", rows)
