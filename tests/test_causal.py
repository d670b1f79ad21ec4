"""Causal convolution over time: the short depthwise kernels, their step for decoding, and the module over all of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import every, rotate, some
from reference import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tritonconv.kernels import causal_conv1d as kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.nn import CausalConv1d
from tritonconv.ops.causal.launch import LONGEST, Walk, causal_backward, causal_forward, needs_copy
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import is_dense
from tritonconv.ops.core.observe import observe

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORWARD, STEP = ["causal_forward_kernel"], ["causal_update_kernel"]
BACKWARD = ["causal_backward_kernel", "depthwise_reduce_kernel"]

# (batch, channels, time, taps): walks that end inside the sequence, one patch, blocks of channels that are not full,
# sequences shorter than the filter, and every number of taps.
SIZES = [
    (2, 5, 75, 4), (1, 8, 64, 4), (3, 16, 8, 4), (2, 3, 1, 4), (1, 6, 2, 8), (2, 7, 37, 1), (1, 9, 50, 2), (2, 4, 33, 3),
    (1, 5, 41, 5), (1, 8, 29, 6), (2, 3, 20, 7), (1, 12, 40, 8), (1, 1, 19, 4),
]  # fmt: skip


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with tritonconv.set_backend("triton"):
        yield


def laid(t: Tensor, channels_last: bool) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else t.contiguous()


def make(
    b: int, d: int, t: int, k: int, dtype: torch.dtype, channels_last: bool, *, state: bool = True, bias: bool = True
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """x, weight, bias and state."""
    return (
        laid(torch.randn(b, d, t).to(dtype), channels_last), torch.randn(d, k).to(dtype),
        torch.randn(d).to(dtype) if bias else None, torch.randn(b, d, k - 1).to(dtype) if state else None,
    )  # fmt: skip


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, activation: Any = "silu"
) -> Tensor:
    """What torch computes in the tensors' type."""
    before = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0)) if state is None else torch.cat((state, x), 2)
    y = torch.nn.functional.conv1d(before, weight.unsqueeze(1), bias, groups=x.shape[1])
    act = parse_activation(activation)
    return y if act is None else act.torch(y)


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(y: Tensor, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [t for t in tensors if t is not None], dy))


def check(tensors: tuple[Tensor | None, ...], activation: Any, channels_last: bool, what: object) -> None:
    """Forward and every gradient against fp64."""
    x, weight, *_ = tensors
    assert x is not None and weight is not None
    wide, ours = doubles(*tensors), leaves(*tensors)
    expected = reference(*wide, activation=activation)  # type: ignore[arg-type]
    with record_launches() as launches:
        out = TF.causal_conv1d(ours[0], ours[1], ours[2], activation, ours[3])  # type: ignore[arg-type]
    assert launches == FORWARD
    assert is_dense(out, channels_last) and out.dtype == x.dtype
    assert_close(out, expected, depth=weight.shape[1], what=what)
    dy = laid(torch.randn(x.shape).to(x.dtype), channels_last)
    with record_launches() as launches:
        found = gradients(out, ours, dy)
    assert launches == BACKWARD
    steps = x.shape[0] * x.shape[2]
    names = [name for name, t in zip(("x", "weight", "bias", "state"), tensors, strict=True) if t is not None]
    for name, got, want in zip(names, found, gradients(expected, wide, dy.double()), strict=True):
        depth = steps if name in ("weight", "bias") else weight.shape[1]
        assert_close(got, want, depth=max(depth, 4), what=(what, name))
        assert got.dtype == x.dtype
    assert is_dense(found[0], channels_last)


@rotate(size=SIZES, channels_last=[False, True], dtype=DTYPES)
def test_forward_and_every_gradient(size: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    check(make(*size, dtype, channels_last), "silu", channels_last, size)  # type: ignore[arg-type]


@rotate(size=SIZES, channels_last=[False, True], given=[dict(state=False), dict(bias=False)])
def test_without_state_or_bias(size: tuple[int, ...], channels_last: bool, given: dict[str, bool]) -> None:
    activation = None if "state" in given else "swish"
    check(make(*size, torch.float32, channels_last, **given), activation, channels_last, size)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["relu", "gelu", ("leaky_relu", 0.2), torch.nn.Hardswish()], ids=str)
