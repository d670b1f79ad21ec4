"""Who runs a call: the choice, its reasons, warnings and observers."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core import backend
from tritonconv.ops.core.backend import current_backend
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import is_dense
from tritonconv.ops.core.observe import Call, observe


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(2, 8, 5, 5, device=device)


@pytest.fixture
def w(device: str) -> torch.Tensor:
    return torch.randn(4, 8, 3, 3, device=device)


def test_auto_takes_triton_where_it_is_supported(x: torch.Tensor, w: torch.Tensor) -> None:
    with record_launches() as launches:
        TF.conv2d(x, w)
    assert launches == ["conv_flat_kernel"]


def test_set_backend_holds_for_the_block_or_for_good(x: torch.Tensor, w: torch.Tensor) -> None:
    with tritonconv.set_backend("torch"), record_launches() as launches:
        TF.conv2d(x, w)
    assert not launches and current_backend() == "auto"
    previous = tritonconv.set_backend("torch")
    assert current_backend() == "torch"
    previous.__exit__(None, None, None)
    assert current_backend() == "auto"


def test_unknown_backends_are_named() -> None:
    with pytest.raises(ValueError, match=r"auto, triton, hopper, torch, got 'cudnn'"):
        tritonconv.set_backend("cudnn")  # type: ignore[arg-type]


def test_a_layers_own_choice_yields_to_the_global_one(x: torch.Tensor) -> None:
    layer = tritonconv.nn.Conv2d(8, 4, 3, device=x.device).requires_grad_(False)
    layer.backend = "torch"
    with record_launches() as launches:
        layer(x)
        with tritonconv.set_backend("triton"):
            layer(x)
    assert len(launches) == 1


def test_what_runs_on_torch_warns_once_per_layer(x: torch.Tensor, w: torch.Tensor) -> None:
    backend._warned.clear()
    with record_launches() as launches, pytest.warns(UserWarning, match=r"conv2d 2x8x5x5.*negated view"):
        TF.conv2d(torch._neg_view(x), w)
    assert not launches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TF.conv2d(torch._neg_view(x), w)


def test_gradients_are_ours_where_torch_is_not_known_to_be_faster(x: torch.Tensor, w: torch.Tensor) -> None:
    with record_launches() as launches:
        TF.conv2d(x, w.requires_grad_()).sum().backward()
    assert "conv_wgrad_kernel" in launches
    with record_launches() as launches, tritonconv.set_backend("torch"):
        TF.conv2d(x, w).sum().backward()
    assert not launches


def test_forced_triton_names_what_is_unsupported(x: torch.Tensor, w: torch.Tensor) -> None:
    with tritonconv.set_backend("triton"):
        with pytest.raises(RuntimeError, match=r"asked for, but torch.int32 has no kernel.*conv2d 2x8x5x5 -> 2x4x3x3"):
            TF.conv2d(x.int(), w.int())
        with pytest.raises(RuntimeError, match=r"asked for, but torch.int32 has no kernel.*conv2d_bn_act in training"):
            TF.conv2d_bn_act(x.int(), w.int(), None, None, None, None, None, training=True)


def test_training_form_updates_the_statistics(x: torch.Tensor, w: torch.Tensor) -> None:
    mean, var = torch.zeros(4, device=x.device), torch.ones(4, device=x.device)
    their_mean, their_var = mean.clone(), var.clone()
    out = TF.conv2d_bn_act(x, w, None, mean, var, None, None, training=True, momentum=0.3, activation="relu")
    y = torch.nn.functional.conv2d(x, w)
    ref = torch.relu(torch.nn.functional.batch_norm(y, their_mean, their_var, training=True, momentum=0.3))
    assert torch.allclose(out, ref, atol=1e-5) and torch.allclose(mean, their_mean) and torch.allclose(var, their_var)


def test_an_observed_run_reports_and_launches_nothing(x: torch.Tensor, w: torch.Tensor) -> None:
    calls: list[Call] = []
    w_cl = w.contiguous(memory_format=torch.channels_last)
    with observe(calls.append), record_launches() as launches:
        y = TF.conv2d(x, w_cl, padding=1)
        TF.linear(y.flatten(1), torch.randn(3, 100, device=x.device))
    assert not launches
    # Eight channels of a contiguous image are copied; the result is as the kernel would give it.
    assert [(c.op, c.decision.backend, c.decision.reason, c.decision.copies) for c in calls] == [
        ("conv2d", "triton", "conv_flat", 1),
        ("linear", "triton", "matmul", 0),
    ]
    assert is_dense(y, True) and calls[0].macs == 2 * 25 * 4 * 72
    assert calls[0].bytes == 4 * (x.numel() + w.numel() + y.numel())


@pytest.mark.parametrize(
    ("x_cl", "w_cl", "copies"), [(False, False, 2), (False, True, 1), (True, False, 1), (True, True, 0)]
)
def test_hidden_copies_are_counted(x_cl: bool, w_cl: bool, copies: int, x: torch.Tensor, w: torch.Tensor) -> None:
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    calls: list[Call] = []
    with observe(calls.append):
        TF.conv2d(x.contiguous(memory_format=formats[x_cl]), w.contiguous(memory_format=formats[w_cl]))
    assert calls[0].decision.copies == copies


def test_a_stem_reads_contiguous_images_in_place(device: str) -> None:
    calls: list[Call] = []
    image, w = torch.randn(1, 3, 9, 9, device=device), torch.randn(4, 3, 3, 3, device=device)
    with observe(calls.append):
        for weight in (w, w.contiguous(memory_format=torch.channels_last)):
            TF.conv2d(image, weight)
    assert [c.decision.copies for c in calls] == [0, 0]


def test_autocast_casts_as_torchs_convolution_does(x: torch.Tensor, w: torch.Tensor, device: str) -> None:
    with torch.autocast(device, torch.bfloat16), tritonconv.set_backend("triton"):
        out = TF.conv2d(x, w, torch.randn(4, device=device))
        assert TF.linear(torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)).dtype == torch.bfloat16
        assert out.dtype == torch.nn.functional.conv2d(x, w).dtype == torch.bfloat16
        norm = torch.rand(4, 4, device=device).unbind()
        assert TF.conv2d_bn_act(x, w, None, *norm).dtype == torch.bfloat16
        assert TF.conv2d(x.double(), w.double()).dtype == torch.float64


def test_threads_do_not_see_each_others_records(x: torch.Tensor, w: torch.Tensor) -> None:
    outs: list[torch.Tensor] = []

    def other() -> None:
        with torch.no_grad():
            outs.append(TF.conv2d(x, w))

    with record_launches() as launches:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert not launches and torch.equal(outs[0], TF.conv2d(x, w))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_cuda_graphs_capture_after_warm_up(x: torch.Tensor, w: torch.Tensor) -> None:
    expected = TF.conv2d(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = TF.conv2d(x, w)
    graph.replay()
    assert torch.equal(out, expected)
