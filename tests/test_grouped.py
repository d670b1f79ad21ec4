"""Groups that share a tile: every pass against fp64, what a NaN reaches, and how many groups are one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from calls import convolution, patched, transposed_convolution
from cases import ConvCase, make_epilogue, make_tensors
from matrix import cover, every, named, rotate, some
from reference import assert_close, conv_reference
from torch import Tensor
from tritonconv.kernels import conv_dgrad, conv_flat, conv_wgrad

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm import launch as batch_norm
from tritonconv.ops.conv.dense import convolve_dense, plan_for, problem_of
from tritonconv.ops.conv.gradients import NormGradient
from tritonconv.ops.conv.gradients import conv_dgrad as launch_dgrad
from tritonconv.ops.conv.plan import PACK_WIDTH, packed
from tritonconv.ops.conv.target import Target
from tritonconv.ops.core.activation import make_spec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.tuning import Problem, device_named
from tritonconv.tuning.candidates import possible
from tritonconv.tuning.cost import predict
from tritonconv.tuning.tables import layer_key

F = torch.nn.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


def case(why: str, size: tuple[int, ...], groups: int, c: int, k: int, *, filter: int = 3, **more: Any) -> ConvCase:
    """A layer by channels and filters of each group; `size`: batch and image."""
    nd = len(size) - 1
    shape = (size[0], groups * c, *size[1:])
    return ConvCase(why, shape, (groups * k, c, *(filter,) * nd), "", dict(padding=filter // 2, groups=groups) | more)


CASES = [
    case("4 of 4", (2, 7, 6), 4, 4, 4),
    case("32 of 4", (1, 5, 6), 32, 4, 4),
    case("8 of 8 stride 2", (2, 9, 7), 8, 8, 8, stride=2),
    case("16 of 3 dilated", (1, 9, 11), 16, 3, 3, dilation=2),
    case("6 of 5 to 4", (2, 7, 5), 6, 5, 4),
    case("9 of 6 to 10, mixed", (1, 8, 9), 9, 6, 10, stride=(2, 1), dilation=(1, 2), padding=(0, 3)),
    case("2 of 4 to 16", (2, 6, 7), 2, 4, 16),
    case("4 of 12 to 2, 5x5", (1, 7, 7), 4, 12, 2, filter=5),
    case("7 of 4", (2, 5, 5), 7, 4, 4),
    case("5 of 3 to 6 same", (2, 6, 5), 5, 3, 6, filter=2, padding="same"),
    case("13 of 5, alone", (1, 5, 6), 13, 5, 5),
    case("1x1 of 8 stride 2", (2, 7, 6), 4, 8, 8, filter=1, stride=2),
    case("24 of 2", (2, 7, 6), 24, 2, 2),
    case("6 of 2 to 1", (2, 7, 6), 6, 2, 1, stride=2),
    case("1-d of 4", (2, 19), 8, 4, 4, filter=5, dilation=2),
    case("1-d filter of 33, no word of bits", (1, 21), 4, 4, 6, filter=33),
    case("3-d of 4", (1, 4, 5, 3), 8, 4, 4, stride=(1, 2, 1)),
    case("empty batch", (0, 5, 5), 4, 4, 4),
]
FOUR = named(CASES, "4 of 4")
FEW = [FOUR, *(named(CASES, name) for name in ("16 of 3 dilated", "9 of 6 to 10, mixed", "3-d of 4"))]


def geometry(c: ConvCase, **more: Any) -> ConvGeometry:
    return ConvGeometry.parse(c.input, c.weight, nd=len(c.input) - 2, **(c.arguments | more))


def conv(c: ConvCase, x: Tensor, w: Tensor, b: Tensor | None = None, module: Any = TF) -> Tensor:
    result: Tensor = getattr(module, f"conv{x.dim() - 2}d")(x, w, b, **c.arguments)
    return result


def gradients(c: ConvCase, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, module: Any = TF, of: str = "xwb") -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, w, b)]
    wanted = [t.requires_grad_() for name, t in zip("xwb", leaves, strict=True) if name in of]
    return list(torch.autograd.grad(conv(c, *leaves, module), wanted, dy.to(leaves[0])))


def check_forward(c: ConvCase, x: Tensor, w: Tensor) -> None:
    """With bias, batch norm, residual and activation behind it."""
    plain = conv_reference(x, w, **c.arguments)
    epilogue = make_epilogue(w.shape[0], plain.to(x.dtype), x.dtype, str(x.device), activation=make_spec("relu"))
    with torch.no_grad():
        out = convolution(x, w, epilogue, **c.arguments)
    assert_close(out, conv_reference(x, w, epilogue, **c.arguments), depth=c.depth, what=c)


def check_gradients(c: ConvCase, x: Tensor, w: Tensor, of: str = "xwb") -> None:
    """Those of input, weight and bias."""
    b = torch.randn(w.shape[0], device=x.device).to(x)
    dy = torch.randn_like(conv(c, x.double(), w.double(), module=F)).to(x.dtype)
    with record_launches() as launches:
        ours = gradients(c, x, w, b, dy, TF, of)
    kernels = {kernel for name, kernel in dict(x="conv_dgrad_kernel", w="conv_wgrad_kernel").items() if name in of}
    assert not dy.numel() or kernels <= set(launches)
    reference = gradients(c, x.double(), w.double(), b.double(), dy.double(), F, of)
    for name, out, ref in zip(of, ours, reference, strict=True):
        depth = geometry(c).gemm("dgrad" if name == "x" else "wgrad")[2]
        assert_close(out, ref, depth=max(1, depth), what=f"{c}, d{name}")


def check_transposed(c: ConvCase, x: Tensor, w: Tensor) -> None:
    """The layer backwards: its filters are the channels of the input, (C, K/groups, *filter)."""
    arguments = {name: value for name, value in c.arguments.items() if value != "same"}
    nd = x.dim() - 2
    plain = getattr(F, f"conv_transpose{nd}d")(x.double(), w.double(), None, **arguments)
    e = make_epilogue(plain.shape[1], plain.to(x.dtype), x.dtype, str(x.device), activation=make_spec("silu"))
    with torch.no_grad(), record_launches() as launches:
        out = transposed_convolution(x, w, e, **arguments)
    assert launches == ["conv_dgrad_kernel"] * (out.numel() > 0)
    wide = e.map(Tensor.double)
    ref = wide.torch(getattr(F, f"conv_transpose{nd}d")(x.double(), w.double(), wide.bias, **arguments))
    depth = geometry(c).gemm("dgrad")[2]
    assert_close(out, ref, depth=depth, what=f"{c}, transposed")


def backwards(c: ConvCase) -> ConvCase:
    """A case whose input has the channels of this one's output."""
    return dataclasses.replace(c, input=(c.input[0], c.weight[0], *c.input[2:]))


