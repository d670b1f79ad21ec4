"""Resampling and its gradients, against torch in fp64; nearest elements exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from matrix import TEST_ALL, cover, rotate
from reference import assert_close
from tritonconv.kernels import resample as forward_kernels
from tritonconv.kernels import resample_backward as backward_kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ResampleGeometry
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last
from tritonconv.ops.core.observe import observe
from tritonconv.ops.resample import launch as launches_of
from tritonconv.tuning import device_named

F = torch.nn.functional
OPS = torch.ops.tritonconv
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KERNELS = ["resample_kernel", "resample_backward_kernel"]
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
# Coordinates are rounded to fp32: those of dozens of elements are off by as much as long sums.
DEPTH = 256


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    arguments: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return self.name

    @property
    def linear(self) -> str:
        return LINEAR[len(self.shape) - 2]


CASES = [
    Case("twice", (1, 24, 2, 5), dict(scale_factor=2)),
    Case("half", (1, 17, 4, 9), dict(scale_factor=0.5)),
    Case("to a size", (1, 5, 3, 7), dict(size=(2, 17))),
    # The scale is the factor's inverse, or what the sizes say: 7 * 1.55 is 10.85.
    Case("odd factors", (1, 9, 4, 7), dict(scale_factor=(0.6, 1.55))),
    Case("odd factors recomputed", (1, 9, 4, 7), dict(scale_factor=(0.6, 1.55), recompute_scale_factor=True)),
    Case("one row stays", (1, 9, 3, 5), dict(size=(3, 8))),
    Case("to one pixel", (1, 6, 3, 4), dict(size=1)),
    # Dense in both formats at once.
    Case("one channel", (1, 1, 2, 5), dict(size=(3, 9))),
    Case("from one pixel", (1, 6, 1, 1), dict(size=(2, 3))),
    Case("1-d", (2, 6, 23), dict(scale_factor=1.7)),
    Case("3-d", (1, 6, 2, 2, 3), dict(size=(3, 2, 4))),
]


def random_image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> torch.Tensor:
    return as_format(torch.randn(shape, device=device).to(dtype), channels_last)


def run(module: Any, x: torch.Tensor, dy: torch.Tensor | None, **arguments: Any) -> list[torch.Tensor]:
    """[y, dx] of one call; dx is missing where dy is."""
    x = x.detach().requires_grad_(dy is not None)
    y = module.interpolate(x, **arguments)
    return [y.detach(), *([] if dy is None else torch.autograd.grad(y, x, dy.to(y.dtype)))]


def compared(x: torch.Tensor, what: object, **arguments: Any) -> list[torch.Tensor]:
    """Ours with gradients, checked against torch's in fp64; without gradients the results are the same."""
    # On CPUs torch finds the nearest elements of fp64 with a scale in fp64, on GPUs in fp32 for all types; that of fp32
    # images is the same on both.
    wide = torch.float64 if "linear" in arguments["mode"] else torch.float32
    reference_x = x.to(wide)
    dy = torch.randn(F.interpolate(reference_x, **arguments).shape, device=x.device).to(x.dtype)
    ours, reference = run(TF, x, dy, **arguments), run(F, reference_x, dy, **arguments)
    if wide == torch.float32:
        assert torch.equal(ours[0].double(), reference[0].to(x.dtype).double()), what
    for name, out, ref in zip(("y", "dx"), ours, reference, strict=True):
        assert out.dtype == x.dtype
        # The reference's sums are in fp32 here.
        narrow = x.dtype == torch.float64 and wide == torch.float32
        assert_close(out.float() if narrow else out, ref.double(), depth=DEPTH, what=f"{what}, {name}")
    with torch.no_grad():
        assert torch.equal(TF.interpolate(x, **arguments), ours[0])
    return ours


@rotate(case=CASES, channels_last=[False, True])
def test_results_and_gradients_match_fp64(case: Case, channels_last: bool, device: str) -> None:
    x = random_image(case.shape, torch.float32, channels_last, device)
    for mode, corners in (("nearest", None), ("nearest-exact", None), (case.linear, False), (case.linear, True)):
        y, dx = compared(x, (case, mode), mode=mode, align_corners=corners, **case.arguments)
        assert is_dense(y, suggests_channels_last(x)) and dx.stride() == x.stride()


