"""Everything but the clock, for a GPU that is not there: geometry, compiled code, the cost model's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.layers import COLUMNS, OURS, seconds_at_least
from tritonconv.bench.registry import operation_for, operations
from tritonconv.bench.session import Job
from tritonconv.bench.suites import is_selected, layer_jobs
from tritonconv.measure.ahead import compile_pool
from tritonconv.measure.progress import track
from tritonconv.ops.core.launch import Launch
from tritonconv.tuning import Device, device_named
from tritonconv.tuning.configs import name_of
from tritonconv.tuning.cost import predict
from tritonconv.tuning.model import Prediction

__all__ = ["MARK", "dry_records", "predict_layer", "predicted", "prediction_table", "small_jobs", "verdict"]

MARK = "Predictions of the cost model for {}; no time was measured."


def predict_layer(case: Case, target: str) -> dict[str, Any]:
    """Compile a layer's launches for a described GPU, and predict their time.

    Returns:
        A record: "status" is "ok", "not built" or "failed", and what was found.
    """
    identity = dict(stage="dry", id=case.id, family=case.family, dtype=case.dtype, target=target, batch=case.batch)
    operation = operation_for(case)
    if operation is None:
        return identity | dict(status="not built")
    device = device_named(target)
    try:
        from tritonconv.measure.offline import compile_launch

        macs, size = operation.count(case)
        if case.macs and (macs, size) != (case.macs, case.bytes):
            raise ValueError(f"{macs} MACs and {size} bytes counted, expected {case.macs} and {case.bytes}")
        launches = operation.launches(case, device)
        shared = [compile_launch(launch, device).metadata.shared for launch in launches]
        if max(shared) > device.shared_memory:
            raise ValueError(f"{max(shared)} bytes of shared memory, limit {device.shared_memory}")
        found = [predicted(launch, device) for launch in launches]
    except Exception as error:
        return identity | dict(status="failed", reason=f"{type(error).__name__}: {error}")
    longest = max(range(len(found)), key=lambda i: found[i].seconds)
    roofline = 1e3 * seconds_at_least(macs, size, case, device, None)
    return identity | dict(
        status="ok", kernel=launches[longest].kernel.__name__, config=name_of(launches[longest].config),
        predicted_ms=1e3 * sum(p.seconds for p in found), bound=found[longest].bound, waves=found[longest].waves,
        resident=found[longest].resident, shared=max(shared), roofline_ms=roofline,
    )  # fmt: skip


def predicted(launch: Launch, device: Device) -> Prediction:
    """The cost model's prediction; a kernel without products reads or writes each of its tensors once, and that is all."""
    if launch.problem is not None:
        return predict(launch.problem, launch.config)
    size = sum(t.numel() * t.element_size() for t in launch.arguments.values() if isinstance(t, Tensor))
    seconds = size / device.bandwidth
    return Prediction(seconds, "memory", {"memory": seconds}, launch.programs, 0, 0)


def dry_records(cases: Sequence[Case], target: str, console: Console) -> list[dict[str, Any]]:
    """`predict_layer` of all cases, in parallel processes."""
    with compile_pool() as processes:
        found = processes.map(predict_layer, cases, [target] * len(cases))
        return list(track(found, len(cases), "compiling", console))


def small_jobs(only: str | None = None, columns: Sequence[str] = COLUMNS) -> list[Job]:
    """The measuring jobs of small layers, as they would run on a GPU; for the interpreter, where nothing is timed.

    Args:
        only: layers whose name or family has this text, as `suites.selected` has it: "small" is the family of all.
        columns: ways to compute them, of which the interpreter runs cuDNN's channels-last one and ours.
    """
    small = [replace(case, family="small") for operation in operations().values() for case in operation.checks()]
    chosen = [case for case in small if is_selected(case, only)]
    return layer_jobs(chosen, [column for column in ("cudnn channels_last", OURS) if column in columns])


def prediction_table(records: Sequence[dict[str, Any]], target: str) -> Table:
    """What was predicted, marked as that."""
    table = Table(title=MARK.format(target), title_justify="left", box=None, pad_edge=False)
    for name in ("layer", "status", "kernel", "config", "bound by", "predicted ms", "roofline ms", "predicted %"):
        table.add_column(name, justify="right" if name.endswith(("ms", "%")) else "left")
    for record in records:
        if record["status"] == "ok":
            predicted, roofline = record["predicted_ms"], record["roofline_ms"]
            table.add_row(
                record["id"], "ok", record["kernel"].removesuffix("_kernel"), record["config"], record["bound"],
                f"{predicted:.4f}", f"{roofline:.4f}", f"{100 * roofline / predicted:.0f}",
            )  # fmt: skip
        else:
            table.add_row(record["id"], record["status"], record.get("reason", ""))
    return table


def verdict(records: Sequence[dict[str, Any]]) -> str:
    """The last line: `90 cases: N ok, M not built, 0 failed`."""
    count = {status: sum(record["status"] == status for record in records) for status in ("ok", "not built", "failed")}
    return f"{len(records)} cases: " + ", ".join(f"{n} {status}" for status, n in count.items())
