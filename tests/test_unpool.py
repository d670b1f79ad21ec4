"""Max unpooling against torch: what a maximum's places lead back to, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import patched
from matrix import cover, rotate
from tritonconv.kernels import unpool as kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last
from tritonconv.ops.pool import launch as launches_of

F = torch.nn.functional
OPS = torch.ops.tritonconv
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def pooled(shape: tuple[int, ...], *window: Any, channels_last: bool = False, dtype: Any = torch.float32) -> Any:
    """(maxima, places) by torch."""
    x = as_format(torch.randn(shape).to(dtype), channels_last)
    return getattr(F, f"max_pool{len(shape) - 2}d")(x, *window, return_indices=True)


CASES: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
    ((2, 20, 6, 8), (2,)),
    ((2, 9, 7, 5), (3, 2)),
    ((3, 7, 9), (2, 2, 1)),
    ((2, 5, 4, 6, 4), (2,)),
    ((1, 3, 1, 1), (1,)),
]


@rotate({"shape, window": CASES}, channels_last=[False, True])
def test_values_and_gradients_are_torchs(shape: Any, window: Any, channels_last: bool, device: str) -> None:
    values, places = (t.to(device) for t in pooled(shape, *window, channels_last=channels_last))
    function = f"max_unpool{len(shape) - 2}d"
    size = shape[2:] if len(window) > 1 else None
    found = []
    for module in (TF, F):
        leaf = values.clone().requires_grad_()
        y = getattr(module, function)(leaf, places, *window, output_size=size)
        found.append(
            [y.detach(), torch.autograd.grad(y, leaf, torch.arange(float(y.numel()), device=device).view(y.shape))[0]]
        )
    assert all(map(torch.equal, *found))
    assert is_dense(found[0][0], suggests_channels_last(values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, device: str) -> None:
    values, places = (t.to(device) for t in pooled((2, 9, 6, 4), 2, dtype=dtype))
    y = TF.max_unpool2d(values, places, 2)
    assert y.dtype == dtype and torch.equal(y, F.max_unpool2d(values, places, 2))


@rotate(config=cover(kernels.configs()), channels_last=[False, True])
def test_every_candidate_config(config: Any, channels_last: bool, device: str) -> None:
    values, places = (t.to(device) for t in pooled((2, 70, 10, 8), 2, channels_last=channels_last))
    with forced(config=config):
        y = launches_of.unpool_forward(values, places, (10, 8))
        assert torch.equal(y, F.max_unpool2d(values, places, 2))
        assert torch.equal(launches_of.unpool_backward(y, places, channels_last), values)


def test_unbatched_strided_and_64_bit(device: str) -> None:
    values, places = (t.to(device) for t in pooled((4, 12, 6, 8), 2))
    expected = F.max_unpool2d(values, places, 2)
    assert torch.equal(TF.max_unpool2d(values[0], places[0], 2), expected[0])
    assert torch.equal(TF.max_unpool2d(values[::2, ::3], places[::2, ::3], 2), expected[::2, ::3])
    # Of maxima and of places alike.
    assert torch.equal(TF.max_unpool2d(values.contiguous(memory_format=torch.channels_last), places, 2), expected)
    with patched(launches_of, "INT32_MAX", -1, [launches_of._unpool]):
        assert torch.equal(TF.max_unpool2d(values, places, 2), expected)


def test_what_is_not_finite_is_moved_as_it_is(device: str) -> None:
    values, places = (t.to(device) for t in pooled((1, 3, 4, 4), 2))
    values[0, 0, 0, 0], values[0, 1, 1, 1] = float("nan"), -float("inf")
    torch.testing.assert_close(TF.max_unpool2d(values, places, 2), F.max_unpool2d(values, places, 2), equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_the_kernel_skips_places_outside(channels_last: bool, device: str) -> None:
    values = as_format(torch.ones(1, 8, 2, 2, device=device), channels_last)
    places = as_format(torch.tensor([-1, 0, 5, 6], device=device).view(1, 1, 2, 2).repeat(1, 8, 1, 1), channels_last)
    y = launches_of.unpool_forward(values, places, (2, 3))
    assert (y.flatten(2) == torch.tensor([1.0, 0, 0, 0, 0, 1], device=device)).all()
    dx = launches_of.unpool_backward(torch.ones_like(y), places, channels_last)
    assert (dx.flatten(2) == torch.tensor([0.0, 1, 1, 0], device=device)).all()


V, PLACES = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.int64)
BAD_CALLS: list[tuple[str, Any]] = [
    ("a place outside", lambda F: F.max_unpool2d(V, PLACES + 16, 2)),
    ("a negative place", lambda F: F.max_unpool2d(V, PLACES - 1, 2)),
    ("int32 places", lambda F: F.max_unpool2d(V, PLACES.int(), 2)),
    ("another size", lambda F: F.max_unpool2d(V, PLACES[..., :1], 2)),
    ("a size too large", lambda F: F.max_unpool2d(V, PLACES, 2, output_size=(6, 4))),
    ("a size too short", lambda F: F.max_unpool2d(V, PLACES, 2, output_size=(4,))),
    ("rank", lambda F: F.max_unpool3d(V[0, 0], PLACES[0, 0], 2)),
    ("no tensor", lambda F: F.max_unpool2d(V, None, 2)),
    ("a float", lambda F: F.max_unpool1d(V[0], PLACES[0], 2.5)),
    ("padding too large", lambda F: F.max_unpool2d(V, PLACES, 2, 1, 4)),
]


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BAD_CALLS])
@pytest.mark.filterwarnings("ignore:tritonconv")
def test_bad_calls_raise_torchs_exception(call: Any) -> None:
    with pytest.raises(Exception) as theirs:
        call(F)
    with record_launches() as launches, pytest.raises(type(theirs.value)) as ours:
        call(TF)
    assert str(ours.value) == str(theirs.value) and not launches


def test_gradcheck_opcheck_and_compile(device: str) -> None:
    values, places = (t.to(device) for t in pooled((1, 2, 4, 4), 2, dtype=torch.float64))
    leaf = values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TF.max_unpool2d(x, places, 2), (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: TF.max_unpool2d(x, places, 2), (leaf,), fast_mode=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.max_unpool, (leaf, places, [4, 4]), test_utils=tests)
    torch.library.opcheck(OPS.max_unpool_backward, (leaf.new_ones(1, 2, 4, 4), places, False), test_utils=tests)
    layer = torch.compile(tritonconv.nn.MaxUnpool2d(2), fullgraph=True, backend="aot_eager")
    with record_launches() as launches:
        y = layer(leaf, places)
        y.sum().backward()
    assert launches == ["unpool_kernel", "unpool_kernel"]
    assert torch.equal(y, F.max_unpool2d(values, places, 2)) and (leaf.grad == 1).all()


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_modules_are_torchs_twins(nd: int, device: str) -> None:
    ours, theirs = (getattr(module, f"MaxUnpool{nd}d")(2, 2) for module in (tritonconv.nn, torch.nn))
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    values, places = (t.to(device) for t in pooled((1, 3, *(5,) * nd), 2))
    size = (1, 3, *(5,) * nd)
    assert torch.equal(ours(values, places, output_size=size), theirs(values, places, output_size=size))
    ours.backend = "torch"
    with tritonconv.set_backend("auto"), record_launches() as launches:
        ours(values, places, output_size=size)
    assert not launches


def test_an_empty_batch_is_torchs(device: str) -> None:
    values, places = torch.randn(0, 3, 2, 2, device=device), torch.zeros(0, 3, 2, 2, dtype=torch.int64, device=device)
    assert TF.max_unpool2d(values, places, 2).shape == (0, 3, 4, 4)
