"""Measured tuning: find each layer's best config and whether torch is faster, and save both for later runs."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tritonconv.convert.explain import restored
from tritonconv.measure.ahead import Compilation, compile_ahead
from tritonconv.measure.check import compare
from tritonconv.measure.clock import copies_for_cold_cache, time_calls
from tritonconv.measure.progress import track
from tritonconv.measure.torch_settings import without_cudnn_search
from tritonconv.ops.core.backend import interpreting, set_backend
from tritonconv.ops.core.launch import Launch, captured, device_of, forced
from tritonconv.ops.core.observe import Call, Example, observe
from tritonconv.ops.core.signature import clear_caches
from tritonconv.tuning import Device, Problem, candidates, choose
from tritonconv.tuning.cache import cache_path, remember, triton_version, write
from tritonconv.tuning.configs import config_name
from tritonconv.tuning.cost import predict
from tritonconv.tuning.measured import MARGIN
from tritonconv.tuning.tables import Entry, entry_of
from tritonconv.tuning.tables import Table as TuningTable

__all__ = ["TuneReport", "Tuned", "configs_to_measure", "tune", "tune_example"]

# The number of configs that are measured, the best ones by the cost model.
TOP = 8


@dataclass(frozen=True)
class Tuned:
    """The measurements of one layer."""

    layer: str
    conditions: str
    entry: Entry | None
    """None if no candidate gave a right result."""
    before_ms: float | None
    """The time with the config that would run without tuning."""
    tried: int
    wrong: tuple[str, ...] = ()
    """Candidates that failed or gave a wrong result, and how."""


@dataclass(frozen=True)
class TuneReport:
    """What `tritonconv.tune` measured; print it."""

    gpu: str
    layers: list[Tuned]
    path: Path
    """The file with the results."""
    skipped: list[str] = field(default_factory=list)
    """Layers that torch runs anyway, or that could not be measured, and why."""

    def __str__(self) -> str:
        table = Table(title=f"tuned on {self.gpu}", title_justify="left", box=None, pad_edge=False)
        for name in ("layer", "with", "config", "tried", "before ms", "ms", "torch ms", "auto runs it on"):
            table.add_column(name, justify="right" if name.endswith("ms") or name == "tried" else "left")
        for row in self.layers:
            if row.entry is None:
                table.add_row(row.layer, row.conditions, "none is right", str(row.tried), "", "", "", "torch")
                continue
            peer = row.entry.peer_ms
            ours = peer is None or row.entry.ms <= MARGIN * peer
            times = ("" if ms is None else f"{ms:.4f}" for ms in (row.before_ms, row.entry.ms, peer))
            table.add_row(
                row.layer, row.conditions, config_name(row.entry.config), str(row.tried), *times,
                "triton" if ours else "torch",
            )  # fmt: skip
        console = Console(width=160, color_system=None)
        with console.capture() as text:
            console.print(table)
            for reason in self.skipped:
                console.print(f"not tuned: {reason}", highlight=False)
            console.print(f"kept in {self.path}", highlight=False)
        return text.get().rstrip("\n")


def tune(
    model: torch.nn.Module, *example_inputs: Any, export: str | Path | None = None, seconds: float = 0.1,
    console: Console | None = None,
) -> TuneReport:  # fmt: skip
    """Measure the best candidates for every layer of a converted model, on the GPU that its inputs are on.

    The results are saved in the user's cache. Every later process takes its configs from there, and (under backend "auto")
    runs a layer on torch if torch was more than 3 % faster. Nothing is tuned except by this call. Each candidate is
    compared with fp64 before it is timed. Only forward calls are measured: gradients run on the backend of their layer, on
    Triton with the configs of the cost model.

    Args:
        model: a converted model, in the mode in which it will run.
        example_inputs: the inputs of a call of the model; their sizes, dtypes and layouts determine what is tuned.
        export: also write a table, which can ship with a program or with the library (tritonconv/tuning/tables).
        seconds: how long each candidate is timed.
        console: shows the progress; by default on standard error.

    Returns:
        A report; print it.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: there is no GPU.
        OSError: the cache's folder, or `export`, cannot be written.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"tune(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    if not torch.cuda.is_available() and not interpreting():
        raise RuntimeError("tune() measures on a GPU, and torch sees none (tritonconv doctor tells more)")
    console = console or Console(stderr=True)
    calls: list[Call] = []
    with restored(model), torch.no_grad(), set_backend("auto"), observe(calls.append):
        model(*example_inputs)
    found = distinct_calls(calls)
    # Other calls may have run on the CPU before the first of these.
    device = device_of(found[0].device if found else torch.device("cpu"))
    path = cache_path(device.name)
    if found:
        # If the folder cannot be written, fail now and not after minutes of measuring.
        remember(device.name, [])
    layers: list[Tuned] = []
    failed: list[str] = []
    if torch.cuda.is_available():
        compile_ahead([task for call in found for task in compilations(call, device)], device, console)
    for call in track(found, len(found), "tuning", console):
        assert call.example is not None
        try:
            layers.append(tune_example(str(call.geometry), call, seconds))
        # Most likely out of memory: the results of other layers are kept.
        except RuntimeError as error:
            if "no GPU" in str(error):
                raise
            failed.append(f"{described(call)}: {type(error).__name__}: {error}")
    entries = [row.entry for row in layers if row.entry is not None]
    if entries:
        remember(device.name, entries)
    choose.cache_clear()
    clear_caches()
    if export is not None:
        table = TuningTable(device.name, triton_version())
        table.merge(entries)
        write(Path(export), table)
    skipped = failed + [f"{described(call)}: {why_not_tuned(call)}" for call in calls if call.example is None]
    return TuneReport(device.name, layers, path, list(dict.fromkeys(skipped)))


