"""What the cost model says of Hopper's kernels, for docs/hopper.md: `python -m benchmarks.traffic` writes it there.

Every layer of cases.csv that they support, forward and both gradients, on an H200: their config and predicted time, that of
the portable kernel, and the roofline. Nothing is measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.markdown import number, table
from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.layers import seconds_at_least
from tritonconv.bench.registry import dtype_of, operations
from tritonconv.ops.core.backend import Backend, set_backend
from tritonconv.ops.core.launch import Launch, captured
from tritonconv.tuning import device_named
from tritonconv.tuning.configs import name_of
from tritonconv.tuning.cost import predict
from tritonconv.tuning.families import HOPPER, family_of

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "hopper.md"
DEVICE = device_named("H200")


def launch_of(case: Case, backend: Backend) -> Launch | None:
    """The launch that computes a layer's products on a backend; None where its kernels have no choice of configs."""
    operation = operations()[case.kind]
    tensors = operation.tensors(case, "meta", dtype_of(case), True)
    with torch.no_grad(), set_backend(backend), captured(DEVICE) as launches:
        operation.ours(case, *tensors)
    return next((one for one in launches if one.problem is not None), None)


def page() -> str:
    """The table."""
    rows = []
    for case in load_cases():
        if case.kind not in ("conv", "convT"):
            continue
        for pass_ in operations()[case.kind].passes:
            one = replace(case, pass_=pass_)
            ours, portable = launch_of(one, "hopper"), launch_of(one, "triton")
            if ours is None or portable is None or ours.problem is None or family_of(ours.problem) is not HOPPER:
                continue
            times = [predict(launch.problem, launch.config).seconds for launch in (ours, portable) if launch.problem]
            macs, size = operations()[case.kind].count(one)
            least = seconds_at_least(macs, size, one, DEVICE, None)
            cells = [number(1e3 * seconds) for seconds in (*times, least)]
            rows.append((case.id, pass_, name_of(ours.config), *cells, number(2e-12 * macs / times[0])))
    return table("layer, pass, config, predicted ms, portable kernel, roofline, predicted TFLOP/s", rows)
