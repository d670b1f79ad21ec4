"""Pooling's numbers: maxima, minima, means, sums and power sums, forward and backward, against torch."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from calls import patched
from matrix import cover, every, named, rotate, some
from reference import assert_close
from tritonconv.kernels import pool as forward_kernels
from tritonconv.kernels import pool_backward as backward_kernels

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, reads_in_place, suggests_channels_last
from tritonconv.ops.pool import launch as launches_of
from tritonconv.ops.pool.call import pool

F = torch.nn.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def id_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    kernel: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def nd(self) -> int:
        return len(self.shape) - 2

    @property
    def geometry(self) -> PoolGeometry:
        return PoolGeometry.parse(
            self.shape, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, nd=self.nd
        )

    @property
    def undilated(self) -> bool:
        return self.dilation == 1

    def random(self, dtype: torch.dtype, channels_last: bool, device: str) -> torch.Tensor:
        """Many elements are equal, so that ties are met."""
        x = torch.randn(self.shape, device=device)
        return as_format(torch.where(torch.rand(self.shape, device=device) < 0.4, x.round(), x).to(dtype), channels_last)


CASES = [
    Case("stem 3x3 s2", (1, 20, 5, 7), 3, 2, 1),
    Case("2x2", (1, 19, 4, 10), 2),
    Case("2x2 ceil", (2, 9, 3, 7), 2, 2, 0, 1, True),
    Case("5x5 s1", (1, 20, 3, 5), 5, 1, 2),
    # Walked row by row; a stride whose cells are large goes pixel by pixel.
    Case("9x5 s6", (1, 9, 10, 12), (9, 5), (6, 5), (4, 2), 1, True),
    # 17 columns: more than are unrolled.
    Case("1-d 17", (2, 6, 24), 17, 3, 8, 1, True),
    Case("dilated", (1, 10, 7, 8), (3, 2), (2, 1), 1, (2, 3)),
    # A stride that no power of two is, and gaps between windows.
    Case("gaps", (1, 7, 5, 11), 2, 3, 0, 1, True),
    Case("s4", (1, 12, 5, 9), 4, 4, 2),
    Case("3-d", (1, 9, 3, 4, 6), (2, 3, 3), 2, 1, 1, True),
    Case("3-d s1", (1, 5, 2, 2, 3), 2, 1, 1),
    Case("one pixel", (3, 8, 1, 1), 1),
    Case("whole image", (2, 8, 4, 3), (4, 3)),
]


STEM = named(CASES, "stem 3x3 s2")


def both(kind: str, case: Case, x: torch.Tensor, dy: torch.Tensor | None, **more: Any) -> list[list[torch.Tensor]]:
    """[y, dx] of ours, and of torch's in fp64, from the same numbers."""
    results = []
    for module, leaf in ((TF, x), (F, x.double())):
        leaf = leaf.detach().requires_grad_(dy is not None)
        numbers: Any = (case.kernel, case.stride)
        if kind == "lp":
            window = case.kernel[0] if case.nd == 1 and isinstance(case.kernel, tuple) else case.kernel
            y = getattr(module, f"lp_pool{case.nd}d")(leaf, more["power"], window, case.stride, case.ceil_mode)
        elif kind == "avg":
            y = getattr(module, f"avg_pool{case.nd}d")(leaf, *numbers, case.padding, case.ceil_mode, **more)
        else:
            y = getattr(module, f"max_pool{case.nd}d")(leaf, *numbers, case.padding, case.dilation, case.ceil_mode)
        found = [y.detach()]
        if dy is not None:
            found.append(torch.autograd.grad(y, leaf, dy.to(y.dtype))[0])
        results.append(found)
    return results


