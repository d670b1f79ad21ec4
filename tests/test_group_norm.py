"""Group, instance and layer norm: forward, backward and running statistics against torch in fp64, and what follows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from calls import patched
from matrix import cover, every, named, rotate
from reference import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from tritonconv.kernels import group_norm as kernels
from tritonconv.kernels.activations import ACTIVATIONS

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.launch import captured, forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense, suggests_channels_last
from tritonconv.ops.group_norm import launch as launches_of
from tritonconv.ops.group_norm.torch_form import followed, layer_norm_of_channels
from tritonconv.tuning import device_named

F = torch.nn.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ONCE = ["group_norm_kernel", "group_norm_backward_kernel", "group_norm_parameters_kernel"]
TWICE = [
    "group_norm_statistics_kernel", "group_norm_combine_kernel", "group_norm_normalize_kernel", "group_norm_reduce_kernel",
    "group_norm_means_kernel", "group_norm_input_gradient_kernel", "group_norm_parameters_kernel",
]  # fmt: skip
# Blocks of pixels and channels, so that no tile has a whole group.
SPLIT = kernels.configs()[-4]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    groups: int
    """0: a layer norm over the channels of each pixel."""

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("groups of 4", (3, 24, 9, 8), 6),
    # Channels of a group that no power of two divides, as 10 and 20 in Stable Diffusion.
    Case("groups of 10", (2, 40, 7, 5), 4),
    Case("one group", (2, 17, 5, 3), 1),
    Case("instances", (2, 33, 7, 5), 33),
    Case("rows", (5, 12), 3),
    Case("one image, one pixel", (1, 12, 1, 1), 2),
    Case("1-d", (3, 6, 11), 2),
    Case("3-d", (2, 10, 3, 4, 5), 5),
    Case("pixels", (2, 24, 5, 7), 0),
    Case("pixels of odd channels", (3, 37, 3, 5), 0),
    Case("pixels of rows", (7, 48), 0),
    Case("pixels of one channel", (2, 1, 3, 4), 0),
    Case("pixels, 3-d", (2, 10, 3, 4, 5), 0),
]
NAMES = ("y", "dx", "dweight", "dbias", "dscale", "dshift", "dresidual")
FOLLOWING = ("weight", "bias", "scale", "shift", "residual")


@dataclass
class Layer:
    """Inputs of a norm and what follows it; vectors are fp32, but for fp64 inputs."""

    groups: int
    activation: Any
    dy: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @classmethod
    def random(
        cls, case: Case, dtype: torch.dtype = torch.float32, channels_last: bool = False, activation: Any = "silu",
        given: tuple[str, ...] = FOLLOWING, device: str = "cpu",
    ) -> Layer:  # fmt: skip
        wide, (n, c, *_) = torch.float64 if dtype == torch.float64 else torch.float32, case.shape
        sizes = dict(weight=(c,), bias=(c,), scale=(n, c), shift=(n, c))
        vectors = {name: torch.randn(size, dtype=wide, device=device) for name, size in sizes.items() if name in given}
        images = [as_format(torch.randn(case.shape, device=device).to(dtype), channels_last) for _ in range(3)]
        residual = dict(residual=images[2]) if "residual" in given else {}
        return cls(case.groups, activation, images[0], images[1], **vectors, **residual)

    def run(self, function: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
        """The result and all gradients."""
        given = (self.x, self.weight, self.bias, self.scale, self.shift, self.residual)
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        y = function(self.groups, self.activation, *leaves)
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], self.dy.to(y.dtype)))
        return [y.detach(), *(None if t is None else next(found) for t in leaves)]

    def double(self) -> Layer:
        return Layer(*(t.double() if isinstance(t, torch.Tensor) else t for t in vars(self).values()))


def ours(groups: int, activation: Any, x: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any) -> Any:
    more = dict(scale=scale, shift=shift, residual=residual, activation=activation)
    if groups == 0:
        return TF.layer_norm_channels(x, weight, bias, **more)
    return TF.group_norm(x, groups, weight, bias, **more)


def theirs(groups: int, activation: Any, x: Any, weight: Any, bias: Any, *following: Any) -> Any:
    spec = parse_activation(activation)
    if groups == 0:
        y = layer_norm_of_channels(x, weight, bias, 1e-5)
    else:
        # Torch's gradient fails for a bias without a weight.
        y = F.group_norm(x, groups, torch.ones_like(bias) if weight is None and bias is not None else weight, bias)
    return followed(y, *following, spec)


def compared(layer: Layer, what: object) -> list[torch.Tensor | None]:
    """Ours, each result checked against torch's in fp64 from the same numbers."""
    found, reference = layer.run(ours), layer.double().run(theirs)
    depth = layer.x.numel() // layer.x.shape[1]
    for name, out, ref in zip(NAMES, found, reference, strict=True):
        assert (out is None) == (ref is None)
        if out is not None and ref is not None:
            # A group of one element does not change with it.
            ref = ref.where(ref.abs() > 1e-12, 0)
            assert_close(out, ref, depth=depth, what=f"{what}, {name}")
    return found


