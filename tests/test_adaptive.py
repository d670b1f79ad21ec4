"""Adaptive pooling: means and maxima over bins and their gradients, against torch in fp64."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from matrix import TEST_ALL, cover, rotate
from reference import assert_close
from tritonconv.kernels import adaptive_pool as forward_kernels
from tritonconv.kernels import adaptive_pool_backward as backward_kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import AdaptiveGeometry
from tritonconv.ops.adaptive import launch as launches_of
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last
from tritonconv.tuning import device_named

F = torch.nn.functional
OPS = torch.ops.tritonconv
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KERNELS = ["adaptive_forward_kernel", "adaptive_backward_kernel"]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    output: Any

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("ragged", (1, 24, 5, 11), (3, 4)),
    Case("windows", (1, 24, 4, 12), (2, 3)),
    Case("odd everything", (2, 17, 5, 7), (2, 3)),
    # Each element has a result of its own, and some have two.
    Case("more results than elements", (1, 5, 3, 4), (5, 7)),
    Case("an axis left alone", (1, 5, 4, 6), (None, 4)),
    Case("as many results as elements", (1, 5, 4, 3), (4, 3)),
    Case("global along one axis", (1, 9, 4, 7), (1, 3)),
    # Dense in both formats at once.
    Case("one channel", (2, 1, 4, 7), 3),
    Case("one pixel", (2, 6, 1, 1), 2),
    Case("1-d", (3, 6, 23), 5),
    Case("3-d", (1, 6, 3, 3, 5), (2, 2, 3)),
    Case("unbatched", (6, 5, 7), (2, 3)),
]


def dimensions(case: Case) -> int:
    return len(case.shape) - (1 if case.name.startswith("unbatched") else 2)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str, ties: bool) -> torch.Tensor:
    # Few values, so that many are equal.
    x = torch.randint(-3, 4, shape, device=device).to(dtype) if ties else torch.randn(shape, device=device).to(dtype)
    return as_format(x, channels_last) if len(shape) > 2 else x


def run(module: Any, kind: str, x: torch.Tensor, output: Any, nd: int, dy: torch.Tensor | None) -> list[torch.Tensor]:
    """[y, dx, places] of one call; dx is missing where dy is."""
    x = x.detach().requires_grad_(dy is not None)
    function = getattr(module, f"adaptive_{kind}_pool{nd}d")
    y, *places = function(x, output, return_indices=True) if kind == "max" else (function(x, output),)
    gradient = [] if dy is None else torch.autograd.grad(y, x, dy.to(y.dtype))
    return [y.detach(), *gradient, *places]


def compared(kind: str, x: torch.Tensor, output: Any, nd: int, what: object) -> list[torch.Tensor]:
    """Ours with gradients, each checked against torch's in fp64; without gradients the results are the same."""
    dy = torch.randn(run(F, kind, x.double(), output, nd, None)[0].shape, device=x.device).to(x.dtype)
    ours, reference = run(TF, kind, x, output, nd, dy), run(F, kind, x.double(), output, nd, dy)
    for name, out, ref in zip(("y", "dx"), ours, reference, strict=False):
        assert out.dtype == x.dtype
        assert_close(out, ref, depth=16, what=f"{kind}, {what}, {name}")
    if kind == "max":
        assert torch.equal(ours[2], reference[2]), what
        assert ours[2].dtype == torch.int64
    with torch.no_grad():
        alone = getattr(TF, f"adaptive_{kind}_pool{nd}d")(x, output)
    assert torch.equal(alone, ours[0])
    return ours


@rotate(case=CASES, channels_last=[False, True], kind=["avg", "max"])
def test_results_and_gradients_match_fp64(kind: str, case: Case, channels_last: bool, device: str) -> None:
    nd = dimensions(case)
    x = inputs(case.shape, torch.float32, channels_last and len(case.shape) == nd + 2, device, kind == "max")
    y, dx, *_ = compared(kind, x, case.output, nd, case)
    if len(case.shape) == nd + 2:
        assert is_dense(y, suggests_channels_last(x)) and dx.stride() == x.stride()


@rotate(dtype=DTYPES[1:], channels_last=[False, True])
def test_the_other_dtypes(channels_last: bool, dtype: torch.dtype, device: str) -> None:
    for kind in ("avg", "max"):
        compared(kind, inputs((1, 24, 4, 7), dtype, channels_last, device, kind == "max"), (3, 4), 2, dtype)


