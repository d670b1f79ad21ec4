"""Depthwise convolution: every candidate config, the code's own edges, and what it must be equal to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from calls import convolution, patched
from cases import DTYPES, ConvCase, make_epilogue, make_tensors
from matrix import cover, rotate
from reference import assert_close, conv_reference
from tritonconv.kernels import depthwise, depthwise_wgrad

import tritonconv.functional as TF
from tritonconv.bench.registry import operations
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv import depthwise as launches_of
from tritonconv.ops.conv.depthwise import depthwise_dgrad, is_depthwise
from tritonconv.ops.conv.depthwise import depthwise_wgrad as launch_wgrad
from tritonconv.ops.core.activation import make_spec
from tritonconv.ops.core.launch import captured, device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format, is_dense
from tritonconv.tuning import Problem, candidates, device_named
from tritonconv.tuning.candidates import possible

pytestmark = pytest.mark.usefixtures("on_triton")

# Patches end inside the image, blocks of channels inside the channels; the second and third are walked.
CONFIG_CASES = [
    ConvCase("3x3", (2, 20, 9, 11), (20, 1, 3, 3), "", dict(padding=1, groups=20)),
    ConvCase("5x5 stride 2", (1, 20, 9, 11), (20, 1, 5, 5), "", dict(padding=2, stride=2, groups=20)),
    ConvCase("3x9 multiplied", (1, 6, 7, 12), (12, 1, 3, 9), "", dict(padding=(1, 4), groups=6)),
]


def geometry_of(case: ConvCase) -> ConvGeometry:
    return ConvGeometry.parse(case.input, case.weight, nd=len(case.input) - 2, **case.arguments)


def configs_for(case: ConvCase, pass_: Any, channels_last: bool, device: str) -> list[Any]:
    kernel = "depthwise_wgrad" if pass_ == "wgrad" else "depthwise"
    gpu = device_of(torch.device(device))
    return possible(Problem(kernel, geometry_of(case), "float32", False, channels_last, gpu, pass_))


@rotate(case=CONFIG_CASES, channels_last=[True, False], dtype=[torch.float32, torch.bfloat16])
def test_every_candidate_config(case: ConvCase, channels_last: bool, dtype: torch.dtype, device: str) -> None:
    x, w = make_tensors(case, dtype, device, x_cl=channels_last, w_cl=channels_last)
    plain = conv_reference(x, w, **case.arguments)
    epilogue = make_epilogue(
        w.shape[0], as_format(plain.to(dtype), channels_last), dtype, device, activation=make_spec("relu")
    )
    reference = conv_reference(x, w, epilogue, **case.arguments)
    for config in cover(configs_for(case, "fprop", channels_last, device)):
        with forced(config=config):
            out = convolution(x, w, epilogue, **case.arguments)
        assert_close(out, reference, depth=case.depth, what=(case, config))

    g, dy = geometry_of(case), as_format(torch.randn_like(plain).to(dtype), channels_last)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    with torch.enable_grad():
        y = torch.nn.functional.conv2d(*leaves, **case.arguments)
        dx, dw = torch.autograd.grad(y, leaves, dy.double())
    for config in cover(configs_for(case, "dgrad", channels_last, device)):
        with forced(config=config):
            out = depthwise_dgrad(dy, w, g, channels_last)
        assert_close(out, dx, depth=g.gemm("dgrad")[2], what=(case, config))
    for config in cover(configs_for(case, "wgrad", channels_last, device)):
        with forced(config=config):
            found, bias = launch_wgrad(dy, x, g, True, True)
        assert_close(found, dw, depth=g.gemm("wgrad")[2], what=(case, config))
        assert_close(bias, dy.double().sum((0, 2, 3)), depth=g.gemm("wgrad")[2], what=(case, config))


def test_every_config_suits_some_layer() -> None:
    gpu = device_named("H200")
    for module, pass_ in ((depthwise, "fprop"), (depthwise_wgrad, "wgrad")):
        kernel = module.__name__.rpartition(".")[2]
        suits = {
            str(config)
            for case, channels_last in itertools.product(CONFIG_CASES, (True, False))
            for config in possible(Problem(kernel, geometry_of(case), "float16", False, channels_last, gpu, pass_))  # type: ignore[arg-type]
        }
        assert suits == set(map(str, module.configs()))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 14, 112])
@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "C"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_layer_has_a_candidate_in_every_pass(size: int, channels_last: bool, stride: int) -> None:
    gpu = device_named("H200")
    for taps in (1, 3, 5, 7, 31):
        arguments: dict[str, Any] = dict(padding=taps // 2, stride=stride, groups=8)
        g = ConvGeometry.parse((1, 8, size, size), (8, 1, taps, taps), nd=2, **arguments)
        for kernel, pass_ in (("depthwise", "fprop"), ("depthwise", "dgrad"), ("depthwise_wgrad", "wgrad")):
            assert candidates(Problem(kernel, g, "bfloat16", False, channels_last, gpu, pass_)), (taps, pass_)  # type: ignore[arg-type]


@rotate(case=CONFIG_CASES, channels_last=[True, False])
def test_small_integers_are_exact(case: ConvCase, channels_last: bool, device: str) -> None:
    for dtype in DTYPES:
        x, w = make_tensors(case, dtype, device, x_cl=channels_last, w_cl=channels_last, integers=True)
        reference = conv_reference(x, w, **case.arguments)
        # bf16 holds integers up to 256.
        exact = reference.abs() <= 256
        assert torch.equal(TF.conv2d(x, w, **case.arguments).double()[exact], reference[exact]), dtype


@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_a_grouped_convolution_and_dense_ones_of_a_channel_each(stride: int, device: str) -> None:
    case = ConvCase("", (2, 6, 8, 7), (12, 1, 3, 3), "", dict(padding=1, stride=stride, groups=6))
    x, w = make_tensors(case, torch.float32, device)
    out = TF.conv2d(x, w, **case.arguments)
    parts = [TF.conv2d(x[:, c : c + 1], w[2 * c : 2 * c + 2], padding=1, stride=stride) for c in range(6)]
    assert_close(out, torch.cat(parts, 1).double(), depth=9)


def test_it_is_dilated_by_zeros_in_the_filter(device: str) -> None:
    x, w = torch.randn(1, 8, 12, 11, device=device), torch.randn(8, 1, 3, 3, device=device)
    stuffed = torch.zeros(8, 1, 5, 5, device=device)
    stuffed[:, :, ::2, ::2] = w
    dilated = TF.conv2d(x, w, dilation=2, padding=2, groups=8)
    assert_close(dilated, TF.conv2d(x, stuffed, padding=2, groups=8).double(), depth=9)


def test_one_dimension_is_two_of_height_one(device: str) -> None:
    x, w = torch.randn(2, 8, 30, device=device), torch.randn(8, 1, 5, device=device)
    flat = TF.conv2d(x.unsqueeze(2), w.unsqueeze(2), padding=(0, 2), groups=8).squeeze(2)
    assert torch.equal(TF.conv1d(x, w, padding=2, groups=8), flat)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_transposed_convolution_is_the_data_gradient(stride: int, device: str) -> None:
    x, w = torch.randn(2, 8, 5, 6, device=device), torch.randn(8, 1, 3, 3, device=device)
    arguments: dict[str, Any] = dict(stride=stride, padding=1, output_padding=stride - 1, groups=8)
    with record_launches() as launches:
        up = TF.conv_transpose2d(x, w, **arguments)
    assert launches == ["depthwise_kernel"]
    assert_close(up, torch.nn.functional.conv_transpose2d(x.double(), w.double(), **arguments), depth=9)


def test_a_contiguous_image_is_read_and_written_where_it_lies(device: str) -> None:
    x, w = torch.randn(2, 8, 6, 9, device=device), torch.randn(8, 1, 3, 3, device=device)
    with captured(device_of(torch.device(device))) as launches:
        y = TF.conv2d(x, w, padding=1, groups=8)
    assert y.is_contiguous()
    (launch,) = launches
    assert launch.arguments["x_ptr"].data_ptr() == x.data_ptr() and not launch.arguments["CHANNELS_LAST"]


@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "C"])
def test_images_of_any_strides(channels_last: bool, device: str) -> None:
    w = torch.randn(8, 1, 3, 3, device=device)
    large = as_format(torch.randn(3, 12, 16, 17, device=device), channels_last)
    for x in (
        large[1:, 2:10, 3:12, 1:9],
        large[:, :8, ::2, ::2],
        large[:1, :8].expand(2, -1, -1, -1),
        large[:, :1].expand(-1, 8, -1, -1),
    ):
        out = TF.conv2d(x, w, padding=1, groups=8)
        assert_close(out, conv_reference(x, w, padding=1, groups=8), depth=9)


@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "C"])
def test_nan_and_infinity_stay_within_the_filters_reach(channels_last: bool, device: str) -> None:
    w = torch.randn(8, 1, 3, 3, device=device)
    for value in (float("nan"), float("inf")):
        x = as_format(torch.randn(2, 8, 9, 10, device=device), channels_last)
        x[1, 3, 4, 5] = value
        for arguments in (dict(padding=1), dict(stride=2), dict(dilation=2)):
            out = TF.conv2d(x, w, groups=8, **arguments)
            reference = torch.nn.functional.conv2d(x, w, groups=8, **arguments)
            assert torch.equal(out.isfinite(), reference.isfinite())
    # The last column is reached by no filter, and must not meet the weight's gradient.
    x = as_format(torch.randn(1, 8, 8, 8, device=device), channels_last)
    x[..., -1] = float("nan")
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, stride=2, groups=8)
    dw, _ = launch_wgrad(as_format(torch.randn(1, 8, 3, 3, device=device), channels_last), x, g, False, False)
    assert dw.isfinite().all()


def test_statistics_leave_with_the_results(device: str) -> None:
    """The batch norm behind it asks for no pass of its own over z, in either format."""
    bn = torch.nn.BatchNorm2d(20).to(device)
    for channels_last in (True, False):
        x = as_format(torch.randn(2, 20, 9, 11, device=device), channels_last)
        w = torch.randn(20, 1, 3, 3, device=device)
        with record_launches() as launches:
            y = TF.conv2d_bn_act(x, w, None, None, None, bn.weight, bn.bias, padding=1, groups=20, training=True)
        assert launches == ["depthwise_kernel", "batch_norm_combine_kernel", "batch_norm_normalize_kernel"]
        z = conv_reference(x, w, padding=1, groups=20)
        assert is_dense(y, channels_last)
        assert_close(y, torch.nn.functional.batch_norm(z, None, None, training=True), depth=9)


def test_large_strides_and_thick_groups_are_not_its_affair() -> None:
    def geometry(c: int, groups: int, **arguments: Any) -> ConvGeometry:
        return ConvGeometry.parse((1, c, 32, 32), (c, c // groups, 3, 3), nd=2, groups=groups, **arguments)

    assert is_depthwise(geometry(8, 8)) and is_depthwise(geometry(8, 8, stride=4))
    assert (
        not is_depthwise(geometry(8, 4)) and not is_depthwise(geometry(8, 8, stride=5)) and not is_depthwise(geometry(1, 1))
    )


def test_large_strides_run_on_the_general_kernels(device: str) -> None:
    x, w = torch.randn(1, 4, 16, 16, device=device), torch.randn(4, 1, 5, 5, device=device)
    with record_launches() as launches:
        out = TF.conv2d(x, w, stride=5, groups=4)
    assert launches == ["conv_flat_kernel"]
    assert_close(out, conv_reference(x, w, stride=5, groups=4), depth=25)


def test_offsets_of_64_bits(device: str) -> None:
    x, w = (
        torch.randn(2, 8, 4, 4, device=device).to(memory_format=torch.channels_last),
        torch.randn(8, 1, 3, 3, device=device),
    )
    with captured(device_of(torch.device(device))) as launches:
        for batch_stride in (128, 2**31):
            # A small view that strides over a large tensor.
            strided = torch.empty_strided(x.shape, (batch_stride, 1, 32, 8), device="meta")
            TF.conv2d(strided, w.to("meta"), padding=1, groups=8)
    assert [launch.arguments["INDEX_64"] for launch in launches] == [False, True]
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, stride=2, padding=1, groups=8)
    for channels_last in (True, False):
        images = as_format(x, channels_last)
        with patched(launches_of, "_index_64", lambda *_: True):
            out = TF.conv2d(images, w, stride=2, padding=1, groups=8)
            dx, (dw, _) = depthwise_dgrad(out, w, g, channels_last), launch_wgrad(out, images, g, False, False)
        assert_close(out, conv_reference(x, w, stride=2, padding=1, groups=8), depth=9)
        leaves = [t.double().requires_grad_() for t in (x, w)]
        with torch.enable_grad():
            y = torch.nn.functional.conv2d(*leaves, stride=2, padding=1, groups=8)
            expected = torch.autograd.grad(y, leaves, out.double())
        assert_close(dx, expected[0], depth=9)
        assert_close(dw, expected[1], depth=32)


def test_the_benchmarks_know_it() -> None:
    assert {specimen.kernel for specimen in operations()["depthwise"].specimens()} == {"depthwise", "depthwise_wgrad"}