def test_other_activations(activation: Any) -> None:
    check(make(2, 5, 40, 4, torch.float32, True), activation, True, activation)


# All of them, or by default those of two sizes.
CONFIG_CASES = some(itertools.product((False, True), (2, 4, 8), (torch.float32, torch.bfloat16, torch.float64)), 4)


@every({"channels_last, taps, dtype": CONFIG_CASES})
def test_every_candidate_config(channels_last: bool, taps: int, dtype: torch.dtype) -> None:
    for t in (70, 64):
        x, weight, bias, state = make(2, 6, t, taps, dtype, channels_last)
        wide = doubles(x, weight, bias, state)
        expected = reference(*wide)  # type: ignore[arg-type]
        dy = laid(torch.randn(2, 6, t).to(dtype), channels_last)
        wanted = gradients(expected, wide, dy.double())
        act = parse_activation("silu")
        layer = dict(channels_last=channels_last, taps=taps, itemsize=x.element_size())  # type: ignore[union-attr]
        for config in kernels.fitting(**layer, backward=False):
            with forced(config=config):
                y = causal_forward(x, weight, bias, state, act)  # type: ignore[arg-type]
            assert_close(y, expected, depth=taps, what=config)
        for config in kernels.fitting(**layer, backward=True):
            with forced(config=config):
                found = causal_backward(dy, x, weight, bias, state, act)  # type: ignore[arg-type]
            for got, want in zip(found, wanted, strict=True):
                assert_close(got, want, depth=2 * t, what=config)


def test_every_config_is_fitting_somewhere() -> None:
    found = {
        str(config)
        for channels_last, backward, taps, itemsize in itertools.product(
            (True, False), (True, False), range(1, 9), (2, 4, 8)
        )
        for config in kernels.fitting(channels_last=channels_last, backward=backward, taps=taps, itemsize=itemsize)
    }
    assert found == set(map(str, kernels.configs()))


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_small_integers_are_exact(channels_last: bool) -> None:
    x, weight = laid(torch.randint(-3, 4, (2, 6, 45)).float(), channels_last), torch.randint(-3, 4, (6, 4)).float()
    dy = torch.randint(-3, 4, (2, 6, 45)).double()
    wide = doubles(x, weight)
    expected = reference(wide[0], wide[1], activation=None)  # type: ignore[arg-type]
    wanted = gradients(expected, wide, dy)
    for dtype in DTYPES:
        ours = leaves(x.to(dtype), weight.to(dtype))
        y = TF.causal_conv1d(*ours)  # type: ignore[arg-type]
        assert torch.equal(y.double(), expected), dtype
        dx, dw = gradients(y, ours, dy.to(dtype))
        assert torch.equal(dx.double(), wanted[0]), dtype
        exact = wanted[1].abs() <= 256
        assert torch.equal(dw.double()[exact], wanted[1][exact]), dtype


def test_views_are_read_where_they_lie() -> None:
    # Mamba splits one projection's result, (B, T, ...), along its channels.
    projected = torch.randn(2, 30, 24)
    x = projected[:, :, 8:16].transpose(1, 2)
    assert not needs_copy(x)
    weight = torch.randn(8, 4)
    assert_close(TF.causal_conv1d(x, weight, activation="silu"), reference(x.double(), weight.double()), depth=4)
    x = torch.randn(2, 16, 40)[:, ::2, 5:35]
    assert not needs_copy(x)
    assert_close(TF.causal_conv1d(x, weight, activation="silu"), reference(x.double(), weight.double()), depth=4)
    # Neither channels nor time steps side by side: the one case with a copy.
    x = torch.randn(2, 8, 60)[:, :, ::2]
    assert needs_copy(x)
    assert_close(TF.causal_conv1d(x, weight, activation="silu"), reference(x.double(), weight.double()), depth=4)
    ours, wide = leaves(x, weight), doubles(x, weight)
    y = TF.causal_conv1d(*ours)  # type: ignore[arg-type]
    # A gradient that is one number for all.
    for got, want in zip(gradients(y.sum(), ours, torch.tensor(1.0)), gradients(
        reference(*wide, activation=None).sum(), wide, torch.tensor(1.0).double()), strict=True):  # type: ignore[arg-type]  # fmt: skip
        assert_close(got, want, depth=60)