@rotate(config=cover(forward_kernels.configs()), channels_last=[False, True])
def test_every_forward_config(config: object, channels_last: bool, device: str) -> None:
    # Tiles of results, of lanes and of channels end inside the sizes and beyond them.
    for kind, shape, output in (("avg", (1, 70, 4, 37), (2, 5)), ("max", (1, 20, 3, 32), (1, 18))):
        x = inputs(shape, torch.float32, channels_last, device, kind == "max")
        with forced(config=config), torch.no_grad():
            ours = run(TF, kind, x, output, 2, None)
        for out, ref in zip(ours, run(F, kind, x.double(), output, 2, None), strict=True):
            assert_close(out.double(), ref.double(), what=config) if kind == "max" else assert_close(out, ref, depth=16)


@rotate(config=cover(backward_kernels.configs()), channels_last=[False, True])
def test_every_backward_config(config: object, channels_last: bool, device: str) -> None:
    for kind in ("avg", "max"):
        with forced(config=config):
            compared(kind, inputs((1, 20, 4, 19), torch.float32, channels_last, device, True), (3, 4), 2, config)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_tiles_and_rows_as_a_gpu_would_have_them(channels_last: bool, device: str) -> None:
    with forced(device=device_named("H200")):
        for kind in ("avg", "max"):
            compared(kind, inputs((1, 24, 9, 7), torch.float32, channels_last, device, True), (2, 3), 2, "H200")


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_nan_and_infinity_are_torchs(channels_last: bool, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    for value in (nan, inf, -inf):
        x = inputs((2, 5, 6, 7), torch.float32, channels_last, device, True)
        x[0, 1], x[1, 2, 2:4, 3], x[1, 3, 5, 6] = value, value, value
        for kind in ("avg", "max"):
            dy = torch.randn(2, 5, 3, 2, device=device)
            ours, theirs = run(TF, kind, x, (3, 2), 2, dy), run(F, kind, x, (3, 2), 2, dy)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    dy[0, 2, 1, 1] = nan
    torch.testing.assert_close(run(TF, "avg", x, (3, 2), 2, dy)[1], run(F, "avg", x, (3, 2), 2, dy)[1], equal_nan=True)


def test_two_runs_are_bit_equal(device: str) -> None:
    x = inputs((1, 20, 6, 9), torch.bfloat16, True, device, False)
    dy = torch.randn(1, 20, 4, 5, device=device)
    for kind in ("avg", "max"):
        first, second = (run(TF, kind, x, (4, 5), 2, dy) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_64_bit_offsets_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels_last in (False, True):
        x = inputs((2, 10, 3, 7), torch.float32, channels_last, device, True)
        dy = torch.randn(2, 10, 2, 3, device=device)
        for kind in ("avg", "max"):
            narrow = run(TF, kind, x, (2, 3), 2, dy)
            with monkeypatch.context() as patch:
                patch.setattr(launches_of, "needs_int64", lambda _elements: True)
                assert all(map(torch.equal, narrow, run(TF, kind, x, (2, 3), 2, dy)))


def test_views_are_read_in_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(2, 24, 9, 8, device=device)
    last = as_format(whole, True)
    views = [last[:, 8:16], last[:, :, 1:7, ::2], whole[:, 3:7], whole[:, :, 2:, 1:6], whole[:1].expand(3, -1, -1, -1)]
    with monkeypatch.context() as patch:
        patch.setattr(launches_of, "as_format", lambda *_: pytest.fail("a copy"))
        found = [getattr(TF, f"adaptive_{kind}_pool2d")(x, (4, 3)) for x in views for kind in ("avg", "max")]
    expected = [getattr(F, f"adaptive_{kind}_pool2d")(x, (4, 3)) for x in views for kind in ("avg", "max")]
    torch.testing.assert_close(found, expected)
    assert all(suggests_channels_last(y) for y in found[:4]) and all(y.is_contiguous() for y in found[4:])


def test_inputs_of_any_strides(device: str) -> None:
    odd = [
        torch.randn(1, 6, 5, 5, device=device)[:, :, :, ::2], torch.randn(3, 5, 6, 1, device=device).permute(3, 1, 2, 0),
        torch.randn(1, 6, 1, 1, device=device).expand(2, 6, 3, 4),
        torch.randn(4, 6, 1, 3, device=device).permute(2, 3, 1, 0),
    ]  # fmt: skip
    for x in odd:
        for kind in ("avg", "max"):
            compared(kind, x, (3, 2), 2, x.stride())
    # Gradients too.
    x = torch.randn(2, 3, 5, 4, device=device, requires_grad=True)
    TF.adaptive_avg_pool2d(x, 2).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(24.0, device=device))


def test_sizes_may_be_numpys(device: str) -> None:
    x = torch.randn(1, 2, 4, 4, device=device)
    assert TF.adaptive_avg_pool2d(x, (np.int64(2), np.int32(3))).shape == (1, 2, 2, 3)


def test_a_seeded_fuzz(device: str) -> None:
    draw = random.Random(7)
    for _ in range(10 if TEST_ALL else 4):
        nd, channels_last, dtype = draw.choice((1, 2, 2, 3)), draw.random() < 0.5, draw.choice(DTYPES)
        shape = (draw.choice((1, 2)), draw.choice((1, 3, 8, 19)), *(draw.randint(1, 7) for _ in range(nd)))
        output = tuple(draw.randint(1, 5) for _ in range(nd))
        kind, rank = draw.choice(("avg", "max")), draw.choice((0, 1))
        x = inputs(shape, dtype, channels_last, device, kind == "max")
        compared(kind, x[0] if rank and not channels_last else x, output, nd, (shape, output, dtype, channels_last))


def test_the_geometry_is_the_definition() -> None:
    for size in range(1, 14):
        for count in range(1, 14):
            g = AdaptiveGeometry.parse((1, 1, size), count, 1)
            bins = [g.bin(2, i) for i in range(count)]
            covering = [sum(first <= i < end for first, end in bins) for i in range(size)]
            assert g.longest(2) == max(end - first for first, end in bins)
            assert g.most_bins(2) == max(covering) and min(covering) >= 1
            assert g.even(2) == (len(set(covering)) == 1 and covering[0] == 1 and size % count == 0)


X = (2, 4, 5, 6)
BAD_CALLS: list[tuple[str, Any]] = [
    ("no tensor", lambda F: F.adaptive_avg_pool2d(None, 2)),
    ("no tensor, maximum", lambda F: F.adaptive_max_pool2d("x", 2)),
    ("too few axes", lambda F: F.adaptive_avg_pool2d(torch.zeros(5, 6), 2)),
    ("too many axes", lambda F: F.adaptive_max_pool2d(torch.zeros(1, *X), 2)),
    ("too many sizes", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), (2, 2, 2))),
    ("too few sizes", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), (2,))),
    ("a negative size", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), -1)),
    ("a negative size, maximum", lambda F: F.adaptive_max_pool2d(torch.zeros(X), -1)),
    ("a float", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), 2.0)),
    ("numpy's integer", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), np.int64(2))),
    ("a bool", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), True)),
    ("no size", lambda F: F.adaptive_avg_pool2d(torch.zeros(X), None)),
    ("no size in 1-d", lambda F: F.adaptive_avg_pool1d(torch.zeros(2, 4, 5), (None,))),
    ("no pixels", lambda F: F.adaptive_avg_pool2d(torch.zeros(2, 4, 5, 0), 2)),
    ("no pixels, maximum", lambda F: F.adaptive_max_pool2d(torch.zeros(2, 4, 0, 5), 2)),
    ("integers", lambda F: F.adaptive_avg_pool2d(torch.zeros(X).int(), 2)),
    ("integers, maximum", lambda F: F.adaptive_max_pool2d(torch.zeros(X).long(), 2)),
    ("3-d of 3 axes", lambda F: F.adaptive_max_pool3d(torch.zeros(2, 3, 4), 2)),
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
    with pytest.raises(RuntimeError, match=r"got input \[2, 4, 5, 6\] and output_size \[2\]"):
        OPS.adaptive_avg_pool(x, [2])
    with pytest.raises(RuntimeError, match=r"output_size \[0, 2\]"):
        OPS.adaptive_max_pool(x, [0, 2], True)