@rotate(c=CASES, dtype=DTYPES, x_cl=[True, False], w_cl=[True, False])
def test_forward_with_the_whole_epilogue_matches_fp64(
    c: ConvCase, dtype: torch.dtype, x_cl: bool, w_cl: bool, device: str
) -> None:
    check_forward(c, *make_tensors(c, dtype, device, x_cl=x_cl, w_cl=w_cl))


@rotate(c=CASES, x_cl=[False, True], dtype=DTYPES, w_cl=[True, False])
def test_every_gradient_matches_fp64(c: ConvCase, x_cl: bool, dtype: torch.dtype, w_cl: bool, device: str) -> None:
    check_gradients(c, *make_tensors(c, dtype, device, x_cl=x_cl, w_cl=w_cl))


@rotate(c=CASES, dtype=DTYPES)
def test_the_transposed_forward_matches_fp64(c: ConvCase, dtype: torch.dtype, device: str) -> None:
    check_transposed(c, *make_tensors(backwards(c), dtype, device))


# Layers of bench/cases.csv's family "grouped" with their structure and fewer channels and pixels.
REDUCED = [
    case("pytorch 34977 a", (2, 6, 6), 4, 64, 64, stride=2),
    case("pytorch 34977 b", (2, 5, 5), 4, 64, 64),
    case("ResNeXt-50 32x4d layer 1", (1, 6, 6), 32, 4, 4),
    case("ResNeXt-50 32x4d layer 2", (1, 6, 6), 32, 8, 8, stride=2),
    case("ResNeXt-50 32x4d layer 3", (1, 5, 5), 8, 16, 16),
    case("ResNeXt-101 32x8d layer 1", (1, 6, 6), 32, 8, 8),
    case("ResNeXt-101 32x8d layer 3", (1, 5, 5), 8, 32, 32),
    case("RegNetY-8GF stage 2", (1, 6, 6), 4, 56, 56),
    case("ShuffleNetV1 1x1", (2, 6, 6), 3, 80, 80, filter=1),
    case("StyleGAN2 modulated", (1, 5, 5), 4, 64, 64),
]


