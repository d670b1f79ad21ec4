"""Hopper's kernels in the Gluon interpreter: forward passes and gradients against fp64, in several orders of events."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from calls import recorded
from cases import make_epilogue
from hopper import (
    BF16,
    FP16,
    HOPPER,
    ON_CPU,
    SEEDS,
    Layer,
    bits,
    channels_last,
    check,
    descriptors,
    forward,
    interpreted,
    of_every_seed,
    reference,
    reference_gradients,
)
from matrix import every, rotate, some
from reference import assert_close
from test_fuzz import sparse
from torch import Tensor
from tritonconv.kernels.activations import ACTIVATIONS
from tritonconv.kernels.hopper import conv, wgrad

from tritonconv.geometry import ConvGeometry, Pass, best_box, boxes_over, pass_extents
from tritonconv.ops.batch_norm.launch import Statistics, combine
from tritonconv.ops.conv.hopper import hopper_convolution, hopper_dgrad, hopper_wgrad
from tritonconv.ops.conv.hopper.convolution import axis_phases, pixels_of, rows_of
from tritonconv.ops.conv.hopper.supports import why_unsupported
from tritonconv.ops.conv.hopper.views import Image
from tritonconv.ops.conv.target import Result, Target
from tritonconv.ops.core.activation import make_spec
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import Launch, captured, forced
from tritonconv.tuning import Problem
from tritonconv.tuning.candidates import possible
from tritonconv.tuning.configs import as_dict, config_name

pytestmark = ON_CPU

DTYPES = [FP16, BF16]
FILTER = dict(padding=1)

LAYERS = [
    # what a tile's edges are
    Layer("3x3 padded", (2, 64, 9, 8), (64, 64, 3, 3), dict(padding=1)),
    Layer("sizes that no tile divides", (3, 64, 17, 13), (136, 64, 3, 3), dict(padding=1)),
    Layer("batch larger than a box holds", (70, 64, 3, 3), (64, 64, 3, 3), dict(padding=1)),
    Layer("one pixel", (1, 64, 1, 1), (64, 64, 3, 3), dict(padding=1)),
    Layer("unpadded, one output pixel", (2, 64, 3, 3), (64, 64, 3, 3)),
    Layer("one row", (2, 64, 1, 33), (64, 64, 1, 3), dict(padding=(0, 1))),
    Layer("filter larger than the image", (1, 64, 2, 2), (64, 64, 5, 5), dict(padding=2)),
    # channels: blocks of 64 or 128 with zeros behind the last
    Layer("tails of channels and filters", (2, 72, 9, 8), (40, 72, 3, 3), dict(padding=1)),
    Layer("8 channels and filters", (2, 8, 9, 8), (8, 8, 3, 3), dict(padding=1)),
    Layer("more channels than a block", (1, 200, 7, 6), (328, 200, 1, 3), dict(padding=(0, 1))),
    # padding
    Layer("causal", (2, 64, 20), (64, 64, 3), dict(padding="causal", dilation=3)),
    Layer("causal 2-d", (1, 64, 6, 7), (64, 64, 3, 2), dict(padding="causal")),
    Layer("even filter same", (1, 64, 6, 7), (64, 64, 2, 4), dict(padding="same")),
    Layer("padding wider than the filter", (1, 64, 4, 5), (64, 64, 2, 1), dict(padding=(3, 2))),
    # strides and dilations
    Layer("dilated", (2, 64, 9, 8), (64, 64, 3, 3), dict(padding=(2, 3), dilation=(2, 3))),
    Layer("stride 2", (2, 64, 9, 8), (72, 64, 3, 3), dict(padding=1, stride=2)),
    Layer("stride 2 of even sizes", (2, 64, 8, 6), (64, 64, 3, 3), dict(padding=1, stride=2)),
    Layer("stride of one axis", (2, 64, 9, 8), (64, 64, 3, 3), dict(padding=1, stride=(2, 1))),
    Layer("stride (2, 3)", (1, 64, 9, 12), (64, 64, 3, 2), dict(padding=(2, 0), stride=(2, 3))),
    Layer("stride 3 in 1-d", (2, 64, 37), (64, 64, 5), dict(padding=2, stride=3)),
    Layer("1x1 strided: phases without taps", (2, 64, 9, 8), (64, 64, 1, 1), dict(stride=2)),
    Layer("stride beyond the filter", (2, 64, 23), (64, 64, 2), dict(stride=5)),
    Layer("stride 2 dilation 2: one phase has all taps", (2, 64, 11), (64, 64, 3), dict(padding=1, stride=2, dilation=2)),
    Layer("stride 4 dilation 2", (2, 64, 31), (64, 64, 5), dict(padding=3, stride=4, dilation=2)),
    Layer("stride 4 dilation 6", (2, 64, 41), (64, 64, 4), dict(padding=7, stride=4, dilation=6)),
    Layer("stride 2 dilation 3", (2, 64, 15, 6), (64, 64, 3, 2), dict(padding=(3, 1), stride=2, dilation=(3, 1))),
    Layer("stride as large as the image", (1, 64, 2, 3), (64, 64, 2, 2), dict(padding=1, stride=(2, 3))),
    # rows and patches
    Layer("1x1: rows", (2, 64, 9, 8), (72, 64, 1, 1)),
    Layer("1x1 padded: no rows", (1, 64, 5, 4), (64, 64, 1, 1), dict(padding=1)),
    Layer("single pixel 1x1", (1, 64, 1, 1), (64, 64, 1, 1)),
    Layer("patches", (2, 64, 8, 12), (64, 64, 2, 2), dict(stride=2)),
    Layer("patches of an image's width", (2, 64, 6, 2), (64, 64, 2, 2), dict(stride=2)),
    Layer("patches and a rest", (2, 64, 9), (64, 64, 2), dict(stride=2)),
    # 1-d and 3-d
    Layer("1-d", (3, 64, 19), (72, 64, 5), dict(padding=2)),
    Layer("3-d", (1, 64, 4, 5, 6), (64, 64, 3, 3, 3), dict(padding=1)),
    Layer("3-d strided", (1, 64, 4, 5, 6), (64, 64, 3, 3, 3), dict(padding=1, stride=2)),
    Layer("3-d strided in depth", (2, 72, 5, 3, 4), (64, 72, 2, 3, 1), dict(padding=(1, 1, 0), stride=(3, 1, 2))),
    Layer("3-d patches", (1, 64, 2, 4, 4), (64, 64, 1, 2, 2), dict(stride=(1, 2, 2))),
    # groups: an axis of their own in place of the depth, and in 3-d the channels' multiples
    Layer("groups of 64", (2, 128, 9, 8), (128, 64, 3, 3), dict(padding=1, groups=2)),
    Layer("groups of 96", (1, 288, 5, 6), (288, 96, 3, 3), dict(padding=1, groups=3)),
    Layer("groups of 64 to 136", (1, 128, 5, 6), (272, 64, 3, 3), dict(padding=1, groups=2)),
    Layer("groups strided", (2, 192, 9, 7), (192, 96, 3, 3), dict(padding=1, groups=2, stride=2)),
    Layer("groups 1-d", (2, 192, 21), (192, 96, 3), dict(padding=1, groups=2)),
    Layer("groups 1x1", (2, 192, 5, 7), (208, 96, 1, 1), dict(groups=2)),
    Layer("groups of 128 in 3-d", (1, 256, 3, 4, 4), (256, 128, 1, 3, 3), dict(padding=(0, 1, 1), groups=2)),
    Layer("groups of 128 in 3-d 1x1x1", (1, 256, 3, 4, 4), (512, 128, 1, 1, 1), dict(groups=2)),
    Layer(
        "groups of 128 in 3-d strided", (1, 256, 4, 5, 3), (256, 128, 2, 3, 1),
        dict(padding=(1, 1, 0), groups=2, stride=(2, 2, 1)),
    ),
]  # fmt: skip

UP = dict(transposed=True)
TRANSPOSED = [
    Layer("stride 1", (2, 64, 7, 6), (64, 72, 3, 3), UP | dict(padding=1)),
    Layer("2x2 stride 2", (2, 64, 7, 6), (64, 72, 2, 2), UP | dict(stride=2)),
    Layer(
        "3x3 stride 2 with output padding", (2, 72, 7, 6), (72, 64, 3, 3), UP | dict(stride=2, padding=1, output_padding=1)
    ),
    Layer("4x4 stride 2", (1, 64, 6, 9), (64, 136, 4, 4), UP | dict(stride=2, padding=1)),
    Layer("stride beyond the filter: pixels without taps", (2, 64, 5, 4), (64, 64, 1, 2), UP | dict(stride=(2, 3))),
    Layer("dilated", (1, 64, 6, 5), (64, 64, 3, 2), UP | dict(stride=2, dilation=(2, 3), padding=1)),
    Layer("one pixel", (3, 64, 1, 1), (64, 64, 4, 4), UP),
    Layer("17 rows: a phase has a box less", (1, 64, 9, 9), (64, 64, 3, 3), UP | dict(stride=2, padding=1)),
    Layer("rows", (2, 64, 7, 6), (64, 72, 1, 1), UP),
    Layer("1-d of eight phases", (2, 72, 8), (72, 64, 16), UP | dict(stride=8, padding=4)),
    Layer("3-d of eight phases", (1, 64, 3, 2, 4), (64, 40, 2, 2, 2), UP | dict(stride=2)),
    Layer("groups of 64", (1, 128, 5, 6), (128, 96, 3, 3), UP | dict(stride=2, padding=1, groups=2)),
    Layer("groups of 128 in 3-d", (1, 256, 2, 3, 3), (256, 128, 1, 2, 2), UP | dict(stride=(1, 2, 2), groups=2)),
]  # fmt: skip


def name_of(value: object) -> str:
    return config_name(as_dict(value)) if hasattr(value, "kwargs") else str(value).removeprefix("torch.")


def layer_named(why: str) -> Layer:
    return next(layer for layer in LAYERS + TRANSPOSED if layer.why == why)


@rotate(layer=LAYERS, dtype=DTYPES)
def test_forward_and_gradients_match_fp64(layer: Layer, dtype: torch.dtype) -> None:
    check(layer, dtype)


def test_results_are_poison_until_their_launches_run() -> None:
    """Else the other tests would not see what a kernel leaves unwritten."""
    layer = layer_named("3x3 padded")
    x, w, dy = layer.tensors(BF16)
    with captured(HOPPER) as launches:
        results = (
            forward(x, w, layer.geometry),
            hopper_dgrad(dy, w, layer.geometry),
            hopper_wgrad(dy, x, layer.geometry, True),
        )
    assert len(launches) == 3 and all(bool(t.isnan().all()) for t in results)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.why in (
    "3x3 padded", "stride (2, 3)", "1x1: rows", "groups of 96", "3-d strided",
)], ids=str)  # fmt: skip
def test_every_order_of_events_gives_the_same_bits(layer: Layer) -> None:
    g = layer.geometry
    x, w, dy = layer.tensors(BF16)
    epilogue = make_epilogue(g.out_channels, reference(x, w, g).to(BF16), BF16, "cpu")
    orders = [None, *range(12)]
    of_every_seed(lambda: forward(x, w, g, epilogue), seeds=orders)
    of_every_seed(lambda: hopper_dgrad(dy, w, g), seeds=orders)
    of_every_seed(lambda: hopper_wgrad(dy, x, g, True), seeds=orders)


# Large enough for every config: more pixels, filters and channels than half of the largest tile, and odd edges.
WIDE = Layer("more than half of every tile", (2, 136, 11, 8), (200, 136, 3, 3), FILTER)


def problem(kernel: str, pass_: Pass) -> Problem:
    return Problem(kernel, WIDE.geometry, "bfloat16", False, True, HOPPER, pass_)


def test_every_config_is_a_candidate_of_a_wide_layer() -> None:
    for module, pass_ in (("conv", "fprop"), ("conv", "dgrad"), ("wgrad", "wgrad")):
        configs = {"conv": conv, "wgrad": wgrad}[module].configs()
        assert possible(problem(f"hopper.{module}", pass_)) == configs, (module, pass_)  # type: ignore[arg-type]


@rotate(config=conv.configs(), dtype=DTYPES)
def test_every_config_of_the_forward_kernel(config: Any, dtype: torch.dtype) -> None:
    g = WIDE.geometry
    x, w, _ = WIDE.tensors(dtype)
    plain = reference(x, w, g)
    assert_close(of_every_seed(lambda: forward(x, w, g), config=config), plain, what=config)
    epilogue = make_epilogue(g.out_channels, plain.to(dtype), dtype, "cpu", activation=make_spec("relu"))
    y = of_every_seed(lambda: forward(x, w, g, epilogue), config=config)
    assert_close(y, reference(x, w, g, epilogue), what=config)
    check_statistics(WIDE, dtype, config=config)


@rotate(config=conv.configs(), stride=[1, 2])
def test_every_config_of_the_data_gradient(config: Any, stride: int) -> None:
    g = ConvGeometry.parse(WIDE.input, WIDE.weight, nd=2, padding=1, stride=stride)
    x, w, dy = Layer("", WIDE.input, WIDE.weight, dict(padding=1, stride=stride)).tensors(BF16)
    dx = of_every_seed(lambda: hopper_dgrad(dy, w, g), config=config)
    assert_close(dx, reference_gradients(x, w, dy, g)[0], what=config)


@pytest.mark.parametrize("config", wgrad.configs(), ids=name_of)
def test_every_config_of_the_weight_gradient(config: Any) -> None:
    for layer in (WIDE, RANGES):
        x, w, dy = layer.tensors(BF16)
        dw = of_every_seed(lambda x=x, dy=dy, g=layer.geometry: hopper_wgrad(dy, x, g, True), config=config)  # type: ignore[misc]
        assert_close(dw, reference_gradients(x, w, dy, layer.geometry)[1], what=(config, layer))


# The epilogue.


def bias_alone(k: int) -> Epilogue:
    return Epilogue(bias=torch.randn(k).to(BF16))


def norm_of(k: int, weight: bool, bias: bool) -> BatchNorm:
    vectors = torch.randn(k), torch.rand(k) + 0.5
    return BatchNorm(*vectors, torch.randn(k) if weight else None, torch.randn(k) if bias else None, 1e-3)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.why in (
    "tails of channels and filters", "1x1: rows", "groups of 64 to 136", "groups of 128 in 3-d", "1-d", "one pixel",
)], ids=str)  # fmt: skip
def test_parts_of_the_epilogue(layer: Layer) -> None:
    g = layer.geometry
    x, w, _ = layer.tensors(BF16)
    plain, k = reference(x, w, g), g.out_channels
    residual = torch.randn_like(plain).to(BF16)
    relu = make_spec("relu")
    epilogues = [
        bias_alone(k),
        Epilogue(batch_norm=norm_of(k, True, True)),
        Epilogue(batch_norm=norm_of(k, False, False)),
        Epilogue(bias=torch.randn(k).to(BF16), batch_norm=norm_of(k, False, True), activation=relu),
        Epilogue(batch_norm=norm_of(k, True, False), residual=residual),
        Epilogue(residual=residual, activation=relu),
        # Copied: it does not lie as the result does.
        Epilogue(residual=residual.contiguous()),
        make_epilogue(k, residual, BF16, "cpu", activation=relu),
    ]
    for epilogue in epilogues:
        y = of_every_seed(lambda epilogue=epilogue: forward(x, w, g, epilogue))  # type: ignore[misc]
        assert_close(y, reference(x, w, g, epilogue), what=(layer, epilogue.describe()))


@rotate(name=ACTIVATIONS, dtype=DTYPES)
def test_activations(name: str, dtype: torch.dtype) -> None:
    layer = layer_named("tails of channels and filters")
    x, w, _ = layer.tensors(dtype)
    epilogue = Epilogue(batch_norm=BatchNorm(torch.zeros(40), torch.full((40,), 300.0), None, None, 0.0),
                        activation=make_spec(name))  # fmt: skip
    y = interpreted(lambda: forward(x, w, layer.geometry, epilogue))
    assert_close(y, reference(x, w, layer.geometry, epilogue), what=name)


# Statistics.


def slots_of(layer: Layer, values: Tensor, pixels: int) -> list[Tensor]:
    """Results (N, K, *spatial) by boxes of so many pixels, [pixels, K] each, in the order of the kernel's slots."""
    g = layer.geometry
    pass_: Pass = "dgrad" if g.transposed else "fprop"
    seen, _, _ = rows_of(g.mirrored if g.transposed else g, None, None)
    extents = pass_extents(seen, pass_)
    sizes = seen.input if g.transposed else seen.output
    image = values.movedim(1, -1).reshape(seen.batch, *sizes, g.out_channels)
    phases = pixels_of(axis_phases(seen, True)) if g.transposed else [(0, 0, 0)]
    step = seen.stride if g.transposed else (1, 1, 1)
    slots = []
    for d, h, w in phases:
        phase = image[:, d :: step[0], h :: step[1], w :: step[2]]
        box = best_box(extents, pixels)
        for corner in itertools.product(*(range(0, size, side) for size, side in zip(extents, box, strict=True))):
            part = phase[tuple(slice(first, first + side) for first, side in zip(corner, box, strict=True))]
            slots.append(part.reshape(-1, g.out_channels))
    return slots