@rotate(dtype=DTYPES[1:], channels_last=[False, True])
def test_the_other_dtypes(channels_last: bool, dtype: torch.dtype, device: str) -> None:
    x = random_image((1, 24, 2, 5), dtype, channels_last, device)
    for mode in ("bilinear", "nearest"):
        compared(x, (dtype, mode), mode=mode, size=(3, 11))


def test_nearest_indices_are_torchs_whatever_the_factor(device: str) -> None:
    draw = random.Random(3)
    with torch.no_grad():
        for _ in range(30):
            length = draw.randint(1, 200)
            factor = draw.choice([draw.uniform(0.1, 4), draw.randint(1, 30) / draw.randint(1, 30)])
            arguments: dict[str, Any] = (
                dict(scale_factor=factor) if draw.random() < 0.6 else dict(size=draw.randint(1, 500))
            )
            if int(length * factor) < 1:
                continue
            x = torch.arange(float(length), device=device)[None, None]
            for mode in ("nearest", "nearest-exact"):
                expected = F.interpolate(x, mode=mode, **arguments)
                assert torch.equal(TF.interpolate(x, mode=mode, **arguments), expected), (length, mode, arguments)


def test_nearest_gradients_lose_nothing_over_long_axes(device: str) -> None:
    # Each result counts once, whatever the rounding of its coordinate.
    for length, count in ((1000, 30_011), (30_011, 1000)):
        x = torch.zeros(1, 1, length, device=device, requires_grad=True)
        for mode in ("nearest", "linear"):
            with forced(config=forward_kernels.tile(1 << 15, 1)):
                (dx,) = torch.autograd.grad(TF.interpolate(x, count, mode=mode).sum(), x)
            (expected,) = torch.autograd.grad(F.interpolate(x, count, mode=mode).sum(), x)
            torch.testing.assert_close(dx, expected, rtol=1e-4, atol=5e-3)
            assert abs(dx.double().sum().item() - count) < 1e-2 * count**0.5


@rotate(config=cover(forward_kernels.configs()), channels_last=[False, True])
def test_every_forward_config(config: object, channels_last: bool, device: str) -> None:
    # Tiles end inside the sizes and beyond them.
    x = random_image((1, 20 if channels_last else 3, 2, 9), torch.float32, channels_last, device)
    for mode in ("bilinear", "nearest"):
        with forced(config=config), torch.no_grad():
            (y,) = run(TF, x, None, size=(1, 35), mode=mode)
        assert_close(y, F.interpolate(x.double(), (1, 35), mode=mode), depth=DEPTH, what=config)


