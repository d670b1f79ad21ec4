"""What was measured: the best config of each layer and the best peer's time, by GPU.

A table belongs to one GPU and one Triton. Entries carry the hash of the kernel that was measured, and are ignored once its
source has changed. The user's own cache goes before the tables that ship with the library.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.problem import Problem
from tritonconv.tuning.sources import kernel_hash

__all__ = ["FORMAT", "Entry", "Table", "entry_of", "is_current", "layer_key", "shipped_table", "slug"]

FORMAT = 1
# A layer of so many times as many or as few pixels lends its config, and its verdict on torch.
NEAR_CONFIG, NEAR_VERDICT = 4.0, 2.0


@dataclass(frozen=True)
class Entry:
    """One measured layer. Times are medians in milliseconds."""

    layer: str
    """`layer_key`: all of it but batch and image size."""
    batch: int
    input: tuple[int, int, int]
    conditions: str
    """What followed in the same kernel and how many hidden copies went before it, as `Prepared.conditions` gives it."""
    kernel_hash: str
    config: dict[str, int | bool]
    ms: float
    peer: str | None = None
    """The fastest other way to compute the layer that was measured beside it."""
    peer_ms: float | None = None
    torch: str = ""
    date: str = ""

    @property
    def pixels(self) -> int:
        return self.batch * math.prod(self.input)

    def is_sound(self) -> bool:
        """Whether it could have been measured: a file may hold anything."""
        words = self.layer, self.conditions, self.kernel_hash, self.peer or "", self.torch, self.date
        sizes = self.batch, *self.input, *self.config.values()
        times = self.ms, self.ms if self.peer_ms is None else self.peer_ms
        return (
            all(isinstance(word, str) for word in words) and self.layer.partition(" ")[0].isidentifier()
            and len(self.input) == 3 and all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes)
            and all(isinstance(ms, (int, float)) and 0 < ms < 1e9 for ms in times)
        )  # fmt: skip


@dataclass
class Table:
    """Entries of one GPU under one Triton."""

    gpu: str
    triton: str
    source: str = ""
    """Where it comes from, for messages."""
    entries: dict[tuple[Any, ...], Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_layer: dict[str, dict[tuple[Any, ...], Entry]] = {}
        for key, entry in self.entries.items():
            self._by_layer.setdefault(entry.layer, {})[key] = entry

    def add(self, entry: Entry) -> None:
        """Put an entry in, in place of an older one for the same sizes and conditions."""
        key = (entry.layer, entry.batch, entry.input, entry.conditions)
        self.entries[key] = self._by_layer.setdefault(entry.layer, {})[key] = entry

    def find(
        self, problem: Problem, conditions: str | None, reach: float, allowed: Sequence[dict[str, int | bool]]
    ) -> Entry | None:
        """The entry of the same layer that was measured nearest in pixels, within a factor of `reach`.

        `conditions` must agree; None: any will do. Entries of another version of the kernel do not count, nor do those of
        configs that are not `allowed`.
        """
        g = problem.geometry
        pixels = g.batch * math.prod(g.input)
        found = [
            (abs(math.log(max(1, entry.pixels) / max(1, pixels))), (entry.batch, entry.input) != (g.batch, g.input), entry)
            for entry in self._by_layer.get(layer_key(problem), {}).values()
            if conditions in (None, entry.conditions) and entry.config in allowed and is_current(entry)
        ]
        distance, _, entry = min(found, key=lambda item: item[:2], default=(math.inf, True, None))
        return entry if distance <= math.log(reach) + 1e-9 else None

    def to_json(self) -> str:
        rows = sorted(self.entries.values(), key=lambda e: (e.layer, e.batch, e.input, e.conditions))
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        head = json.dumps(dict(format=FORMAT, gpu=self.gpu, triton=self.triton))
        return f'{head[:-1]}, "entries": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str, source: str) -> Table:
        """Raises ValueError for anything that is not a table of this format."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, expected {FORMAT}")
            table = cls(str(data["gpu"]), str(data["triton"]), source)
            for row in data["entries"]:
                entry = Entry(**row | dict(input=tuple(row["input"])))
                if not entry.is_sound():
                    raise ValueError(f"an entry of {entry.layer} has no sizes, time or config that could be")
                table.add(entry)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{source} is no tuning table: {error}") from error
        return table

    def merge(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.add(entry)


def layer_key(problem: Problem) -> str:
    """All that changes the best config, but batch and image size.

    >>> from tritonconv.geometry import ConvGeometry
    >>> from tritonconv.tuning import device_named
    >>> g = ConvGeometry.parse((8, 64, 56, 56), (128, 64, 3, 3), nd=2, padding=1, stride=2)
    >>> layer_key(Problem("conv_fprop", g, "bfloat16", False, True, device_named("H200")))
    'conv_fprop fprop bfloat16 vectors c64 k128 g1 f1x3x3 s1x2x2 p0x1x1+0x1x1 d1x1x1'
    """
    g = problem.geometry

    def sizes(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    flags = [
        problem.dtype + ("+tf32" if problem.tf32 and problem.dtype == "float32" else ""),
        *["vectors"] * problem.vectors, *["int64"] * g.needs_int64, *["transposed"] * g.transposed,
        *["computed"] * problem.computed, *[f"packed{problem.pack}"] * (problem.pack > 1),
    ]  # fmt: skip
    extra = f" op{sizes(g.output_padding)}" if any(g.output_padding) else ""
    return (
        f"{problem.kernel} {problem.pass_} {' '.join(flags)} c{g.in_channels} k{g.out_channels} g{g.groups} "
        f"f{sizes(g.kernel)} s{sizes(g.stride)} p{sizes(g.padding)}+{sizes(g.padding_after)} d{sizes(g.dilation)}{extra}"
    )


def entry_of(
    problem: Problem,
    conditions: str,
    config: Any,
    ms: float,
    *,
    peer: str | None,
    peer_ms: float | None,
    torch: str,
    date: str,
) -> Entry:
    """What was measured of a problem; `config` is a triton.Config."""
    return Entry(
        layer_key(problem), problem.geometry.batch, problem.geometry.input, conditions, kernel_hash(problem.kernel),
        as_dict(config), ms, peer, peer_ms, torch, date,
    )  # fmt: skip


def slug(gpu: str) -> str:
    """A GPU's name as part of a file's.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def is_current(entry: Entry) -> bool:
    """Whether the kernel is still what was measured."""
    try:
        return entry.kernel_hash == kernel_hash(entry.layer.split()[0])
    except OSError:
        return False


@functools.cache
def shipped_table(gpu: str) -> Table | None:
    """The table that comes with the library for this GPU, if there is one.

    Its configs serve any Triton: a config that the kernel no longer has is not taken.
    """
    path = resources.files(__package__).joinpath("tables").joinpath(f"{slug(gpu)}.json")
    return Table.from_json(path.read_text(), f"tables/{path.name}") if path.is_file() else None