def check_statistics(layer: Layer, dtype: torch.dtype, *, config: Any = None) -> None:
    """Counts and moments of every slot, and of all of them together, against torch."""
    g = layer.geometry
    x, w, _ = layer.tensors(dtype)
    # A mean far from zero, that squares minus squares would lose.
    epilogue = Epilogue(bias=torch.full((g.out_channels,), 100.0).to(dtype))
    slots: list[Tensor] = []
    values = reference(x, w, g, epilogue)
    runs = []
    for seed in SEEDS:
        slots = []
        y = interpreted(lambda slots=slots: forward(x, w, g, epilogue, slots=slots), config=config, seed=seed)  # type: ignore[misc]
        assert_close(y, values, what=layer)
        runs.append(slots)
    counts, moments = runs[0]
    assert all(torch.equal(bits(a), bits(b)) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    with captured(HOPPER) as launches:
        forward(x, w, g, epilogue, slots=[])
    pixels = (config or launches[0].config).kwargs["BLOCK_M"]
    expected = slots_of(layer, values, pixels)
    assert counts.tolist() == [len(part) for part in expected]
    for i, part in enumerate(expected):
        # Nobody reads the moments of an empty slot.
        if len(part):
            mean = part.mean(0)
            torch.testing.assert_close(moments[0, i].double(), mean, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(moments[1, i].double(), (part - mean).square().sum(0), rtol=1e-3, atol=1e-3)
    mean, var, count = combine(Statistics(counts, moments))
    every = values.movedim(1, -1).reshape(-1, g.out_channels)
    assert count.item() == len(every)
    torch.testing.assert_close(mean.double(), every.mean(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(var.double(), every.var(0, correction=0), rtol=1e-3, atol=1e-3)


STATISTICS = [
    "3x3 padded", "sizes that no tile divides", "batch larger than a box holds", "one pixel",
    "tails of channels and filters", "stride 2", "1x1: rows", "1-d", "3-d", "groups of 64 to 136", "groups of 128 in 3-d",
]  # fmt: skip


@pytest.mark.parametrize("layer", [layer_ for layer_ in LAYERS if layer_.why in STATISTICS], ids=str)
def test_statistics(layer: Layer) -> None:
    check_statistics(layer, BF16)


# Transposed convolutions.


@rotate(layer=TRANSPOSED, dtype=DTYPES)
def test_transposed_convolutions(layer: Layer, dtype: torch.dtype) -> None:
    g = layer.geometry
    x, w, dy = layer.tensors(dtype)
    plain = reference(x, w, g)
    assert_close(of_every_seed(lambda: forward(x, w, g)), plain, what=layer)
    epilogue = make_epilogue(g.out_channels, plain.to(dtype), dtype, "cpu", activation=make_spec("silu"))
    y = of_every_seed(lambda: forward(x, w, g, epilogue))
    assert_close(y, reference(x, w, g, epilogue), what=layer)
    # Its gradients are a convolution, and that convolution's weight gradient.
    dx, dw = reference_gradients(x, w, dy, g)
    assert_close(of_every_seed(lambda: forward(dy, w, g.mirrored)), dx, what=layer)
    assert_close(of_every_seed(lambda: hopper_wgrad(x, dy, g.mirrored, True)), dw, what=layer)


@every(layer=some(TRANSPOSED, 7))
def test_statistics_of_transposed_convolutions(layer: Layer) -> None:
    check_statistics(layer, BF16)


def test_a_box_beyond_a_small_phase_is_an_empty_slot() -> None:
    """Phases differ by a row, which may be the only one of a box."""
    layer = layer_named("17 rows: a phase has a box less")
    slots: list[Tensor] = []
    x, w, _ = layer.tensors(BF16)
    interpreted(lambda: forward(x, w, layer.geometry, slots=slots))
    assert 0 in slots[0] and slots[0].sum() == math.prod(layer.geometry.output) * layer.geometry.batch


# The weight gradient's ranges.

RANGES = Layer("several ranges", (1, 72, 67, 61), (40, 72, 1, 2))
# The more boxes, the more ranges.
OF_64 = next(config for config in wgrad.configs() if config.kwargs["BLOCK_K"] == 64)


def launches_of_wgrad(layer: Layer) -> list[Launch]:
    x, _, dy = layer.tensors(BF16)
    with captured(HOPPER) as launches, forced(config=OF_64):
        hopper_wgrad(dy, x, layer.geometry, True)
    return launches


def test_one_range_writes_the_weight_gradient_itself() -> None:
    one, *others = launches_of_wgrad(layer_named("3x3 padded"))
    assert one.arguments["RANGES"] == 1 and not others
    assert one.arguments["dw"].base.dtype == BF16


def test_several_ranges_are_added_in_their_order() -> None:
    first, second = launches_of_wgrad(RANGES)
    count, size = first.arguments["RANGES"], first.arguments["RANGE"]
    boxes = boxes_over(pass_extents(RANGES.geometry, "wgrad"), first.arguments["dy"].block_shape[:4])
    assert count > 1 and boxes % size, "the last range is shorter"
    assert second.kernel.__name__ == "wgrad_reduce_kernel" and first.arguments["dw"].base.dtype == torch.float32
    x, w, dy = RANGES.tensors(BF16)
    dw = of_every_seed(lambda: hopper_wgrad(dy, x, RANGES.geometry, True), config=OF_64, seeds=range(8))
    assert_close(dw, reference_gradients(x, w, dy, RANGES.geometry)[1])


@pytest.mark.parametrize("layer", [
    RANGES, *(layer for layer in LAYERS if layer.why in ("3x3 padded", "1-d", "3-d strided", "groups of 96")),
], ids=str)  # fmt: skip
def test_a_contiguous_weight_has_a_contiguous_gradient(layer: Layer) -> None:
    x, w, dy = layer.tensors(FP16)
    dw = of_every_seed(lambda: hopper_wgrad(dy, x, layer.geometry, False), config=OF_64)
    assert dw.is_contiguous()
    assert_close(dw, reference_gradients(x, w, dy, layer.geometry)[1])


# Layouts.


def copies(x: Tensor, w: Tensor, g: ConvGeometry) -> int:
    """How many tensors are copied on the way to the kernel."""
    with captured(HOPPER):
        call = recorded(lambda x, w: hopper_convolution(x, w, Epilogue(), g), x, w)
    assert isinstance(call.result, Result) and call.kernel == "hopper.conv"
    return call.copies


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 8:72], lambda x: x[:, 64:, ::2, 1::2], lambda x: x[:, :64].transpose(2, 3), lambda x: x[::2, 64:],
        lambda x: x[:, :64, 1:, 2:],
    ],
    ids=["channels", "every second pixel", "rows and columns", "every second image", "offset"],
)  # fmt: skip
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (2, 2)], ids=str)
def test_views_are_read_in_place(view: Any, kernel: int, stride: int) -> None:
    x = view(channels_last(torch.randn(3, 128, 10, 8).to(BF16)))
    w = channels_last(torch.randn(72, 64, kernel, kernel).to(BF16))
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, padding=kernel // 3, stride=stride)
    assert copies(x, w, g) == 0
    assert_close(of_every_seed(lambda: forward(x, w, g)), reference(x, w, g))


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_contiguous_tensors_are_copied(transposed: bool) -> None:
    """The result is channels-last where either of them is."""
    for contiguous_x, contiguous_w in ((True, False), (False, True)):
        x, w = channels_last(torch.randn(2, 64, 6, 5).to(BF16)), channels_last(torch.randn(64, 64, 3, 3).to(BF16))
        x, w = x.contiguous() if contiguous_x else x, w.contiguous() if contiguous_w else w
        g = ConvGeometry.parse(x.shape, w.shape, nd=2, padding=1, transposed=transposed)
        assert copies(x, w, g) == 1
        y = of_every_seed(lambda: forward(x, w, g))  # noqa: B023
        assert y.stride()[1] == 1
        assert_close(y, reference(x, w, g))