@pytest.mark.parametrize(("shape", "output"), [((0, 4, 3, 3), 2), ((2, 4, 3, 3), 0)], ids=str)
def test_nothing_to_compute_is_torchs(shape: tuple[int, ...], output: int, device: str) -> None:
    x = torch.zeros(shape, device=device)
    for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        torch.testing.assert_close(getattr(TF, name)(x, output), getattr(F, name)(x, output))


def test_gradcheck(device: str) -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    for function in (TF.adaptive_avg_pool2d, TF.adaptive_max_pool2d):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, (2, 3)), x, fast_mode=True)


def test_operators_are_clean(device: str) -> None:
    x = as_format(torch.randn(2, 4, 5, 3, device=device), True).requires_grad_()
    torch.library.opcheck(OPS.adaptive_avg_pool, (x, [2, 2]))
    torch.library.opcheck(OPS.adaptive_max_pool, (x, [2, 2], False))
    dy, index = torch.randn(2, 4, 2, 2, device=device), torch.zeros(2, 4, 2, 2, device=device, dtype=torch.int64)
    torch.library.opcheck(OPS.adaptive_avg_pool_backward, (dy, x.shape, True))
    torch.library.opcheck(OPS.adaptive_max_pool_backward, (dy, index, x.shape, False))


def test_compiled_pools_run_on_our_kernels(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return TF.adaptive_avg_pool2d(x, (2, None)).sum() + TF.adaptive_max_pool2d(x, 3).square().sum()

    x = torch.randn(2, 4, 7, 5, device=device, requires_grad=True)
    with record_launches() as launches:
        torch.compile(function, fullgraph=True, backend="aot_eager")(x).backward()
    assert sorted(launches) == sorted(KERNELS * 2)
    compiled, x.grad = x.grad, None
    function(x).backward()
    torch.testing.assert_close(compiled, x.grad)


def test_transforms_run_on_torch_or_say_so(device: str) -> None:
    x = torch.randn(3, 2, 4, 5, 5, device=device)
    with pytest.raises(RuntimeError, match=r"torch.func transform"):
        torch.vmap(lambda t: TF.adaptive_avg_pool2d(t, 2))(x)
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match="runs on torch"):
        y = torch.vmap(lambda t: TF.adaptive_avg_pool2d(t, 2))(x)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x.flatten(0, 1), 2).unflatten(0, (3, 2)))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        TF.adaptive_avg_pool2d(torch.autograd.forward_ad.make_dual(x[0], x[1]), 2)


