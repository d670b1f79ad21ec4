"""Blocks and models under pytest-benchmark: inference of a large batch in bf16, host and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritonconv.bench.layers import COLUMNS, ready
from tritonconv.bench.modules import ModuleCase, module_cases, settle
from tritonconv.bench.networks import compare_module, sample, way

CASES = [pytest.param(case, id=case.name) for suite in ("blocks", "models") for case in module_cases(suite)]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("case", CASES)
def test_module(benchmark: Any, case: ModuleCase, column: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("nothing can be timed without a GPU")
    place = ready()
    model = settle(case.make().to(place), sample(case, place)).eval()
    found = compare_module(case, model, column, place)
    assert found["status"] == "ok", found["reason"]
    function, layout = way(model.to(torch.bfloat16), column)
    images = case.images(case.batches[1], device=place, dtype=torch.bfloat16).to(memory_format=layout)
    benchmark.group = case.name
    benchmark.extra_info.update(provider=case.provider(), batch=case.batches[1], error=found["error"])

    def call() -> None:
        function(images)
        torch.cuda.synchronize()

    benchmark(call)