def compared(kind: str, case: Case, dtype: torch.dtype, channels_last: bool, device: str, **more: Any) -> None:
    x = case.random(dtype, channels_last, device)
    if kind == "lp":
        # Of a power of 16 bits, torch's own rounding of each element would be met; away from zero ours is close to fp64.
        x = x.abs().add(0.25)
        case = replace(case, padding=0)
    dy = as_format(torch.randn(case.geometry.output_shape, device=device).to(dtype), channels_last)
    ours, reference = both(kind, case, x, dy, **more)
    for name, out, ref in zip(("y", "dx"), ours, reference, strict=True):
        assert_close(out, ref, depth=case.geometry.taps, what=(case, kind, name))
        assert out.dtype == dtype and is_dense(out, suggests_channels_last(x))


@rotate(case=CASES, channels_last=[False, True])
def test_maxima_and_their_places_are_torchs(case: Case, channels_last: bool, device: str) -> None:
    compared("max", case, torch.float32, channels_last, device)
    x = case.random(torch.float32, channels_last, device)
    numbers = (case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    for ours, theirs in zip(
        getattr(TF, f"max_pool{case.nd}d")(x, *numbers, True),
        getattr(F, f"max_pool{case.nd}d")(x, *numbers, True),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype and is_dense(ours, suggests_channels_last(x))


@rotate(case=[case for case in CASES if case.undilated], channels_last=[False, True])
def test_means_match_fp64(case: Case, channels_last: bool, device: str) -> None:
    compared("avg", case, torch.float32, channels_last, device, count_include_pad=bool(case.shape[1] % 2))


@rotate(case=[named(CASES, "2x2 ceil"), named(CASES, "whole image")], channels_last=[False, True], power=[1, 2, 3, 2.5])
def test_power_sums_match_fp64(case: Case, channels_last: bool, power: float, device: str) -> None:
    compared("lp", case, torch.float32, channels_last, device, power=power)


@rotate(dtype=DTYPES[1:], channels_last=[False, True], case=[STEM, named(CASES, "3-d")])
def test_the_other_dtypes(case: Case, dtype: torch.dtype, channels_last: bool, device: str) -> None:
    compared("max", case, dtype, channels_last, device)
    compared("avg", case, dtype, channels_last, device, count_include_pad=False)
    compared("lp", case, dtype, channels_last, device, power=2)
    x = case.random(dtype, channels_last, device)
    assert torch.equal(getattr(TF, f"max_pool{case.nd}d")(x, 3, 2), getattr(F, f"max_pool{case.nd}d")(x, 3, 2))


# In contiguous images patches are one column wide.
CONFIGS = [
    (config, channels_last)
    for config, channels_last in itertools.product(cover(forward_kernels.configs()), (True, False))
    if channels_last or config.kwargs["PATCH_Q"] == 1
]


@every({"config, channels_last": CONFIGS})
def test_every_candidate_config(config: object, channels_last: bool, device: str) -> None:
    for case in (STEM, named(CASES, "5x5 s1")):
        x = case.random(torch.float32, channels_last, device)
        g = case.geometry
        with forced(config=config):
            for indices in ("", "tap"):
                y, found = launches_of.pool_forward(x, g, launches_of.Pool("max"), indices)  # type: ignore[arg-type]
                assert torch.equal(y, F.max_pool2d(x, case.kernel, case.stride, case.padding)), (config, indices)
        dy = torch.ones_like(y)
        reference = both("max", case, x, dy)[1][1]
        assert_close(launches_of.pool_backward(dy, g, launches_of.Pool("max"), channels_last, found), reference, depth=9)


@rotate(config=cover(backward_kernels.configs()), channels_last=[False, True])
def test_every_candidate_config_backward(config: object, channels_last: bool, device: str) -> None:
    for case in (STEM, named(CASES, "5x5 s1")):
        with forced(config=config):
            compared("max", case, torch.float32, channels_last, device)
            compared("avg", case, torch.float32, channels_last, device, count_include_pad=False)


def minimum(x: torch.Tensor, *arguments: Any) -> Any:
    y, places = F.max_pool2d(-x, *arguments, return_indices=True)
    return -y, places


def test_minima_and_sums_follow_from_maxima_and_means(device: str) -> None:
    x = STEM.random(torch.float64, True, device).requires_grad_()
    y, places = TF.min_pool2d(x, 3, 2, 1, return_indices=True)
    expected, where = minimum(x, 3, 2, 1)
    assert torch.equal(y, expected) and torch.equal(places, where)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (TF.min_pool2d(x, 3, 2, 1), expected)))
    torch.testing.assert_close(TF.min_pool1d(x[0], 2), -F.max_pool1d(-x[0], 2))
    torch.testing.assert_close(TF.min_pool3d(x, 2), -F.max_pool3d(-x.contiguous(), 2))
    torch.testing.assert_close(TF.sum_pool2d(x, (2, 3)), F.avg_pool2d(x, (2, 3), divisor_override=1))
    torch.testing.assert_close(TF.sum_pool1d(x[0], 2, padding=1), 2 * F.avg_pool1d(x[0], 2, padding=1))
    torch.testing.assert_close(TF.sum_pool3d(x, 2), 8 * F.avg_pool3d(x.contiguous(), 2))
    for divisor in (3, -2):
        torch.testing.assert_close(
            TF.avg_pool2d(x, 3, 2, 1, divisor_override=divisor), F.avg_pool2d(x, 3, 2, 1, divisor_override=divisor)
        )


