"""Transposed convolution as layers: torch's twins, its errors, and models that are converted."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from matrix import rotate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import dense_strides


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_modules_are_torchs_twins(nd: int, device: str) -> None:
    kind = getattr(torch.nn, f"ConvTranspose{nd}d")
    arguments: dict[str, Any] = dict(
        stride=(1, 1, 2)[-nd:], padding=1, groups=3, dilation=2, output_padding=1, device=device
    )
    ours = getattr(tritonconv.nn, f"ConvTranspose{nd}d")(6, 9, 3, **arguments)
    theirs = kind(6, 9, 3, **arguments)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, kind) and repr(ours) == repr(theirs)
    x = torch.randn(2, 6, *(4, 3, 2)[:nd], device=device)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=1e-4, atol=1e-5)
        # As large as without output padding.
        size = [n - 1 for n in theirs(x).shape[2:]]
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [[4, 4], [9], [9, 9, 9], [11, 9]], ids=str)
def test_an_output_size_that_cannot_be_raises_torchs_error(size: list[int]) -> None:
    layer = tritonconv.nn.ConvTranspose2d(3, 4, 3, stride=2)
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError) as theirs:
        torch.nn.ConvTranspose2d(3, 4, 3, stride=2)(x, output_size=size)
    with pytest.raises(ValueError, match=r".") as ours:
        layer(x, output_size=size)
    assert str(ours.value) == str(theirs.value)


@rotate(groups=[1, 2, 4], nd=[1, 2, 3])
def test_statistics_are_those_of_the_result(nd: int, groups: int) -> None:
    """With padding a stride's first pixels lie before the image, and count for nothing."""
    for kernel, stride, padding in ((3, 2, 1), (4, 2, 1), (2, 2, 0), (3, 3, 1), (3, 2, 0)):
        x, w = torch.randn(2, 4, *(5,) * nd), torch.randn(4, 4 // groups, *(kernel,) * nd)
        numbers = dict(stride=stride, padding=padding, groups=groups)
        found = []
        for kind in (torch.float32, torch.float64):
            mean, var = torch.zeros(4, dtype=kind), torch.ones(4, dtype=kind)
            if kind == torch.float32:
                function = getattr(TF, f"conv_transpose{nd}d_bn_act")
                y = function(x, w, None, mean, var, None, None, training=True, **numbers)
            else:
                z = getattr(torch.nn.functional, f"conv_transpose{nd}d")(x.double(), w.double(), **numbers)
                y = torch.nn.functional.batch_norm(z, mean, var, training=True)
            found.append((y, mean, var))
        for out, ref in zip(*found, strict=True):
            torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_batch_norm_alone() -> None:
    """Of all that comes before it no gradient is needed."""
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 6, 3, 3)
    for training in (True, False):
        found = []
        for kind in (torch.float32, torch.float64):
            affine = [torch.linspace(0.5, 1.5, 6, dtype=kind).requires_grad_() for _ in range(2)]
            mean, var = torch.zeros(6, dtype=kind), torch.ones(6, dtype=kind)
            if kind == torch.float32:
                y = TF.conv_transpose2d_bn_act(x, w, None, mean, var, *affine, training=training, activation="silu")
            else:
                z = torch.nn.functional.conv_transpose2d(x.double(), w.double())
                y = torch.nn.functional.silu(torch.nn.functional.batch_norm(z, mean, var, *affine, training))
            found.append(torch.autograd.grad(y.sum(), affine))
        for out, ref in zip(*found, strict=True):
            torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-4)


# Errors

X, W = (2, 4, 5, 5), (4, 6, 3, 3)


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS: list[tuple[str, Callable[[ModuleType], object], str]] = [
    ("wrong channels", lambda F: F.conv_transpose2d(t(2, 5, 5, 5), t(*W)), r"to have 4 channels, but got 5"),
    ("wrong rank", lambda F: F.conv_transpose2d(t(5, 5), t(*W)), r"3D \(unbatched\) or 4D \(batched\).*\[5, 5\]"),
    ("wrong dtype mix", lambda F: F.conv_transpose2d(t(*X), t(*W, dtype=torch.float64)), r"should be the same"),
    ("bias of another dtype", lambda F: F.conv_transpose2d(t(*X), t(*W), t(6, dtype=torch.float64)), r"be the same"),
    ("bias too short", lambda F: F.conv_transpose2d(t(*X), t(*W), t(5)), r"1-dimensional with 6 elements.*\[5\]"),
    ("bias of a group", lambda F: F.conv_transpose2d(t(*X), t(*W), t(6), groups=2), r"with 12 elements"),
    ("negative stride", lambda F: F.conv_transpose2d(t(*X), t(*W), stride=-1), r"non-positive stride"),
    ("negative padding", lambda F: F.conv_transpose2d(t(*X), t(*W), padding=-1), r"negative padding"),
    ("padding in words", lambda F: F.conv_transpose2d(t(*X), t(*W), padding="same"), r"padding"),
    ("zero dilation", lambda F: F.conv_transpose2d(t(*X), t(*W), dilation=0), r"dilation"),
    ("groups that do not divide", lambda F: F.conv_transpose2d(t(*X), t(*W), groups=3), r"divisible by 3"),
    ("fractional groups", lambda F: F.conv_transpose2d(t(*X), t(*W), groups=1.5), r"groups"),
    ("much output padding", lambda F: F.conv_transpose2d(t(*X), t(*W), stride=2, output_padding=2), r"smaller than"),
    ("negative output padding", lambda F: F.conv_transpose2d(t(*X), t(*W), stride=2, output_padding=-1), r"negative"),
    ("three strides", lambda F: F.conv_transpose2d(t(*X), t(*W), stride=(1, 2, 3)), r"list of 2 values.*\[1, 2, 3\]"),
    ("nothing left", lambda F: F.conv_transpose2d(t(1, 4, 1, 1), t(4, 6, 2, 2), padding=1), r"at least 1"),
    ("an image without pixels", lambda F: F.conv_transpose2d(t(1, 4, 0, 0), t(*W)), r"at least 1"),
    ("no filters", lambda F: F.conv_transpose2d(t(*X), t(4, 0, 3, 3)), r"."),
    ("no tensor", lambda F: F.conv_transpose2d(None, t(*W)), r"Tensor"),
    ("1-d image in 2-d", lambda F: F.conv_transpose1d(t(*X), t(4, 6, 3)), r"2D \(unbatched\) or 3D \(batched\)"),
]


