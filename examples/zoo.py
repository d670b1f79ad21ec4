"""Convert models of five libraries, compare what they give with the originals, and count what is fused.

    pip install -c constraints.txt ".[zoo]"
    python examples/zoo.py                                  # all models, a few minutes
    python examples/zoo.py --markdown docs/zoo.md
    python examples/zoo.py timm/resnet18 diffusers/unet_2d  # some

On a GPU the layers run on our kernels. Without one torch computes them, and the counts are of what would be launched;
--interpret runs the kernels in Triton's interpreter, slowly.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

if not torch.cuda.is_available():
    # Counts when triton is imported, which is why tritonconv comes after it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from zoo_models import MODELS, Model, declare_operators

import tritonconv

CONVOLUTIONS = {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
NORMS = nn.modules.batchnorm._BatchNorm
BOUND = 1e-4
"""Largest difference in fp32, relative to the largest value of a result. Deep networks amplify rounding."""


@dataclass
class Outcome:
    """What became of one model."""

    model: str
    convolutions: int
    """Convolutions in a forward."""
    links: int
    """Batch norms of a convolution's result that nobody else reads."""
    unfused: int
    """Those that are launches of their own."""
    on_torch: list[str]
    """Kinds of layers that torch computes."""
    copies: int
    """Hidden copies to another memory format."""
    breaks: int
    """Places where the trace stopped."""
    convert_s: float
    first_call_s: float
    difference: float
    """Largest one of a result from torch's, relative to the largest value."""
    strides: bool
    """Whether the results have torch's strides."""

    @property
    def is_right(self) -> bool:
        return self.difference <= BOUND and self.strides


class Links(TorchFunctionMode):
    """Counts convolutions, batch norms, and those that alone read a convolution's result."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.norms = 0
        self._reads: dict[int, list[str]] = {}
        self._results: list[Tensor] = []

    @property
    def links(self) -> int:
        return sum(readers == ["batch_norm"] for readers in self._reads.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor) and id(v) in self._reads]
        computes = name not in ("__get__", "size", "dim", "contiguous", "is_floating_point")
        for value in given if computes else ():
            self._reads[id(value)].append(name)
        result = func(*args, **(kwargs or {}))
        self.norms += name == "batch_norm"
        if name in CONVOLUTIONS:
            self.convolutions += 1
            # Kept, so that no other tensor gets its identity.
            self._results.append(result)
            self._reads[id(result)] = []
        return result


def measure(name: str, make: Model, interpret: bool = False) -> Outcome:
    """Convert a model, run both, and compare."""
    torch.manual_seed(0)
    model, args, kwargs = make()
    randomize_statistics(model.eval())
    with torch.no_grad(), Links() as found:
        expected = tensors_of(model(*args, **kwargs))
    start = time.perf_counter()
    converted = tritonconv.convert(model)
    convert_s = time.perf_counter() - start
    with torch.no_grad(), tritonconv.set_backend("auto" if interpret or torch.cuda.is_available() else "torch"):
        start = time.perf_counter()
        results = tensors_of(converted(*args, **kwargs))
        first_call_s = time.perf_counter() - start
    report = tritonconv.explain(converted, *args, **kwargs)
    modules = dict(converted.named_modules())
    alone = sum(isinstance(modules.get(row.name), NORMS) or row.kind == "batch_norm" for row in report.layers)
    return Outcome(
        name, found.convolutions, found.links, max(found.links - (found.norms - alone), 0),
        sorted({row.kind for row in report.layers if row.backend == "torch"}),
        sum(row.copies for row in report.layers), sum(entry["how"] == "graph break" for entry in report.fusion),
        convert_s, first_call_s, max(map(difference, results, expected), default=0.0),
        [t.stride() for t in results] == [t.stride() for t in expected],
    )  # fmt: skip


def randomize_statistics(model: nn.Module) -> None:
    """Running statistics that are not those of a new batch norm."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of a model's result."""
    values = pytree.tree_leaves(dict(result) if isinstance(result, dict) else result)
    return [value for value in values if isinstance(value, Tensor)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)) if ours.numel() else 0.0


COLUMNS = (
    "model", "convolutions", "norms behind them", "unfused", "copies", "graph breaks", "convert, s", "first call, s",
    "difference", "on torch",
)  # fmt: skip


def row_of(outcome: Outcome) -> list[str]:
    o = outcome
    error = f"{o.difference:.0e}" + ("" if o.strides else ", strides differ") + ("" if o.is_right else " WRONG")
    numbers = (o.convolutions, o.links, o.unfused, o.copies, o.breaks)
    return [o.model, *map(str, numbers), f"{o.convert_s:.2f}", f"{o.first_call_s:.1f}", error, ", ".join(o.on_torch)]


def summary(outcomes: Sequence[Outcome]) -> str:
    links, unfused = sum(o.links for o in outcomes), sum(o.unfused for o in outcomes)
    return (
        f"{len(outcomes)} models, {sum(o.is_right for o in outcomes)} right. Of {links} batch norms behind convolutions "
        f"{unfused} are not fused. {sum(o.copies for o in outcomes)} hidden copies on "
        f"{sum(o.convolutions for o in outcomes)} convolutions. Slowest convert {max(o.convert_s for o in outcomes):.1f} "
        f"s, slowest first call {max(o.first_call_s for o in outcomes):.1f} s."
    )


def versions() -> str:
    found = importlib.metadata.packages_distributions()
    packages = [name for name in ("tritonconv", "torch", *MODELS) if name in found]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The page of the documentation."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"the CPU ({platform.machine()})"
    lines = [
        "# Models of five libraries",
        "",
        "`python examples/zoo.py --markdown docs/zoo.md` wrote this page. Each model has random weights and small",
        "inputs. It is converted, runs in eval mode, and is compared with the original in fp32. Differences are",
        "relative to the largest value of a result. Seconds are those of one machine, on which no kernel was",
        "compiled. Hidden copies are those of images that enter or leave contiguous (at graph breaks too), where code",
        "joins channels and pixels, and of weights that a forward computes or that belong to a subclass of a layer.",
        "The last column has the kinds of layers that torch computes.",
        "",
        summary(outcomes),
        "",
        f"{datetime.date.today()}, {versions()}, on {device}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" if name in ("model", "on torch") else "--:" for name in COLUMNS) + " |",
        *("| " + " | ".join(row_of(outcome)) + " |" for outcome in outcomes),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; 1 if a model was wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help="LIBRARY or LIBRARY/MODEL; all, if none is given")
    parser.add_argument("--interpret", action="store_true", help="run the kernels in Triton's interpreter")
    parser.add_argument("--markdown", type=Path, help="write the table as a page, too")
    args = parser.parse_args(argv)
    models = {f"{library}/{name}": make for library, found in MODELS.items() for name, make in found.items()}
    chosen = {n: make for n, make in models.items() if not args.names or {n, n.partition("/")[0]} & set(args.names)}
    if not chosen:
        parser.error(f"no model of {', '.join(args.names)}; there are {', '.join(models)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    declare_operators()
    console, outcomes = Console(stderr=True), []
    with console.status("") as status:
        for name, make in chosen.items():
            status.update(name)
            outcomes.append(measure(name, make, args.interpret))
            if not console.is_terminal:
                print(*row_of(outcomes[-1]), sep="\t", flush=True)
    if console.is_terminal:
        table = Table(*COLUMNS, caption=summary(outcomes))
        for outcome in outcomes:
            table.add_row(*row_of(outcome))
        Console().print(table)
    else:
        print(summary(outcomes))
    if args.markdown:
        args.markdown.write_text(markdown(outcomes))
    return int(not all(outcome.is_right for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
