"""What there is to measure, as jobs: checks of every candidate config, layers, blocks and models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.layers import COLUMNS, OURS, Ceilings, check_layer, measure_layer
from tritonconv.bench.modules import module_cases
from tritonconv.bench.networks import measure_module
from tritonconv.bench.registry import case_launches, configs_of, module_of, operation_for, operations
from tritonconv.bench.session import Job
from tritonconv.geometry import Pass
from tritonconv.measure.ahead import Compilation
from tritonconv.tuning import Device
from tritonconv.tuning.configs import name_of

__all__ = [
    "check_compilations", "check_jobs", "check_layers", "is_selected", "layer_compilations", "layer_jobs",
    "module_jobs", "not_built", "selected",
]  # fmt: skip

# torch.compile searches long, and its searches must not take the whole budget.
TIMEOUTS = {"compile": 90.0, "compile max-autotune": 180.0}

PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")
KINDS = (("bf16", False), ("fp16", False), ("fp32", False), ("fp32", True))


def check_layers(device: Device) -> Iterator[tuple[Case, Any, bool]]:
    """Every operation's small layers, in every pass, type, layout and possible config of the kernel that they take.

    Gradients of products are computed channels-last whatever comes in, so that one layout will do for them.
    """
    for operation in operations().values():
        for pass_, small in itertools.product(operation.passes, operation.checks()):
            for (dtype, tf32), channels_last in itertools.product(KINDS, (True, False)):
                if (tf32 and not operation.products) or (pass_ != "fprop" and operation.products and not channels_last):
                    continue
                case = replace(small, dtype=dtype, tf32=tf32, pass_=pass_)
                launches = operation.launches(case, device, None, channels_last)
                own = [launch for launch in launches if module_of(launch) in operation.kernels]
                # Several kernels of a call may choose from the same configs.
                for config in {str(config): config for launch in own for config in configs_of(launch)}.values():
                    yield case, config, channels_last


def check_jobs(device: Device) -> list[Job]:
    """A job for each; the candidates of large tiles first, in which miscompilations were seen."""
    jobs = []
    for case, config, channels_last in check_layers(device):
        layout = "channels_last" if channels_last else "contiguous"
        column = f"{case.dtype}{' tf32' if case.tf32 else ''} {layout}"
        identity = dict(stage="check", id=check_name(case, config), column=column) | {"pass": case.pass_}
        jobs.append(Job(identity, check_layer, (case, config, channels_last), timeout=60.0))
    return jobs


def layer_jobs(
    cases: Sequence[Case], columns: Sequence[str] = COLUMNS, ceilings: Ceilings | None = None, seconds: float = 0.2
) -> list[Job]:
    """Layers that have kernels, each in these ways; gradients after all that is forward."""
    jobs = []
    for pass_, case in itertools.product(PASSES, cases):
        operation = operation_for(case)
        if operation is None or pass_ not in operation.passes:
            continue
        one = replace(case, pass_=pass_)
        for column in columns:
            identity = layer_identity(one, column)
            jobs.append(Job(identity, measure_layer, (one, column, ceilings, seconds), TIMEOUTS.get(column, 60.0)))
    return jobs


def layer_identity(case: Case, column: str) -> dict[str, Any]:
    return dict(
        stage="layer", id=case.id, family=case.family, dtype=case.dtype, column=column, mode="graph", batch=case.batch
    ) | {"pass": case.pass_}


def not_built(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Records of layers that no kernel computes yet."""
    return [layer_identity(case, OURS) | dict(status="not built") for case in cases if operation_for(case) is None]


def layer_compilations(jobs: Sequence[Job], device: Device) -> list[Compilation]:
    """What these of the `layer_jobs` will launch of our own."""
    ours = [job.arguments[0] for job in jobs if job.identity["column"] == OURS]
    return [(case.id, functools.partial(case_launches, case, None, True, device)) for case in ours]


def check_name(case: Case, config: Any) -> str:
    return f"{case.id}, {name_of(config)}"


def check_compilations(jobs: Sequence[Job], device: Device) -> list[Compilation]:
    """What these of the `check_jobs` will launch."""
    tasks: list[Compilation] = []
    for job in jobs:
        case, config, channels_last = job.arguments
        launches = functools.partial(case_launches, case, config, channels_last, device)
        tasks.append((f"{job.identity['id']}, {job.identity['column']}", launches))
    return tasks


def module_jobs(suite: Any, columns: Sequence[str] = COLUMNS, seconds: float = 0.3) -> list[Job]:
    """Blocks or models: inference of one image and of many, training; as called, and in a CUDA graph."""
    jobs = []
    for case in module_cases(suite):
        for pass_, batch in (
            ("inference", case.batches[1]),
            ("inference", case.batches[0]),
            ("training", case.train_batch),
        ):
            for column in columns:
                # Next to each other, for they share what is prepared.
                for mode in ("eager", "graph") if pass_ == "inference" else ("eager",):
                    identity = dict(stage="module", suite=suite, id=case.name, column=column, mode=mode, batch=batch)
                    jobs.append(
                        Job(
                            identity | {"pass": pass_}, measure_module, (case.name, pass_, batch, column, mode, seconds),
                            TIMEOUTS.get(column, 60.0) * 2,
                        )
                    )  # fmt: skip
    return jobs


def selected(only: str | None) -> list[Case]:
    """Rows of cases.csv whose id or family has this text."""
    return [case for case in load_cases() if is_selected(case, only)]


def is_selected(case: Case, only: str | None) -> bool:
    """Whether its id or family has this text."""
    return only is None or only in case.id or only in case.family
