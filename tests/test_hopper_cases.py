"""Acceptance: the layers of benchmarks/cases.csv on Hopper's kernels, as they are and, interpreted, reduced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hopper import BF16, HOPPER, ON_CPU, Layer, check, descriptors, forward, of_every_seed, reference, reference_gradients
from matrix import some
from reference import assert_close
from torch import Tensor

from tritonconv.bench.cases import Case, load_cases
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.hopper import hopper_dgrad, hopper_wgrad
from tritonconv.ops.conv.hopper.supports import why_unsupported
from tritonconv.ops.core.launch import Launch, captured
from tritonconv.ops.core.layout import dense_strides
from tritonconv.tuning import device_named

pytestmark = ON_CPU

FAMILIES = ("standard3x3", "pointwise1x1", "dilated", "conv1d", "conv3d", "grouped", "stem", "transposed")
CASES = [case for case in load_cases() if case.family in FAMILIES]

# Every layer of these families that is left to the portable kernels.
REFUSED = {
    "vae_conv_out": "128 channels and 3 filters are not multiples of 8",
    "r50_stem_7x7": "3 channels and 64 filters are not multiples of 8",
    "convnext_patchify4": "3 channels and 96 filters are not multiples of 8",
    "vit_patch16": "3 channels and 768 filters are not multiples of 8",
    "pt54404_cifar_stem": "3 channels and 64 filters are not multiples of 8",
    "kb50_alexnet_stem": "3 channels and 96 filters are not multiples of 8",
    "r3d18_stem": "3 channels and 64 filters are not multiples of 8",
    "qwen2vl_patch": "3 channels and 1280 filters are not multiples of 8",
    "dcgan_g1": "512 channels and 100 filters are not multiples of 8",
    "dcgan_g5": "3 channels and 64 filters are not multiples of 8",
    "rnx50_l1_g32": "4 channels and 4 filters of a group are not multiples of 8",
    "rnx50_l3_g32": "groups of 16 channels and 16 filters have less than 64",
    "rnx101_l1_g32": "groups of 8 channels and 8 filters have less than 64",
    "rnx101_l3_g32": "groups of 32 channels and 32 filters have less than 64",
    "regnety8_s2_g8": "groups of 56 channels and 56 filters have less than 64",
    "pt192902_dw_k4": "1 channels and 1 filters of a group are not multiples of 8",
    "mamba28_dw_k4": "1 channels and 1 filters of a group are not multiples of 8",
    "meta_dw1d_202": "1 channels and 1 filters of a group are not multiples of 8",
    "conformer_dw31": "1 channels and 1 filters of a group are not multiples of 8",
    "x3d_dw3": "1 channels and 1 filters of a group are not multiples of 8",
}
SUPPORTED = [case for case in CASES if case.id not in REFUSED]


def layer_of(case: Case) -> Layer:
    transposed = case.kind == "convT"
    rows, columns = (case.channels, case.filters) if transposed else (case.filters, case.channels)
    arguments = dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)
    if transposed:
        arguments |= dict(transposed=True, output_padding=case.output_padding)
    return Layer(case.id, case.input_shape, (rows, columns // case.groups, *case.kernel), arguments)


def reduced(case: Case) -> Case:
    """The layer with fewer images, pixels, groups and channels: what divides what, and which taps see padding, stays."""
    groups = min(case.groups, 3)
    c, k = (groups * fewer(channels // case.groups) for channels in (case.channels, case.filters))
    reach = [d * (taps - 1) for d, taps in zip(case.dilation, case.kernel, strict=True)]
    # Of a line as much as lets all taps see pixels; of an image so much of its rows, where they are not too long.
    if case.nd == 1:
        most = [reach[0] + 150]
    else:
        lead = [9] if case.nd == 2 else [5, 6]
        most = [*lead, min(40, max(17 if case.nd == 2 else 9, reach[-1] + 5))]
    size = tuple(n if n <= m else m - (n - m) % 2 for n, m in zip(case.size, most, strict=True))
    return replace(case, batch=min(case.batch, 3), channels=c, filters=k, groups=groups, size=size)


def fewer(channels: int) -> int:
    return channels if channels <= 192 else 128 + channels % 64 + 64 * (channels >= 1024)


def test_what_is_refused_and_why() -> None:
    found = {}
    for case in CASES:
        g = layer_of(case).geometry
        reason = why_unsupported(g.mirrored, BF16, HOPPER, "dgrad") if g.transposed else why_unsupported(g, BF16, HOPPER)
        if reason is not None:
            found[case.id] = reason
    assert found == REFUSED


@pytest.mark.parametrize("case", some((c for c in SUPPORTED if c.kind == "conv"), 12), ids=lambda case: case.id)
def test_a_reduced_layer(case: Case) -> None:
    check(layer_of(reduced(case)), BF16)


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case.kind == "convT"], ids=lambda case: case.id)
def test_a_reduced_transposed_layer(case: Case) -> None:
    layer = layer_of(reduced(case))
    g = layer.geometry
    x, w, dy = layer.tensors(BF16)
    dx, dw = reference_gradients(x, w, dy, g)
    assert_close(of_every_seed(lambda: forward(x, w, g)), reference(x, w, g), what=case.id)
    assert_close(of_every_seed(lambda: forward(dy, w, g.mirrored)), dx, what=case.id)
    assert_close(of_every_seed(lambda: hopper_wgrad(x, dy, g.mirrored, True)), dw, what=case.id)


# As they are: launches for tensors without memory.


def meta(shape: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(shape, dense_strides(shape, True), dtype=BF16, device="meta")


def launches_of(g: ConvGeometry) -> list[Launch]:
    x, w, y = meta(g.input_shape), meta(g.weight_shape), meta(g.output_shape)
    with captured(device_named("H200")) as launches:
        forward(x, w, g)
        if g.transposed:
            forward(y, w, g.mirrored)
            hopper_wgrad(x, y, g.mirrored, True)
        else:
            hopper_dgrad(y, w, g)
            hopper_wgrad(y, x, g, True)
    return launches


@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.id)
def test_launches_of_the_whole_layer_keep_the_limits_of_descriptors(case: Case) -> None:
    launches = launches_of(layer_of(case).geometry)
    names = [one.kernel.__name__ for one in launches]
    assert names[:3] == ["hopper_conv_kernel", "hopper_conv_kernel", "hopper_wgrad_kernel"]
    assert names[3:] in ([], ["wgrad_reduce_kernel"])
    for one in launches[:3]:
        assert 1 <= one.programs <= device_named("H200").multiprocessors
        assert len(descriptors(one)) >= 3
        for descriptor in descriptors(one):
            size = descriptor.base.element_size()
            assert all(1 <= n < 2**32 for n in descriptor.shape) and max(descriptor.block_shape) <= 256
            assert all(0 < stride * size < 2**40 and stride * size % 16 == 0 for stride in descriptor.strides[:-1])
