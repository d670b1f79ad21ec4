"""Blocks and whole models, one way to run them: compared first, then timed. Runs in a worker process."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import tritonconv
from tritonconv.bench.layers import COMPILE_MODES, OURS
from tritonconv.bench.modules import MODULES, ModuleCase, calibrate_batch_norms
from tritonconv.measure.clock import Mode, can_time, copies_for_cold_cache, peak_memory, time_calls
from tritonconv.measure.torch_settings import prepare_torch, without_tf32
from tritonconv.ops.core.launch import device_of

__all__ = ["Prepared", "measure_module", "prepare_module"]

# Rounding adds up over layers in whatever order they run: ours may be off by so many times what torch's own is.
SLACK = 2.0
# Torch's own error is that of the better one of these: either may be wrong.
LAYOUTS = ("cudnn contiguous", "cudnn channels_last")


def measure_module(
    name: str, pass_: Literal["inference", "training"], batch: int, column: str, mode: Mode, seconds: float = 0.3
) -> dict[str, Any]:
    """Run a module in bf16 in the column's way: forward in eval mode, or forward, backward and a step of SGD.

    Its outputs, in training all its gradients, are compared with those of the same module in fp32, and may be off by twice
    what torch's own are in the better one of its layouts. Without a GPU the comparison is all, on two small images.
    """
    case = MODULES[name]
    record: dict[str, Any] = dict(provider=case.provider(), timed=False)
    if pass_ == "inference":
        prepared = _prepared.get((name, column, batch))
        if prepared is None:
            _prepared.clear()
            prepared = _prepared[name, column, batch] = prepare_module(case, column, batch)
        record |= prepared.found
        if record["status"] != "ok" or not can_time():
            return record
        return record | _time_inference(prepared.function, prepared.images, mode, seconds)
    _prepared.clear()
    record |= check_training(case, column)
    if record["status"] != "ok" or not can_time():
        return record
    return record | _time_training(case, make(case), prepare_torch(), batch, column, seconds)


@dataclass(frozen=True)
class Prepared:
    """A module in bf16 that was run once and compared."""

    function: Callable[[Tensor], Tensor]
    images: Tensor
    found: dict[str, Any]


# The one that is measured just now: as called and in a graph it is the same, and may have taken minutes to compile.
_prepared: dict[tuple[str, str, int], Prepared] = {}


def make(case: ModuleCase) -> nn.Module:
    """The module in fp32, in eval mode, with the statistics of two images."""
    place = prepare_torch()
    torch.manual_seed(0)
    # Random weights are made where they are needed, which is much faster on the GPU.
    with torch.device(place):
        model = case.make()
    with without_tf32():
        return calibrate_batch_norms(model.to(place), sample(case, 2, place)).eval()


def prepare_module(case: ModuleCase, column: str, batch: int) -> Prepared:
    """Run a module in the column's way, and compare the first two images' outputs with fp32, as torch's own are."""
    place = prepare_torch()
    model = make(case)
    images = sample(case, batch, place)
    errors = []
    with without_tf32():
        reference = model(images[:2])
        for peer_column in LAYOUTS:
            peer, layout = way(copy.deepcopy(model).to(torch.bfloat16), peer_column)
            errors.append(distance(peer(images[:2].to(torch.bfloat16, memory_format=layout)), reference))
            del peer
    function, layout = way(model.to(torch.bfloat16), column)
    images = images.to(torch.bfloat16, memory_format=layout)
    # On all of them: what is compiled and searched for now is what will be timed.
    return Prepared(function, images, judged(distance(function(images)[:2], reference), errors, 1e-3))


def check_training(case: ModuleCase, column: str) -> dict[str, Any]:
    """Compare the gradients of two images with fp32, as torch's own are."""
    place = prepare_torch()
    images = sample(case, 2, place)
    with without_tf32():
        reference = gradients(make(case), images, "cudnn contiguous", place, narrow=False)
    errors = [distance(gradients(make(case), images, layout, place), reference) for layout in LAYOUTS]
    return judged(distance(gradients(make(case), images, column, place), reference), errors, 1e-2)


def judged(error: float, torch_errors: Iterable[float], least: float) -> dict[str, Any]:
    """Whether an error is at most `least` more than SLACK times torch's smallest; a torch that gives NaN has no say."""
    torch_error = min(filter(math.isfinite, torch_errors), default=0.0)
    limit = SLACK * torch_error + least
    found = dict(error=error, torch_error=torch_error, status="ok")
    if not error <= limit:
        found |= dict(status="wrong", reason=f"relative error {error:.2e}, limit {limit:.2e}")
    return found


def gradients(model: nn.Module, images: Tensor, column: str, place: str, narrow: bool = True) -> Tensor:
    """Gradients of all parameters, one behind the other, with the batch's statistics; `narrow`: autocast to bf16."""
    # All else stays as in eval mode: branches that are dropped at random would differ.
    for module in model.modules():
        module.train(isinstance(module, nn.modules.batchnorm._BatchNorm))
    parameters = list(model.parameters())
    function, layout = way(model, column)
    with torch.enable_grad(), torch.autocast(place, torch.bfloat16, enabled=narrow):
        loss = function(images.to(memory_format=layout)).float().square().mean()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([t.float().flatten() for t in found if t is not None])


def distance(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||"""
    return float((out.float() - reference).norm() / reference.norm())


def sample(case: ModuleCase, batch: int, place: str) -> Tensor:
    """Images to run on; the interpreter and the CPU have no time for many or large ones."""
    return case.images(min(batch, 2), device=place)[..., :32, :32] if place == "cpu" else case.images(batch, device=place)


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


def _time_inference(function: Callable[[Tensor], Tensor], images: Tensor, mode: Mode, seconds: float) -> dict[str, Any]:
    copies = copies_for_cold_cache([images], device_of(images.device).l2_bytes, limit=4)
    sets = [images] + [images.clone() for _ in range(copies - 1)]
    for each in sets:
        function(each)
    memory = peak_memory(lambda: function(images))
    timing = time_calls([functools.partial(function, each) for each in sets], mode=mode, seconds=seconds)
    return dict(timed=True, **timing.to_dict(), images_per_second=1e3 * len(images) / timing.ms, memory=memory)


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