def test_which_kernels_run(device: str) -> None:
    x = torch.randn(2, 4, 7, 5, device=device, requires_grad=True)
    for function in (TF.adaptive_avg_pool2d, TF.adaptive_max_pool2d):
        with record_launches() as launches:
            function(x, 3).sum().backward()
        assert launches == KERNELS
    with tritonconv.set_backend("torch"), record_launches() as launches:
        TF.adaptive_max_pool2d(x, 3)
    assert not launches


def test_a_mean_saves_nothing_and_a_maximum_its_places(device: str) -> None:
    def saved(function: Any) -> int:
        seen: list[torch.Tensor] = []
        x = torch.randn(2, 8, 9, 9, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            function(x, 3)
        return sum(t.numel() * t.element_size() for t in seen)

    assert saved(TF.adaptive_avg_pool2d) == 0 and saved(TF.adaptive_max_pool2d) == 2 * 8 * 9 * 4


def test_autocast_is_torchs(device: str) -> None:
    for nd in (2, 3):
        x = torch.randn(1, 2, *(4,) * nd, device=device).bfloat16()
        for kind in ("avg", "max"):
            with torch.autocast(device, torch.bfloat16):
                ours, theirs = (getattr(m, f"adaptive_{kind}_pool{nd}d")(x, 3) for m in (TF, F))
            assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("name", [f"Adaptive{kind}Pool{nd}d" for kind in ("Avg", "Max") for nd in (1, 2, 3)])
def test_modules_are_torchs_twins(name: str, device: str) -> None:
    nd = int(name[-2])
    arguments = (3, True) if "Max" in name else (3,)
    ours, theirs = (getattr(n, name)(*arguments) for n in (tritonconv.nn, torch.nn))
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    x = torch.randn(2, 3, *(5,) * nd, device=device)
    with record_launches() as launches:
        torch.testing.assert_close(ours(x), theirs(x))
    assert launches == KERNELS[:1]
    ours.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        ours(x)
    assert not launches


def test_with_indices_is_torchs(device: str) -> None:
    for nd in (1, 2, 3):
        x, name = torch.randn(1, 3, *(5,) * nd, device=device), f"adaptive_max_pool{nd}d_with_indices"
        torch.testing.assert_close(getattr(TF, name)(x, 2), getattr(F, name)(x, 2))


def test_explain_sees_the_layer_and_runs_nothing(device: str) -> None:
    layer = tritonconv.nn.AdaptiveAvgPool2d(2)
    with record_launches() as launches:
        row = tritonconv.explain(layer, torch.randn(2, 4, 5, 5, device=device)).to_dict()["layers"][0]
    assert not launches and row["backend"] == "triton" and "adaptive" in row["reason"] and row["copies"] == 0
