"""Global pooling: means, sums and maxima over whole images and their gradients, against torch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import cover, rotate
from reference import assert_close
from tritonconv.kernels import global_pool as kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import AdaptiveGeometry
from tritonconv.ops.adaptive import launch as launches_of
from tritonconv.ops.adaptive.operator import global_average
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last
from tritonconv.tuning import device_named
from tritonconv.tuning.rules.adaptive_pooling import global_pool_config

F = torch.nn.functional
OPS = torch.ops.tritonconv
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    (2, 24, 7, 7),
    (2, 130, 9, 8),
    (3, 17, 5, 3),
    (3, 1, 6, 5),
    (5, 20, 1, 1),
    (1, 5, 7, 1),
    (3, 6, 23),
    (2, 5, 3, 4, 5),
]
H200 = device_named("H200")


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> torch.Tensor:
    return as_format(torch.randint(-9, 10, shape, device=device).to(dtype), channels_last)


def run(module: Any, kind: str, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """[y, dx, places]"""
    x = x.detach().requires_grad_()
    function = getattr(module, f"adaptive_{kind}_pool{x.dim() - 2}d")
    y, *places = function(x, 1, return_indices=True) if kind == "max" else (function(x, 1),)
    return [y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype)), *places]


def compared(kind: str, x: torch.Tensor, what: object) -> list[torch.Tensor]:
    dy = torch.randn((*x.shape[:2], *(1,) * (x.dim() - 2)), device=x.device).to(x.dtype)
    ours, reference = run(TF, kind, x, dy), run(F, kind, x.double(), dy)
    for name, out, ref in zip(("y", "dx"), ours, reference, strict=False):
        assert_close(out, ref, depth=x[0, 0].numel(), what=f"{kind}, {what}, {name}")
    assert kind == "avg" or torch.equal(ours[2], reference[2]), what
    return ours


@rotate(shape=SHAPES, channels_last=[False, True], kind=["avg", "max"])
def test_results_and_gradients_match_fp64(kind: str, shape: tuple[int, ...], channels_last: bool, device: str) -> None:
    x = inputs(shape, torch.float32, channels_last, device)
    y, dx, *_ = compared(kind, x, shape)
    assert is_dense(y, suggests_channels_last(x)) and dx.stride() == x.stride()


@rotate(dtype=DTYPES[1:], channels_last=[False, True])
def test_the_other_dtypes(channels_last: bool, dtype: torch.dtype, device: str) -> None:
    for kind in ("avg", "max"):
        compared(kind, inputs((2, 24, 7, 7), dtype, channels_last, device), dtype)


# Blocks of both sides inside the sizes and beyond them; one slot, and on a GPU several with several blocks in each.
@rotate(config=cover(kernels.configs()), channels_last=[False, True])
def test_every_candidate_config(config: object, channels_last: bool, device: str) -> None:
    for kind in ("avg", "max"):
        with forced(config=config):
            compared(kind, inputs((1, 20, 9, 33), torch.float32, channels_last, device), config)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_as_many_slots_as_a_gpu_would_have(channels_last: bool, device: str) -> None:
    x = inputs((1, 6, 63, 65), torch.float32, channels_last, device)
    with forced(device=H200), record_launches() as launches:
        for kind in ("avg", "max"):
            compared(kind, x, "H200")
    assert launches.count("global_join_kernel") == 2


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 3, 3), (1, 3, 8), (3, 5, 9), (1, 7, 300)], ids=str)
def test_gradients_are_written_across_the_ends_of_planes(shape: tuple[int, ...], device: str) -> None:
    # Vectors that lie in two planes, planes shorter than a vector, and a last vector that is not whole.
    with forced(device=H200):
        for kind in ("avg", "max"):
            compared(kind, inputs(shape, torch.float32, False, device), shape)


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_nan_and_infinity_are_torchs(channels_last: bool, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = inputs((1, 6, 33, 34), torch.float32, channels_last, device)
    x[0, 0, 3, 4] = x[0, 0, 30, 2] = x[0, 0, 31, 1] = nan
    x[0, 1], x[0, 2], x[0, 3, 4, 4], x[0, 4, 1, 1] = -inf, nan, inf, -inf
    dy = torch.randn(1, 6, 1, 1, device=device)
    dy[0, 5] = nan
    for kind in ("avg", "max"):
        theirs = run(F, kind, x, dy)
        for device_like in (None, H200):
            with forced(device=device_like):
                torch.testing.assert_close(run(TF, kind, x, dy), theirs, equal_nan=True)


@pytest.mark.parametrize("name", ["H200", "MI300X"])
def test_the_rule_covers_a_side_with_little_waste(name: str) -> None:
    for channels, pixels in ((64, 12544), (256, 3136), (2048, 49), (96, 196), (8, 50176), (24, 784), (130, 64)):
        for channels_last in (False, True):
            for walks in (False, True):
                config = global_pool_config(channels, pixels, channels_last, device_named(name), walks)
                side, block = (channels, "BLOCK_C") if channels_last else (pixels, "BLOCK_P")
                length = config.kwargs[block]
                assert -(-side // length) * length <= max(1.35 * side, 64) and (config.num_stages > 1) == walks
                # A vector of 16 bits.
                assert length >= 8


@rotate(channels_last=[False, True], keepdim=[False, True])
def test_global_average_is_torchs_mean(keepdim: bool, channels_last: bool, device: str) -> None:
    for shape in ((2, 9, 5, 6), (2, 9, 7), (1, 4, 3, 2, 5)):
        x = as_format(torch.randn(shape, device=device), channels_last).requires_grad_()
        wide = x.detach().double().requires_grad_()
        axes = tuple(range(2, len(shape)))
        y, reference = global_average(x, keepdim), wide.mean(axes, keepdim)
        assert_close(y, reference, depth=35)
        with torch.no_grad():
            assert torch.equal(global_average(x, keepdim), y)
        dy = torch.randn_like(reference)
        (dx,), (expected,) = torch.autograd.grad(y, x, dy.to(y.dtype)), torch.autograd.grad(reference, wide, dy)
        assert_close(dx, expected)
        assert dx.stride() == x.stride()
        with tritonconv.set_backend("auto"):
            assert torch.equal(global_average(x, keepdim, "torch"), x.mean(axes, keepdim))


def test_global_average_of_what_no_kernel_takes_is_torchs(device: str) -> None:
    x = torch.zeros(0, 3, 4, 4, device=device)
    assert global_average(x, True).shape == (0, 3, 1, 1)
    with pytest.raises(RuntimeError, match=r"3 to 5 axes, but got size \[2, 3\]"):
        global_average(torch.zeros(2, 3, device=device), True)


def test_sums_are_wide(device: str) -> None:
    x = torch.full((1, 3, 64, 64), 100.0, dtype=torch.float16, device=device)
    # The sum is 409600, beyond what fp16 can hold.
    assert (global_average(x, False) == 100.0).all()


def test_views_are_read_in_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(2, 24, 9, 8, device=device)
    last = as_format(whole, True)
    # Of rows that do not follow each other the other kernel takes the mean.
    views = [
        last[:, 8:16],
        whole[:, 3:7],
        whole[1:],
        last[:, :, :, 1:5],
        whole[:, :, :, :6],
        whole[:1].expand(3, -1, -1, -1),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(launches_of, "as_format", lambda *_: pytest.fail("a copy"))
        with record_launches() as launches:
            found = [getattr(TF, f"adaptive_{kind}_pool2d")(x, 1) for x in views for kind in ("avg", "max")]
    torch.testing.assert_close(
        found, [getattr(F, f"adaptive_{kind}_pool2d")(x, 1) for x in views for kind in ("avg", "max")]
    )
    assert launches == ["global_reduce_kernel"] * 6 + ["adaptive_forward_kernel"] * 4 + ["global_reduce_kernel"] * 2


def test_two_runs_are_bit_equal(device: str) -> None:
    x, dy = torch.randn(1, 20, 40, 41, device=device).bfloat16(), torch.randn(1, 20, 1, 1, device=device)
    with forced(device=H200):
        for kind in ("avg", "max"):
            assert all(map(torch.equal, run(TF, kind, x, dy), run(TF, kind, x, dy)))


def test_64_bit_offsets_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels_last in (False, True):
        x, dy = inputs((2, 10, 6, 7), torch.float32, channels_last, device), torch.randn(2, 10, 1, 1, device=device)
        for kind in ("avg", "max"):
            narrow = run(TF, kind, x, dy)
            with monkeypatch.context() as patch:
                patch.setattr(launches_of, "needs_int64", lambda _elements: True)
                assert all(map(torch.equal, narrow, run(TF, kind, x, dy)))


def test_large_tensors_have_64_bit_offsets() -> None:
    g = AdaptiveGeometry.parse((64, 64, 1024, 1024), 1, 2)
    assert launches_of.needs_int64(g.elements) and not launches_of.needs_int64(g.elements // 2 - 1)
    assert AdaptiveGeometry.parse((1, 1, 2**16, 2**15), 1, 2).limit and g.limit is None


def test_gradients_of_any_strides(device: str) -> None:
    x = torch.randn(2, 6, 4, 5, device=device, requires_grad=True)
    # An expanded gradient.
    TF.adaptive_avg_pool2d(x, 1).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 20))
    (dx,) = torch.autograd.grad(TF.adaptive_max_pool2d(x, 1), x, torch.randn(6, 2, 1, 1, device=device).transpose(0, 1))
    assert (dx != 0).sum() == 12


def test_gradcheck(device: str) -> None:
    for shape in ((2, 3, 4), (1, 3, 2, 4)):
        x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for kind in ("avg", "max"):
            function = getattr(TF, f"adaptive_{kind}_pool{len(shape) - 2}d")
            assert torch.autograd.gradcheck(lambda t, f=function: f(t, 1), x, fast_mode=True)


def test_operators_are_clean(device: str) -> None:
    x = as_format(torch.randn(2, 4, 5, 3, device=device), True).requires_grad_()
    for keepdim in (False, True):
        torch.library.opcheck(OPS.global_average, (x, keepdim))
    torch.library.opcheck(OPS.adaptive_max_pool, (x, [1, 1], True))


def test_compiled_means_run_on_our_kernels(device: str) -> None:
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return TF.adaptive_avg_pool2d(x, 1).flatten(1) + global_average(x, False)

    with record_launches() as launches:
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
    assert set(launches) == {"global_reduce_kernel", "global_spread_flat_kernel"}
    torch.testing.assert_close(y, 2 * x.mean((2, 3)))
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 / 25))


def test_which_kernels_run(device: str) -> None:
    for channels_last, spread in ((False, "global_spread_flat_kernel"), (True, "global_spread_kernel")):
        x = inputs((2, 4, 7, 5), torch.float32, channels_last, device)
        for kind in ("avg", "max"):
            with record_launches() as launches:
                run(TF, kind, x, torch.ones(2, 4, 1, 1, device=device))
            assert launches == ["global_reduce_kernel", spread]


def test_a_module_in_a_network(device: str) -> None:
    head = torch.nn.Sequential(tritonconv.nn.AdaptiveAvgPool2d((1, 1)), torch.nn.Flatten(), torch.nn.Linear(5, 3)).to(
        device
    )
    x = torch.randn(2, 5, 6, 6, device=device)
    torch.testing.assert_close(head(x), head[2](x.mean((2, 3))))
    with record_launches() as launches:
        row = tritonconv.explain(head[0], x).to_dict()["layers"][0]
    assert not launches and row["backend"] == "triton" and "global_reduce" in row["reason"]


@rotate(shape=[(1, 4, 3, 1), (2, 8, 5, 1), (1, 4, 3, 1, 1), (2, 4, 1, 3, 1)], wider=[1, 3])
def test_images_of_single_columns(shape: tuple[int, ...], wider: int, device: str) -> None:
    """Pixels that do not lie side by side, in rows that have one each."""
    x = torch.randn(*shape[:-1], wider, device=device)[..., :1]
    for t in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        axes = tuple(range(2, x.dim()))
        assert_close(global_average(t, True), t.double().mean(axes, keepdim=True), depth=5)
        y, places = getattr(TF, f"adaptive_max_pool{x.dim() - 2}d_with_indices")(t, 1)
        assert torch.equal(y.flatten(), t.amax(axes).flatten())
        assert torch.equal(t.flatten(2).gather(2, places.flatten(2)), y.flatten(2))