@rotate(case=CASES, channels_last=[False, True], split=[False, True], following=[True, False])
def test_forward_and_backward_match_fp64(
    case: Case, channels_last: bool, split: bool, following: bool, device: str
) -> None:
    given = FOLLOWING if following else ("weight", "bias")
    layer = Layer.random(case, torch.float32, channels_last, "silu" if following else None, given, device)
    with forced(config=SPLIT) if split else contextlib.nullcontext(), record_launches() as launches:
        y, dx, *_ = compared(layer, case)
    assert launches == (TWICE if split and case.groups else ONCE)
    for t in (y, dx):
        assert t is not None and is_dense(t, suggests_channels_last(layer.x)) and t.stride() == layer.x.stride()


@rotate(
    case=[named(CASES, name) for name in ("groups of 10", "instances", "pixels of odd channels", "1-d")],
    dtype=DTYPES[1:], channels_last=[False, True], split=[False, True],
)  # fmt: skip
def test_the_other_dtypes(case: Case, dtype: torch.dtype, channels_last: bool, split: bool, device: str) -> None:
    with forced(config=SPLIT) if split else contextlib.nullcontext():
        compared(Layer.random(case, dtype, channels_last, device=device), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_vectors_of_16_bits_have_gradients_of_16_bits(dtype: torch.dtype, device: str) -> None:
    layer = Layer.random(named(CASES, "groups of 4"), dtype, True, device=device)
    for name in FOLLOWING:
        setattr(layer, name, getattr(layer, name).to(dtype))
    assert all(t is not None and t.dtype == dtype for t in compared(layer, dtype))


@rotate(activation=[None, *ACTIVATIONS], groups=[3, 0], split=[False, True])
def test_every_activation(activation: str | None, groups: int, split: bool, device: str) -> None:
    layer = Layer.random(Case("", (2, 12, 5, 3), groups), torch.float32, True, activation, device=device)
    with forced(config=SPLIT) if split else contextlib.nullcontext():
        compared(layer, activation)


@every(missing=FOLLOWING, split=[False, True])
def test_each_part_may_be_missing(missing: str, split: bool, device: str) -> None:
    given = tuple(name for name in FOLLOWING if name != missing)
    with forced(config=SPLIT) if split else contextlib.nullcontext():
        for groups in (3, 0):
            compared(Layer.random(Case("", (2, 12, 5, 3), groups), given=given, device=device), missing)


def test_only_the_gradients_that_are_needed(device: str) -> None:
    layer = Layer.random(named(CASES, "groups of 4"), device=device)
    for groups, config in ((6, None), (6, SPLIT), (0, None)):
        layer.groups = groups
        full = dict(zip(NAMES, layer.double().run(theirs), strict=True))
        for name in ("x", "bias", "scale", "residual"):
            tensors = {n: getattr(layer, n) for n in ("x", *FOLLOWING)}
            tensors[name] = tensors[name].clone().requires_grad_()
            with forced(config=config):
                y = ours(groups, "silu", *tensors.values())
                (found,) = torch.autograd.grad(y, [tensors[name]], layer.dy)
            expected = full[f"d{name}"]
            assert expected is not None
            assert_close(found, expected, depth=layer.dy.numel() // 24, what=f"{groups}, {config}, {name}")


# Whole groups in several tiles, and blocks of both sides inside the sizes and beyond them.
@rotate(config=cover(kernels.configs()), channels_last=[False, True], groups=[7, 0, 70])
def test_every_candidate_config(config: object, channels_last: bool, groups: int, device: str) -> None:
    shape = (2, 70, 9, 7) if channels_last else (1, 70, 41, 13)
    with forced(config=config):
        compared(Layer.random(Case("", shape, groups), torch.float32, channels_last, device=device), config)


@every(channels_last=[False, True], groups=[2, 8, 0])
def test_as_many_slots_as_a_gpu_would_have(channels_last: bool, groups: int, device: str) -> None:
    layer = Layer.random(Case("", (2, 8, 200, 199), groups), torch.float32, channels_last, device=device)
    with forced(device=device_named("H200")), captured(device_named("H200")) as launches, torch.no_grad():
        TF.layer_norm_channels(layer.x) if groups == 0 else TF.group_norm(layer.x, groups)
    assert groups == 0 or launches[0].arguments["SLOTS"] > 2
    with forced(config=SPLIT), patched(launches_of, "LEAST_BLOCKS", 1):
        # The same division into slots with tiles that the interpreter can afford.
        compared(Layer.random(Case("", (2, 8, 61, 47), groups), torch.float32, channels_last, device=device), groups)


@pytest.mark.parametrize("name", ["H200", "MI300X"])
def test_whole_groups_are_read_once_where_registers_hold_them(name: str) -> None:
    device = device_named(name)
    for shape, groups, backward, once in (
        ((2, 640, 32, 32), 32, False, True), ((2, 1280, 16, 16), 32, True, True), ((2, 320, 64, 64), 32, False, False),
        ((1, 128, 512, 512), 32, False, False), ((2, 32, 64, 64), 32, True, True), ((8, 96, 56, 56), 0, True, True),
    ):  # fmt: skip
        for channels_last in (False, True):
            x = as_format(torch.empty(shape, dtype=torch.bfloat16, device="meta"), channels_last)
            view = launches_of.GroupView.of(x, groups, False)._replace(device=device)
            tile = view.tile(backward, residual=False)
            assert (tile is not None) == once, (shape, groups)
            if tile is not None:
                assert tile.step <= tile.channels and tile.pixels * tile.channels <= 1 << 15
                assert groups == 0 or (tile.step % view.size == 0 and tile.pixels >= view.pixels)


@rotate(case=[named(CASES, "groups of 10"), named(CASES, "pixels")], channels_last=[False, True], split=[False, True])
def test_a_mean_far_from_zero_costs_no_precision(case: Case, channels_last: bool, split: bool, device: str) -> None:
    layer = Layer.random(case, torch.float32, channels_last, None, ("weight", "bias"), device)
    # A spread of a thousandth: torch's channels-last group norm is off by percents there.
    layer.x = as_format((torch.randn(case.shape, device=device) * 0.05 + 1e3).contiguous(), channels_last)
    with forced(config=SPLIT) if split else contextlib.nullcontext():
        compared(layer, case)


@rotate(value=[float("nan"), float("inf")], groups=[4, 0, 12], split=[False, True], channels_last=[False, True])
def test_what_is_not_finite_stays_in_its_group(
    value: float, groups: int, split: bool, channels_last: bool, device: str
) -> None:
    layer = Layer.random(Case("", (3, 12, 5, 6), groups), torch.float32, channels_last, device=device)
    layer.x[1, 2, 3, 3] = value
    layer.dy[2, 4, 0, 0] = value
    with forced(config=SPLIT) if split else contextlib.nullcontext():
        found = layer.run(ours)
    for name, out, ref in zip(NAMES, found, layer.double().run(theirs), strict=True):
        assert out is not None and ref is not None and torch.equal(out.isfinite(), ref.isfinite()), name
        assert not ref.isfinite().all()


@every(groups=[5, 0], split=[False, True])
def test_two_runs_are_bit_equal(groups: int, split: bool, device: str) -> None:
    layer = Layer.random(Case("", (4, 20, 9, 9), groups), torch.bfloat16, True, device=device)
    with forced(config=SPLIT) if split else contextlib.nullcontext():
        first, second = layer.run(ours), layer.run(ours)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


@every(groups=[5, 0], split=[False, True])
def test_64_bit_offsets_change_nothing(groups: int, split: bool, device: str) -> None:
    for channels_last in (False, True):
        layer = Layer.random(Case("", (3, 10, 6, 7), groups), torch.float32, channels_last, device=device)
        with forced(config=SPLIT) if split else contextlib.nullcontext():
            narrow = layer.run(ours)
            with patched(launches_of, "needs_int64", lambda _elements: True):
                wide = layer.run(ours)
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True) if a is not None and b is not None)


