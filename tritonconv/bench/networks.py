"""Blocks and whole models, one way to run them: compared first, then timed. Runs in a worker process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import tritonconv
from tritonconv.bench.clock import Mode, can_time, copies_for_cold_cache, peak_memory, time_calls
from tritonconv.bench.layers import COMPILE_MODES, OURS, ready
from tritonconv.bench.modules import MODULES, ModuleCase, settle
from tritonconv.ops.launch import device_of

__all__ = ["measure_module"]

# Rounding adds up over layers in whatever order they run: ours may be off by so many times what torch's own is.
SLACK = 2.0


def measure_module(
    name: str, pass_: Literal["inference", "training"], batch: int, column: str, mode: Mode, seconds: float = 0.3
) -> dict[str, Any]:
    """Run a module in bf16 in the column's way: forward in eval mode, or forward, backward and a step of SGD.

    Its outputs are compared with those of the same module in fp32, and may be off by twice what torch's channels-last
    ones are. Without a GPU the comparison is all, on one small image; training of our own is "not built" before the
    backward kernels are.
    """
    case = MODULES[name]
    place = ready()
    if pass_ == "training" and column == OURS:
        return dict(status="not built", reason="backward kernels are not built yet: all of it would run on torch")
    torch.manual_seed(0)
    model = settle(case.make().to(place), sample(case, place)).eval()
    record: dict[str, Any] = dict(provider=case.provider(), timed=False)
    if pass_ == "inference":
        found = compare_module(case, model, column, place)
        record |= found
        if found["status"] != "ok" or not can_time():
            return record
        return record | _time_inference(case, model, place, batch, column, mode, seconds)
    record["status"] = "ok"
    return record | _time_training(case, model, place, batch, column, seconds) if can_time() else record


def compare_module(case: ModuleCase, model: nn.Module, column: str, place: str) -> dict[str, Any]:
    """Error of the column's way and of torch's against fp32, on two images."""
    images = sample(case, place)
    reference = model(images)
    half = copy.deepcopy(model).to(torch.bfloat16)
    errors = {}
    for kind in {"cudnn channels_last", column}:
        function, layout = way(copy.deepcopy(half), kind)
        out = function(images.to(torch.bfloat16, memory_format=layout)).float()
        errors[kind] = float((out - reference).norm() / reference.norm())
    limit = SLACK * errors["cudnn channels_last"] + 1e-3
    record = dict(error=errors[column], torch_error=errors["cudnn channels_last"], status="ok")
    if not errors[column] <= limit:
        record |= dict(status="wrong", reason=f"relative error {errors[column]:.2e}, limit {limit:.2e}")
    return record


def sample(case: ModuleCase, place: str) -> Tensor:
    """Two images to compare on; the interpreter and the CPU have no time for large ones."""
    images = case.images(2, device=place)
    return images[..., :32, :32] if place == "cpu" else images


def way(model: nn.Module, column: str) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The module as the column runs it, and the memory format that it wants."""
    three = any(isinstance(m, nn.Conv3d) for m in model.modules())
    if column == "cudnn contiguous":
        return model, torch.contiguous_format
    layout = torch.channels_last_3d if three else torch.channels_last
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    if column == OURS:
        return tritonconv.convert(model, inplace=True), layout
    if column in COMPILE_MODES:
        torch._dynamo.reset()
        return torch.compile(model, mode=COMPILE_MODES[column], dynamic=False), layout
    return model, layout


def _time_inference(
    case: ModuleCase, model: nn.Module, place: str, batch: int, column: str, mode: Mode, seconds: float
) -> dict[str, Any]:
    function, layout = way(model.to(torch.bfloat16), column)
    images = case.images(batch, device=place, dtype=torch.bfloat16).to(memory_format=layout)
    copies = copies_for_cold_cache([images], device_of(images.device).l2_bytes, limit=4)
    sets = [images] + [images.clone() for _ in range(copies - 1)]
    for each in sets:
        function(each)
    memory = peak_memory(lambda: function(images))
    timing = time_calls([lambda each=each: function(each) for each in sets], mode=mode, seconds=seconds)  # type: ignore[misc]
    return dict(timed=True, **timing.to_dict(), images_per_second=1e3 * batch / timing.ms, memory=memory)


def _time_training(
    case: ModuleCase, model: nn.Module, place: str, batch: int, column: str, seconds: float
) -> dict[str, Any]:
    model.train()
    function, layout = way(model, column)
    images = case.images(batch, device=place).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, foreach=True)

    def step() -> None:
        with torch.autocast(place, torch.bfloat16):
            loss = function(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.enable_grad():
        for _ in range(3):
            step()
        memory = peak_memory(step)
        timing = time_calls([step], mode="eager", seconds=seconds)
    return dict(timed=True, **timing.to_dict(), images_per_second=1e3 * batch / timing.ms, memory=memory)