@rotate(config=cover(backward_kernels.configs()), channels_last=[False, True])
def test_every_backward_config(config: object, channels_last: bool, device: str) -> None:
    dy = random_image((1, 20 if channels_last else 3, 2, 9), torch.float32, channels_last, device)
    geometry = ResampleGeometry.parse((1, dy.shape[1], 1, 35), (2, 9), None, "linear")
    with forced(config=config):
        dx = launches_of.resample_gradient(dy, geometry, channels_last)
    x = torch.zeros(1, dy.shape[1], 1, 35, device=device, dtype=torch.float64, requires_grad=True)
    F.interpolate(x, (2, 9), mode="bilinear").backward(dy.double())
    assert_close(dx, x.grad, depth=DEPTH, what=config)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_tiles_and_rows_as_a_gpu_would_have_them(channels_last: bool, device: str) -> None:
    with forced(device=device_named("H200")):
        compared(random_image((1, 24, 2, 5), torch.float32, channels_last, device), "H200", size=(4, 7), mode="bilinear")


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_nan_and_infinity_are_torchs(mode: str, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.randn(1, 5, 4, 4, device=device)
    x[0, 0, 0, 0], x[0, 1, 2, 3], x[0, 2, 3, 1], x[0, 3, 1, 1] = nan, inf, -inf, inf
    for channels_last in (False, True):
        for corners in (None, True) if mode == "bilinear" else (None,):
            # An element with weight zero counts: infinity times zero is NaN. Torch's gradient counts the last element
            # twice, once with weight zero, ours once.
            dy = torch.randn(1, 5, 7, 3, device=device)
            dy[0, 0, 1, 1], dy[0, 1, 2, 1], dy[0, 2, 5, 0] = nan, inf, -inf
            arguments = dict(size=(7, 3), mode=mode, align_corners=corners)
            ours, theirs = (run(m, as_format(x, channels_last), dy, **arguments) for m in (TF, F))
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_an_axis_of_the_same_size_is_left_alone(device: str) -> None:
    # Torch's CPU code multiplies infinity by a weight of zero here, its GPU code copies.
    x = torch.full((1, 1, 3), float("inf"), device=device)
    assert torch.equal(TF.interpolate(x, 3, mode="linear"), x)


def test_two_runs_are_bit_equal(device: str) -> None:
    x = random_image((1, 20, 3, 5), torch.bfloat16, True, device)
    dy = torch.randn(1, 20, 5, 9, device=device)
    first, second = (run(TF, x, dy, size=(5, 9), mode="bilinear") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_64_bit_offsets_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels_last in (False, True):
        x = random_image((2, 10, 2, 5), torch.float32, channels_last, device)
        dy = torch.randn(2, 10, 3, 7, device=device)
        for mode in ("nearest", "bilinear"):
            narrow = run(TF, x, dy, size=(3, 7), mode=mode)
            with monkeypatch.context() as patch:
                patch.setattr(launches_of, "needs_int64", lambda _elements: True)
                assert all(map(torch.equal, narrow, run(TF, x, dy, size=(3, 7), mode=mode)))


def test_views_are_read_in_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(2, 24, 5, 8, device=device)
    last = as_format(whole, True)
    views = [last[:, 8:16], last[:, :, 1:4, ::2], whole[:, 3:7], whole[:, :, 2:, 1:6], whole[:1].expand(3, -1, -1, -1)]
    with monkeypatch.context() as patch:
        patch.setattr(launches_of, "as_format", lambda *_: pytest.fail("a copy"))
        found = [TF.interpolate(x, (4, 3), mode=mode) for x in views for mode in ("nearest", "bilinear")]
    expected = [F.interpolate(x, (4, 3), mode=mode) for x in views for mode in ("nearest", "bilinear")]
    torch.testing.assert_close(found, expected)
    assert all(suggests_channels_last(y) for y in found[:4]) and all(y.is_contiguous() for y in found[4:])


def test_inputs_of_any_strides(device: str) -> None:
    odd = [
        torch.randn(1, 6, 3, 5, device=device)[:, :, :, ::2], torch.randn(3, 5, 6, 1, device=device).permute(3, 1, 2, 0),
        torch.randn(1, 6, 1, 1, device=device).expand(2, 6, 2, 4),
    ]  # fmt: skip
    for x in odd:
        compared(x, x.stride(), size=(3, 2), mode="bilinear")
    # Gradients too.
    x = torch.randn(2, 3, 3, 4, device=device, requires_grad=True)
    TF.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4.0))


def test_a_seeded_fuzz(device: str) -> None:
    draw = random.Random(7)
    for _ in range(14 if TEST_ALL else 5):
        nd, channels_last, dtype = draw.choice((1, 2, 2, 3)), draw.random() < 0.5, draw.choice(DTYPES)
        largest = {1: 20, 2: 4, 3: 2}[nd]
        shape = (draw.choice((1, 2)), draw.choice((1, 3, 8, 19)), *(draw.randint(1, largest) for _ in range(nd)))
        arguments: dict[str, Any] = dict(mode=draw.choice(("nearest", "nearest-exact", LINEAR[nd])))
        if arguments["mode"] == LINEAR[nd]:
            arguments["align_corners"] = draw.choice((None, False, True))
        if draw.random() < 0.5:
            arguments["size"] = tuple(draw.randint(1, largest + 2) for _ in range(nd))
        else:
            # No axis that keeps its size or doubles by another factor: there torch's 2-d CPU code has rules of its own.
            arguments["scale_factor"] = tuple(draw.choice((1, 2, 2.5, 3.3)) for _ in range(nd))
            arguments["recompute_scale_factor"] = draw.choice((None, False, True))
            if any(
                (int(n * f) in (n, 2 * n)) != (f in (1, 2))
                for n, f in zip(shape[2:], arguments["scale_factor"], strict=True)
            ):
                continue
        compared(random_image(shape, dtype, channels_last, device), (shape, dtype, arguments), **arguments)