def test_inputs_and_gradients_of_any_strides(device: str) -> None:
    for groups in (3, 0):
        layer = Layer.random(Case("", (4, 6, 8, 5), groups), torch.float64, device=device)
        layer.x = layer.x[::2, :, ::3]
        assert layer.weight is not None and layer.bias is not None and layer.scale is not None and layer.shift is not None
        layer.weight, layer.bias = layer.weight.repeat_interleave(2)[::2], layer.bias[:1].expand(6)
        layer.scale, layer.shift = layer.scale[::2], layer.shift[:2, :1].expand(2, 6)
        layer.dy = torch.randn(2, 3, 5, 6, device=device, dtype=torch.float64).permute(0, 3, 1, 2)
        layer.residual = torch.randn(1, 6, 1, 1, device=device, dtype=torch.float64).expand(2, 6, 3, 5)
        compared(layer, groups)


def test_scale_and_shift_may_have_unit_axes_for_pixels(device: str) -> None:
    layer = Layer.random(named(CASES, "groups of 4"), device=device)
    assert layer.scale is not None and layer.shift is not None
    flat = TF.group_norm(layer.x, 6, scale=layer.scale, shift=layer.shift)
    assert torch.equal(
        TF.group_norm(layer.x, 6, scale=layer.scale[..., None, None], shift=layer.shift[:, :, None, None]), flat
    )
    rows = layer.x.movedim(1, -1)
    flat = TF.layer_norm(rows, (24,), scale=layer.scale, shift=layer.shift)
    assert torch.equal(TF.layer_norm(rows, (24,), scale=layer.scale[:, None, None], shift=layer.shift[:, None, None]), flat)


