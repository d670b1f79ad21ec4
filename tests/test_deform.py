"""Deformable convolution: values and all five gradients against the papers' sums in fp64."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from deform_reference import deform_reference
from matrix import cover, every, named, rotate, some
from reference import assert_close
from torch import Tensor

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import DeformGeometry
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import is_dense
from tritonconv.ops.deform.gradients import Wanted, deform_dgrad, deform_wgrad
from tritonconv.ops.deform.launch import deform_forward
from tritonconv.ops.deform.torch_form import deform_on_torch
from tritonconv.tuning import Problem, device_named
from tritonconv.tuning.candidates import candidates, possible
from tritonconv.tuning.devices import known_devices

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORWARD = ["deform_conv_kernel"]
BACKWARD = ["deform_conv_dgrad_kernel", "deform_scatter_kernel", "deform_conv_wgrad_kernel"]
NAMES = ("x", "offset", "weight", "bias", "mask")


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with tritonconv.set_backend("triton"):
        yield


@dataclass(frozen=True)
class Case:
    """A layer; `why` is its id."""

    why: str
    size: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True

    def __str__(self) -> str:
        return self.why

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation)

    @property
    def output(self) -> tuple[int, int]:
        axes = zip(self.size[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        p, q = ((size + 2 * pad - step * (taps - 1) - 1) // hop + 1 for size, taps, hop, pad, step in axes)
        return p, q

    def tensors(self, dtype: torch.dtype, channels_last: bool, reach: int = 40) -> list[Tensor | None]:
        """x, offset, weight, bias and mask. Offsets are odd sixteenths: no place is whole, and bf16 has them exactly."""
        n, c, *_ = self.size
        taps = math.prod(self.kernel) * self.offset_groups
        offset = (torch.randint(-reach, reach, (n, 2 * taps, *self.output)) * 2 + 1) / 16
        weight = torch.randn(self.filters, c // self.groups, *self.kernel)
        found = [
            torch.randn(self.size), offset, weight, torch.randn(self.filters) if self.bias else None,
            torch.rand(n, taps, *self.output) if self.mask else None,
        ]  # fmt: skip
        return [None if t is None else laid(t.to(dtype), channels_last) for t in found]


CASES = [
    Case("plain", (2, 8, 5, 6), 6),
    Case("version 1 without bias", (1, 16, 6, 5), 8, mask=False, bias=False),
    Case("stride, padding and dilation by axes", (2, 8, 9, 8), 5, (3, 2), (2, 3), (2, 0), (1, 2)),
    Case("weight groups", (1, 12, 5, 5), 9, (1, 2), groups=3),
    Case("offset groups", (1, 24, 5, 4), 7, offset_groups=4),
    Case("offset groups of one channel, odd", (1, 5, 4, 4), 3, offset_groups=5),
    Case("both groups alike", (1, 16, 4, 5), 8, groups=2, offset_groups=2),
    Case("several offset groups in a weight group", (1, 16, 4, 4), 6, (2, 2), groups=2, offset_groups=4),
    Case("several weight groups in an offset group", (1, 16, 4, 4), 8, (2, 1), groups=4, offset_groups=2),
    Case("groups across one another", (1, 12, 4, 5), 6, (1, 2), groups=3, offset_groups=2),
    Case("depthwise", (1, 4, 4, 4), 4, (1, 2), groups=4),
    Case("one pixel", (2, 4, 1, 1), 3, padding=(1, 1)),
    Case("one tap", (1, 8, 5, 3), 4, (1, 1), padding=(0, 0)),
    Case("larger than the image", (1, 4, 2, 2), 2, (3, 4), padding=(2, 2)),
    Case("many filters and odd channels", (1, 19, 3, 4), 37, (2, 1)),
]


PLAIN = named(CASES, "plain")
ONNX = ("version 1 without bias", "stride, padding and dilation by axes", "groups across one another")


def laid(t: Tensor, channels_last: bool) -> Tensor:
    return t.to(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t.contiguous()


def leaves(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def call(function: Any, tensors: list[Tensor | None], case: Case) -> Tensor:
    x, offset, weight, bias, mask = tensors
    return function(x, offset, weight, bias, mask=mask, **case.numbers)


def gradients(y: Tensor, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [t for t in tensors if t is not None], dy))


def geometry_of(tensors: list[Tensor | None], case: Case) -> DeformGeometry:
    x, offset, weight, _, mask = tensors
    return DeformGeometry.parse(x.shape, offset.shape, weight.shape, None if mask is None else mask.shape, **case.numbers)  # type: ignore[union-attr]


def depth_of(name: str, case: Case) -> int:
    n, c, *_ = case.size
    pixels, taps = n * math.prod(case.output), math.prod(case.kernel)
    return {"x": case.filters * taps, "weight": pixels, "bias": pixels}.get(name, case.filters * c)


def check(case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    """Forward and every gradient against fp64."""
    tensors = case.tensors(dtype, channels_last)
    ours, wide = leaves(tensors), leaves(tensors, torch.float64)
    expected = call(deform_reference, wide, case)
    with record_launches() as launches:
        out = call(TF.deform_conv2d, ours, case)
    assert launches == FORWARD
    assert is_dense(out, channels_last) and out.dtype == dtype
    assert_close(out, expected, depth=case.size[1] // case.groups * math.prod(case.kernel), what=case)
    dy = laid(torch.randn(out.shape).to(dtype), channels_last)
    with record_launches() as launches:
        found = gradients(out, ours, dy)
    assert [name for name in launches if name != "wgrad_reduce_kernel"] == BACKWARD
    names = [name for name, t in zip(NAMES, tensors, strict=True) if t is not None]
    for name, got, want, t in zip(names, found, gradients(expected, wide, dy.double()), ours, strict=False):
        assert_close(got, want, depth=depth_of(name, case), what=(case, name))
        assert got.dtype == dtype
        assert t is None or t.dim() != 4 or is_dense(got, channels_last)


@rotate(case=CASES, dtype=DTYPES, channels_last=[True, False])
def test_forward_and_every_gradient(case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    check(case, dtype, channels_last)


def test_the_reference_is_onnxs() -> None:
    """The papers' sums against the operator that ONNX defines by torchvision's."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    for case in (named(CASES, name) for name in ONNX):
        tensors = case.tensors(torch.float64, False)
        given = [t for t in tensors if t is not None]
        names = [name for name, t in zip(("X", "offset", "W", "B", "mask"), tensors, strict=True) if t is not None]
        ordered = {"X": "X", "W": "W", "offset": "offset", "B": "B", "mask": "mask"}
        node = helper.make_node(
            "DeformConv", [name if name in names else "" for name in ordered], ["Y"], strides=list(case.stride),
            pads=[*case.padding, *case.padding], dilations=list(case.dilation), group=case.groups,
            offset_group=case.offset_groups,
        )  # fmt: skip
        inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in names]
        graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("Y", TensorProto.DOUBLE, None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
        feed = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        theirs = torch.from_numpy(ReferenceEvaluator(model).run(None, feed)[0])
        torch.testing.assert_close(call(deform_reference, tensors, case), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_torchs_path_is_the_same_sum(case: Case) -> None:
    tensors = leaves(case.tensors(torch.float64, False))
    wide = leaves(tensors)
    with tritonconv.set_backend("torch"), record_launches() as launches:
        y = call(TF.deform_conv2d, tensors, case)
    assert not launches
    expected, dy = call(deform_reference, wide, case), torch.randn(y.shape).double()
    torch.testing.assert_close(y, expected)
    for got, want in zip(gradients(y, tensors, dy), gradients(expected, wide, dy), strict=True):
        torch.testing.assert_close(got, want)


def all_of(kernel: str, case: Case, dtype: str, pass_: Any) -> list[Any]:
    """Every config that some GPU may take for this type."""
    conv = geometry_of(case.tensors(torch.float32, True), case).conv
    found = {}
    for arch, tf32 in itertools.product(("sm_90", "gfx942"), (False, True)):
        problem = Problem(kernel, conv, dtype, tf32, True, device_named(arch), pass_)
        found |= {str(config): config for config in possible(problem)}
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_every_candidate_config(dtype: torch.dtype) -> None:
    # More channels than a block, several runs in one, and a reduction that none divides.
    cases = [Case("", (1, 72, 3, 3), 70, (1, 2), padding=(0, 1)), Case("", (1, 24, 3, 3), 9, (2, 1), offset_groups=3)]
    for case in cases[: 1 if dtype == torch.float64 else 2]:
        tensors = case.tensors(dtype, True)
        x, offset, weight, bias, mask = tensors
        wide = leaves(tensors, torch.float64)
        expected, geometry = call(deform_reference, wide, case), geometry_of(tensors, case)
        dy = laid(torch.randn(expected.shape).to(dtype), True)
        wanted = dict(zip(NAMES, gradients(expected, wide, dy.double()), strict=True))
        name = str(dtype)[6:]
        for config in cover(all_of("deform_conv", case, name, "fprop")):
            with forced(config=config):
                y = deform_forward(x, offset, mask, weight, Epilogue(bias), geometry)  # type: ignore[arg-type]
            assert_close(y, expected, depth=144, what=config)
        for config in cover(all_of("deform_conv_wgrad", case, name, "wgrad")):
            with forced(config=config):
                dw = deform_wgrad(dy, x, offset, mask, geometry, True)  # type: ignore[arg-type]
            assert_close(dw, wanted["weight"], depth=16, what=config)
        for config in cover(all_of("deform_conv_dgrad", case, name, "dgrad")):
            with forced(config=config):
                found = deform_dgrad(dy, x, offset, mask, weight, geometry, Wanted(), True, "deterministic")  # type: ignore[arg-type]
            for key, got in zip(("x", "offset", "mask"), found, strict=True):
                assert got is not None
                assert_close(got, wanted[key], depth=depth_of(key, case), what=(config, key))


def test_every_config_is_fitting_somewhere() -> None:
    from tritonconv.kernels import deform_conv, deform_conv_dgrad, deform_conv_wgrad

    layers = [Case("", (2, c, 32, 32), k, (3, 3)) for c, k in ((8, 16), (64, 64), (128, 128), (256, 256))]
    for module, pass_ in ((deform_conv, "fprop"), (deform_conv_wgrad, "wgrad"), (deform_conv_dgrad, "dgrad")):
        found = set()
        for case, dtype, tf32 in itertools.product(layers, ("float32", "bfloat16", "float64"), (False, True)):
            (n, c, h, w), p = case.size, case.output
            geometry = DeformGeometry.parse((n, c, h, w), (n, 18, *p), (case.filters, c, 3, 3), padding=1)
            name = module.__name__.rsplit(".")[-1]
            for device in known_devices().values():
                problem = Problem(name, geometry.conv, dtype, tf32, True, device, pass_)  # type: ignore[arg-type]
                assert candidates(problem), (problem.kernel, device.name, case, dtype)
            problem = Problem(name, geometry.conv, dtype, tf32, True, device_named("sm_90"), pass_)  # type: ignore[arg-type]
            found |= set(map(str, candidates(problem)))
        assert found == set(map(str, module.configs())), module


@pytest.mark.parametrize("groups", [1, 2])
def test_zero_offsets_and_a_mask_of_ones_are_a_plain_convolution(groups: int) -> None:
    case = replace(PLAIN, size=(1, 16, 6, 5), filters=8, kernel=(3, 3), groups=groups, offset_groups=2)
    x, offset, weight, bias, mask = (t for t in case.tensors(torch.float32, True))
    offset, mask = torch.zeros_like(offset), torch.ones_like(mask)  # type: ignore[arg-type]
    # Small integers: every sum is exact, in whatever order.
    x, weight, bias = ((4 * t).round() for t in (x, weight, bias))  # type: ignore[operator]
    dy = torch.randint(-3, 4, (1, 8, 6, 5)).float()
    plain = [t.detach().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.conv2d(*plain, padding=1, groups=groups)
    wanted = torch.autograd.grad(expected, plain, dy)
    for dtype in (torch.float32, torch.float64):
        ours = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = TF.deform_conv2d(ours[0], offset.to(dtype), ours[1], ours[2], padding=1, mask=mask.to(dtype))
        assert torch.equal(y.float(), expected)
        for got, want in zip(torch.autograd.grad(y, ours, dy.to(dtype)), wanted, strict=True):
            assert torch.equal(got.float(), want)
    # Any numbers, where one block holds a tap's channels in both kernels.
    x, weight = torch.randn(1, 64, 6, 5).contiguous(memory_format=torch.channels_last), torch.randn(8, 64, 3, 3)
    with torch.no_grad():
        y = TF.deform_conv2d(x, torch.zeros(1, 18, 6, 5), weight, padding=1, mask=torch.ones(1, 9, 6, 5))
        expected = TF.conv2d(x, weight, padding=1)
    assert_close(y, expected.double(), depth=9)


def test_whole_places_have_derivatives_to_the_right() -> None:
    """As in torchvision: the floor's side, also at -1, where the value itself is zero."""
    x = torch.tensor([[1.0, 4.0], [10.0, 40.0]]).view(1, 1, 2, 2)
    weight = torch.ones(1, 1, 1, 1)
    places = [(0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (-1.5, 0.0), (2.0, 0.0)]
    slopes = [(9.0, 3.0), (1.0, 0.0), (-10.0, 30.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    for (h, w), (dh, dw) in zip(places, slopes, strict=True):
        for backend in ("triton", "torch"):
            offset = torch.tensor([h, w]).view(1, 2, 1, 1).expand(1, 2, 2, 2).clone().requires_grad_()
            with tritonconv.set_backend(backend):
                y = TF.deform_conv2d(x, offset, weight)[0, 0, 0, 0]
                (slope,) = torch.autograd.grad(y, offset)
            assert slope[0, :, 0, 0].tolist() == [dh, dw], (backend, h, w)


FAR = [1e9, -1e9, 3e38, -3e38, math.inf, -math.inf, -1.0, 3.0, 1e5]


@pytest.mark.parametrize("far", FAR, ids=str)
def test_far_outside_is_zero_and_gets_nothing(far: float) -> None:
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(4, 8, 1, 1)
    for axis in (0, 1):
        offset = torch.zeros(1, 2, 3, 3)
        offset[0, axis, 0, 0] = far
        ours = leaves([x, offset, weight, None, torch.full((1, 1, 3, 3), 0.5)])
        y = TF.deform_conv2d(ours[0], ours[1], ours[2], mask=ours[4])  # type: ignore[arg-type]
        assert (y[0, :, 0, 0] == 0).all() and y.isfinite().all() and (y[0, :, 1:, 1:] != 0).all()
        dx, doffset, dw, dmask = gradients(y, ours, torch.ones_like(y))
        assert dx[0, :, 0, 0].abs().sum() == 0 and (dx[0, :, 1, 1] != 0).all() and dw.isfinite().all()
        assert dmask[0, 0, 0, 0] == 0 and dmask[0, 0, 1, 1] != 0
        assert doffset.isfinite().all() and (far == -1.0 or (doffset[0, :, 0, 0] == 0).all())


@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_offset_makes_its_own_results_nan(axis: int) -> None:
    for case in (PLAIN, named(CASES, "offset groups")):
        tensors = case.tensors(torch.float32, True)
        # Inside along the other axis: outside of it nothing is read.
        tensors[1][0, :2, 2, 1] = 1 / 16  # type: ignore[index]
        tensors[1][0, axis, 2, 1] = math.nan  # type: ignore[index]
        bad = torch.zeros(tensors[0].shape[0], *case.output, dtype=torch.bool)  # type: ignore[union-attr]
        bad[0, 2, 1] = True
        for backend in ("triton", "torch"):
            ours = leaves(tensors)
            with tritonconv.set_backend(backend):
                y = call(TF.deform_conv2d, ours, case)
                dx, doffset, dw, _, dmask = gradients(y, ours, torch.randn(y.shape))
            assert torch.equal(y.isnan().any(1), bad) and torch.equal(y.isnan().all(1), bad), backend
            # The gradient of what is sampled there: its mask's, its weights', one of its offsets', and no pixel's.
            assert doffset.isnan().sum() == 1 and doffset[0, 1 - axis, 2, 1].isnan() and dmask.isnan().sum() == 1
            assert dw[:, : case.size[1] // case.offset_groups, 0, 0].isnan().all(), backend
            assert backend == "torch" or dx.isfinite().all()


@rotate(bad=[math.nan, math.inf, -math.inf], where=["x", "dy", "weight", "mask"])
def test_what_is_not_finite_goes_where_it_belongs(bad: float, where: str) -> None:
    case = Case("", (1, 8, 4, 4), 3, (2, 2), padding=(0, 0))
    tensors = case.tensors(torch.float32, True, reach=6)
    dy = torch.randn(1, 3, 3, 3)
    if where == "dy":
        dy[0, 1, 1, 1] = bad
    else:
        tensors[NAMES.index(where)][0, -1, 1, 1] = bad  # type: ignore[index]
    ours, wide = leaves(tensors), leaves(tensors, torch.float64)
    y = call(TF.deform_conv2d, ours, case)
    with tritonconv.set_backend("torch"):
        expected = call(TF.deform_conv2d, wide, case)
    assert torch.equal(y.isfinite(), expected.isfinite())
    for name, got, want in zip(NAMES, gradients(y, ours, dy), gradients(expected, wide, dy.double()), strict=True):
        if name == "x":
            # Torch's path gives a neighbor without weight zero times infinity.
            assert not (want.isfinite() & ~got.isfinite()).any() and (where == "x" or not got.isfinite().all())
        else:
            assert torch.equal(got.isfinite(), want.isfinite()), name


def test_the_same_bits_on_every_run() -> None:
    case = Case("", (1, 16, 5, 5), 8, offset_groups=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = case.tensors(dtype, True, reach=16)
        x, offset, weight, _, mask = tensors
        dy, geometry = torch.randn(1, 8, *case.output).to(dtype), geometry_of(tensors, case)
        small = all_of("deform_conv_dgrad", case, str(dtype)[6:], "dgrad")[-1]
        # Other tiles add up in another order; integers do not mind.
        once = deform_dgrad(dy, x, offset, mask, weight, geometry, Wanted(), True, "deterministic")  # type: ignore[arg-type]
        with forced(config=small):
            again = deform_dgrad(dy, x, offset, mask, weight, geometry, Wanted(True, False, False), True, "deterministic")  # type: ignore[arg-type]
        assert torch.equal(once[0], again[0]) or dtype != torch.bfloat16  # type: ignore[arg-type]
        for first, second in zip(
            once, deform_dgrad(dy, x, offset, mask, weight, geometry, Wanted(), True, "deterministic"), strict=True  # type: ignore[arg-type]
        ):  # fmt: skip
            assert torch.equal(first, second)  # type: ignore[arg-type]
        weights = [deform_wgrad(dy, x, offset, mask, geometry, True) for _ in range(2)]  # type: ignore[arg-type]
        assert torch.equal(*weights)


@pytest.mark.parametrize("exponent", [-60, -20, 0, 20, 60])
def test_fixed_point_has_room_and_bits_at_every_magnitude(exponent: int) -> None:
    """Every sample of the image at one place: the largest sums that there can be."""
    x, weight, dy = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(1, 4, 6, 6) * 2.0**exponent
    h, w = (torch.arange(6.0).view(6, 1).expand(6, 6), torch.arange(6.0).expand(6, 6))
    taps = torch.arange(9)
    offset = torch.stack((2.25 - h[None] - (taps // 3 - 1).view(9, 1, 1), 2.25 - w[None] - (taps % 3 - 1).view(9, 1, 1)), 1)
    offset = offset.reshape(1, 18, 6, 6)
    ours = leaves([x, offset, weight, None, None])
    wide = leaves(ours, torch.float64)
    case = Case("", (1, 4, 6, 6), 4, mask=False, bias=False)
    (dx,) = torch.autograd.grad(call(TF.deform_conv2d, ours, case), ours[0], dy)
    (want,) = torch.autograd.grad(call(deform_reference, wide, case), wide[0], dy.double())
    scale = 2.0**-exponent
    assert_close(dx * scale, want * scale, depth=36 * 36)


def test_no_buffer_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward and backward allocate, by counting: no taps x channels x pixels anywhere."""
    case = Case("", (2, 32, 8, 8), 16, bias=False)
    tensors = leaves(case.tensors(torch.bfloat16, True))
    taken: list[int] = []
    torch_empty = torch.empty

    def counted(function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Tensor:
            t = function(*args, **kwargs)
            # Tensors that only stand for the arguments have no memory.
            if function is not torch_empty:
                taken.append(t.numel() * t.element_size())
            return t

        return count

    for name in ("empty_strided", "zeros", "empty", "empty_like", "zeros_like"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    y = call(TF.deform_conv2d, tensors, case)
    pixels = 2 * 8 * 8
    # Results, a channels-last copy of the weight, and nothing else.
    assert sum(taken) <= y.numel() * 2 + tensors[2].numel() * 2  # type: ignore[union-attr]
    taken.clear()
    gradients(y, tensors, torch.randn(y.shape).bfloat16())
    samples = 9 * 32 * pixels * 2
    gradients_of_all = sum(t.numel() * 2 for t in tensors if t is not None)
    # The gradients, copies of weight and dy, sums of dx in 8 bytes an element, and of the weight's ranges.
    assert max(taken) <= 8 * 32 * pixels < samples
    assert sum(taken) <= gradients_of_all + (tensors[2].numel() + y.numel()) * 2 + 8 * 32 * pixels + 4 * 9 * 32 * 16 + 64  # type: ignore[union-attr]


def fuzzed(seed: int) -> tuple[Case, torch.dtype, bool]:
    r = random.Random(seed)
    groups, offset_groups = r.choice([1, 1, 2, 3]), r.choice([1, 1, 2, 3])
    c = math.lcm(groups, offset_groups) * r.choice([1, 2, 5, 8])
    kernel = r.randint(1, 3), r.randint(1, 3)
    dilation = r.randint(1, 2), r.randint(1, 2)
    padding = r.randint(0, 2), r.randint(0, 2)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    case = Case(
        f"seed {seed}", (r.randint(1, 2), c, least[0] + r.randint(0, 5), least[1] + r.randint(0, 5)),
        groups * r.randint(1, 9), kernel, (r.randint(1, 3), r.randint(1, 3)), padding, dilation, groups, offset_groups,
        r.random() < 0.7, r.random() < 0.5,
    )  # fmt: skip
    return case, r.choice(DTYPES), r.random() < 0.5


@every(seed=some(range(10), 5))
def test_fuzz(seed: int) -> None:
    check(*fuzzed(seed))


def test_torchs_path_computes_halves_as_the_kernels_do() -> None:
    tensors = PLAIN.tensors(torch.bfloat16, False)
    x, offset, weight, bias, mask = tensors
    y = deform_on_torch(x, offset, mask, weight, bias, geometry_of(tensors, PLAIN))  # type: ignore[arg-type]
    assert_close(y, call(deform_reference, tensors, PLAIN), depth=72)
