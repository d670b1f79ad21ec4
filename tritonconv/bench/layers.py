"""One layer, one way to compute it: checked first, then timed. These functions run in a worker process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import DTYPES, Case
from tritonconv.bench.registry import Operation, dtype_of, operations
from tritonconv.bench.results import OURS
from tritonconv.measure.check import Comparison, compare
from tritonconv.measure.clock import can_time, copies_for_cold_cache, peak_memory, time_calls
from tritonconv.measure.torch_settings import prepare_torch, set_tf32, without_tf32
from tritonconv.ops.core.backend import set_backend
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.tuning import Device, products_of

__all__ = [
    "COLUMNS", "HOPPER", "OURS", "Ceilings", "Layer", "check_layer", "measure_ceilings", "measure_layer", "prepare_layer",
    "seconds_at_least",
]  # fmt: skip

Ceilings = dict[str, float]
"""What this device sustains: "bandwidth" in bytes a second, and "16", "tf32", "fp32", "fp64" in flop a second."""

HOPPER = f"{OURS} hopper"
"""Ours where the kernels for H100 and H200 are asked for; only on those."""
COLUMNS = ("cudnn contiguous", "cudnn channels_last", OURS, "compile", "compile max-autotune")
COMPILE_MODES = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}

# References of more multiply-adds are computed in fp32: fp64 would take longer than all the timing.
BIG = 2 * 10**12


def measure_layer(case: Case, column: str, ceilings: Ceilings | None, seconds: float = 0.2) -> dict[str, Any]:
    """Check one way to compute a layer, and time it where there is a GPU.

    Returns:
        "status" ("ok", "wrong"), "error" against the reference; on a GPU also "ms" with quantiles, "tflops", "gbps",
        "roofline_ms", "percent" of it, "memory" in bytes. Without a GPU "timed" is False and there are no numbers.
    """
    layer = prepare_layer(case, column)
    found = layer.found
    record: dict[str, Any] = dict(error=found.error, status="wrong" if found.complaint else "ok", timed=False)
    if column.startswith(OURS):
        record["kernels"] = layer.kernels
    if column == HOPPER and not any(name.startswith("hopper_") for name in layer.kernels):
        return record | dict(status="skipped", reason="the portable kernel runs it")
    if found.complaint:
        return record | dict(reason=found.complaint)
    if can_time():
        record |= time_layer(layer.operation, case, layer.function, layer.tensors, ceilings, seconds)
    return record


@dataclass(frozen=True)
class Layer:
    """A layer that was computed once and compared."""

    operation: Operation
    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    found: Comparison
    kernels: list[str]


def prepare_layer(case: Case, column: str) -> Layer:
    """Make a layer's tensors, compute it in the column's way and compare that with the reference."""
    place = prepare_torch()
    set_tf32(case.tf32)
    operation = operations()[case.kind]
    torch.manual_seed(0)
    tensors = operation.tensors(case, place, dtype_of(case), channels_last=column != "cudnn contiguous")
    function = way(operation, column, case)
    with record_launches() as launches:
        found = check(operation, case, function, tensors)
    return Layer(operation, function, tensors, found, launches)


def way(operation: Operation, column: str, case: Case) -> Callable[..., Tensor]:
    """A function of the layer's tensors that computes it in the column's way."""

    def on_triton(*tensors: Tensor) -> Tensor:
        with set_backend("hopper" if column == HOPPER else operation.backend):
            return operation.ours(case, *tensors)

    def on_torch(*tensors: Tensor) -> Tensor:
        return operation.torch(case, *tensors)

    if column in COMPILE_MODES:
        torch._dynamo.reset()
        return torch.compile(on_torch, mode=COMPILE_MODES[column], dynamic=False)
    return on_triton if column.startswith(OURS) else on_torch


def check(operation: Operation, case: Case, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Comparison:
    """Compare a way to compute a layer with the reference on the same inputs."""
    reference = reference_of(operation, case, tensors)
    return compare(function(*tensors), reference, depth=operation.depth(case), tf32=case.tf32)


def reference_of(operation: Operation, case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """The layer in fp64, computed once for all ways and configs."""
    reference = _references.get(case)
    if reference is None:
        _references.clear()
        macs, _ = operation.count(case)
        wide = torch.float32 if macs > BIG and case.dtype in ("bf16", "fp16") else torch.float64
        with without_tf32():
            reference = operation.reference(case, *(t.to(wide) for t in tensors))
        _references[case] = reference
    return reference


# Of the layer that is measured just now: its inputs are the same numbers whichever way it is computed.
_references: dict[Case, Tensor] = {}


def time_layer(
    operation: Operation, case: Case, function: Callable[..., Tensor], tensors: tuple[Tensor, ...],
    ceilings: Ceilings | None, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Numbers of a layer that is right."""
    device = device_of(tensors[0].device)
    sets = [tensors]
    while len(sets) < copies_for_cold_cache(tensors, device.l2_bytes):
        sets.append(tuple(t.clone() for t in tensors))
    memory = peak_memory(lambda: function(*tensors))
    timing = time_calls([functools.partial(function, *each) for each in sets], seconds=seconds)
    macs, size = operation.count(case)
    roofline = seconds_at_least(macs, size, case, device, ceilings)
    return dict(
        timed=True, **timing.to_dict(), tflops=2e-9 * macs / timing.ms, gbps=1e-6 * size / timing.ms,
        roofline_ms=1e3 * roofline, percent=1e5 * roofline / timing.ms, memory=memory,
    )  # fmt: skip