def test_a_result_of_one_pixel_has_either_format() -> None:
    x, w = torch.randn(3, 64, 3, 3).to(BF16), torch.randn(72, 64, 3, 3).to(BF16)
    g = ConvGeometry.parse(x.shape, w.shape, nd=2)
    y = of_every_seed(lambda: forward(x, w, g))
    assert y.is_contiguous()
    assert_close(y, reference(x, w, g))


def test_gradients_of_contiguous_tensors() -> None:
    layer = layer_named("tails of channels and filters")
    x, w, dy = (t.contiguous() for t in layer.tensors(BF16))
    dx, dw = reference_gradients(x, w, dy, layer.geometry)
    assert_close(of_every_seed(lambda: hopper_dgrad(dy, w, layer.geometry)), dx)
    assert_close(of_every_seed(lambda: hopper_wgrad(dy, x, layer.geometry, False)), dw)


@pytest.mark.parametrize(
    "layer", ["3x3 padded", "tails of channels and filters", "1x1: rows", "groups of 96", "1-d", "3-d"]
)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_target_leaves_its_neighbors_alone(layer: str, residual: bool) -> None:
    check_target(layer_named(layer), residual)


@pytest.mark.parametrize("layer", ["2x2 stride 2", "3x3 stride 2 with output padding"])
def test_a_target_of_a_transposed_convolution(layer: str) -> None:
    check_target(layer_named(layer), residual=True)


