"""Bad input raises what torch raises, naming got, expected and the geometry; nothing is launched or written."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import tritonconv.functional as TF
from tritonconv.ops.core.launch import record_launches

X, W = (2, 4, 8, 8), (6, 4, 3, 3)


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# What is wrong, the call, and what the message must say.
BAD_CALLS: list[tuple[str, Callable[[ModuleType], object], str]] = [
    ("wrong channels", lambda F: F.conv2d(t(2, 5, 8, 8), t(*W)), r"to have 4 channels, but got 5"),
    ("wrong rank", lambda F: F.conv2d(t(8, 8), t(*W)), r"3D \(unbatched\) or 4D \(batched\).*\[8, 8\]"),
    ("too high a rank", lambda F: F.conv2d(t(1, *X), t(*W)), r"3D \(unbatched\) or 4D \(batched\)"),
    ("weight of wrong rank", lambda F: F.conv2d(t(*X), t(6, 4, 3)), r"conv2d|weight|stride"),
    ("wrong dtype mix", lambda F: F.conv2d(t(*X), t(*W, dtype=torch.float64)), r"should be the same"),
    ("bias of another dtype", lambda F: F.conv2d(t(*X), t(*W), t(6, dtype=torch.float64)), r"bias type.*be the same"),
    ("bias too short", lambda F: F.conv2d(t(*X), t(*W), t(5)), r"bias to be 1-dimensional with 6 elements.*\[5\]"),
    ("bias with two axes", lambda F: F.conv2d(t(*X), t(*W), t(6, 1)), r"1-dimensional with 6"),
    ("negative stride", lambda F: F.conv2d(t(*X), t(*W), stride=-1), r"non-positive stride"),
    ("zero stride", lambda F: F.conv2d(t(*X), t(*W), stride=(1, 0)), r"non-positive stride"),
    ("negative padding", lambda F: F.conv2d(t(*X), t(*W), padding=-1), r"negative padding"),
    ("zero dilation", lambda F: F.conv2d(t(*X), t(*W), dilation=0), r"dilation"),
    ("zero groups", lambda F: F.conv2d(t(*X), t(*W), groups=0), r"non-positive groups"),
    ("groups that do not divide", lambda F: F.conv2d(t(*X), t(6, 1, 3, 3), groups=4), r"divisible by 4"),
    ("three strides", lambda F: F.conv2d(t(*X), t(*W), stride=(1, 2, 3)), r"list of 2 values.*\[1, 2, 3\]"),
    ("fractional stride", lambda F: F.conv2d(t(*X), t(*W), stride=1.5), r"stride"),
    ("stride in words", lambda F: F.conv2d(t(*X), t(*W), stride="two"), r"stride"),
    ("unknown padding", lambda F: F.conv2d(t(*X), t(*W), padding="full"), r"(?i)padding.*full"),
    ("same with a stride", lambda F: F.conv2d(t(*X), t(*W), padding="same", stride=2), r"not supported for strided"),
    ("filter larger than the image", lambda F: F.conv2d(t(*X), t(6, 4, 9, 9)), r"can't be greater than actual input size"),
    ("no filters", lambda F: F.conv2d(t(*X), t(0, 4, 3, 3)), r"at least 1"),
    ("no tensor", lambda F: F.conv2d(None, t(*W)), r"Tensor"),
    ("1-d image in 2-d", lambda F: F.conv1d(t(*X), t(6, 4, 3)), r"2D \(unbatched\) or 3D \(batched\)"),
    ("3-d of 2-d", lambda F: F.conv3d(t(4, 8, 8), t(6, 4, 3, 3, 3)), r"4D \(unbatched\) or 5D \(batched\)"),
]


@pytest.mark.parametrize(("call", "says"), [pytest.param(c, s, id=name) for name, c, s in BAD_CALLS])
@pytest.mark.parametrize("grad", [False, True], ids=["triton", "torch"])
def test_bad_calls_raise_torchs_exception(call: Callable[[ModuleType], object], says: str, grad: bool) -> None:
    with pytest.raises(Exception) as theirs:
        call(torch.nn.functional)  # type: ignore[arg-type]
    with record_launches() as launches, torch.set_grad_enabled(grad), pytest.raises(type(theirs.value), match=says):
        call(TF)
    assert not launches


def test_messages_name_the_geometry() -> None:
    with pytest.raises(RuntimeError, match=r"input \[2, 5, 8, 8\], weight \[6, 4, 3, 3\], stride=\[2, 2\]") as error:
        TF.conv2d(t(2, 5, 8, 8), t(*W), stride=2)
    assert "groups=1" in str(error.value)
    with pytest.raises(RuntimeError, match=r"conv2d 2x4x8x8 -> 2x6x6x6, weight 6x4x3x3"):
        TF.conv2d(t(*X), t(*W), t(5))


def test_tensors_on_two_devices_raise() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"same device.*cpu.*meta.*conv2d 2x4x8x8"):
        TF.conv2d(t(*X), torch.empty(W, device="meta"))


def test_a_residual_of_another_size_raises() -> None:
    says = r"residual of the output's size \[2, 6, 6, 6\].*\[2, 6, 5, 5\]"
    with torch.no_grad(), pytest.raises(RuntimeError, match=says):
        TF.conv2d_bn_act(t(*X), t(*W), None, None, None, None, None, residual=t(2, 6, 5, 5))


def test_statistics_of_another_length_raise() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"running_var should contain 6 elements, not 5"):
        TF.conv2d_bn_act(t(*X), t(*W), None, t(6), t(5), None, None)