X = (2, 4, 5, 6)
BAD_CALLS: list[tuple[str, Any]] = [
    ("no tensor", lambda F: F.interpolate(None, 2)),
    ("too few axes", lambda F: F.interpolate(torch.zeros(5, 6), 2)),
    ("too many axes", lambda F: F.interpolate(torch.zeros(1, *X, 2), 2)),
    ("size and factor", lambda F: F.interpolate(torch.zeros(X), 2, 2)),
    ("neither", lambda F: F.interpolate(torch.zeros(X))),
    ("too many sizes", lambda F: F.interpolate(torch.zeros(X), (2, 2, 2))),
    ("too few factors", lambda F: F.interpolate(torch.zeros(X), scale_factor=(2.0,))),
    ("a float", lambda F: F.interpolate(torch.zeros(X), (2.0, 2.0))),
    ("no size", lambda F: F.interpolate(torch.zeros(X), 0)),
    ("a negative size", lambda F: F.interpolate(torch.zeros(X), -1)),
    ("a small factor", lambda F: F.interpolate(torch.zeros(X), scale_factor=0.01)),
    ("an infinite factor", lambda F: F.interpolate(torch.zeros(X), scale_factor=float("inf"), recompute_scale_factor=True)),
    ("no number", lambda F: F.interpolate(torch.zeros(X), scale_factor="2")),
    ("no pixels", lambda F: F.interpolate(torch.zeros(2, 4, 0, 6), 2)),
    ("no channels", lambda F: F.interpolate(torch.zeros(2, 0, 5, 6), 2)),
    ("an unknown mode", lambda F: F.interpolate(torch.zeros(X), 2, mode="cubic")),
    ("a mode of fewer axes", lambda F: F.interpolate(torch.zeros(X), 2, mode="linear")),
    ("a mode of more axes", lambda F: F.interpolate(torch.zeros(X), 2, mode="trilinear")),
    ("corners of nearest", lambda F: F.interpolate(torch.zeros(X), 2, align_corners=False)),
    ("corners of area", lambda F: F.interpolate(torch.zeros(X), 2, mode="area", align_corners=True)),
    ("a size recomputed", lambda F: F.interpolate(torch.zeros(X), 2, recompute_scale_factor=True)),
    ("antialias of nearest", lambda F: F.interpolate(torch.zeros(X), 2, antialias=True)),
    ("integers", lambda F: F.interpolate(torch.zeros(X).int(), 2)),
]


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BAD_CALLS])
@pytest.mark.filterwarnings("ignore:tritonconv")
def test_bad_calls_raise_torchs_exception(call: Any) -> None:
    with pytest.raises(Exception) as theirs:
        call(F)
    with tritonconv.set_backend("auto"), record_launches() as launches, pytest.raises(type(theirs.value)) as ours:
        call(TF)
    assert str(ours.value) == str(theirs.value) and not launches


def test_operators_check_sizes(device: str) -> None:
    x = torch.zeros(X, device=device)
    with pytest.raises(RuntimeError, match=r"got input \[2, 4, 5, 6\], size \[2\]"):
        OPS.resample(x, [2], [], "nearest")
    with pytest.raises(RuntimeError, match="mode 'bicubic'"):
        OPS.resample(x, [2, 2], [], "bicubic")