@pytest.mark.parametrize("channels_last", [False, True], ids=["C", "CL"])
def test_what_is_not_finite_is_where_torch_has_it(channels_last: bool, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.randn(2, 5, 6, 8, device=device)
    # Several NaN to a window: the last one's place. Whole windows of infinities: the first place inside the image.
    x[0, 0, 2:4, 1:5] = nan
    x[1, 1] = -inf
    x[1, 2] = inf
    x[0, 3, 3, 3], x[0, 4, 5, 5] = inf, -inf
    x = as_format(x, channels_last)
    for arguments in ((3, 2, 1), (2, 1)):
        for ours, theirs in ((TF.max_pool2d, F.max_pool2d), (lambda *a, **_: TF.min_pool2d(*a, return_indices=True), None)):
            y, places = ours(x, *arguments, return_indices=True)
            expected, where = minimum(x, *arguments) if theirs is None else theirs(x, *arguments, return_indices=True)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(places, where)
        torch.testing.assert_close(TF.max_pool2d(x, *arguments), F.max_pool2d(x, *arguments), equal_nan=True)
        torch.testing.assert_close(TF.avg_pool2d(x, *arguments), F.avg_pool2d(x, *arguments), equal_nan=True)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        dxs = [
            torch.autograd.grad(module.max_pool2d(leaf, *arguments).nan_to_num().sum(), leaf)[0]
            for module, leaf in zip((TF, F), leaves, strict=True)
        ]
        torch.testing.assert_close(*dxs, equal_nan=True)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 2.5, 0.5])
def test_a_power_sum_has_torchs_gradient_at_zero_and_its_nan(power: float, device: str) -> None:
    x = torch.randn(1, 6, 4, 6, dtype=torch.float64, device=device)
    x[0, 0], x[0, 1, :2, :2], x[0, 2, 0, 0] = 0, 0, 0
    x[0, 3] = x[0, 3].abs()
    x[0, 4, 0, 0], x[0, 5, 0, 0] = float("nan"), float("inf")
    found = []
    for module in (TF, F):
        leaf = x.clone().requires_grad_()
        y = module.lp_pool2d(leaf, power, 2)
        found += [y, torch.autograd.grad(y.sum(), leaf)[0]]
    ours, theirs = found[:2], found[2:]
    if power == 1.0:
        # Torch gives the elements of a window with NaN a gradient of 0 here, by way of sign(NaN) = 0; ours is 1.
        theirs[1][0, 4, :2, :2] = 1.0
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_the_limits_of_power_sums_are_those_of_absolute_values(device: str) -> None:
    x = torch.randn(2, 4, 5, 6, device=device)
    for p in (float("inf"), -float("inf")):
        assert torch.equal(TF.lp_pool2d(x, p, 2), F.lp_pool2d(x, p, 2))


