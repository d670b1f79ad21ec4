"""Recorded calls: the same again, whatever lies like the first; and how few functions a call that was seen before takes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.conv.operator import CONV
from tritonconv.ops.core import backend
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.recording import record
from tritonconv.ops.core.signature import clear_caches

CPU = torch.device("cpu")


def test_views_copies_and_allocations_are_replayed() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        columns = x.t().contiguous()
        out = torch.empty_strided((3, 2), (2, 1), dtype=x.dtype, device=x.device).copy_(columns)
        return out.view(6), (y[None] * 2).sum(0)

    recording = record(function, [torch.zeros(2, 3), torch.zeros(4)], CPU)
    for _ in range(2):
        x, y = torch.randn(2, 3), torch.randn(4)
        flat, doubled = recording.run(x, y)
        assert torch.equal(flat, x.t().reshape(6)) and torch.equal(doubled, 2 * y)
    assert recording.copies == 2 and not recording.launches


def test_nothing_runs_while_a_call_is_recorded() -> None:
    tensors = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    numbers = (1,), (0,), "", (1,), 1, 0.0, "", 0.0, 0.0, "conv"
    with record_launches() as launches:
        recording = record(lambda x, w: CONV(x, w, *(None,) * 6, *numbers), tensors, CPU)
        assert not launches and [one.kernel.__name__ for one in recording.launches] == ["conv_flat_kernel"]
        y = recording.run(*tensors)
    assert launches == ["conv_flat_kernel"] and torch.allclose(y, torch.nn.functional.conv2d(*tensors), atol=1e-5)


def test_what_is_written_in_place_is_written_each_time() -> None:
    def function(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return total * 1

    recording, total = record(function, [torch.zeros(3), torch.zeros(3)], CPU), torch.zeros(3)
    for step in range(1, 4):
        assert torch.equal(recording.run(torch.ones(3), total), torch.full((3,), float(step)))
    assert torch.equal(total, torch.full((3,), 3.0))


def test_tensors_that_start_elsewhere_are_other_calls() -> None:
    w, whole = torch.randn(8, 8, 1, 1).half(), torch.randn(8 * 17).half()
    with torch.no_grad():
        for start in (0, 1, 8):
            x = whole[start : start + 128].view(1, 4, 4, 8).permute(0, 3, 1, 2)
            for _ in range(2):
                expected = torch.nn.functional.conv2d(x.double(), w.double())
                assert torch.allclose(TF.conv2d(x, w).double(), expected, atol=1e-2)


def test_autocast_is_part_of_a_call() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        assert TF.conv2d(x, w).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert TF.conv2d(x, w).dtype == torch.bfloat16
            y = TF.conv2d(x.clone().requires_grad_(), w)
            assert y.dtype == torch.bfloat16 and y.requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_move_at_each_call_and_backward_passes_notice(training: bool) -> None:
    block, x = tritonconv.nn.ConvBNAct2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    block.train(training)
    twin = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).train(training)
    twin[0].weight.data.copy_(block.conv.weight.data)
    for _ in range(3):
        before = block.bn.running_mean._version
        assert torch.allclose(block(x), twin(x), atol=1e-4)
        assert torch.allclose(block.bn.running_mean, twin[1].running_mean, atol=1e-6)
        assert (block.bn.running_mean._version > before) == training
        assert block.bn.num_batches_tracked == twin[1].num_batches_tracked


def functions_of(call: Callable[[], object]) -> list[str]:
    """Our Python functions that a call takes which was seen before."""
    for _ in range(2):
        call()
    names: list[str] = []

    def profile(frame: Any, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and "tritonconv" in file and "kernels" not in file and "site-packages" not in file:
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    # The interpreter's launches differ from a GPU's.
    return [name for name in names if name not in ("<genexpr>", "<listcomp>", "descriptor")]


X, W, V = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3), torch.ones(4)
EVAL: dict[str, Callable[[], object]] = {
    "conv2d": lambda: TF.conv2d(X, W),
    "linear": lambda: TF.linear(X[0, 0], X[0, 1]),
    "conv_transpose2d": lambda: TF.conv_transpose2d(X, W),
    "conv2d_bn_act": lambda: TF.conv2d_bn_act(X, W, None, V, V, V, V),
    "batch_norm": lambda: TF.batch_norm(X, V, V),
    "group_norm": lambda: TF.group_norm(X, 2, V, V),
    "instance_norm": lambda: TF.instance_norm(X),
    "layer_norm": lambda: TF.layer_norm(X, (8,)),
    "max_pool2d": lambda: TF.max_pool2d(X, 2),
    "avg_pool2d": lambda: TF.avg_pool2d(X, 2),
    "adaptive_avg_pool2d": lambda: TF.adaptive_avg_pool2d(X, 2),
    "interpolate": lambda: TF.interpolate(X, scale_factor=2),
    "pixel_shuffle": lambda: TF.pixel_shuffle(X, 2),
    "causal_conv1d": lambda: TF.causal_conv1d(X[0], torch.ones(8, 3)),
    "deform_conv2d": lambda: TF.deform_conv2d(X, torch.zeros(1, 18, 6, 6), W),
    "stochastic_pool2d": lambda: TF.stochastic_pool2d(X, 2, training=False),
}


@pytest.mark.parametrize("name", EVAL)
def test_few_functions_are_on_the_way_to_a_launch(name: str) -> None:
    with torch.no_grad():
        names = functions_of(EVAL[name])
    assert names[-1] == "run" and len(names) <= 8, names


TRAINED = X.clone().requires_grad_()
TRAINING: dict[str, Callable[[], object]] = {
    "conv2d": lambda: TF.conv2d(TRAINED, W),
    "conv_transpose2d": lambda: TF.conv_transpose2d(TRAINED, W),
    "conv2d_bn_act": lambda: TF.conv2d_bn_act(TRAINED, W, None, None, None, V, V, training=True),
    "batch_norm": lambda: TF.batch_norm(TRAINED, None, None, V, V, True),
    "group_norm": lambda: TF.group_norm(TRAINED, 2, V, V),
    "layer_norm": lambda: TF.layer_norm(TRAINED, (8,)),
    "max_pool2d": lambda: TF.max_pool2d(TRAINED, 2),
    "adaptive_avg_pool2d": lambda: TF.adaptive_avg_pool2d(TRAINED, 2),
    "interpolate": lambda: TF.interpolate(TRAINED, scale_factor=2),
    "causal_conv1d": lambda: TF.causal_conv1d(TRAINED[0], torch.ones(8, 3)),
    "deform_conv2d": lambda: TF.deform_conv2d(TRAINED, torch.zeros(1, 18, 6, 6), W),
}


@pytest.mark.parametrize("name", TRAINING)
def test_few_functions_are_on_the_way_of_a_forward_pass_in_training(name: str) -> None:
    names = functions_of(TRAINING[name])
    assert "run" in names and len(names) <= 15, names


SAID: dict[str, Callable[[Tensor], object]] = {
    "conv2d": lambda x: TF.conv2d(x, torch.randn(4, 4, 3, 3).bool().int().float(), padding=1),
    "max_pool2d": lambda x: TF.max_pool2d(x, 2),
    "batch_norm": lambda x: TF.batch_norm(x, V, V),
    "group_norm": lambda x: TF.group_norm(x, 2),
    "interpolate": lambda x: TF.interpolate(x, scale_factor=2, mode="bicubic"),
    "adaptive_max_pool2d": lambda x: TF.adaptive_max_pool2d(x, 2),
    "pixel_shuffle": lambda x: TF.pixel_shuffle(x, 2),
    "module": lambda x: tritonconv.nn.MaxPool2d(2)(x),
    "sequence": lambda x: nn.Sequential(tritonconv.nn.AvgPool2d(2))(x),
}


@pytest.mark.parametrize("name", SAID)
def test_warnings_name_the_callers_own_line(name: str) -> None:
    x = torch._neg_view(torch.randn(1, 4, 6, 6))
    clear_caches()
    with tritonconv.set_backend("auto"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backend._warned.clear()
        SAID[name](x)
    assert [warning.filename for warning in said if "runs on torch" in str(warning.message)] == [__file__]