def test_an_empty_batch_is_torchs(device: str) -> None:
    x = torch.zeros(0, 4, 3, 3, device=device)
    assert TF.interpolate(x, 5).shape == F.interpolate(x, 5).shape


def test_sizes_may_be_numpys(device: str) -> None:
    x = torch.randn(1, 2, 4, 4, device=device)
    assert TF.interpolate(x, (np.int64(2), np.int32(3))).shape == (1, 2, 2, 3)
    assert TF.interpolate(x, scale_factor=np.float64(2)).shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(mode="bicubic"), "bicubic"), (dict(mode="bilinear", antialias=True), "antialias"),
        (dict(mode="lanczos", antialias=True), "lanczos"),
    ],
    ids=["bicubic", "antialias", "lanczos"],
)  # fmt: skip
def test_what_has_no_kernel_runs_on_torch_and_says_so(arguments: dict[str, Any], reason: str, device: str) -> None:
    x = torch.randn(1, 3, 4, 5, device=device)
    with pytest.raises(RuntimeError, match=reason):
        TF.interpolate(x, (3, 7), **arguments)
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match="runs on torch"):
        y = TF.interpolate(x, (3, 7), **arguments)
    assert torch.equal(y, F.interpolate(x, (3, 7), **arguments))
    seen: list[Any] = []
    with tritonconv.set_backend("auto"), observe(seen.append):
        TF.interpolate(x, (3, 7), **arguments)
    assert [call.decision.backend for call in seen] == ["torch"] and reason in seen[0].decision.reason


def test_integers_run_on_torch(device: str) -> None:
    x = torch.randint(0, 255, (1, 3, 4, 5), device=device, dtype=torch.uint8)
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match=r"torch.uint8 has no kernel"):
        assert torch.equal(TF.interpolate(x, scale_factor=2), F.interpolate(x, scale_factor=2))


def test_area_runs_on_adaptive_pooling(device: str) -> None:
    x = torch.randn(1, 3, 4, 5, device=device)
    for arguments in (dict(size=(3, 7)), dict(scale_factor=0.6)):
        with record_launches() as launches:
            y = TF.interpolate(x, mode="area", **arguments)
        assert launches == ["adaptive_forward_kernel"]
        torch.testing.assert_close(y, F.interpolate(x, mode="area", **arguments))


def test_gradcheck(device: str) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    for mode in ("nearest", "bilinear"):
        assert torch.autograd.gradcheck(lambda t, m=mode: TF.interpolate(t, (4, 3), mode=m), x, fast_mode=True)


def test_operators_are_clean(device: str) -> None:
    x = as_format(torch.randn(1, 4, 3, 2, device=device), True).requires_grad_()
    torch.library.opcheck(OPS.resample, (x, [4, 3], [1.5, 1.5], "linear"))
    torch.library.opcheck(OPS.resample_backward, (torch.randn(1, 4, 2, 2, device=device), x.shape, [], "nearest", True))


def test_compiled_calls_run_on_our_kernels(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return TF.interpolate(x, scale_factor=1.5, mode="bilinear").square().sum() + TF.interpolate(x, (2, 4)).sum()

    x = torch.randn(2, 4, 3, 5, device=device, requires_grad=True)
    with record_launches() as launches:
        torch.compile(function, fullgraph=True, backend="aot_eager")(x).backward()
    assert sorted(launches) == sorted(KERNELS * 2)
    compiled, x.grad = x.grad, None
    function(x).backward()
    torch.testing.assert_close(compiled, x.grad)


def test_transforms_run_on_torch_or_say_so(device: str) -> None:
    x = torch.randn(3, 2, 4, 5, 5, device=device)
    with pytest.raises(RuntimeError, match=r"torch.func transform"):
        torch.vmap(lambda t: TF.interpolate(t, 2))(x)
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match="runs on torch"):
        y = torch.vmap(lambda t: TF.interpolate(t, 2))(x)
    torch.testing.assert_close(y, F.interpolate(x.flatten(0, 1), 2).unflatten(0, (3, 2)))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        TF.interpolate(torch.autograd.forward_ad.make_dual(x[0], x[1]), 2)


