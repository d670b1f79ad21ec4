"""The layers that are benchmarked: cases.csv, one row a layer that people run."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from tritonconv.geometry import Pass

__all__ = ["DTYPES", "Case", "load_cases"]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True)
class Case:
    """One layer: what is computed, on which sizes, in which type.

    Tuples have a number for each of the layer's own spatial axes.
    """

    id: str
    kind: str
    """The operation: conv, convT, deform, pool, gap, bn, gn."""
    batch: int
    channels: int
    size: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] | Literal["causal"] = (0,)
    """Zeros on both sides of each axis; "causal": all before the first element."""
    dilation: tuple[int, ...] = (1,)
    groups: int = 1
    output_padding: tuple[int, ...] = (0,)
    deform_groups: int = 0
    mask: bool = False
    residual: bool = False
    fused: bool = False
    """Whether batch norm, residual and ReLU follow in the same kernel: the largest epilogue."""
    dtype: str = "bf16"
    tf32: bool = False
    pass_: Pass = "fprop"
    """The forward pass, or the gradient of the input or of the weight."""
    channels_last: bool = True
    family: str = ""
    """Layers that behave alike share one; plots and means are made by family."""
    macs: int = 0
    """Multiply-adds of the forward pass, as counted by hand; the operation counts its own."""
    bytes: int = 0
    source: str = ""
    """Where the layer comes from."""

    @property
    def nd(self) -> int:
        return len(self.size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)


@functools.cache
def load_cases() -> list[Case]:
    """All rows of cases.csv.

    >>> len(load_cases()), load_cases()[0].id
    (98, 'r50_l1_3x3')
    """
    text = resources.files(__package__).joinpath("cases.csv").read_text()
    return [_case(row) for row in csv.DictReader(text.splitlines())]


def _case(row: dict[str, str]) -> Case:
    nd = int(row["nd"])

    def sizes(*names: str) -> tuple[int, ...]:
        return tuple(int(row[name]) for name in names)[3 - nd :]

    def each(name: str) -> tuple[int, ...]:
        values = tuple(int(v) for v in row[name].split("x"))
        return values * nd if len(values) == 1 else values

    return Case(
        id=row["id"], kind=row["kind"], batch=int(row["N"]), channels=int(row["C"]), size=sizes("D", "H", "W"),
        filters=int(row["K"]), kernel=sizes("T", "R", "S"), stride=each("stride"),
        padding="causal" if row["pad"] == "causal" else each("pad"), dilation=each("dilation"), groups=int(row["groups"]),
        output_padding=each("output_padding"), deform_groups=int(row["deform_groups"]), mask=row["mask"] == "1",
        residual=row["residual"] == "1", dtype=row["dtype"], family=row["family"], macs=int(row["macs"]),
        bytes=int(row["bytes"]), source=row["source"],
    )  # fmt: skip
