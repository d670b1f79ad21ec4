"""Tuning of benchmark layers: what `tritonconv.tune` does for a model's, beside the peers that were timed before."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict
from typing import Any

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import case_launches, dtype_of, operations
from tritonconv.measure.ahead import Compilation
from tritonconv.measure.torch_settings import prepare_torch, set_tf32
from tritonconv.measure.tune import configs_to_measure, tune_example
from tritonconv.ops.core.observe import Call, observe
from tritonconv.tuning import Device
from tritonconv.tuning.configs import config_name

__all__ = ["case_compilations", "tune_case"]


def case_compilations(case: Case, device: Device) -> list[Compilation]:
    """What `tune_case` will launch."""
    problem = operations()[case.kind].launches(case, device, None, True)[-1].problem
    assert problem is not None
    return [
        (case.id, functools.partial(case_launches, case, config, True, device)) for config in configs_to_measure(problem)
    ]


def tune_case(case: Case, peer_ms: float | None, peer: str | None) -> dict[str, Any]:
    """Tune one layer, in a worker; a record with the entries of a table.

    Args:
        peer_ms, peer: the fastest peer that was timed before, if there is one; torch is timed here.
    """
    place = prepare_torch()
    set_tf32(case.tf32)
    operation = operations()[case.kind]
    calls: list[Call] = []
    tensors = operation.tensors(case, place, dtype_of(case), True)
    with observe(calls.append):
        operation.ours(case, *tensors)
    found = [tune_example(case.id, call, 0.1) for call in calls if call.example is not None]
    entries = [row.entry for row in found if row.entry is not None]
    if not entries:
        return dict(status="wrong", reason="; ".join(w for row in found for w in row.wrong) or "no candidate was right")
    ours = sum(entry.ms for entry in entries)
    torch_ms = sum(entry.peer_ms or 0.0 for entry in entries)
    best_ms, best = min((peer_ms or math.inf, peer or "torch"), (torch_ms, "torch"))
    return dict(
        status="ok", config=config_name(entries[-1].config),
        candidates=sum(row.tried for row in found), before_ms=sum(row.before_ms or 0.0 for row in found), ms=ours,
        peer=best, peer_ms=best_ms, wrong=[w for row in found for w in row.wrong],
        entries=[asdict(entry) for entry in entries],
    )  # fmt: skip