@pytest.mark.parametrize(("call", "says"), [pytest.param(c, s, id=name) for name, c, s in BAD_CALLS])
def test_bad_calls_raise_torchs_exception(call: Callable[[ModuleType], object], says: str) -> None:
    with pytest.raises(Exception) as theirs:
        call(torch.nn.functional)  # type: ignore[arg-type]
    with record_launches() as launches, pytest.raises(type(theirs.value), match=says):
        call(TF)
    assert not launches


def test_messages_name_the_geometry() -> None:
    says = r"input \[2, 5, 5, 5\], weight \[4, 6, 3, 3\], stride=\[2, 2\].*output_padding=\[1, 1\]"
    with pytest.raises(RuntimeError, match=says):
        TF.conv_transpose2d(t(2, 5, 5, 5), t(*W), stride=2, output_padding=1)
    with pytest.raises(RuntimeError, match=r"conv_transpose2d 2x4x5x5 -> 2x6x12x12, weight 4x6x3x3.*output padding 1x1"):
        TF.conv_transpose2d(t(*X), t(*W), t(5), stride=2, output_padding=1)


# Models


class Decoder(torch.nn.Module):
    """Two steps up, of a generator's kind and of a U-Net's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.ConvTranspose2d(8, 12, 4, 2, 1, bias=False)
        self.bn = torch.nn.BatchNorm2d(12)
        self.second = torch.nn.ConvTranspose2d(12, 6, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.relu(self.bn(self.first(x)))))


@pytest.fixture
def decoder(device: str) -> Decoder:
    model = Decoder().eval().to(device)
    model.bn.running_mean.uniform_(-1, 1)
    model.bn.running_var.uniform_(0.5, 2)
    return model


def test_convert_fuses_what_follows_and_revert_undoes_it(decoder: Decoder, device: str) -> None:
    x = torch.randn(2, 8, 5, 4, device=device)
    converted = tritonconv.convert(decoder)
    with torch.no_grad(), record_launches() as launches:
        y = converted(x)
    assert launches == ["conv_dgrad_kernel", "conv_up_kernel"]
    assert converted.first.weight.stride() == dense_strides((8, 12, 4, 4), True)
    torch.testing.assert_close(y, decoder(x).detach(), rtol=1e-4, atol=1e-5)
    # What leaves the model lies as torch gives it.
    assert y.is_contiguous()
    reverted = tritonconv.revert(converted)
    assert type(reverted.first) is torch.nn.ConvTranspose2d and reverted.first.weight.is_contiguous()
    assert torch.equal(reverted(x), decoder(x)) and list(reverted.state_dict()) == list(decoder.state_dict())


def test_explain_counts_and_names_them(decoder: Decoder, device: str) -> None:
    x = torch.randn(2, 8, 5, 4, device=device)
    first, second = tritonconv.explain(tritonconv.convert(decoder), x).to_dict()["layers"]
    assert first["kind"] == "ConvTranspose2d" and first["fused"] == ["bn", "relu"] and second["fused"] == ["tanh"]
    assert first["reason"] == "conv_dgrad, fused" and second["reason"] == "conv_up, fused"
    assert first["macs"] == 2 * 20 * 8 * 12 * 16 and second["macs"] == 2 * 80 * 12 * 6 * 4
    assert first["bytes"] == 4 * (2 * 8 * 20 + 8 * 12 * 16 + 2 * 12 * 80)
    # Two of four taps an axis see an image pixel; the second step's pixels see what the first's do.
    assert first["receptive_field"] == second["receptive_field"] == 2
    with FlopCounterMode(display=False) as counter, torch.no_grad(), tritonconv.set_backend("torch"):
        decoder(x)
    assert 2 * (first["macs"] + second["macs"]) == counter.get_total_flops()


def test_a_layer_that_is_given_its_output_size_stays_alone(device: str) -> None:
    class Sized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.bn = torch.nn.ConvTranspose2d(3, 4, 3, 2), torch.nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.up(x, output_size=[10, 10])))

    model = Sized().eval().to(device)
    x = torch.randn(1, 3, 4, 4, device=device)
    with torch.no_grad():
        torch.testing.assert_close(tritonconv.convert(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_functional_call_is_replaced(device: str) -> None:
    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 4, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.conv_transpose2d(x, self.weight, stride=2)

    model, x = Functional().to(device), torch.randn(1, 3, 4, 4, device=device)
    converted = tritonconv.convert(model.eval())
    with torch.no_grad(), record_launches() as launches:
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert launches == ["conv_up_kernel"]
