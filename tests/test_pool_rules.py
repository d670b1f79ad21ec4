"""Pooling's rules: operators, autograd, torch.compile, transforms, modules and errors, as torch has them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.launch import record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.ops.core.observe import observe

F = torch.nn.functional
OPS = torch.ops.tritonconv
FORWARD, BACKWARD = "pool_kernel", "pool_backward_kernel"


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def test_geometry_says_all() -> None:
    g = PoolGeometry.parse((2, 3, 9, 8), (3, 2), None, (1, 0), 1, True, nd=2, name="avg_pool")
    assert (g.input, g.kernel, g.stride, g.padding) == ((1, 9, 8), (1, 3, 2), (1, 3, 2), (0, 1, 0))
    assert g.output_shape == (2, 3, 4, 4) and g.overhangs and g.taps == 6
    assert g.bytes(2, 1) == 2 * (432 + 96) + 96 and not g.needs_int64
    assert str(g) == "avg_pool2d 2x3x9x8 -> 2x3x4x4, window 3x2, stride 3x2, padding 1x0, dilation 1x1, ceil mode"
    assert PoolGeometry.parse((64, 64, 1024, 1024), 2, nd=2).needs_int64
    # The last window must begin inside the image or before it.
    assert PoolGeometry.parse((1, 1, 3), 1, 3, ceil_mode=True, nd=1).output_shape == (1, 1, 1)


def test_gradcheck(device: str) -> None:
    x = torch.randperm(96, device=device).double().view(1, 3, 4, 8)
    x = as_format(x, True).requires_grad_()
    for function in (
        lambda x: TF.max_pool2d(x, 3, 2, 1),
        lambda x: TF.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: TF.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x: TF.lp_pool2d(x + 0.5, 2, 2),
    ):
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: TF.avg_pool2d(x, 3, 2, 1), (x,), fast_mode=True)


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_a_second_derivative_is_torchs(name: str, device: str) -> None:
    x = as_format(torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device), True).requires_grad_()
    found = []
    for module in (TF, F):
        y = getattr(module, name)(x, 3, 2, 1)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append([y, dx, *torch.autograd.grad(dx.square().sum(), x)])
    torch.testing.assert_close(*found)


def test_a_power_sums_second_derivative_is_torchs(device: str) -> None:
    x = torch.rand(2, 3, 4, 6, dtype=torch.float64, device=device).add(0.25).requires_grad_()
    found = []
    for module in (TF, F):
        (dx,) = torch.autograd.grad(module.lp_pool2d(x, 3.0, 2).square().sum(), x, create_graph=True)
        found.append([dx, *torch.autograd.grad(dx.square().sum(), x)])
    torch.testing.assert_close(*found)


def test_operators_are_clean(device: str) -> None:
    x = as_format(torch.randn(1, 3, 4, 5, device=device), True).requires_grad_()
    numbers = ([3, 2], [2], [1, 0], [1], False)
    plain: dict[str, Any] = dict(power=2.0, divisor=None, include_pad=True, activation="", a=0.0, b=0.0)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for kind, indices in (("max", "tap"), ("max", "flat"), ("min", ""), ("avg", ""), ("lp", "")):
        torch.library.opcheck(OPS.pool, (x, *numbers), dict(kind=kind, indices=indices, **plain), test_utils=tests)
    with torch.no_grad():
        y, found = OPS.pool(x, *numbers, kind="max", indices="tap", **plain)
    more: dict[str, Any] = dict(kind="max", power=1.0, divisor=None, include_pad=True, channels_last=True)
    assert found.dtype == torch.uint8
    torch.library.opcheck(OPS.pool_backward, (y, found, None, None, [1, 3, 4, 5], *numbers), more, test_utils=tests)
    # A maximum without indices computes them for its gradient.
    y, _ = OPS.pool(x, *numbers, kind="max", indices="", **plain)
    leaf = x.detach().clone().requires_grad_()
    expected = torch.autograd.grad(F.max_pool2d(leaf, (3, 2), 2, (1, 0)).sum(), leaf)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)
    with pytest.raises(RuntimeError, match=r"expected a gradient of size \[1, 3, 2, 2\]"):
        OPS.pool_backward(x, found, None, None, [1, 3, 4, 5], *numbers, **more)
    with pytest.raises(NotImplementedError, match="activation"):
        OPS.pool(x, *numbers, kind="avg", indices="", **plain | dict(activation="relu"))[0].sum().backward()


def test_compiled_models_run_on_our_kernels(device: str) -> None:
    nn = tritonconv.nn
    model = torch.nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), nn.LPPool2d(2, 2, 1), nn.MinPool2d(2, 1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.rand(1, 4, 9, 8, device=device, requires_grad=True)
    with record_launches() as launches:
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert launches == [FORWARD] * 4 + [BACKWARD] * 4
    torch.testing.assert_close((y, dx), (model(x), torch.autograd.grad(model(x).sum(), x)[0]))
    pair = torch.compile(lambda x: TF.max_pool1d(x, 2, return_indices=True), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), record_launches() as launches:
        torch.testing.assert_close(pair(x[0]), F.max_pool1d(x[0], 2, return_indices=True))
        # Unbatched, then another size.
        torch.testing.assert_close(pair(x[0, :, :, :6]), F.max_pool1d(x[0, :, :, :6], 2, return_indices=True))
    assert launches == [FORWARD] * 2


@pytest.mark.filterwarnings("ignore:tritonconv", "ignore:.*vmap")
def test_transforms_run_on_torch_or_raise(device: str) -> None:
    x = torch.randn(2, 3, 2, 4, 4, device=device)
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.vmap(lambda x: TF.max_pool2d(x, 2))(x)
    with tritonconv.set_backend("auto"), record_launches() as launches:
        assert torch.equal(
            torch.vmap(lambda x: TF.max_pool2d(x, 2))(x), F.max_pool2d(x.flatten(0, 1), 2).view(2, 3, 2, 2, 2)
        )
        torch.func.jvp(lambda x: TF.avg_pool2d(x, 2), (x[0],), (x[1],))
    assert not launches


@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_unbatched_and_empty_inputs(name: str, nd: int, device: str) -> None:
    x = torch.randn(2, 3, *(4,) * nd, device=device)
    ours, theirs = (getattr(module, f"{name}{nd}d") for module in (TF, F))
    with record_launches() as launches:
        torch.testing.assert_close(ours(x[0], 2), theirs(x[0], 2))
    assert launches == [FORWARD]
    for shape in ((0, 3, *(4,) * nd),):
        empty = torch.randn(shape, device=device, requires_grad=True)
        y = ours(empty, 2)
        y.sum().backward()
        assert y.shape == theirs(empty, 2).shape and empty.grad.shape == shape


def test_what_is_saved_is_a_byte_a_result(device: str) -> None:
    def saved(function: Any) -> int:
        seen: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            function(torch.randn(1, 8, 8, 8, device=device, requires_grad=True))
        return sum(t.numel() * t.element_size() for t in seen)

    assert saved(lambda x: TF.max_pool2d(x, 2)) == 128
    assert saved(lambda x: TF.max_pool2d(x, 2, return_indices=True)) == 8 * 128
    assert saved(lambda x: TF.avg_pool2d(x, 2)) == 0


OPTIONS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("MaxPool1d", (3, 2, 1), {}),
    ("MaxPool2d", (3,), dict(stride=2, padding=1, dilation=1, return_indices=True)),
    ("MaxPool2d", (2,), dict(ceil_mode=True)),
    ("MaxPool3d", ((1, 2, 2),), {}),
    ("AvgPool1d", (3, 1, 1), dict(count_include_pad=False)),
    ("AvgPool2d", (2,), dict(divisor_override=3)),
    ("AvgPool3d", (2, 2), dict(ceil_mode=True)),
    ("LPPool1d", (2, 2), {}),
    ("LPPool2d", (1, 2, 1), {}),
    ("LPPool3d", (4.0, 2), dict(ceil_mode=True)),
]


@pytest.mark.parametrize(("name", "arguments", "options"), OPTIONS, ids=str)
def test_modules_are_torchs_twins(name: str, arguments: Any, options: Any, device: str) -> None:
    ours, theirs = (getattr(module, name)(*arguments, **options) for module in (tritonconv.nn, torch.nn))
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    x = torch.rand(1, 3, *(5,) * int(name[-2]), device=device)
    with record_launches() as launches:
        torch.testing.assert_close(ours(x), theirs(x))
    assert launches == [FORWARD]
    ours.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        ours(x)
    assert not launches


def test_minimum_and_sum_are_modules_too(device: str) -> None:
    x = torch.randn(1, 3, 4, 6, device=device)
    torch.testing.assert_close(tritonconv.nn.MinPool2d(2)(x), -F.max_pool2d(-x, 2))
    torch.testing.assert_close(tritonconv.nn.SumPool2d(2)(x), F.avg_pool2d(x, 2, divisor_override=1))
    y, places = tritonconv.nn.MinPool2d(2, return_indices=True)(x)
    assert torch.equal(x.flatten(2).gather(2, places.flatten(2)).view_as(y), y)


X = torch.randn(2, 3, 6, 6)
BAD_CALLS: list[tuple[str, Any]] = [
    ("no tensor", lambda F: F.max_pool2d(None, 2)),
    ("window of zero", lambda F: F.max_pool2d(X, 0)),
    ("negative stride", lambda F: F.avg_pool2d(X, 2, -1)),
    ("stride of zero", lambda F: F.max_pool1d(X[0], 2, 0)),
    ("padding too large", lambda F: F.max_pool2d(X, 3, 1, 2)),
    ("mean's padding too large", lambda F: F.avg_pool2d(X, 3, 1, 2)),
    ("negative padding", lambda F: F.avg_pool3d(X, 2, 1, -1)),
    ("dilation of zero", lambda F: F.max_pool2d(X, 2, dilation=0)),
    ("window too large", lambda F: F.max_pool2d(X, 7)),
    ("1-d window too large", lambda F: F.max_pool1d(X[0], 7)),
    ("3-d window too large", lambda F: F.avg_pool3d(X, 4)),
    ("3-d mean over an image that is padded to a window", lambda F: F.avg_pool3d(X, 4, 1, 2)),
    ("rank", lambda F: F.max_pool2d(X[0, 0], 2)),
    ("rank of a mean", lambda F: F.avg_pool1d(X, 2)),
    ("no channels", lambda F: F.max_pool2d(X[:, :0], 2)),
    ("no pixels", lambda F: F.avg_pool2d(X[:, :, :0], 2)),
    ("three numbers for two", lambda F: F.max_pool2d(X, (2, 2, 2))),
    ("a float", lambda F: F.max_pool2d(X, 2.0)),
    ("a bool", lambda F: F.max_pool2d(X, True)),
    ("a string", lambda F: F.avg_pool2d(X, "2")),
    ("ceil_mode a number", lambda F: F.max_pool2d(X, 2, ceil_mode=1)),
    ("count_include_pad a number", lambda F: F.avg_pool2d(X, 2, count_include_pad=1)),
    ("divisor of zero", lambda F: F.avg_pool2d(X, 2, divisor_override=0)),
    ("divisor a float", lambda F: F.avg_pool2d(X, 2, divisor_override=2.5)),
    ("mean of integers", lambda F: F.avg_pool2d(X.int(), 2)),
    ("power of zero", lambda F: F.lp_pool2d(X, 0, 2)),
    ("one number of two", lambda F: F.lp_pool2d(X, 2, (2,))),
]


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BAD_CALLS])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.filterwarnings("ignore:tritonconv")
def test_bad_calls_raise_torchs_exception(call: Any, backend: Any) -> None:
    with pytest.raises(Exception) as theirs:
        call(F)
    kind: Any = type(theirs.value)
    if backend == "triton" and kind is NotImplementedError:
        kind = RuntimeError
    with tritonconv.set_backend(backend), record_launches() as launches, pytest.raises(kind) as ours:
        call(TF)
    # Ours goes by position where the caller has a name.
    said, expected = (re.sub(r" \(position \d\)", "", str(error.value)) for error in (ours, theirs))
    assert not launches and (said == expected or backend == "triton")


@pytest.mark.parametrize("shape", [(1, 2, 0), (2, 9), (1, 2, 3, 4)], ids=str)
def test_geometry_raises_for_what_torch_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="max_pool1d"):
        PoolGeometry.parse(shape, 2 if 0 in shape else 10, nd=1)


def test_what_no_kernel_supports_is_said(device: str) -> None:
    x = torch.rand(1, 2, 4, 4, device=device)
    for call, reason in (
        (lambda: TF.lp_pool2d(x, 18, 2), "norm_type=18 has no kernel"),
        (lambda: TF.lp_pool2d(x, -1, 2), "norm_type=-1 has no kernel"),
        (lambda: TF.max_pool2d(x.int(), 2), r"torch\.int32 has no kernel"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call()
        with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match=reason):
            call()


def test_autocast_leaves_the_dtype_as_torch_does(device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, 2, 4, 4, device=device, dtype=dtype)
            assert TF.max_pool2d(x, 2).dtype == TF.avg_pool2d(x, 2).dtype == dtype


def test_explain_sees_the_layer_and_runs_nothing(device: str) -> None:
    seen: list[Any] = []
    x = torch.randn(2, 4, 6, 6, device=device)
    with observe(seen.append), record_launches() as launches:
        tritonconv.nn.MaxPool2d(2)(x)
        TF.avg_pool2d(x[..., ::2], 2)
        with tritonconv.set_backend("torch"):
            TF.max_pool2d(x[0], 2)
    assert not launches
    assert [call.op for call in seen] == ["max_pool2d", "avg_pool2d", "max_pool2d"]
    assert [call.decision.backend for call in seen] == ["triton", "triton", "torch"]
    assert [call.decision.copies for call in seen] == [0, 1, 0] and seen[0].bytes == 4 * (288 + 72)