def test_no_box_is_written_to_channels_that_start_anywhere() -> None:
    """They are copied there, behind the launch."""
    x, w, _ = layer_named("3x3 padded").tensors(BF16)
    y = channels_last(torch.zeros(2, 88, 9, 8).to(BF16))[:, 4:68]
    with captured(HOPPER) as launches:
        forward(x, w, layer_named("3x3 padded").geometry, target=Target(y))
    (one,) = launches
    assert y.data_ptr() % 16 == 8 and all(d.base.data_ptr() % 16 == 0 for d in descriptors(one, "y"))


def check_target(layer: Layer, residual: bool) -> None:
    g = layer.geometry
    x, w, _ = layer.tensors(BF16)
    plain, k = reference(x, w, g), g.out_channels
    epilogue = Epilogue(residual=torch.randn_like(plain).to(BF16)) if residual else Epilogue()
    n, _, *spatial = plain.shape
    for seed in SEEDS:
        room = channels_last(torch.randn(n, k + 24, *spatial).to(BF16))
        before = room.clone()
        y = room[:, 8 : 8 + k]
        interpreted(lambda y=y: forward(x, w, g, epilogue, target=Target(y)), seed=seed)  # type: ignore[misc]
        assert_close(y, reference(x, w, g, epilogue), what=layer)
        assert torch.equal(room[:, :8], before[:, :8]) and torch.equal(room[:, 8 + k :], before[:, 8 + k :])