@rotate(channels_last=[False, True], lengths=[(20, 17), (2, 9), (1, 1), (9, 2)])
def test_halves_with_the_state_handed_over_are_the_whole(channels_last: bool, lengths: tuple[int, int]) -> None:
    x, weight, bias, state = make(2, 5, sum(lengths), 4, torch.float32, channels_last)
    ours, wide = leaves(x, weight, bias, state), doubles(x, weight, bias, state)
    first, between = TF.causal_conv1d(ours[0][:, :, : lengths[0]], ours[1], ours[2], "silu", ours[3], True)  # type: ignore[index, arg-type]
    second, final = TF.causal_conv1d(ours[0][:, :, lengths[0] :], ours[1], ours[2], "silu", between, True)  # type: ignore[index, arg-type]
    out, expected = torch.cat((first, second), 2), reference(*wide)  # type: ignore[arg-type]
    assert_close(out, expected, depth=4)
    assert torch.equal(final, torch.cat((state, x), 2)[:, :, -3:])  # type: ignore[arg-type]
    dy, dfinal = torch.randn(out.shape), torch.randn(final.shape)
    last = torch.cat((wide[3], wide[0]), 2)[:, :, -3:]  # type: ignore[arg-type]
    wanted = torch.autograd.grad((expected, last), wide, (dy.double(), dfinal.double()))  # type: ignore[arg-type]
    for got, want in zip(torch.autograd.grad((out, final), ours, (dy, dfinal)), wanted, strict=True):  # type: ignore[arg-type]
        assert_close(got, want, depth=2 * sum(lengths))


def test_a_final_state_without_a_first_one_begins_with_zeros() -> None:
    x, weight = torch.randn(2, 3, 2), torch.randn(3, 5)
    _, state = TF.causal_conv1d(x, weight, return_final_state=True)
    assert torch.equal(state, torch.nn.functional.pad(x, (2, 0)))
    x = torch.randn(2, 3, 9)
    _, state = TF.causal_conv1d(x, weight, return_final_state=True)
    assert torch.equal(state, x[:, :, -4:])
    x.zero_()
    assert state.abs().sum() > 0


# No step is a vector.
@rotate({"length, steps": list(itertools.product((3, 4, 7), (0, 1, 3)))}, dtype=DTYPES)
def test_updates_are_the_sequence_step_by_step(dtype: torch.dtype, length: int, steps: int) -> None:
    x, weight, bias, _ = make(2, 5, 6, 4, dtype, False, state=False)
    before = torch.randn(2, 5, length).to(dtype)
    state = before.clone()
    results = []
    for t in range(0, 6, steps or 1):
        part = x[:, :, t : t + (steps or 1)]  # type: ignore[index]
        with record_launches() as launches:
            y = TF.causal_conv1d_update(part if steps else part[:, :, 0], state, weight, bias, "silu")  # type: ignore[arg-type]
        assert launches == STEP and y.dim() == (3 if steps else 2)
        results.append(y if steps else y.unsqueeze(2))
    expected = reference(*(t.double() for t in (x, weight, bias, before[:, :, -3:])))  # type: ignore[union-attr]
    assert_close(torch.cat(results, 2), expected, depth=4)
    assert torch.equal(state, torch.cat((before, x), 2)[:, :, -length:])  # type: ignore[arg-type]


