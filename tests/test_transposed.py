"""Transposed convolution: every case, dtype, memory format and candidate config against fp64, in both directions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import patched, transposed_convolution
from cases import DTYPES, ConvCase, make_epilogue, make_tensors
from matrix import cover, every, named, rotate, some
from reference import assert_close
from test_fuzz import sparse
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tritonconv.kernels import conv_dgrad, conv_up

import tritonconv
import tritonconv.functional as TF
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.gradients import conv_dgrad as launch_dgrad
from tritonconv.ops.conv.target import Target
from tritonconv.ops.conv.transposed import convolve_transposed
from tritonconv.ops.core.activation import make_spec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format, dense_strides, is_dense, suggests_channels_last
from tritonconv.tuning import Problem
from tritonconv.tuning.candidates import possible

F = torch.nn.functional


@pytest.fixture(autouse=True)
def on_triton() -> object:
    with tritonconv.set_backend("triton"):
        yield


# Weights are (C, K/groups, *filter).
CASES = [
    # conv_dgrad: stride phases
    ConvCase("3x3 stride 2", (2, 40, 5, 7), (40, 24, 3, 3), "conv_dgrad", dict(stride=2, padding=1, output_padding=1)),
    ConvCase("4x4 stride 2", (2, 16, 4, 5), (16, 9, 4, 4), "conv_dgrad", dict(stride=2, padding=1)),
    ConvCase("3x3", (1, 64, 5, 6), (64, 16, 3, 3), "conv_dgrad", dict(padding=1)),
    ConvCase("phases without taps", (1, 12, 4, 3), (12, 5, 1, 2), "conv_dgrad", dict(stride=3)),
    ConvCase("dilated with a stride", (1, 8, 4, 5), (8, 6, 3, 3), "conv_dgrad", dict(stride=(2, 3), dilation=(3, 2))),
    ConvCase("dilation a multiple of the stride", (1, 8, 4, 5), (8, 6, 3, 2), "conv_dgrad", dict(stride=2, dilation=4)),
    ConvCase("output padding up to the stride", (2, 6, 3, 3), (6, 4, 2, 3), "conv_dgrad",
             dict(stride=(1, 4), output_padding=(0, 3))),
    ConvCase("output padding beyond the stride", (2, 6, 4), (6, 4, 3), "conv_dgrad", dict(dilation=3, output_padding=2)),
    ConvCase("planes of output padding alone", (1, 2, 2, 3, 2), (2, 3, 1, 1, 1), "conv_dgrad",
             dict(dilation=2, output_padding=1)),
    ConvCase("groups", (2, 12, 4, 5), (12, 5, 3, 3), "conv_dgrad", dict(stride=2, padding=1, groups=3)),
    ConvCase("depthwise", (1, 3, 5, 5), (3, 1, 4, 4), "depthwise", dict(stride=2, padding=1, groups=3)),
    ConvCase("groups whose filter is their stride", (1, 8, 3, 3), (8, 3, 2, 2), "conv_dgrad", dict(stride=2, groups=2)),
    ConvCase("padding larger than the filter", (1, 4, 6, 6), (4, 3, 3, 3), "conv_dgrad", dict(stride=2, padding=4)),
    ConvCase("1-d 16/8", (2, 24, 6), (24, 10, 16), "conv_dgrad", dict(stride=8, padding=4)),
    ConvCase("1-d filter of 40, no word of bits", (1, 4, 9), (4, 3, 40), "conv_dgrad", dict(padding=3)),
    ConvCase("3-d", (1, 6, 2, 3, 4), (6, 5, 3, 2, 3), "conv_dgrad", dict(stride=(2, 1, 2), padding=(1, 0, 1))),
    ConvCase("sizes of one", (1, 1, 1, 1), (1, 1, 1, 1), "conv_dgrad", dict(stride=2, output_padding=1)),
    # conv_up: every input pixel has output pixels of its own
    ConvCase("2x2 stride 2", (2, 40, 5, 4), (40, 24, 2, 2), "conv_up", dict(stride=2)),
    ConvCase("2x3 stride 2x3", (1, 6, 3, 5), (6, 5, 2, 3), "conv_up", dict(stride=(2, 3))),
    ConvCase("1-d 4/4", (2, 16, 7), (16, 33, 4), "conv_up", dict(stride=4)),
    ConvCase("3-d 1x2x2", (1, 8, 2, 3, 3), (8, 16, 1, 2, 2), "conv_up", dict(stride=(1, 2, 2))),
    ConvCase("3-d 2x2x2", (1, 8, 2, 3, 2), (8, 7, 2, 2, 2), "conv_up", dict(stride=2)),
    ConvCase("1x1", (2, 16, 3, 4), (16, 12, 1, 1), "conv_up", dict(dilation=3)),
    ConvCase("one pixel", (3, 100, 1, 1), (100, 12, 4, 4), "conv_up"),
    ConvCase("one row", (2, 8, 1, 5), (8, 12, 3, 2), "conv_up", dict(stride=(1, 2))),
    # edges
    ConvCase("empty batch", (0, 8, 4, 4), (8, 6, 3, 3), "", dict(stride=2)),
    ConvCase("empty batch without pixels", (0, 8, 1, 1), (8, 6, 2, 2), "", dict(padding=1)),
]  # fmt: skip
STRIDED, UP = named(CASES, "3x3 stride 2"), named(CASES, "2x2 stride 2")
FEW = [STRIDED, named(CASES, "groups"), named(CASES, "1-d 16/8"), UP]


def filters(case: ConvCase) -> int:
    return case.weight[1] * int(case.arguments.get("groups", 1))


def geometry(case: ConvCase) -> ConvGeometry:
    return ConvGeometry.parse(case.input, case.weight, nd=len(case.input) - 2, transposed=True, **case.arguments)


def run(case: ConvCase, x: Tensor, w: Tensor, b: Tensor | None = None, module: Any = TF) -> Tensor:
    result: Tensor = getattr(module, f"conv_transpose{x.dim() - 2}d")(x, w, b, **case.arguments)
    return result


def fused(case: ConvCase, x: Tensor, w: Tensor, e: Epilogue) -> Tensor:
    return transposed_convolution(x, w, e, **case.arguments)


def reference(case: ConvCase, x: Tensor, w: Tensor, e: Epilogue | None = None) -> Tensor:
    """What torch computes in fp64 from the same inputs."""
    wide = (e or Epilogue()).map(Tensor.double)
    return wide.torch(run(case, x.double(), w.double(), wide.bias, F))


def gradients(case: ConvCase, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, module: Any) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    return list(torch.autograd.grad(run(case, *leaves, module), leaves, dy))


# Forward


@rotate(case=CASES, dtype=DTYPES)
def test_forward_with_the_whole_epilogue_matches_fp64(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    x, w = make_tensors(case, dtype, device)
    plain = reference(case, x, w)
    epilogue = make_epilogue(filters(case), plain.to(dtype), dtype, device, activation=make_spec("silu"))
    with torch.no_grad(), record_launches() as launches:
        out = fused(case, x, w, epilogue)
    assert launches == ([f"{case.kernel}_kernel"] if case.kernel else [])
    depth = max(1, geometry(case).gemm()[2])
    assert_close(out, reference(case, x, w, epilogue), depth=depth, what=case)


@every(case=[*FEW[::2], *(named(CASES, name) for name in ("2x2 stride 2", "3-d 1x2x2", "one pixel"))])
def test_output_format_is_channels_last_if_input_or_weight_is(case: ConvCase, device: str) -> None:
    for x_cl, w_cl in itertools.product((False, True), repeat=2):
        x, w = make_tensors(case, torch.float32, device, x_cl=x_cl, w_cl=w_cl)
        with torch.no_grad():
            out = run(case, x, w)
        assert out.stride() == dense_strides(tuple(out.shape), output_format(x, w))
        assert_close(out, reference(case, x, w), depth=max(1, geometry(case).gemm()[2]), what=(case, x_cl, w_cl))
        if len(case.input) == 4 and case.kernel:
            assert out.stride() == run(case, x, w, module=F).stride()


# Every tile's edges fall inside the output.
CONFIG_CASES = [
    ConvCase("3x3 stride 1x2", (1, 40, 5, 4), (40, 24, 3, 3), "conv_dgrad", dict(stride=(1, 2), padding=1)),
    ConvCase("2x2 stride 2", (1, 40, 9, 8), (40, 24, 2, 2), "conv_up", dict(stride=2)),
]
CONFIGS = [
    (case, config)
    for case, module in zip(CONFIG_CASES, (conv_dgrad, conv_up), strict=True)
    for config in cover(module.configs())
]


@rotate({"case, config": CONFIGS}, dtype=[torch.float32, torch.bfloat16])
def test_every_candidate_config(case: ConvCase, config: object, dtype: torch.dtype, device: str) -> None:
    if device == "cuda":
        g = geometry(case).mirrored
        pass_: Any = "dgrad" if case.kernel == "conv_dgrad" else "fprop"
        problem = Problem(case.kernel, g, str(dtype)[6:], False, True, device_of(torch.device("cuda")), pass_)
        if str(config) not in map(str, possible(problem)):
            pytest.skip("the config is pruned for this dtype on this GPU")
    x, w = make_tensors(case, dtype, device)
    epilogue = make_epilogue(filters(case), reference(case, x, w).to(dtype), dtype, device, activation=make_spec("relu"))
    with torch.no_grad(), forced(config=config):
        out = fused(case, x, w, epilogue)
    assert_close(out, reference(case, x, w, epilogue), depth=geometry(case).gemm()[2], what=(case, config))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_two_runs_are_bit_equal_and_so_are_64_bit_offsets(case: ConvCase, device: str) -> None:
    x, w = make_tensors(case, torch.float16, device)
    with torch.no_grad():
        first = run(case, x, w)
        assert torch.equal(run(case, x, w), first)
        with patched(ConvGeometry, "needs_int64", True):
            assert torch.equal(run(case, x, w), first)


@pytest.mark.parametrize("options", [dict(stride=2), dict(stride=2, padding=1)], ids=["conv_up", "conv_dgrad"])
def test_a_view_across_more_than_2_to_the_31_elements(options: dict[str, Any], device: str) -> None:
    # Memory that is never touched is never mapped.
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    x = storage.as_strided((2, 16, 1, 1), (2**31, 1, 16, 16))
    x.copy_(torch.randn(2, 16, 1, 1))
    w = torch.randn(16, 8, 4, 4, device=device).half()
    with torch.no_grad():
        out = TF.conv_transpose2d(x, w, **options)
    assert_close(out, F.conv_transpose2d(x.double(), w.double(), **options), depth=16)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda x: x[:, :, ::2, 1::2],
    "transposed": lambda x: x.transpose(2, 3),
    "channel slice": lambda x: x[:, 8:40],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded rows": lambda x: x[:, :, :1].expand(-1, -1, 3, -1),
}


@rotate(view=VIEWS, options=[dict(stride=2), dict(stride=2, padding=1)])
def test_views_need_not_be_dense(view: str, options: dict[str, Any], device: str) -> None:
    for channels_last in (False, True):
        x = VIEWS[view](as_format(torch.randn(2, 48, 6, 5, device=device), channels_last))
        w = torch.randn(x.shape[1], 8, 2, 2, device=device)
        with torch.no_grad():
            out = TF.conv_transpose2d(x, w, **options)
        assert_close(out, F.conv_transpose2d(x.double(), w.double(), **options), depth=4 * x.shape[1])


def test_unbatched_input_is_a_batch_of_one(device: str) -> None:
    for case in (STRIDED, named(CASES, "1-d 16/8"), named(CASES, "3-d"), UP):
        x, w = make_tensors(case, torch.float32, device)
        with torch.no_grad():
            assert torch.equal(run_unbatched(case, x[0], w), run(case, x[:1], w)[0])


def run_unbatched(case: ConvCase, x: Tensor, w: Tensor) -> Tensor:
    result: Tensor = getattr(TF, f"conv_transpose{x.dim() - 1}d")(x, w, **case.arguments)
    return result


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nan_and_inf_reach_the_outputs_that_see_them_and_no_others(case: ConvCase, device: str) -> None:
    x, w = make_tensors(case, torch.float32, device)
    x.view(x.shape[0], x.shape[1], -1)[0, 0, 1], x.view(x.shape[0], x.shape[1], -1)[0, 1, 2] = float("nan"), float("inf")
    with torch.no_grad():
        assert_close(run(case, x, w), reference(case, x, w), depth=400)


def test_nan_behind_the_tensors_is_never_read(device: str) -> None:
    for channels, options in itertools.product((5, 24), (dict(stride=2), dict(stride=2, padding=1))):
        room = torch.full((channels * 20 + 999,), float("nan"), device=device)
        x = room[64 : 64 + channels * 20].view(1, 4, 5, channels).permute(0, 3, 1, 2)
        x.copy_(torch.randn(1, channels, 4, 5))
        space = torch.full((channels * 20 + 999,), float("nan"), device=device)
        w = space[: channels * 20].view(channels, 2, 2, 5).permute(0, 3, 1, 2)
        w.copy_(torch.randn(channels, 5, 2, 2))
        with torch.no_grad():
            out = TF.conv_transpose2d(x, w, **options)
        assert_close(out, F.conv_transpose2d(x.double(), w.double(), **options), depth=4 * channels)


# Equivalences


@every(case=some(CASES[:25], 5))
def test_it_is_the_data_gradient_of_a_convolution(case: ConvCase, device: str) -> None:
    x, w = make_tensors(case, torch.float64, device)
    with torch.no_grad():
        y = run(case, x, w)
        torch.testing.assert_close(launch_dgrad(x, w, geometry(case).mirrored, True, "conv"), y)
    g, nd = geometry(case), x.dim() - 2
    # torch's own convolution of a result of this size, where it comes back to x.
    arguments = {name: value for name, value in case.arguments.items() if name != "output_padding"}
    image = torch.randn(g.output_shape, dtype=x.dtype, device=device, requires_grad=True)
    z = getattr(F, f"conv{nd}d")(image, w, **arguments)
    if z.shape == x.shape:
        torch.testing.assert_close(torch.autograd.grad(z, image, x)[0], y)


def test_grouped_is_the_concatenation_of_dense(device: str) -> None:
    x, w = torch.randn(2, 12, 4, 5, device=device), torch.randn(12, 5, 3, 3, device=device)
    with torch.no_grad():
        parts = [TF.conv_transpose2d(x[:, g : g + 4], w[g : g + 4], stride=2) for g in (0, 4, 8)]
        torch.testing.assert_close(TF.conv_transpose2d(x, w, stride=2, groups=3), torch.cat(parts, 1))


def test_a_filter_that_is_its_stride_is_a_linear_layer_and_a_pixel_shuffle(device: str) -> None:
    x, w = torch.randn(2, 12, 4, 5, device=device), torch.randn(12, 5, 3, 3, device=device)
    with torch.no_grad():
        rows = TF.linear(x.permute(0, 2, 3, 1), w.reshape(12, -1).T.contiguous()).permute(0, 3, 1, 2)
        torch.testing.assert_close(TF.conv_transpose2d(x, w, stride=3), F.pixel_shuffle(rows, 3))


def test_1d_is_2d_of_height_one_is_3d_of_depth_one(device: str) -> None:
    x, w = torch.randn(2, 6, 7, device=device), torch.randn(6, 4, 3, device=device)
    with torch.no_grad():
        one = TF.conv_transpose1d(x, w, stride=2, padding=1)
        two = TF.conv_transpose2d(x[:, :, None], w[:, :, None], stride=(1, 2), padding=(0, 1))
        three = TF.conv_transpose3d(x[:, :, None, None], w[:, :, None, None], stride=(1, 1, 2), padding=(0, 0, 1))
    torch.testing.assert_close(one, two.squeeze(2))
    torch.testing.assert_close(one, three.squeeze(3).squeeze(2))


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("stride", [2, 1], ids=["conv_up", "conv_dgrad"])
def test_fused_is_unfused(nd: int, stride: int, device: str) -> None:
    x, w = torch.randn(2, 6, *(3, 4, 2)[:nd], device=device), torch.randn(6, 5, *(2,) * nd, device=device)
    b, mean, var, gamma, beta = torch.rand(5, 5, device=device).unbind()
    conv, both = getattr(TF, f"conv_transpose{nd}d"), getattr(TF, f"conv_transpose{nd}d_bn_act")
    with torch.no_grad():
        y = conv(x, w, b, stride=stride)
        residual = torch.randn_like(y)
        with record_launches() as launches:
            out = both(x, w, b, mean, var, gamma, beta, stride=stride, residual=residual, activation="relu")
        assert len(launches) == 1
    torch.testing.assert_close(out, torch.relu(F.batch_norm(y, mean, var, gamma, beta) + residual), rtol=1e-4, atol=1e-4)


@every(case=[*FEW, named(CASES, "3-d 1x2x2")])
def test_statistics_come_from_the_accumulators(case: ConvCase, device: str) -> None:
    x, w = make_tensors(case, torch.float32, device)
    result = convolve_transposed(x, w, Epilogue(), geometry(case), Target(statistics=True))
    assert result.y is not None and result.statistics is not None
    counts, moments = result.statistics
    y = result.y.transpose(0, 1).flatten(1).double()
    assert counts.sum() == y.shape[1]
    mine = counts[:, None] > 0
    # An empty slot's moments are not written.
    mean, squares = (torch.where(mine, m, 0).double() for m in moments)
    total = (counts[:, None] * mean).sum(0) / y.shape[1]
    torch.testing.assert_close(total, y.mean(1), rtol=1e-4, atol=1e-5)
    deviations = (squares + counts[:, None] * (mean - total).square()).sum(0)
    torch.testing.assert_close(deviations / y.shape[1], y.var(1, correction=0), rtol=1e-4, atol=1e-5)


# Backward


@rotate(case=CASES, dtype=DTYPES)
def test_every_gradient_matches_fp64(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    x, w = make_tensors(case, dtype, device, w_cl=dtype != torch.float16)
    b = torch.randn(filters(case), device=device).to(dtype)
    dy = torch.randn(geometry(case).output_shape, device=device).to(dtype)
    with record_launches() as launches:
        ours = gradients(case, x, w, b, dy, TF)
    wgrad = "depthwise_wgrad_kernel" if case.kernel == "depthwise" else "conv_wgrad_kernel"
    assert not dy.numel() or wgrad in launches
    wide = gradients(case, x.double(), w.double(), b.double(), dy.double(), F)
    g = geometry(case)
    for name, out, ref, pass_ in zip("xwb", ours, wide, ("dgrad", "wgrad", "wgrad"), strict=True):
        assert_close(out, ref, depth=max(1, g.gemm(pass_)[2] * g.taps), what=f"{case}, d{name}")  # type: ignore[arg-type]
    assert is_dense(ours[1], suggests_channels_last(w))


def test_only_the_gradients_that_are_needed_are_computed_and_their_tensors_saved(device: str) -> None:
    def kernels(*needed: bool) -> tuple[set[str], int]:
        x, w = make_tensors(STRIDED, torch.float32, device)
        leaves = [t.requires_grad_(n) for t, n in zip((x, w, torch.randn(24, device=device)), needed, strict=True)]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = run(STRIDED, *leaves)
        with record_launches() as launches:
            y.sum().backward()
        assert [t.grad is not None for t in leaves] == list(needed)
        return set(launches), sum(t.numel() for t in saved)

    x, w = make_tensors(STRIDED, torch.float32, device)
    assert kernels(True, False, False) == ({"conv_flat_kernel"}, w.numel())
    assert kernels(False, True, False) == ({"conv_wgrad_kernel"}, x.numel())
    assert kernels(False, False, True) == (set(), 0)


@pytest.mark.parametrize(
    ("nd", "options"),
    [
        (1, dict(stride=2, padding=1, output_padding=1)), (2, dict(stride=2, padding=1)), (3, dict(stride=2)),
        (1, dict(dilation=2, output_padding=1, groups=2)), (2, dict(dilation=2, output_padding=1)),
    ],
    ids=str,
)  # fmt: skip
def test_gradcheck(nd: int, options: dict[str, Any], device: str) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    leaves = leaf(2, 4, *(3,) * nd), leaf(4, 6 // int(options.get("groups", 1)), *(2,) * nd), leaf(6)
    conv = getattr(TF, f"conv_transpose{nd}d")
    assert torch.autograd.gradcheck(lambda *t: conv(*t, **options), leaves, fast_mode=True)


def test_what_follows_has_torchs_gradients(device: str) -> None:
    x, w = torch.randn(2, 4, 3, 3, device=device), torch.randn(4, 6, 2, 2, device=device)
    mean, var, gamma, beta = torch.rand(4, 6, device=device).unbind()
    leaves = [t.requires_grad_() for t in (x, w, gamma, beta)]

    def run_it() -> tuple[Tensor, ...]:
        y = TF.conv_transpose2d_bn_act(x, w, None, mean, var, gamma, beta, stride=2, activation="silu")
        return torch.autograd.grad(y.square().sum(), leaves)

    ours = run_it()
    with tritonconv.set_backend("torch"):
        torch.testing.assert_close(ours, run_it(), rtol=1e-3, atol=1e-3)


def test_a_fused_operator_says_that_it_has_no_gradient(device: str) -> None:
    x, w = torch.randn(1, 3, 4, 4, device=device), torch.randn(3, 4, 2, 2, device=device, requires_grad=True)
    y = torch.ops.tritonconv.conv_transpose(x, w, *(None,) * 6, **NUMBERS | dict(activation="silu"))
    with pytest.raises(NotImplementedError, match="call the operator alone"):
        y.sum().backward()


# The registered operator

NUMBERS: dict[str, Any] = dict(
    stride=[2, 1], padding=[1, 0], output_padding=[1, 0], groups=1, dilation=[1, 1], eps=1e-5, activation="", a=0.0, b=0.0
)


@rotate(channels_last=[False, True], is_fused=[False, True])
def test_opcheck(channels_last: bool, is_fused: bool, device: str) -> None:
    x, w = as_format(torch.randn(2, 8, 4, 5, device=device), channels_last), torch.randn(8, 4, 3, 3, device=device)
    k = torch.rand(4, 4, device=device).unbind()
    optional = (k[0], *k, torch.randn(2, 4, 8, 7, device=device)) if is_fused else (None,) * 6
    numbers = NUMBERS | (dict(activation="leaky_relu", a=0.1) if is_fused else {})
    if not is_fused:
        x, w = x.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(torch.ops.tritonconv.conv_transpose.default, (x, w, *optional), numbers)


def test_compiled_forward_and_backward_run_on_our_kernels(device: str) -> None:
    torch._dynamo.reset()
    x, w = torch.randn(2, 4, 5, 5, device=device), torch.randn(4, 6, 3, 3, device=device)
    leaves = x.requires_grad_(), w.requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return TF.conv_transpose2d(x, w, padding=1, stride=2).relu().square().sum()

    with record_launches() as launches:
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves).backward()
    assert {"conv_dgrad_kernel", "conv_flat_kernel", "conv_wgrad_kernel"} <= set(launches)
    with tritonconv.set_backend("torch"):
        torch.testing.assert_close((x.grad, w.grad), torch.autograd.grad(loss(x, w), leaves), rtol=1e-4, atol=1e-4)


@every(nd=some([2, 1, 3], 1))
def test_modules_compile_and_export(nd: int, device: str) -> None:
    torch._dynamo.reset()
    layer = getattr(tritonconv.nn, f"ConvTranspose{nd}d")(4, 6, 3, stride=2, output_padding=1, device=device)
    x = torch.randn(2, 4, *(4, 3, 2)[:nd], device=device)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        program = torch.export.export(layer, (x,))
        assert any("tritonconv.conv_transpose" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), expected)


def test_flops_are_counted_as_torchs(device: str) -> None:
    def counted(module: Any) -> int:
        x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
        w = torch.randn(4, 6, 3, 3, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module.conv_transpose2d(x, w, stride=2).sum().backward()
        return int(counter.get_total_flops())

    assert counted(TF) == counted(F)


def test_autocast(device: str) -> None:
    layer = tritonconv.nn.ConvTranspose2d(8, 8, 2, stride=2, device=device)
    x = torch.randn(2, 8, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
        direct = torch.ops.tritonconv.conv_transpose(x, layer.weight, *(None,) * 6, **NUMBERS)
    y.float().sum().backward()
    assert y.dtype == direct.dtype == torch.bfloat16
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


# Random layers


def draw(seed: int) -> dict[str, Any]:
    """A random layer, small enough for the interpreter."""
    r = random.Random(seed)
    nd, groups = r.choice([1, 2, 2, 2, 3]), r.choice([1, 1, 1, 2, 3])
    kernel = [r.choice([1, 2, 2, 3, 4, 5]) for _ in range(nd)]
    up = r.random() < 0.3
    stride = kernel if up else [r.choice([1, 2, 2, 3, 4]) for _ in range(nd)]
    dilation = [1] * nd if up else [r.choice([1, 1, 2, 3]) for _ in range(nd)]
    extra = [0] * nd if up else [r.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    # What is cut off leaves a pixel at least.
    most = [(d * (k - 1) + e) // 2 for d, k, e in zip(dilation, kernel, extra, strict=True)]
    padding = [0] * nd if up else [r.randint(0, min(2, m)) for m in most]
    channels = groups * r.choice([1, 2, 3, 4, 8, 16, 24, 40])
    return dict(
        x=(r.choice([1, 2, 3]), channels, *(r.randint(1, 5) for _ in range(nd))), bias=r.random() < 0.5,
        w=(channels, r.choice([1, 2, 5, 8, 16, 24]), *kernel), stride=tuple(stride), padding=tuple(padding),
        output_padding=tuple(extra), dilation=tuple(dilation), groups=groups, relu=r.random() < 0.5,
        dtype=r.choice(["float32", "float16", "bfloat16", "float64"]), x_cl=r.random() < 0.6, w_cl=r.random() < 0.6,
    )  # fmt: skip


@every(seed=some(range(24), 12))
def test_random_layers_are_exact(seed: int, device: str) -> None:
    c = draw(seed)
    torch.manual_seed(seed)
    dtype, nd = getattr(torch, c["dtype"]), len(c["x"]) - 2
    x, w = as_format(sparse(c["x"], dtype, device), c["x_cl"]), as_format(sparse(c["w"], dtype, device), c["w_cl"])
    bias = sparse((c["w"][1] * c["groups"],), dtype, device) if c["bias"] else None
    arguments = {name: c[name] for name in ("stride", "padding", "output_padding", "dilation", "groups")}
    wide = getattr(F, f"conv_transpose{nd}d")(x.double(), w.double(), None if bias is None else bias.double(), **arguments)
    wide = torch.relu(wide) if c["relu"] else wide
    with torch.no_grad():
        act = "relu" if c["relu"] else None
        out = getattr(TF, f"conv_transpose{nd}d_bn_act")(x, w, bias, *(None,) * 4, activation=act, **arguments)
    # bf16 holds integers up to 256.
    exact = wide.abs() <= 256
    assert torch.equal(out.double()[exact], wide[exact]), f"repeat with draw({seed}): {c}"