def test_two_runs_are_bit_equal_and_ours(device: str) -> None:
    def run() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = TF.max_pool2d(leaf, 3, 1, 1) + TF.avg_pool2d(leaf, 3, 1, 1)
        return [y, torch.autograd.grad(y.square().sum(), leaf)[0]]

    x = as_format(torch.randn(2, 12, 6, 5, device=device), True)
    with record_launches() as launches:
        first = run()
    assert launches == ["pool_kernel", "pool_kernel", "pool_backward_kernel", "pool_backward_kernel"]
    assert all(map(torch.equal, first, run()))


def test_64_bit_offsets_change_nothing(device: str) -> None:
    for channels_last in (False, True):
        for case in (named(CASES, "3-d"),):
            x = case.random(torch.float32, channels_last, device).requires_grad_()

            def run(x: torch.Tensor = x, case: Case = case) -> list[torch.Tensor]:
                numbers = (case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
                y, places = getattr(TF, f"max_pool{case.nd}d")(x, *numbers, return_indices=True)
                z = getattr(TF, f"avg_pool{case.nd}d")(x, *numbers[:3], case.ceil_mode)
                return [y, places, *torch.autograd.grad(y.sum() + z.sum(), x)]

            narrow = run()
            with patched(launches_of, "wide_offsets", lambda *_: True):
                assert all(map(torch.equal, narrow, run()))


def test_views_are_read_where_they_lie(device: str) -> None:
    wide = as_format(torch.randn(2, 24, 6, 7, device=device), True)
    views = {
        "a slice of channels": (wide[:, 8:16], True),
        "rows cut off": (as_format(wide, False)[:, :, 1:5], True),
        "channels of contiguous planes": (as_format(wide, False)[:, 3:9:2], True),
        "every second column": (as_format(wide, False)[..., ::2], False),
        "an expanded batch": (as_format(wide[:1], False).expand(3, -1, -1, -1), True),
        "transposed": (wide.transpose(2, 3), False),
        "expanded pixels": (torch.randn(2, 3, 1, 1, device=device).expand(2, 3, 4, 5), False),
    }
    for name, (x, in_place) in views.items():
        assert reads_in_place(x, suggests_channels_last(x)) == in_place, name
        for ours, theirs in ((TF.max_pool2d, F.max_pool2d), (TF.avg_pool2d, F.avg_pool2d)):
            y, expected = ours(x, 3, 2, 1), theirs(x, 3, 2, 1)
            torch.testing.assert_close(y, expected)
            assert y.is_contiguous(memory_format=torch.channels_last) == suggests_channels_last(x) or not in_place, name


def test_gradients_of_any_strides(device: str) -> None:
    x = torch.randn(2, 6, 6, 4, dtype=torch.float64, device=device, requires_grad=True)
    for dy in (
        torch.randn((), device=device).double().expand(2, 6, 3, 2),
        torch.randn(2, 3, 2, 6).double().permute(0, 3, 1, 2),
    ):
        for name in ("max_pool2d", "avg_pool2d"):
            grads = [torch.autograd.grad(getattr(module, name)(x, 2), x, dy)[0] for module in (TF, F)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["max", "avg", "lp"])
def test_an_activation_in_the_same_kernel(kind: Any, device: str) -> None:
    from tritonconv.ops.core.activation import parse_activation

    x = as_format(torch.randn(2, 10, 6, 5, device=device), True)
    spec = parse_activation(("leaky_relu", 0.1))
    reference = getattr(F, f"{kind}_pool2d")(*((x, 2, 2) if kind == "lp" else (x, 2)))
    y = pool(kind, x, 2, power=2.0, activation=spec)
    torch.testing.assert_close(y, F.leaky_relu(reference, 0.1), equal_nan=True)
    # With gradients it follows.
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(pool(kind, leaf, 2, power=2.0, activation=spec).detach(), y, equal_nan=True)


def test_a_result_may_be_a_slice_of_a_wider_tensor(device: str) -> None:
    x = as_format(torch.randn(2, 8, 6, 5, device=device), True)
    for part in (x, as_format(x, False)):
        whole = as_format(torch.full((2, 24, 3, 3), 7.0, device=device), True)
        out = whole[:, 8:16]
        version = out._version
        with record_launches() as launches:
            assert pool("max", part, 3, 2, 1, out=out) is out
        assert launches == ["pool_kernel"] and out._version > version
        assert torch.equal(out, F.max_pool2d(x, 3, 2, 1))
        assert (whole[:, :8] == 7).all() and (whole[:, 16:] == 7).all()
    with tritonconv.set_backend("torch"):
        assert torch.equal(pool("max", x, 3, 2, 1, out=whole[:, :8]), F.max_pool2d(x, 3, 2, 1))
    with pytest.raises(RuntimeError, match=r"expected `out` of size \[2, 8, 3, 3\]"):
        pool("max", x, 3, 2, 1, out=whole)
    with pytest.raises(RuntimeError, match="without gradients"):
        pool("max", x.clone().requires_grad_(), 3, 2, 1, out=out)
    with pytest.raises(ValueError, match="evenly spaced"):
        pool("max", x, 3, 2, 1, out=as_format(torch.empty(2, 8, 3, 4, device=device), True)[..., :3])


def random_case(rng: random.Random) -> Case:
    nd = rng.choice([1, 2, 2, 3])
    kernel = tuple(rng.randint(1, 4) for _ in range(nd))
    dilation = tuple(rng.choice([1, 1, 2]) for _ in range(nd)) if rng.random() < 0.3 else 1
    each = (dilation,) * nd if isinstance(dilation, int) else dilation
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, each, strict=True))
    padding = tuple(rng.randint(0, n // 2) for n in kernel)
    # Torch's means of three dimensions take no window that is larger than the image.
    size = tuple(rng.randint(n if nd == 3 else max(1, n - 2 * p), 7) for n, p in zip(reach, padding, strict=True))
    stride = None if rng.random() < 0.3 else tuple(rng.randint(1, 5) for _ in range(nd))
    return Case(
        "fuzz", (rng.randint(1, 2), rng.choice([1, 3, 8, 17]), *size), kernel, stride, padding, dilation, rng.random() < 0.5
    )


@every(seed=some(range(12), 6))
def test_any_arguments(seed: int, device: str) -> None:
    rng = random.Random(seed)
    case = random_case(rng)
    channels_last, dtype = rng.random() < 0.6, rng.choice([torch.float32, torch.float64])
    x = case.random(dtype, channels_last, device)
    if rng.random() < 0.3:
        x[torch.rand(x.shape, device=device) < 0.2] = float("nan")
    numbers = (case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    ours, theirs = (getattr(module, f"max_pool{case.nd}d")(x, *numbers, return_indices=True) for module in (TF, F))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    # Torch names no place of a window that lies in the padding alone, but one outside.
    inside = ours[0] > -float("inf")
    assert torch.equal(ours[1][inside], theirs[1][inside]), (seed, case)
    x = case.random(dtype, channels_last, device)
    dy = torch.randn(case.geometry.output_shape, dtype=dtype, device=device)
    kinds: list[tuple[str, dict[str, Any]]] = [("max", {})] if inside.all() else []
    if case.undilated:
        kinds.append(("avg", dict(count_include_pad=rng.random() < 0.5)))
    for kind, more in kinds:
        for out, ref in zip(*both(kind, case, x, dy, **more), strict=True):
            assert_close(out, ref, depth=case.geometry.taps, what=(seed, case, kind))