def test_an_update_writes_into_a_view_and_nothing_beside_it() -> None:
    memory = torch.randn(2, 6, 10)
    untouched, state = memory.clone(), memory[:, ::2, 2:9:2]
    before = state.clone()
    x, weight = torch.randn(2, 3, 5), torch.randn(3, 4)
    y = TF.causal_conv1d_update(x, state, weight)
    assert_close(y, reference(x.double(), weight.double(), None, before[:, :, 1:].double(), None), depth=4)
    assert torch.equal(state, x[:, :, 1:])
    memory[:, ::2, 2:9:2] = before
    assert torch.equal(memory, untouched)


def test_an_update_bumps_the_states_version() -> None:
    state = torch.zeros(1, 2, 3)
    version = state._version
    TF.causal_conv1d_update(torch.randn(1, 2), state, torch.randn(2, 4))
    assert state._version > version


def test_everything_runs_in_inference_mode() -> None:
    with torch.inference_mode():
        x, weight, state = torch.randn(1, 2, 5), torch.randn(2, 4), torch.zeros(1, 2, 3)
        y = TF.causal_conv1d(x, weight)
        steps = [TF.causal_conv1d_update(x[:, :, t], state, weight) for t in range(5)]
        assert torch.allclose(torch.stack(steps, 2), y, atol=1e-6)


@rotate(channels_last=[False, True], bad=[float("nan"), float("inf")], at=[0, 7, 30, 34])
def test_a_bad_element_goes_no_further_than_in_torch(channels_last: bool, bad: float, at: int) -> None:
    x, weight, bias, state = make(2, 5, 35, 4, torch.float32, channels_last)
    x[1, 3, at] = bad  # type: ignore[index]
    for activation in (None, "silu"):
        ours, wide = leaves(x, weight, bias, state), doubles(x, weight, bias, state)
        y, expected = TF.causal_conv1d(*ours[:3], activation, ours[3]), reference(*wide, activation=activation)  # type: ignore[arg-type, misc]
        assert torch.equal(y.isfinite(), expected.isfinite())
        dy = torch.randn(y.shape)
        found, wanted = gradients(y, ours, dy), gradients(expected, wide, dy.double())
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())


def test_the_same_bits_on_every_run() -> None:
    x, weight, bias, state = make(2, 5, 75, 4, torch.float32, True)
    dy, act = torch.randn(2, 5, 75), parse_activation("silu")
    runs = [causal_backward(dy, x, weight, bias, state, act) for _ in range(2)]  # type: ignore[arg-type]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@rotate(taps=[1, 4, 8, 9, 20], channels_last=[False, True])
def test_it_is_a_convolution_padded_before(taps: int, channels_last: bool) -> None:
    x, weight, bias, state = make(2, 5, 30, taps, torch.float32, channels_last)
    padded = torch.nn.functional.pad(x, (taps - 1, 0))  # type: ignore[arg-type]
    expected = TF.conv1d(padded, weight.unsqueeze(1), bias, groups=5)  # type: ignore[union-attr]
    assert_close(TF.causal_conv1d(x, weight, bias), expected.double(), depth=taps)  # type: ignore[arg-type]
    # Also as the convolution's weight is.
    assert_close(TF.causal_conv1d(x, weight.unsqueeze(1), bias), expected.double(), depth=taps)  # type: ignore[arg-type, union-attr]
    ours, wide = leaves(x, weight, bias, state), doubles(x, weight, bias, state)
    y, expected = TF.causal_conv1d(*ours[:3], "silu", ours[3]), reference(*wide)  # type: ignore[arg-type, misc]
    assert_close(y, expected, depth=taps)
    dy = torch.randn(y.shape)
    for got, want in zip(gradients(y, ours, dy), gradients(expected, wide, dy.double()), strict=True):
        assert_close(got, want, depth=60)


def test_gradcheck() -> None:
    for channels_last in (False, True):
        x, weight, bias, state = make(2, 3, 5, 4, torch.float64, channels_last)
        inputs = [t.requires_grad_() for t in (x, weight, bias, state)]  # type: ignore[union-attr]
        assert torch.autograd.gradcheck(
            lambda x, w, b, s: TF.causal_conv1d(x, w, b, "silu", s, True), inputs, fast_mode=True
        )


