"""The layers of cases.csv under pytest-benchmark: `make bench`, or pytest benchmarks/test_layers.py -o addopts= -k r50.

Wall-clock time of a call and its synchronization, host and all; `tritonconv bench` times the device alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.layers import COLUMNS, prepare_layer
from tritonconv.bench.registry import operation_for

CASES = [pytest.param(case, id=case.id) for case in load_cases() if operation_for(case) is not None]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("case", CASES)
def test_layer(benchmark: Any, case: Case, column: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("nothing can be timed without a GPU")
    layer = prepare_layer(case, column)
    assert layer.found.complaint is None, layer.found.complaint
    macs, size = layer.operation.count(case)
    benchmark.group = case.id
    benchmark.extra_info.update(family=case.family, macs=macs, bytes=size, error=layer.found.error, kernels=layer.kernels)

    def call() -> None:
        layer.function(*layer.tensors)
        torch.cuda.synchronize()

    benchmark(call)
