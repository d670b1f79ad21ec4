"""Pixel shuffle, pixel unshuffle and channel shuffle: the very numbers that torch gives, of any type."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from matrix import TEST_ALL, cover, rotate
from tritonconv.kernels import shuffle as kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.ops.core.observe import observe
from tritonconv.ops.shuffle import launch as launches_of
from tritonconv.tuning import device_named

F = torch.nn.functional
OPS = torch.ops.tritonconv
INVERSES = dict(pixel_shuffle="pixel_unshuffle", pixel_unshuffle="pixel_shuffle")


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


CASES: list[tuple[str, tuple[int, ...], int]] = [
    ("pixel_shuffle", (2, 32, 5, 3), 2),
    ("pixel_shuffle", (1, 64, 3, 4), 4),
    # A square of 9, which is no power of two.
    ("pixel_shuffle", (1, 45, 3, 4), 3),
    ("pixel_shuffle", (2, 5, 3, 4), 1),
    # Longer than a run that goes as a whole.
    ("pixel_shuffle", (1, 256, 2, 2), 16),
    ("pixel_shuffle", (12, 3, 5), 2),
    ("pixel_shuffle", (2, 3, 8, 3, 2), 2),
    ("pixel_unshuffle", (2, 8, 10, 6), 2),
    ("pixel_unshuffle", (1, 3, 8, 16), 4),
    ("pixel_unshuffle", (1, 5, 9, 6), 3),
    ("pixel_unshuffle", (3, 10, 6), 2),
    ("pixel_unshuffle", (2, 3, 2, 4, 6), 2),
    ("channel_shuffle", (2, 58, 7, 5), 2),
    ("channel_shuffle", (2, 32, 3, 3), 16),
    ("channel_shuffle", (2, 15, 3, 3), 3),
    ("channel_shuffle", (2, 15, 3, 3), 5),
    ("channel_shuffle", (1, 6, 3, 3), 1),
    ("channel_shuffle", (1, 6, 3, 3), 6),
    ("channel_shuffle", (2, 12, 5), 4),
    ("channel_shuffle", (1, 12, 2, 3, 4), 3),
    ("channel_shuffle", (2, 6, 1, 2, 2, 2), 3),
]
# Squares of a power of two and of another number, and each function.
FEW = [
    ("pixel_shuffle", (2, 32, 5, 3), 2), ("pixel_shuffle", (1, 45, 3, 4), 3), ("pixel_unshuffle", (2, 8, 10, 6), 2),
    ("channel_shuffle", (2, 58, 7, 5), 2),
]  # fmt: skip
MOVED = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int8, torch.int64, torch.complex64]


def image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> torch.Tensor:
    x = torch.randint(0, 120, shape, device=device).to(dtype)
    return as_format(x, channels_last) if len(shape) in (4, 5) else x


@rotate({"kind, shape, factor": CASES}, channels_last=[False, True])
def test_results_are_torchs(kind: str, shape: tuple[int, ...], factor: int, channels_last: bool, device: str) -> None:
    x = image(shape, torch.float32, channels_last, device)
    with record_launches() as launches:
        y = getattr(TF, kind)(x, factor)
    expected = getattr(F, kind)(x.contiguous(), factor)
    assert torch.equal(y, expected) and launches == ["shuffle_kernel"]
    # In five axes, of which two are batches, torch fails for such strides.
    if not (kind.startswith("pixel") and x.dim() == 5):
        assert y.stride() == getattr(F, kind)(x, factor).stride()


@rotate(dtype=MOVED[1:], channels_last=[False, True])
def test_numbers_of_any_type_are_moved(dtype: torch.dtype, channels_last: bool, device: str) -> None:
    for kind, shape, factor in FEW:
        x = image(shape, dtype, channels_last, device)
        y = getattr(TF, kind)(x, factor)
        assert y.dtype == dtype and torch.equal(y, getattr(F, kind)(x, factor))


def test_types_that_torch_cannot_move(device: str) -> None:
    x = torch.randn(1, 8, 3, 4, device=device).to(torch.float8_e4m3fn)
    y = TF.pixel_shuffle(x, 2)
    assert y.dtype == x.dtype and torch.equal(y.float(), F.pixel_shuffle(x.float(), 2))


def test_bits_of_nan_survive(device: str) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 8, 3, 4), device=device, dtype=torch.int64).int()
    y = TF.pixel_shuffle(bits.view(torch.float32), 2).view(torch.int32)
    assert torch.equal(y, F.pixel_shuffle(bits, 2))


@rotate(config=cover(kernels.configs()), channels_last=[False, True])
def test_every_config(config: object, channels_last: bool, device: str) -> None:
    # Tiles end inside the sizes and beyond them.
    calls = [
        ("pixel_shuffle", (1, 24, 7, 9), 2), ("pixel_shuffle", (1, 18, 3, 5), 3), ("pixel_shuffle", (1, 6, 3, 700), 1),
        ("pixel_unshuffle", (1, 6, 6, 14), 2), ("channel_shuffle", (2, 24, 5, 5), 2),
        ("channel_shuffle", (1, 12, 40, 40), 3),
    ]  # fmt: skip
    for kind, shape, factor in calls:
        x = image(shape, torch.float32, channels_last, device)
        with forced(config=config, device=device_named("H200")):
            y = getattr(TF, kind)(x, factor)
        assert torch.equal(y, getattr(F, kind)(x, factor)), (kind, shape)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "pixel_unshuffle", "channel_shuffle"])
def test_the_gradient_undoes_it(kind: str, device: str) -> None:
    for channels_last in (False, True):
        x = image((1, 12, 4, 6), torch.float32, channels_last, device).requires_grad_()
        y = getattr(TF, kind)(x, 2)
        dy = torch.randn_like(y)
        with record_launches() as launches:
            (dx,) = torch.autograd.grad(y, x, dy)
        (expected,) = torch.autograd.grad(getattr(F, kind)(x, 2), x, dy)
        assert torch.equal(dx, expected) and launches == ["shuffle_kernel"]
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: getattr(TF, kind)(t, 2), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda t: getattr(TF, kind)(t, 2), x, fast_mode=True)


def test_64_bit_offsets_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches_of, "needs_int64", lambda _elements: True)
    for kind, shape, factor in FEW:
        for channels_last in (False, True):
            x = image(shape, torch.float32, channels_last, device)
            assert torch.equal(getattr(TF, kind)(x, factor), getattr(F, kind)(x, factor))


def test_views_are_read_in_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(2, 24, 6, 8, device=device)
    last = as_format(whole, True)
    views = [last[:, 8:16], last[:, :, 2:4, ::2], whole[:, 3:7], whole[:, :, 2:, 1:5], whole[:1].expand(3, -1, -1, -1)]
    monkeypatch.setattr(launches_of, "as_format", lambda *_: pytest.fail("a copy"))
    for x in views:
        for kind in ("pixel_shuffle", "pixel_unshuffle"):
            assert torch.equal(getattr(TF, kind)(x, 2), getattr(F, kind)(x.contiguous(), 2))
    for x in (views[0], views[2], views[4]):
        assert torch.equal(TF.channel_shuffle(x, 2), F.channel_shuffle(x.contiguous(), 2))


def test_copies_are_counted(device: str) -> None:
    whole = torch.randn(2, 4, 6, 8, device=device)
    for x, copies in ((whole, 0), (whole[..., ::2], 0), (whole[..., 1:5], 1), (as_format(whole, True)[..., 1:5], 1)):
        seen: list[Any] = []
        with observe(seen.append):
            TF.channel_shuffle(x, 2)
        assert [call.decision.copies for call in seen] == [copies]
        assert torch.equal(TF.channel_shuffle(x, 2), F.channel_shuffle(x.contiguous(), 2))


def test_a_seeded_fuzz(device: str) -> None:
    draw = random.Random(5)
    for _ in range(25 if TEST_ALL else 8):
        kind, factor = draw.choice(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")), draw.randint(1, 5)
        n, c, h, w = draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 6), draw.randint(1, 6)
        shape = {"pixel_shuffle": (n, c * factor**2, h, w), "pixel_unshuffle": (n, c, h * factor, w * factor)}.get(
            kind, (n, c * factor, h, w)
        )
        x = image(shape, draw.choice(MOVED), draw.random() < 0.5, device)
        if draw.random() < 0.3:
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        y, expected = getattr(TF, kind)(x, factor), getattr(F, kind)(x, factor)
        assert torch.equal(y, expected), (kind, shape, factor, x.stride())


X = (2, 4, 5, 6)
BAD_CALLS: list[tuple[str, Any]] = [
    ("no tensor", lambda F: F.pixel_shuffle(None, 2)),
    ("a float", lambda F: F.pixel_shuffle(torch.zeros(X), 2.0)),
    ("a bool", lambda F: F.pixel_shuffle(torch.zeros(X), True)),
    ("no factor", lambda F: F.pixel_shuffle(torch.zeros(X), None)),
    ("zero", lambda F: F.pixel_shuffle(torch.zeros(X), 0)),
    ("negative", lambda F: F.pixel_shuffle(torch.zeros(X), -2)),
    ("channels that 9 does not divide", lambda F: F.pixel_shuffle(torch.zeros(X), 3)),
    ("too few axes", lambda F: F.pixel_shuffle(torch.zeros(4, 4), 2)),
    ("unshuffle by zero", lambda F: F.pixel_unshuffle(torch.zeros(X), 0)),
    ("rows that 2 does not divide", lambda F: F.pixel_unshuffle(torch.zeros(X), 2)),
    ("columns that 5 does not divide", lambda F: F.pixel_unshuffle(torch.zeros(X), 5)),
    ("unshuffle of two axes", lambda F: F.pixel_unshuffle(torch.zeros(4, 4), 2)),
    ("no groups", lambda F: F.channel_shuffle(torch.zeros(X), 0)),
    ("groups that do not divide", lambda F: F.channel_shuffle(torch.zeros(X), 3)),
    ("channels of two axes", lambda F: F.channel_shuffle(torch.zeros(4, 4), 2)),
    ("groups of a float", lambda F: F.channel_shuffle(torch.zeros(X), 2.0)),
]


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BAD_CALLS])
def test_bad_calls_raise_torchs_exception(call: Any) -> None:
    with pytest.raises(Exception) as theirs:
        call(F)
    with record_launches() as launches, pytest.raises(type(theirs.value)) as ours:
        call(TF)
    assert str(ours.value) == str(theirs.value) and not launches


def test_operators_check_sizes(device: str) -> None:
    x = torch.zeros(X, device=device)
    for kind in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        with pytest.raises(RuntimeError, match=r"7 does not divide what it must of \[2, 4, 5, 6\]"):
            getattr(OPS, kind)(x, 7)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 0, 2, 2), (2, 4, 0, 2)], ids=str)
def test_nothing_to_move_is_torchs(shape: tuple[int, ...], device: str) -> None:
    for kind in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        x = torch.zeros(shape, device=device)
        assert getattr(TF, kind)(x, 2).shape == getattr(F, kind)(x, 2).shape


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.to(torch.complex128), "complex128 has no kernel"),
        (lambda x: x.to(torch.complex64).conj(), "conjugated"),
        (lambda x: x.to_sparse(), "is not strided"),
    ],
    ids=["complex128", "conjugated", "sparse"],
)
def test_what_is_not_plain_memory_runs_on_torch(make: Any, reason: str, device: str) -> None:
    x = make(torch.randn(1, 4, 2, 3, device=device))
    with pytest.raises(RuntimeError, match=reason):
        TF.pixel_shuffle(x, 2)
    if x.layout == torch.strided:
        seen: list[Any] = []
        with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match=reason), observe(seen.append):
            assert torch.equal(TF.pixel_shuffle(x, 2), F.pixel_shuffle(x, 2))
        assert [call.decision.backend for call in seen] == ["torch"]


@pytest.mark.parametrize("kind", ["pixel_shuffle", "pixel_unshuffle", "channel_shuffle"])
def test_operators_are_clean(kind: str, device: str) -> None:
    x = as_format(torch.randn(1, 8, 2, 4, device=device), True).requires_grad_()
    torch.library.opcheck(getattr(OPS, kind), (x, 2))


def test_compiled_calls_run_on_our_kernel(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return TF.channel_shuffle(TF.pixel_unshuffle(TF.pixel_shuffle(x, 2).square(), 2), 4).cumsum(1).sum()

    x = torch.randn(2, 8, 3, 5, device=device, requires_grad=True)
    with record_launches() as launches:
        torch.compile(function, fullgraph=True, backend="aot_eager")(x).backward()
    assert launches == ["shuffle_kernel"] * 6
    compiled, x.grad = x.grad, None
    function(x).backward()
    torch.testing.assert_close(compiled, x.grad)
    bits = torch.arange(8, device=device).reshape(1, 4, 1, 2)
    assert torch.equal(
        torch.compile(lambda t: TF.pixel_shuffle(t, 2), fullgraph=True, backend="aot_eager")(bits), F.pixel_shuffle(bits, 2)
    )


def test_transforms_run_on_torch_or_say_so(device: str) -> None:
    x = torch.randn(3, 2, 4, 5, 5, device=device)
    for image in (x, x.int()):
        with pytest.raises(RuntimeError, match=r"torch.func transform"):
            torch.vmap(lambda t: TF.pixel_shuffle(t, 2))(image)
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match="runs on torch"):
        y = torch.vmap(lambda t: TF.pixel_shuffle(t, 2))(x)
    assert torch.equal(y, F.pixel_shuffle(x, 2))
    for image in (x, x.to(torch.complex64)):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            TF.pixel_shuffle(torch.autograd.forward_ad.make_dual(image[0], image[1]), 2)


def test_the_torch_backend_launches_nothing(device: str) -> None:
    with tritonconv.set_backend("torch"), record_launches() as launches:
        TF.pixel_shuffle(torch.randn(1, 4, 2, 2, device=device), 2)
    assert not launches


@pytest.mark.parametrize("name", ["PixelShuffle", "PixelUnshuffle", "ChannelShuffle"])
def test_modules_are_torchs_twins(name: str, device: str) -> None:
    ours, theirs = (getattr(n, name)(2) for n in (tritonconv.nn, torch.nn))
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    x = torch.randn(1, 8, 4, 4, device=device)
    with record_launches() as launches:
        assert torch.equal(ours(x), theirs(x))
    assert launches == ["shuffle_kernel"]
    ours.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        ours(x)
    assert not launches


def test_explain_sees_the_layer_and_runs_nothing(device: str) -> None:
    layer = tritonconv.nn.PixelShuffle(2)
    with record_launches() as launches:
        row = tritonconv.explain(layer, torch.randn(2, 4, 5, 5, device=device)).to_dict()["layers"][0]
    assert not launches and row["backend"] == "triton" and "shuffle" in row["reason"] and row["copies"] == 0