def test_only_gradients_that_are_needed() -> None:
    x, weight, bias, _ = make(1, 4, 12, 4, torch.float32, True)
    weight.requires_grad_()  # type: ignore[union-attr]
    y = TF.causal_conv1d(x, weight, bias, "silu")  # type: ignore[arg-type]
    (dw,) = torch.autograd.grad(y.sum(), (weight,))  # type: ignore[arg-type]
    assert dw.shape == weight.shape and x.grad is None  # type: ignore[union-attr]


def test_empty_batches() -> None:
    x, weight, bias, state = make(0, 4, 12, 4, torch.float32, True)
    ours = leaves(x, weight, bias, state)
    y, final = TF.causal_conv1d(*ours[:3], "silu", ours[3], True)  # type: ignore[arg-type, misc]
    assert y.shape == (0, 4, 12) and final.shape == (0, 4, 3)
    found = gradients(y, ours, torch.zeros(0, 4, 12))
    assert found[1].abs().sum() == 0 and found[2].abs().sum() == 0 and found[3].shape == (0, 4, 3)
    assert TF.causal_conv1d_update(torch.zeros(0, 4), torch.zeros(0, 4, 3), weight).shape == (0, 4)  # type: ignore[arg-type]


X, W = (2, 6, 10), (6, 4)
causal, update = TF.causal_conv1d, TF.causal_conv1d_update
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("two axes", lambda: causal(t(6, 10), t(*W)), RuntimeError, r"3D input.*\[6, 10\]"),
    ("no tensor", lambda: causal(None, t(*W)), TypeError, r"'input' must be Tensor, not NoneType"),  # type: ignore[arg-type]
    ("weight of other channels", lambda: causal(t(*X), t(5, 4)), RuntimeError, r"\[6, K\].*\[2, 6, 10\].*\[5, 4\]"),
    ("dense weight", lambda: causal(t(*X), t(6, 6, 4)), RuntimeError, r"\[6, K\].*\[6, 6, 4\]"),
    ("weight without taps", lambda: causal(t(*X), t(6, 0)), RuntimeError, r"\[6, 0\]"),
    ("weight of another type", lambda: causal(t(*X), t(*W).double()), RuntimeError, r"weight type.*the same"),
    ("bias of another type", lambda: causal(t(*X), t(*W), t(6).double()), RuntimeError, r"bias type.*the same"),
    ("short bias", lambda: causal(t(*X), t(*W), t(5)), RuntimeError, r"6 elements.*\[5\]"),
    ("short state", lambda: causal(t(*X), t(*W), initial_state=t(2, 6, 2)), RuntimeError, r"\[2, 6, 3\].*\[2, 6, 2\]"),
    ("state of another type", lambda: causal(t(*X), t(*W), initial_state=t(2, 6, 3).half()), RuntimeError, "state type"),
    ("no steps", lambda: causal(t(2, 6, 0), t(*W)), RuntimeError, r"\[2, 6, 0\]"),
    ("unknown activation", lambda: causal(t(*X), t(*W), None, "sinus"), ValueError, "sinus"),
    ("update of four axes", lambda: update(t(1, *X), t(2, 6, 3), t(*W)), RuntimeError, r"2D input.*\[1, 2, 6, 10\]"),
    ("short conv_state", lambda: update(t(2, 6), t(2, 6, 2), t(*W)), RuntimeError, r"at least 3.*\[2, 6, 2\]"),
    ("conv_state of half", lambda: update(t(2, 6), t(2, 6, 3).half(), t(*W)), RuntimeError, "conv_state type"),
    ("update of another bias", lambda: update(t(2, 6), t(2, 6, 3), t(*W), t(5)), RuntimeError, r"6 elements"),
    ("shared conv_state", lambda: update(t(2, 6), t(1, 6, 3).expand(2, 6, 3), t(*W)), RuntimeError, "share"),
    ("no conv_state", lambda: update(t(2, 6), None, t(*W)), TypeError, "'conv_state'"),  # type: ignore[arg-type]
    ("update with gradients", lambda: update(t(2, 6), t(2, 6, 3), t(*W).requires_grad_()), RuntimeError, "no_grad"),
]  # fmt: skip