def described(call: Call) -> str:
    return call.op if call.geometry is None else f"{call.op} of {call.geometry}"


def why_not_tuned(call: Call) -> str:
    """Why a call without an example was not tuned."""
    if call.decision.backend == "torch":
        return call.decision.reason
    if call.bytes == 0 or (call.geometry is not None and call.macs == 0):
        return "it has no elements"
    return "a rule chooses its config, and no measurement would change it"


def distinct_calls(calls: Sequence[Call]) -> list[Call]:
    """One call of each kind."""
    return list({(call.device, call.example.key()): call for call in calls if call.example is not None}.values())


def compilations(call: Call, device: Device) -> list[Compilation]:
    """The launches that `tune_example` will make."""
    assert call.example is not None
    problem = problem_of(call.example, device)
    return [
        (str(call.geometry), functools.partial(example_launches, call.example, config, device))
        for config in configs_to_measure(problem)
    ]


def configs_to_measure(problem: Problem) -> list[Any]:
    """The configs to measure: first the one that would be chosen now, then the best ones by the cost model."""
    chosen = choose(problem)
    order = sorted(candidates(problem), key=lambda config: predict(problem, config).seconds)
    return [chosen] + [config for config in order[:TOP] if config is not chosen]


def example_launches(example: Example, config: Any, device: Device) -> list[Launch]:
    """The launches of a call with a config, without running them."""
    with torch.no_grad(), set_backend("triton"), forced(config=config), captured(device) as launches:
        example.run()
    return launches


def problem_of(example: Example, device: Device) -> Problem:
    """The properties of a call from which its config is chosen."""
    problem = example_launches(example, None, device)[-1].problem
    assert problem is not None
    return problem


def tune_example(layer: str, call: Call, seconds: float) -> Tuned:
    """Measure the candidates of one call on random tensors like its own, and measure torch too."""
    example, device = call.example, call.device
    assert example is not None
    problem = problem_of(example, device_of(device))
    # A separate generator, so that tuning does not change the user's random numbers.
    generator = torch.Generator(device).manual_seed(0)
    real = example.map(lambda t: materialize(t, device, generator))
    wide = real.map(lambda t: t.double() if t.is_floating_point() else t)
    with torch.no_grad(), without_cudnn_search():
        reference = wide.on_torch()
    del wide
    configs = configs_to_measure(problem)
    sets = [real] + [
        # Not clones, because a clone may have other strides than its original.
        example.map(lambda t: materialize(t, device, generator))
        for _ in range(copies_for_cold_cache([t for t in real.tensors if t is not None], device_of(device).l2_bytes) - 1)
    ]
    times: dict[int, float] = {}
    wrong = []
    with torch.no_grad(), set_backend("triton"):
        for config in configs:
            with forced(config=config):
                try:
                    complaint = compare(
                        real.run(), reference, depth=problem.gemm[2], tf32=problem.tf32 and problem.products == "tf32"
                    ).complaint
                    if complaint is None:
                        times[id(config)] = time_calls([s.run for s in sets], seconds=seconds).ms
                        continue
                # Any failure of the compiler or of the launch.
                except Exception as error:
                    if "no GPU" in str(error):
                        raise
                    complaint = f"{type(error).__name__}: {error}"
            wrong.append(f"{config}: {complaint}")
        with set_backend("torch"):
            for each in sets[:2]:
                each.on_torch()
            peer = time_calls([s.on_torch for s in sets], seconds=seconds).ms
    best = min((c for c in configs if id(c) in times), key=lambda c: times[id(c)], default=None)
    entry = None
    if best is not None:
        entry = entry_of(
            problem, call.conditions, best, times[id(best)], peer="torch", peer_ms=peer,
            torch=torch.__version__, date=datetime.date.today().isoformat(),
        )  # fmt: skip
    return Tuned(layer, call.conditions, entry, times.get(id(configs[0])), len(configs), tuple(wrong))


def materialize(t: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """A tensor of random numbers with these sizes and strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    storage = torch.empty(span, dtype=t.dtype, device=device).normal_(generator=generator)
    # Some of these tensors are variances, which are not negative; near 0 they would make fp16 overflow.
    return (storage.abs_().add_(0.5) if t.dim() == 1 else storage).as_strided(t.shape, t.stride())