# Layer norm over the last axis.


@rotate(shape=[(2, 5, 7, 24), (3, 37), (12,), (2, 3, 1), (4, 1, 1, 16)], dtype=DTYPES, following=[True, False])
def test_layer_norm_of_rows(shape: tuple[int, ...], dtype: torch.dtype, following: bool, device: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, c = shape[0] if len(shape) > 1 else 1, shape[-1]
    by_image = (n, c) if len(shape) > 1 else None
    x, dy, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    leaves = [x, *(torch.randn(c, dtype=wide, device=device) for _ in range(2))]
    if following and by_image:
        leaves += [*(torch.randn(by_image, dtype=wide, device=device) for _ in range(2)), residual]
    leaves = [t.requires_grad_() for t in leaves]
    rest = leaves[3:] or [None] * 3
    y = TF.layer_norm(*leaves[:1], (c,), *leaves[1:3], scale=rest[0], shift=rest[1], residual=rest[2], activation="gelu")
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    more = doubles[3:] or [None] * 3
    ref = F.layer_norm(doubles[0], (c,), *doubles[1:3])
    ref = followed(ref, *more, parse_activation("gelu"), axis=-1)
    assert y.is_contiguous() and y.dtype == dtype
    assert_close(y.detach(), ref.detach())
    for out, expected in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(ref, doubles, dy.double()), strict=True
    ):
        assert_close(out, expected.where(expected.abs() > 1e-12, 0), depth=x.numel() // c)


def test_layer_norm_of_a_permuted_image_is_contiguous_as_torchs(device: str) -> None:
    x = torch.randn(2, 12, 5, 7, device=device)
    rows = x.movedim(1, -1)
    y, ref = TF.layer_norm(rows, (12,)), F.layer_norm(rows, (12,))
    assert y.stride() == ref.stride()
    torch.testing.assert_close(y, ref)
    # Channels-last images are read in place.
    last = as_format(x, True).movedim(1, -1)
    with captured(device_named("H200")) as launches, torch.no_grad():
        TF.layer_norm(last, (12,))
    assert launches[0].arguments["x_ptr"].data_ptr() == last.data_ptr()


def test_layer_norm_over_several_axes_runs_on_torch(device: str) -> None:
    x = torch.randn(2, 3, 4, device=device)
    with pytest.raises(RuntimeError, match="several axes"):
        TF.layer_norm(x, (3, 4))
    with tritonconv.set_backend("auto"), pytest.warns(UserWarning, match="several axes"):
        torch.testing.assert_close(TF.layer_norm(x, (3, 4)), F.layer_norm(x, (3, 4)))


# Instance norm.


@rotate(shape=[(3, 5, 7), (2, 6, 5, 4), (2, 3, 3, 4, 2)], channels_last=[False, True], split=[False, True])
def test_instance_norm_and_its_running_statistics(
    shape: tuple[int, ...], channels_last: bool, split: bool, device: str
) -> None:
    x = as_format(torch.randn(shape, device=device) * 2 + 3, channels_last)
    c = shape[1]
    vectors = [torch.rand(c, device=device) + 0.5 for _ in range(4)]
    for batch in (True, False):
        given, expected = [t.clone() for t in vectors], [t.double() for t in vectors]
        with forced(config=SPLIT) if split else contextlib.nullcontext():
            y = TF.instance_norm(x, *given, batch, 0.3, activation=("leaky_relu", 0.2))
        ref = F.leaky_relu(F.instance_norm(x.double(), *expected, batch, 0.3), 0.2)
        assert_close(y, ref)
        assert y.is_contiguous()
        for out, running in zip(given, expected, strict=True):
            assert_close(out, running)
    given = [vectors[0].clone()[::2].repeat_interleave(2)[:c] for _ in range(2)]
    TF.instance_norm(x, *given)
    assert not torch.equal(given[0], vectors[0])


def test_instance_norm_moves_statistics_in_place_once(device: str) -> None:
    x = torch.randn(2, 4, 5, device=device)
    mean = torch.zeros(8, device=device)[::2]
    var = torch.ones(4, device=device, dtype=torch.float32)
    with record_launches() as launches, torch.no_grad():
        TF.instance_norm(x, mean, var)
    assert launches == ["group_norm_kernel", "group_norm_running_kernel"]
    assert_close(mean, 0.1 * x.double().mean((0, 2)))
    assert_close(var, 0.9 + 0.1 * x.double().var(2).mean(0))


# Arguments that are wrong, and nothing to compute.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.group_norm(x, 5), "divisible"),
        (lambda m, x: m.group_norm(x, 2.0), "num_groups"),
        (lambda m, x: m.group_norm(x[0, :, 0, 0], 2), "at least 2 dimensions"),
        (lambda m, x: m.group_norm(x, 2, torch.ones(3)), "weight"),
        (lambda m, x: m.group_norm(x, 2, eps="a"), "eps"),
        (lambda m, x: m.group_norm(x[:1, :, :1, :1], 6), "more than 1 value per channel"),
        (lambda m, _: m.group_norm(None, 2), None),
        (lambda m, x: m.instance_norm(x[:, :, :1, :1]), "more than 1 spatial"),
        (lambda m, x: m.instance_norm(x, use_input_stats=False), "running_mean"),
        (lambda m, x: m.instance_norm(x, torch.ones(3), torch.ones(3)), None),
        (lambda m, x: m.layer_norm(x, (4,)), "normalized_shape"),
        (lambda m, x: m.layer_norm(x, 3), None),
        (lambda m, x: m.layer_norm(x, (3,), torch.ones(4)), "weight"),
    ],
)
def test_torchs_errors(call: Callable[..., Any], message: str | None, device: str) -> None:
    x = torch.randn(2, 6, 4, 3, device=device)
    with pytest.raises(Exception, match=message) as expected:
        call(F, x)
    with pytest.raises(type(expected.value), match=message):
        call(TF, x)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (dict(scale=torch.ones(6)), "expected scale of size"),
        (dict(shift=torch.ones(2, 5)), "expected shift of size"),
        (dict(shift=torch.ones(2, 6, 1)), "expected shift of size"),
        (dict(residual=torch.ones(1, 6, 4, 3)), "expected residual of the input's size"),
        (dict(residual=torch.ones(2, 6, 4, 3).double()), "should be the same"),
    ],
)
def test_what_follows_must_fit(named: dict[str, Any], message: str, device: str) -> None:
    x = torch.randn(2, 6, 4, 3, device=device)
    with pytest.raises(RuntimeError, match=message):
        TF.group_norm(x, 2, **{name: t.to(device) for name, t in named.items()})
    with pytest.raises(ValueError, match="use_input_stats"):
        TF.instance_norm(x, torch.ones(6), torch.ones(6), use_input_stats=False, scale=torch.ones(2, 6))