def t(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(("call", "error", "says"), [pytest.param(*rest, id=name) for name, *rest in BAD])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_errors(call: Any, error: type[Exception], says: str, backend: Any) -> None:
    with tritonconv.set_backend(backend), record_launches() as launches, pytest.raises(error, match=says):
        call()
    assert not launches


def test_torchs_functions_have_no_causal_padding() -> None:
    for nd in (1, 2, 3):
        x, w = torch.zeros(1, 1, *(4,) * nd), torch.zeros(1, 1, *(2,) * nd)
        with pytest.raises(RuntimeError, match="invalid padding string 'causal'"):
            getattr(TF, f"conv{nd}d")(x, w, padding="causal")
        with pytest.raises(RuntimeError, match="invalid padding string 'causal'"):
            getattr(TF, f"conv{nd}d_bn_act")(x, w, *(None,) * 5, padding="causal")


def test_geometry_of_causal_padding() -> None:
    g = ConvGeometry.parse((2, 4, 10), (6, 4, 3), nd=1, padding="causal", dilation=2, stride=3)
    assert (g.padding[2], g.padding_after[2], g.output_shape) == (4, 0, (2, 6, 4))


def test_backends() -> None:
    x, weight, bias, state = make(2, 5, 12, 4, torch.float32, True)
    state_of_step = torch.zeros(2, 5, 3)
    with tritonconv.set_backend("torch"), record_launches() as launches:
        y = TF.causal_conv1d(x, weight, bias, "silu", state)  # type: ignore[arg-type]
        step = TF.causal_conv1d_update(x[:, :, 0], state_of_step, weight)  # type: ignore[arg-type, index]
    assert not launches
    assert torch.equal(y, reference(x, weight, bias, state))  # type: ignore[arg-type]
    assert torch.equal(state_of_step[:, :, 2], x[:, :, 0])  # type: ignore[index]
    assert torch.allclose(step, x[:, :, 0] * weight[:, 3])  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"backend 'triton' was asked for, but torch.complex64 has no kernel"):
        TF.causal_conv1d(x.to(torch.complex64), weight.to(torch.complex64))  # type: ignore[union-attr]
    with (
        tritonconv.set_backend("auto"),
        pytest.warns(UserWarning, match="causal_conv1d of .* runs on torch: torch.complex64"),
    ):
        TF.causal_conv1d(x.to(torch.complex64), weight.to(torch.complex64))  # type: ignore[union-attr]


def test_observers_see_the_call_and_torch_runs_it() -> None:
    x, weight, *_ = make(2, 5, 24, 4, torch.float32, True)
    calls: list[Any] = []
    with observe(calls.append), record_launches() as launches:
        TF.causal_conv1d(x, weight)  # type: ignore[arg-type]
        TF.causal_conv1d(x[:, :, ::2].contiguous()[:, :, ::2], weight)  # type: ignore[arg-type, index]
    assert not launches
    assert [(c.decision.backend, c.decision.copies) for c in calls] == [("triton", 0), ("triton", 1)]
    assert calls[0].macs == 2 * 5 * 24 * 4 and calls[0].bytes == 4 * (2 * 2 * 5 * 24 + 20)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool, device: str) -> None:
    x, weight, bias, state = make(2, 5, 12, 4, torch.float32, True)
    if grad:
        weight.requires_grad_()  # type: ignore[union-attr]
    with torch.autocast(device, torch.bfloat16):
        y = TF.causal_conv1d(x, weight, bias, "silu", state)  # type: ignore[arg-type]
        low = [t.bfloat16().double() for t in (x, weight, bias, state)]  # type: ignore[union-attr]
        through = torch.ops.tritonconv.causal_conv1d(x, weight, bias, state, activation="silu", a=0.0, b=0.0)
        with torch.no_grad():
            memory = torch.zeros(2, 5, 3)
            step = TF.causal_conv1d_update(x[:, :, 0].bfloat16(), memory, weight)  # type: ignore[index, arg-type]
    assert y.dtype == through.dtype == torch.bfloat16 and step.dtype == memory.dtype == torch.float32
    assert torch.equal(y, through)
    assert_close(y, reference(*low), depth=4)
    if grad:
        (dw,) = torch.autograd.grad(y.float().sum(), (weight,))  # type: ignore[arg-type]
        assert dw.dtype == torch.float32