def test_which_kernels_run(device: str) -> None:
    x = torch.randn(1, 4, 3, 5, device=device, requires_grad=True)
    for mode in ("nearest", "nearest-exact", "bilinear"):
        with record_launches() as launches:
            TF.interpolate(x, 3, mode=mode).sum().backward()
        assert launches == KERNELS
    with tritonconv.set_backend("torch"), record_launches() as launches:
        TF.interpolate(x, 3)
    assert not launches


def test_nothing_is_saved_for_the_gradient(device: str) -> None:
    seen: list[torch.Tensor] = []
    x = torch.randn(1, 8, 4, 4, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        TF.interpolate(x, 3, mode="bilinear")
    assert not seen


def test_autocast_is_torchs(device: str) -> None:
    for nd in (1, 2, 3):
        x = torch.randn(1, 2, *(2,) * nd, device=device).bfloat16()
        for mode in ("nearest", "nearest-exact", LINEAR[nd]):
            with torch.autocast(device, torch.bfloat16):
                ours, theirs = (m.interpolate(x, 3, mode=mode) for m in (TF, F))
            assert ours.dtype == theirs.dtype


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Upsample", dict(scale_factor=2, mode="bilinear", align_corners=True)), ("Upsample", dict(size=(5, 3))),
        ("Upsample", dict(scale_factor=1.5, mode="bilinear", recompute_scale_factor=True)),
        ("UpsamplingNearest2d", dict(scale_factor=2)), ("UpsamplingBilinear2d", dict(size=(5, 3))),
    ],
    ids=str,
)  # fmt: skip
def test_modules_are_torchs_twins(name: str, arguments: dict[str, Any], device: str) -> None:
    ours, theirs = (getattr(n, name)(**arguments) for n in (tritonconv.nn, torch.nn))
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    x = torch.randn(1, 3, 4, 4, device=device)
    with record_launches() as launches:
        torch.testing.assert_close(ours(x), theirs(x))
    assert launches == KERNELS[:1]
    ours.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        ours(x)
    assert not launches


def test_explain_sees_the_layer_and_runs_nothing(device: str) -> None:
    layer = tritonconv.nn.Upsample(scale_factor=2)
    with record_launches() as launches:
        row = tritonconv.explain(layer, torch.randn(2, 4, 5, 5, device=device)).to_dict()["layers"][0]
    assert not launches and row["backend"] == "triton" and "resample" in row["reason"] and row["copies"] == 0


@rotate(mode=["nearest", "nearest-exact", "linear", "area"], nd=[1, 2, 3], step=[2, 3])
def test_channels_last_views_with_a_step_between_channels(step: int, nd: int, mode: str, device: str) -> None:
    x = torch.randn(1, *(5, 3, 2)[:nd], 4 * step, device=device).movedim(-1, 1)[:, ::step]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[nd] if mode == "linear" else mode
    y = TF.interpolate(x, scale_factor=2, mode=mode)
    assert_close(y, torch.nn.functional.interpolate(x.double().contiguous(), scale_factor=2, mode=mode))
    assert suggests_channels_last(y)


@pytest.mark.parametrize("factor", [2.05, 1.03])
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_nearest_with_a_factor_near_a_whole_one_follows_cuda(nd: int, factor: float, device: str) -> None:
    """torch's CPU code of two axes repeats or copies whatever the factor, where the sizes say so."""
    x = torch.randn(1, 2, *(10,) * nd, device=device)
    places = (torch.arange(int(10 * factor)) * torch.tensor(1 / factor)).long()
    expected = x
    for axis in range(2, 2 + nd):
        expected = expected.index_select(axis, places.to(device))
    assert len(places) % 10 == 0 and not torch.equal(places, torch.arange(len(places)) // (len(places) // 10))
    assert torch.equal(TF.interpolate(x, scale_factor=factor), expected)
    whole = TF.interpolate(x, scale_factor=factor, recompute_scale_factor=True)
    assert torch.equal(whole, torch.nn.functional.interpolate(x, size=len(places)))