def test_mixed_vectors_have_no_kernel(device: str) -> None:
    x = torch.randn(2, 6, 4, 3, device=device)
    with pytest.raises(RuntimeError, match="no kernel"):
        TF.group_norm(x, 2, torch.ones(6, device=device).double())
    with pytest.raises(RuntimeError, match="20000 channels"):
        TF.layer_norm_channels(torch.randn(1, 20000, 1, device=device))
    with pytest.raises(RuntimeError, match="too many"):
        torch.ops.tritonconv.group_norm(
            torch.randn(1, 20000, 1, device=device), *(None,) * 5, 0, 1e-5, "", 0.0, 0.0
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="expected scale of size"):
        torch.ops.tritonconv.group_norm(x, None, None, torch.ones(6, device=device), None, None, 2, 1e-5, "", 0.0, 0.0)


@pytest.mark.parametrize("shape", [(0, 6, 4, 3), (2, 6, 0, 3)])
def test_empty_tensors(shape: tuple[int, ...], device: str) -> None:
    results = []
    for module in (F, TF):
        x, w = torch.randn(shape, device=device).requires_grad_(), torch.ones(6, device=device).requires_grad_()
        y = module.group_norm(x, 2, w)
        results.append([y, *torch.autograd.grad(y.sum(), [x, w])])
        assert module.instance_norm(x.detach()).shape == shape
    torch.testing.assert_close(*results, equal_nan=True)
    assert TF.layer_norm_channels(torch.randn(shape, device=device)).shape == shape