@rotate(channels_last=[False, True], optional=[False, True])
def test_opcheck(channels_last: bool, optional: bool) -> None:
    inputs = leaves(*make(2, 5, 12, 4, torch.float32, channels_last, state=optional, bias=optional))
    numbers = dict(activation="silu" if optional else "", a=0.0, b=0.0)
    torch.library.opcheck(torch.ops.tritonconv.causal_conv1d.default, tuple(inputs), numbers)
    x, weight, bias, _ = (None if t is None else t.detach() for t in inputs)
    arguments = (x, torch.randn(2, 5, 4), weight, bias)
    torch.library.opcheck(torch.ops.tritonconv.causal_conv1d_update.default, arguments, numbers)


@every({"dynamic, channels_last": some(itertools.product((True, False), (True, False)), 1)})
def test_compile_fullgraph(dynamic: bool, channels_last: bool) -> None:
    torch._dynamo.reset()
    layer = CausalConv1d(6, 6, 4, groups=6, activation="silu")

    def model(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = layer(x, state, True)
        return layer(y), state

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for steps in (12, 21) if dynamic else (12,):
        x = laid(torch.randn(2, 6, steps), channels_last).requires_grad_()
        state = torch.randn(2, 6, 3)
        with record_launches() as launches:
            y, last = compiled(x, state)
            dx, dw = torch.autograd.grad(y.sum(), (x, layer.weight))
        assert launches == 2 * FORWARD + 2 * BACKWARD
        expected, expected_last = model(x, state)
        assert torch.allclose(y, expected, atol=1e-6) and torch.equal(last, expected_last)
        for got, want in zip((dx, dw), torch.autograd.grad(expected.sum(), (x, layer.weight)), strict=True):
            assert torch.allclose(got, want, atol=1e-4)


def test_the_step_compiles() -> None:
    torch._dynamo.reset()
    layer, state = CausalConv1d(6, 6, 4, groups=6, activation="silu"), torch.randn(2, 6, 3)
    other, x = state.clone(), torch.randn(2, 6)
    with torch.no_grad(), record_launches() as launches:
        y = torch.compile(layer.step, fullgraph=True, backend="aot_eager")(x, state)
        assert launches == STEP
        assert torch.allclose(y, layer.step(x, other), atol=1e-6) and torch.equal(state, other)


def test_flops() -> None:
    x, weight, *_ = leaves(*make(2, 5, 12, 4, torch.float32, True, state=False, bias=False))
    with FlopCounterMode(display=False) as counter:
        TF.causal_conv1d(x, weight, activation="silu").sum().backward()  # type: ignore[arg-type]
    assert counter.get_total_flops() == 3 * 2 * (2 * 5 * 12 * 4)


LAYERS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((6, 6, 4), dict(groups=6)),
    ((6, 6, 9), dict(groups=6)),
    ((6, 12, 3), dict(groups=6)),
    ((6, 6, 3), dict(groups=6, dilation=4)),
    ((6, 8, 3), dict(dilation=4)),
    ((6, 8, 3), dict(groups=2, dilation=2)),
    ((32, 24, 3), dict(stride=2)),
    ((6, 6, 4), dict(groups=6, stride=2)),
    ((6, 8, 2), dict(bias=False, dilation=16)),
]