def seconds_at_least(macs: int, size: int, case: Case, device: Device, ceilings: Ceilings | None) -> float:
    """The roofline by what this device was measured to sustain, else by its description."""
    kind = products_of(DTYPES[case.dtype], case.tf32)
    if ceilings is None:
        return device.roofline(macs, size, kind)
    return max(2 * macs / ceilings[kind], size / ceilings["bandwidth"])


def check_layer(case: Case, config: Any, channels_last: bool) -> dict[str, Any]:
    """Whether a layer is right with this config (None: the chosen one), twice the same, and writes all of its output."""
    place = prepare_torch()
    set_tf32(case.tf32)
    operation = operations()[case.kind]
    torch.manual_seed(0)
    tensors = operation.tensors(case, place, dtype_of(case), channels_last)
    function = way(operation, OURS, case)
    with forced(config=config), record_launches() as launches:
        # Blocks that were just freed are handed out again: outputs of the next calls begin as NaN.
        size = reference_of(operation, case, tensors).shape
        unwritten = [torch.full(size, float("nan"), dtype=dtype_of(case), device=place) for _ in range(2)]
        del unwritten
        found = check(operation, case, function, tensors)
        again = torch.equal(function(*tensors).nan_to_num(), function(*tensors).nan_to_num())
    reason = found.complaint or (None if again else "two runs differ: a race")
    return dict(error=found.error, status="wrong" if reason else "ok", kernels=launches[:1]) | (
        {"reason": reason} if reason else {}
    )


def measure_ceilings() -> Ceilings:
    """What this device sustains, through torch: a large copy, and large matrix products of random data."""
    prepare_torch()
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copy = time_calls([lambda: y.copy_(x)], seconds=0.3)
    ceilings = {"bandwidth": 2 * x.numel() * x.element_size() / copy.ms * 1e3}
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for kind, dtype, n in (("16", half, 8192), ("tf32", single, 8192), ("fp32", single, 4096), ("fp64", double, 4096)):
        set_tf32(kind == "tf32")
        a, b = (torch.empty(n, n, dtype=dtype, device="cuda").normal_() for _ in range(2))
        product = time_calls([functools.partial(torch.mm, a, b)], seconds=0.3)
        ceilings[kind] = 2 * n**3 / product.ms * 1e3
    return ceilings
