"""Blocks and models under pytest-benchmark: inference of a large batch in bf16, host and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritonconv.bench.layers import COLUMNS
from tritonconv.bench.modules import ModuleCase, module_cases
from tritonconv.bench.networks import prepare_module

CASES = [pytest.param(case, id=case.name) for suite in ("blocks", "models") for case in module_cases(suite)]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("case", CASES)
def test_module(benchmark: Any, case: ModuleCase, column: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("nothing can be timed without a GPU")
    layer = prepare_module(case, column, case.batches[1])
    assert layer.found["status"] == "ok", layer.found["reason"]
    benchmark.group = case.name
    benchmark.extra_info.update(provider=case.provider(), batch=case.batches[1], error=layer.found["error"])

    def call() -> None:
        layer.function(layer.images)
        torch.cuda.synchronize()

    benchmark(call)