@rotate({"sizes, numbers": LAYERS}, channels_last=[False, True])
def test_modules(sizes: tuple[Any, ...], numbers: dict[str, Any], channels_last: bool) -> None:
    layer = CausalConv1d(*sizes, **numbers, activation="silu")
    x = laid(torch.randn(2, sizes[0], 27), channels_last).requires_grad_()
    theirs = copy.deepcopy(layer).double()
    wide = x.detach().double().requires_grad_()
    before = torch.nn.functional.pad(wide, (layer.state_steps, 0))
    expected = torch.nn.functional.silu(torch.nn.Conv1d.forward(theirs, before))
    y = layer(x)
    assert_close(y, expected, depth=layer.weight[0].numel(), what=numbers)
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    wanted = torch.autograd.grad(expected, (wide, *theirs.parameters()), dy.double())
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, depth=60 * sizes[1], what=numbers)
    with tritonconv.set_backend("torch"), record_launches() as launches:
        assert torch.allclose(layer(x), y, atol=1e-5)
    assert not launches
    # A state, and no batch.
    x = x.detach()
    cut = 12
    first, state = layer(x[:, :, :cut], None, True)
    second, final = layer(x[:, :, cut:], state, True)
    assert torch.allclose(torch.cat((first, second), 2), y, atol=1e-5)
    assert torch.equal(final, torch.nn.functional.pad(x, (layer.state_steps, 0))[:, :, 27:])
    alone, last = layer(x[0], None, True)
    assert torch.allclose(alone, y[0], atol=1e-5) and torch.equal(last, final[0])


def test_modules_are_torchs_but_for_the_padding() -> None:
    layer, plain = CausalConv1d(6, 6, 4, groups=6, activation="silu"), torch.nn.Conv1d(6, 6, 4, groups=6)
    layer.load_state_dict(plain.state_dict())
    assert isinstance(layer, torch.nn.Conv1d) and "silu" in repr(layer)
    x = torch.randn(2, 6, 12)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.nn.Sequential(copy.deepcopy(layer))):
        assert torch.equal(other(x), expected)
    model = torch.nn.Sequential(copy.deepcopy(layer), torch.nn.Conv1d(6, 8, 1), torch.nn.ReLU()).eval()
    wanted = model(x)
    converted = tritonconv.convert(model, backend="triton")
    assert torch.allclose(converted(x), wanted, atol=1e-5)
    assert isinstance(model[0], CausalConv1d)


def test_the_modules_step_decodes() -> None:
    layer, x = CausalConv1d(6, 6, 4, groups=6, activation="silu"), torch.randn(2, 6, 12)
    with torch.no_grad():
        expected = layer(x)
        y, state = layer(x[:, :, :7], None, True)
        steps = [layer.step(x[:, :, t], state) for t in range(7, 10)]
        rest = layer.step(x[:, :, 10:], state)
    assert torch.allclose(torch.cat((y, torch.stack(steps, 2), rest), 2), expected, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"depthwise layer.*6, 8"):
        CausalConv1d(6, 8, 4).step(x[:, :, 0], state)
    with pytest.raises(RuntimeError, match=r"\[2, 6, 4\].*\[2, 6, 3\]"):
        CausalConv1d(6, 8, 3, dilation=2)(x, state)


def test_causal_padding_costs_no_copy() -> None:
    for numbers in (dict(dilation=2), dict(groups=32, dilation=2)):
        layer = CausalConv1d(32, 32, 3, **numbers)  # type: ignore[arg-type]
        # As `convert` would have it.
        layer.weight.data = laid(layer.weight.data, True)
        calls: list[Any] = []
        with observe(calls.append), torch.no_grad():
            layer(laid(torch.randn(2, 32, 40), True))
        assert [(c.decision.backend, c.decision.copies, c.geometry.padding[2]) for c in calls] == [("triton", 0, 4)]


def test_walks_cover_every_size() -> None:
    for channels_last, taps, backward in itertools.product((False, True), (1, 4, LONGEST), (False, True)):
        for shape in ((1, 1, 1), (3, 7, 5), (1, 5120, 1000)):
            x = torch.empty(shape)
            walk = Walk.over(x, channels_last, taps, backward)
            assert walk.programs(shape[1]) >= 1 and walk.range & (walk.range - 1) == 0