def test_gradcheck(device: str) -> None:
    for groups in (2, 0):
        layer = Layer.random(Case("", (2, 4, 3, 2), groups), torch.float64, True, device=device)
        leaves = [t.requires_grad_() for t in (layer.x, layer.weight, layer.bias, layer.scale, layer.shift, layer.residual)]
        assert torch.autograd.gradcheck(lambda *t, g=groups: ours(g, "silu", *t), leaves, fast_mode=True)


def test_autocast_makes_results_fp32_where_torchs_does() -> None:
    calls: list[Callable[[Any, Any], Any]] = [
        lambda m, x: m.group_norm(x, 2), lambda m, x: m.layer_norm(x, (6,)), lambda m, x: m.instance_norm(x),
    ]  # fmt: skip
    # Fake tensors stand for those of a GPU, on which torch.autocast insists.
    for name in ("cuda", "cpu"):
        before = torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)
        torch.set_autocast_dtype(name, torch.float16)
        torch.set_autocast_enabled(name, True)
        try:
            with FakeTensorMode():
                x = torch.empty(2, 4, 5, 6, device=name, dtype=torch.float16)
                found, expected = ([call(m, x).dtype for call in calls] for m in (TF, F))
        finally:
            torch.set_autocast_enabled(name, before[0])
            torch.set_autocast_dtype(name, before[1])
        assert found == expected == [torch.float32 if name == "cuda" else torch.float16] * 2 + [torch.float16], name