# What a tolerance would hide.


@every(layer=some(LAYERS, 16))
def test_small_integers_are_exact(layer: Layer) -> None:
    g = layer.geometry
    x, w, dy = layer.tensors(BF16, integers=True)
    wide_dx, wide_dw = reference_gradients(x, w, dy, g)
    assert_exact(interpreted(lambda: forward(x, w, g)), reference(x, w, g))
    assert_exact(interpreted(lambda: hopper_dgrad(dy, w, g)), wide_dx)
    assert_exact(interpreted(lambda: hopper_wgrad(dy, x, g, True)), wide_dw)


def assert_exact(out: Tensor, wide: Tensor, what: object = "") -> None:
    # bf16 holds integers up to 256.
    exact = wide.abs() <= 256
    assert torch.equal(out.double()[exact], wide[exact]), what


@pytest.mark.parametrize("layer", [
    "3x3 padded", "tails of channels and filters", "stride 2", "stride (2, 3)", "1x1 strided: phases without taps",
    "dilated", "1x1: rows", "patches", "groups of 96", "1-d", "3-d", "groups of 128 in 3-d",
    "batch larger than a box holds",
])  # fmt: skip
def test_nan_and_inf_reach_the_outputs_that_see_them(layer: str) -> None:
    """And no others: not by zeros of padding, of channels behind the last, of neighbors in a box, or of other groups."""
    case = layer_named(layer)
    g = case.geometry
    x, w, dy = case.tensors(BF16)
    # Of one sign, so that no infinities meet.
    w = channels_last(w.abs() + 0.1)
    for t in (x, dy):
        last = tuple(size - 1 for size in t.shape)
        t[(0, 0, *(size // 2 for size in t.shape[2:]))] = math.nan
        t[last] = math.inf
    assert_close(of_every_seed(lambda: forward(x, w, g)), reference(x, w, g))
    dx, _ = reference_gradients(x, w, dy, g)
    assert_close(of_every_seed(lambda: hopper_dgrad(dy, w, g)), dx)


def poisoned(t: Tensor) -> Tensor:
    """The same tensor with NaN before and behind it, on 16 bytes."""
    room = torch.full((t.numel() + 128,), math.nan, dtype=t.dtype)
    view = room.as_strided(t.shape, t.stride(), 64)
    view.copy_(t)
    return view


@pytest.mark.parametrize(
    "layer", ["tails of channels and filters", "groups of 96", "1x1: rows", "stride 2", "8 channels and filters"]
)
def test_nan_around_the_tensors_is_never_read(layer: str) -> None:
    case = layer_named(layer)
    g = case.geometry
    x, w, dy = case.tensors(BF16)
    dx, dw = reference_gradients(x, w, dy, g)
    y = reference(x, w, g)
    x, w, dy = poisoned(x), poisoned(w), poisoned(dy)
    assert_close(interpreted(lambda: forward(x, w, g)), y)
    assert_close(interpreted(lambda: hopper_dgrad(dy, w, g)), dx)
    assert_close(interpreted(lambda: hopper_wgrad(dy, x, g, True)), dw)


def test_inputs_are_left_as_they_were() -> None:
    layer = layer_named("3x3 padded")
    tensors = layer.tensors(BF16)
    x, w, dy = (t.clone() for t in tensors)
    g = layer.geometry
    interpreted(lambda: (forward(x, w, g), hopper_dgrad(dy, w, g), hopper_wgrad(dy, x, g, True)))
    assert all(torch.equal(a, b) for a, b in zip((x, w, dy), tensors, strict=True))


# Equivalences.

FIRST, FIRST_WGRAD = conv.configs()[0], wgrad.configs()[0]


@pytest.mark.parametrize("shape", [(2, 192, 21), (2, 192, 7, 6)], ids=["1-d", "2-d"])
def test_groups_are_dense_convolutions_side_by_side(shape: tuple[int, ...]) -> None:
    ones = (3,) * (len(shape) - 2)
    layer = Layer("", shape, (208, 96, *ones), dict(padding=1, groups=2))
    x, w, dy = layer.tensors(BF16)
    y = interpreted(lambda: forward(x, w, layer.geometry), config=FIRST)
    dx = interpreted(lambda: hopper_dgrad(dy, w, layer.geometry), config=FIRST)
    dw = interpreted(lambda: hopper_wgrad(dy, x, layer.geometry, True), config=FIRST_WGRAD)
    for group in range(2):
        c, k = slice(96 * group, 96 * group + 96), slice(104 * group, 104 * group + 104)
        own_x, own_w, own_dy = channels_last(x[:, c]), channels_last(w[k]), channels_last(dy[:, k])
        g = ConvGeometry.parse(own_x.shape, own_w.shape, nd=len(ones), padding=1)
        assert torch.equal(interpreted(lambda: forward(own_x, own_w, g), config=FIRST), y[:, k])  # noqa: B023
        assert torch.equal(interpreted(lambda: hopper_dgrad(own_dy, own_w, g), config=FIRST), dx[:, c])  # noqa: B023
        own_dw = interpreted(lambda: hopper_wgrad(own_dy, own_x, g, True), config=FIRST_WGRAD)  # noqa: B023
        assert torch.equal(own_dw, dw[k])


@every(layer=some(TRANSPOSED, 5))
def test_a_transposed_convolution_is_a_data_gradient(layer: Layer) -> None:
    g = layer.geometry
    x, w, _ = layer.tensors(BF16)
    y = interpreted(lambda: forward(x, w, g))
    assert torch.equal(y, interpreted(lambda: hopper_dgrad(x, w, g.mirrored)))


@pytest.mark.parametrize("stride", [1, 2])
def test_fewer_axes_are_axes_of_one_pixel(stride: int) -> None:
    layer = Layer("", (2, 64, 21), (72, 64, 3), dict(padding=1, stride=stride))
    x, w, dy = layer.tensors(BF16)
    results = []
    for lead in (0, 1, 2):
        one = (1,) * lead
        shapes = (t.reshape(*t.shape[:2], *one, t.shape[2]) for t in (x, w, dy))
        # A reshape may leave strides of unit axes that no channels-last tensor has.
        own_x, own_w, own_dy = (channels_last(t) for t in shapes)
        zeros = (0,) * lead
        g = ConvGeometry.parse(own_x.shape, own_w.shape, nd=1 + lead, padding=(*zeros, 1), stride=(*one, stride))
        y = interpreted(lambda: forward(own_x, own_w, g), config=FIRST)  # noqa: B023
        dx = interpreted(lambda: hopper_dgrad(own_dy, own_w, g), config=FIRST)  # noqa: B023
        dw = interpreted(lambda: hopper_wgrad(own_dy, own_x, g, True), config=FIRST_WGRAD)  # noqa: B023
        results.append((y.flatten(), dx.flatten(), dw.flatten()))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


# Sizes beyond 32 bits.


def test_phases_begin_beyond_2_to_the_31_elements() -> None:
    row = 3 * 2**30
    image = Image(2, (1, 5, 4), 64, 1, (8 * row, 8 * row, row, 64), False)
    view = image.view((1, 1, 8, 8), 64, BF16, (0, 1, 1), (1, 2, 2))
    assert view.offset == row + 64
    shape, strides, _, _ = view.arguments
    assert shape == [2, 1, 2, 2, 64] and strides == [8 * row, 8 * row, 2 * row, 128, 1]


def test_descriptors_of_meta_tensors_far_apart() -> None:
    """Sizes, strides and places of a launch for tensors that no memory has."""
    w = torch.empty_strided((64, 64, 3, 3), (576, 1, 192, 64), dtype=BF16, device="meta")
    x = torch.empty_strided((2, 64, 9, 8), (2**35, 1, 2**32, 64), dtype=BF16, device="meta")
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, padding=1, stride=2)
    with captured(HOPPER) as launches:
        forward(x, w, g)
    (one,) = launches
    phases = descriptors(one, "x")
    assert [p.base.storage_offset() for p in phases] == [0, 64, 2**32, 2**32 + 64]
    assert all(p.strides == [2**35, 9 * 8 * 64, 2**33, 128, 1] for p in phases)
    assert [p.shape for p in phases] == [[2, 1, h, w, 64] for h, w in ((5, 4), (5, 4), (4, 4), (4, 4))]


def test_an_image_across_more_than_2_to_the_31_elements() -> None:
    # Memory that is never touched is never mapped.
    storage = torch.empty(2**31 + 2**20, dtype=BF16)
    x = storage.as_strided((2, 64, 5, 4), (2**31, 1, 2**10, 64))
    x.copy_(torch.randn(2, 64, 5, 4))
    w = channels_last(torch.randn(64, 64, 3, 3).to(BF16))
    for stride in (1, 2):
        g = ConvGeometry.parse(x.shape, w.shape, nd=2, padding=1, stride=stride)
        assert_close(interpreted(lambda: forward(x, w, g)), reference(x, w, g))  # noqa: B023


# Random layers.


def draw(seed: int) -> dict[str, Any]:
    """A random layer that the kernels support."""
    for attempt in itertools.count():
        r = random.Random(1000 * seed + attempt)
        nd = r.choice([1, 2, 2, 2, 3])
        groups = r.choice([1, 1, 1, 2, 3])
        sizes = [128, 256] if groups > 1 and nd == 3 else [64, 72, 96, 136] if groups > 1 else [8, 16, 40, 64, 72, 136, 264]
        c, k = r.choice(sizes), r.choice(sizes)
        kernel = [r.choice([1, 1, 2, 3, 3, 4, 5] if nd < 3 else [1, 2, 3]) for _ in range(nd)]
        stride = kernel if r.random() < 0.15 else [r.choice([1, 1, 2, 3]) for _ in range(nd)]
        padding = [r.choice([0, 1, 2]) for _ in range(nd)]
        dilation = [r.choice([1, 1, 2, 3]) for _ in range(nd)]
        spatial = [max(d * (t - 1) + 1 - 2 * p, s) + r.randrange(9) for d, t, p, s in
                   zip(dilation, kernel, padding, stride, strict=True)]  # fmt: skip
        layer = dict(
            x=(r.choice([1, 2, 3, 9]), groups * c, *spatial), w=(groups * k, c, *kernel), stride=tuple(stride),
            padding=tuple(padding), dilation=tuple(dilation), groups=groups, dtype=r.choice(["float16", "bfloat16"]),
            config=r.random() if groups == 1 or nd < 3 else None, seed=r.randrange(100),
            residual=r.random() < 0.3, relu=r.random() < 0.5, w_cl=r.random() < 0.7,
        )  # fmt: skip
        g = geometry_of(layer)
        passes: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")
        if all(why_unsupported(g, BF16, HOPPER, pass_) is None for pass_ in passes):
            return layer
    raise AssertionError


def pick(configs: list[Any], share: float | None) -> Any:
    return None if share is None else configs[int(share * len(configs))]


def geometry_of(layer: dict[str, Any]) -> ConvGeometry:
    numbers = {name: layer[name] for name in ("stride", "padding", "dilation", "groups")}
    return ConvGeometry.parse(layer["x"], layer["w"], nd=len(layer["x"]) - 2, **numbers)


@every(seed=some(range(40), 12))
def test_random_layers_are_exact(seed: int) -> None:
    layer = draw(seed)
    torch.manual_seed(seed)
    g, dtype = geometry_of(layer), getattr(torch, layer["dtype"])
    x, w, dy = (channels_last(sparse(shape, dtype, "cpu")) for shape in (g.input_shape, g.weight_shape, g.output_shape))
    residual = sparse(g.output_shape, dtype, "cpu") if layer["residual"] else None
    epilogue = Epilogue(residual=residual, activation=make_spec("relu") if layer["relu"] else None)
    order = layer["seed"]
    config, config_wgrad = (pick(module.configs(), layer["config"]) for module in (conv, wgrad))
    dx, dw = reference_gradients(x, w, dy, g)
    what = f"repeat with draw({seed}): {layer}"
    given = w if layer["w_cl"] else w.contiguous()
    y = interpreted(lambda: forward(x, given, g, epilogue), config=config, seed=order)
    assert_exact(y, reference(x, w, g, epilogue), f"forward, {what}")
    assert_exact(interpreted(lambda: hopper_dgrad(dy, given, g), config=config, seed=order), dx, f"dgrad, {what}")
    out = interpreted(lambda: hopper_wgrad(dy, x, g, layer["w_cl"]), config=config_wgrad, seed=order)
    assert_exact(out, dw, f"wgrad, {what}")