@every(c=some(REDUCED, 3))
def test_layers_of_networks(c: ConvCase, device: str) -> None:
    x, w = make_tensors(c, torch.bfloat16, device)
    check_forward(c, x, w)
    check_gradients(c, x, w)


# Every tile's edges fall inside; a group of the kernel's has 32 channels, or 24 of which no block is a whole tap.
CONFIG_CASES = [case("8 of 4", (1, 9, 8), 8, 4, 4), case("4 of 6 to 5 stride 2", (1, 9, 8), 4, 6, 5, stride=2)]
CONFIGS = [
    (c, module, config)
    for c, module in itertools.product(CONFIG_CASES, (conv_flat, conv_dgrad, conv_wgrad))
    for config in cover(module.configs())
]


@rotate({"c, module, config": CONFIGS}, dtype=[torch.float32, torch.bfloat16])
def test_every_candidate_config(c: ConvCase, module: Any, config: Any, dtype: torch.dtype, device: str) -> None:
    if device == "cuda":
        kernel, g = module.__name__.split(".")[-1], geometry(c)
        pass_: Any = {"conv_flat": "fprop", "conv_dgrad": "dgrad", "conv_wgrad": "wgrad"}[kernel]
        g = dataclasses.replace(g, groups=g.groups // packed(g))
        problem = Problem(
            kernel, g, str(dtype)[6:], False, True, device_of(torch.device("cuda")), pass_, pack=packed(geometry(c))
        )
        if str(config) not in map(str, possible(problem)):
            pytest.skip("the config is pruned for this dtype on this GPU")
    x, w = make_tensors(c, dtype, device)
    with forced(config=config):
        if module is conv_flat:
            check_forward(c, x, w)
        else:
            check_gradients(c, x, w, of="x" if module is conv_dgrad else "wb")


def test_ranges_of_many_pixels_are_added(device: str) -> None:
    # A GPU with many multiprocessors wants many ranges.
    c = case("many pixels", (1, 40, 32), 8, 4, 4)
    for dtype, w_cl in ((torch.float32, False), (torch.bfloat16, True)):
        x, w = make_tensors(c, dtype, device, w_cl=w_cl)
        with record_launches() as launches, forced(device=device_named("H200"), config=conv_wgrad.configs()[3]):
            check_gradients(c, x, w, of="wb")
        assert launches.count("wgrad_reduce_kernel") == 2


@every(c=FEW)
def test_groups_are_convolutions_of_their_own(c: ConvCase, device: str) -> None:
    x, w = make_tensors(c, torch.float32, device)
    groups = c.arguments["groups"]
    alone = dataclasses.replace(c, arguments=c.arguments | dict(groups=1))
    with torch.no_grad():
        parts = [conv(alone, *pair) for pair in zip(x.chunk(groups, 1), w.chunk(groups), strict=True)]
        torch.testing.assert_close(conv(c, x, w), torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


@every(c=FEW)
def test_small_integers_are_exact(c: ConvCase, device: str) -> None:
    for dtype in DTYPES:
        x, w = make_tensors(c, dtype, device, integers=True)
        b = torch.zeros(w.shape[0], device=device, dtype=dtype)
        dy = torch.randint(-1, 2, tuple(geometry(c).output_shape)).to(x)
        pairs = [
            (conv(c, x, w), conv(c, x.double(), w.double(), module=F)),
            *zip(gradients(c, x, w, b, dy), gradients(c, x.double(), w.double(), b.double(), dy, F), strict=True),
        ]
        for out, ref in pairs:
            # bf16 holds integers up to 256.
            exact = ref.abs() <= 256
            assert torch.equal(out.double()[exact], ref[exact]), dtype


@every(c=some([FOUR, named(CASES, "1-d of 4")], 1))
def test_64_bit_offsets_change_nothing_and_two_runs_are_bit_equal(c: ConvCase, device: str) -> None:
    x, w = make_tensors(c, torch.float16, device)
    x[0, 1].view(-1)[3] = math.nan
    b, dy = torch.randn(w.shape[0], device=device).half(), torch.randn(geometry(c).output_shape, device=device)

    def run() -> list[Tensor]:
        return [conv(c, x, w).nan_to_num(7), *(t.nan_to_num(7) for t in gradients(c, x, w, b, dy))]

    narrow = run()
    assert all(map(torch.equal, narrow, run()))
    with patched(ConvGeometry, "needs_int64", True):
        assert all(map(torch.equal, narrow, run()))


def test_gradcheck(device: str) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((2, 6, 5), (9, 2, 2), (9,)))
    assert torch.autograd.gradcheck(lambda *t: TF.conv1d(*t, groups=3, stride=2, padding=1), (x, w, b), fast_mode=True)


# What is not finite


def poison(t: Tensor, groups: int) -> Tensor:
    """NaN in one group, both infinities in another, infinity at the border of a third, none in the rest."""
    t = t.clone(memory_format=torch.preserve_format)
    channels = t.shape[1] // groups
    pixels = t[0].flatten(1)
    pixels[channels, pixels.shape[1] // 2] = math.nan
    pixels[2 * channels, 0], pixels[2 * channels + channels - 1, -1] = math.inf, -math.inf
    last = t[-1].flatten(1)
    last[3 * channels, last.shape[1] // 3] = math.inf
    for source, image in ((pixels, t[0]), (last, t[-1])):
        image.copy_(source.view(image.shape))
    return t


def assert_same(out: Tensor, ref: Tensor, depth: int, what: object) -> None:
    """Also where there is neither number: NaN for NaN, and the same infinity."""
    assert ref.isfinite().any() and not ref.isfinite().all(), what
    assert_close(out, ref, depth=depth, what=what)
    assert torch.equal(out.isnan(), ref.isnan()) and torch.equal(out.double()[ref.isinf()], ref[ref.isinf()]), what


# The interpreter takes its time for a tile that is made anew.
@every({"name, x_cl": some([("4 of 4", True), ("4 of 4", False), ("9 of 6 to 10, mixed", True), ("1-d of 4", False)], 3)})
def test_nan_and_inf_stay_in_their_group(name: str, x_cl: bool, device: str) -> None:
    c = named(CASES, name)
    groups = c.arguments["groups"]
    x, w = make_tensors(c, torch.float32, device, x_cl=x_cl, w_cl=x_cl)
    bad = poison(x, groups)
    assert_same(conv(c, bad, w), conv_reference(bad, w, **c.arguments), c.depth, c)
    b, dy = torch.randn(w.shape[0], device=device), torch.randn(geometry(c).output_shape, device=device)
    # Of a bad image the weight's gradient, and of a bad gradient all three.
    for image, gradient in ((bad, dy), (x, poison(dy, groups))):
        reference = gradients(c, image.double(), w.double(), b.double(), gradient.double(), F)
        for name, out, ref in zip("xwb", gradients(c, image, w, b, gradient), reference, strict=True):
            if not ref.isfinite().all():
                assert_same(out, ref, 9 * 99, f"{c}, d{name}")


def test_a_bad_weight_reaches_its_filter_alone(device: str) -> None:
    c = FOUR
    x, w = make_tensors(c, torch.bfloat16, device)
    w[6, 1, 0, 2], w[9, 0, 1, 1] = math.nan, math.inf
    assert_same(conv(c, x, w), conv_reference(x, w, **c.arguments), c.depth, c)


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_statistics_are_those_of_the_results(bad: bool, device: str) -> None:
    for c in (named(CASES, "32 of 4"), named(CASES, "16 of 3 dilated")):
        x, w = make_tensors(c, torch.float32, device)
        x = poison(x, c.arguments["groups"]) if bad else x
        parts = convolve_dense(x, w, Epilogue(), geometry(c), "conv", Target(statistics=True)).statistics
        assert parts is not None
        mean, var, count = batch_norm.combine(parts)
        ref = conv_reference(x, w, **c.arguments).transpose(0, 1).flatten(1)
        assert float(count) == ref.shape[1] and ref.mean(1).isnan().any() == bad
        finite = ref.isfinite().all(1)
        assert not mean[~finite].isfinite().any() and not var[~finite].isfinite().any()
        torch.testing.assert_close(mean[finite].double(), ref.mean(1)[finite], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var[finite].double(), ref.var(1, correction=0)[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["fixed", "batch"])
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_a_batch_norms_gradient_is_computed_on_the_way(batch_statistics: bool, bad: bool, device: str) -> None:
    c = case("1x1", (2, 7, 6), 8, 4, 6, filter=1)
    _, w = make_tensors(c, torch.bfloat16, device)
    g, act = geometry(c), make_spec("silu")
    z, dy = (as_format(torch.randn(g.output_shape, device=device).bfloat16(), True) for _ in range(2))
    if bad:
        dy = poison(dy, 8)
    table = torch.rand(5, g.out_channels, device=device)
    dz = torch.full_like(dy, math.nan)
    with torch.no_grad():
        one_pass = launch_dgrad(dy, w, g, True, "conv", NormGradient(z, table, act, batch_statistics, dz))
        between = batch_norm.input_gradient(dy, z, table, act, batch_statistics)
        expected = F.conv_transpose2d(between.double(), w.double(), groups=8)
    torch.testing.assert_close(dz.float(), between.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
    assert_close(one_pass, expected, depth=6, what=c)
    assert torch.equal(one_pass.isnan(), expected.isnan()) and expected.isnan().any() == bad


# How many groups are one


def layer(groups: int, c: int, k: int) -> ConvGeometry:
    return ConvGeometry.parse((8, groups * c, 14, 14), (groups * k, c, 3, 3), nd=2, padding=1, groups=groups)


@pytest.mark.parametrize(
    ("groups", "c", "k", "expected"),
    [
        (32, 4, 4, 8), (32, 8, 8, 4), (32, 16, 16, 1), (32, 3, 3, 8), (32, 5, 5, 4), (16, 4, 8, 4), (2, 4, 4, 2),
        # 7 groups of 4 are 28; 11 would be 44, more of it zeros than of a group alone.
        (7, 4, 4, 7), (11, 4, 4, 1), (3, 80, 80, 1), (4, 64, 4, 1), (1, 3, 64, 1), (1, 1, 1, 1), (6, 12, 2, 2),
        (64, 1, 1, 32),
    ],
)  # fmt: skip
def test_as_many_groups_are_one_as_fit(groups: int, c: int, k: int, expected: int) -> None:
    assert packed(layer(groups, c, k)) == expected


def test_a_pack_divides_the_groups_and_is_not_too_wide() -> None:
    for groups, c, k in itertools.product(range(1, 40), range(1, 20), range(1, 20)):
        pack = packed(layer(groups, c, k))
        assert groups % pack == 0 and (pack == 1 or pack * max(c, k) <= PACK_WIDTH)


def test_a_packed_layer_is_no_dense_one() -> None:
    g, dense = layer(32, 4, 4), layer(4, 32, 32)
    x, w = torch.empty(8, 128, 14, 14, device="meta"), torch.empty(128, 4, 3, 3, device="meta")
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    plan = plan_for(x, w, g)
    assert (plan.kernel, plan.pack, plan.geometry, plan.copies) == ("conv_flat", 8, dense, 0)
    problem = problem_of(plan, torch.bfloat16, False, device_named("H200"))
    other = dataclasses.replace(problem, pack=1)
    assert layer_key(problem) != layer_key(other) and "packed8" in layer_key(problem)
    # The zeros are in no memory.
    config = conv_flat.configs()[0]
    seconds = predict(problem, config).terms["memory"]
    assert seconds == g.bytes(2) / problem.device.bandwidth < predict(other, config).terms["memory"]


def test_what_is_told_of_a_layer_is_the_layers(device: str) -> None:
    model = torch.nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False)
    report = tritonconv.explain(model.to(device), torch.randn(1, 32, 6, 6, device=device))
    (row,) = report.layers
    assert row.macs == layer(8, 4, 4).macs // (8 * 14 * 14) * 36
