"""Which kernel a layer takes and which config: pure arithmetic, no tensors touched."""

from __future__ import annotations

import itertools

import pytest
from tritonconv.kernels import conv_flat, conv_fprop, matmul
from tritonconv.kernels.tiles import fitting

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.plan import ConvPlan, plan_convolution
from tritonconv.ops.core.layout import dense_strides
from tritonconv.tuning import Problem, choose, known_devices


def plan(x: tuple[int, ...], w: tuple[int, ...], *, x_cl: bool = True, w_cl: bool = True, **arguments: object) -> ConvPlan:
    geometry = ConvGeometry.parse(x, w, nd=len(x) - 2, **arguments)  # type: ignore[arg-type]
    strides = dense_strides(x, x_cl)
    return plan_convolution(geometry, strides, weight_contiguous=not w_cl, weight_channels_last=w_cl)


def test_channels_of_whole_blocks_take_conv_fprop() -> None:
    assert plan((8, 64, 56, 56), (256, 64, 3, 3)).kernel == "conv_fprop"
    assert plan((8, 128, 56, 56), (64, 128, 3, 3)).kernel == "conv_fprop"


def test_few_or_odd_channels_take_blocks_across_taps() -> None:
    for channels, filters in ((3, 64), (24, 64), (32, 32), (64, 64), (96, 96), (200, 256)):
        assert plan((8, channels, 56, 56), (filters, channels, 3, 3)).kernel == "conv_flat", channels


def test_1x1_is_a_product_over_pixels_unless_it_strides() -> None:
    assert plan((8, 64, 56, 56), (64, 64, 1, 1)).kernel == "matmul"
    assert plan((8, 128, 56, 56), (64, 128, 1, 1), stride=2).kernel == "conv_fprop"
    assert plan((8, 64, 56, 56), (64, 32, 1, 1), groups=2).kernel != "matmul"


def test_patches_become_channels() -> None:
    # A row of 4 pixels of 8 channels is one run; the filter loses that axis.
    folded = plan((2, 32, 16, 16), (16, 32, 4, 4), stride=4)
    assert folded.geometry.in_channels == 128 and folded.geometry.kernel == (1, 4, 1)
    # An image that is one patch is a row of a matrix.
    whole = plan((4096, 3, 2, 14, 14), (1280, 3, 2, 14, 14), stride=(2, 14, 14))
    assert whole.kernel == "matmul" and whole.geometry.gemm() == (4096, 1280, 1176) and whole.row_stride == 1176
    # Its weights stay in their own order for a contiguous image.
    contiguous = plan((2, 3, 224, 224), (768, 3, 16, 16), x_cl=False, w_cl=False, stride=16)
    assert contiguous.kernel == "conv_flat" and contiguous.copies == 0 and contiguous.vector == 16


def test_dilation_inside_a_patch_is_no_patch() -> None:
    assert plan((2, 32, 16, 16), (16, 32, 4, 4), stride=4, dilation=2).geometry.kernel == (1, 4, 4)


def test_offsets_are_64_bit_when_a_tensor_or_a_view_is_large() -> None:
    assert not plan((8, 64, 56, 56), (64, 64, 3, 3)).index_64
    assert plan((64, 128, 513, 513), (128, 128, 3, 3), stride=2).index_64
    geometry = ConvGeometry.parse((2, 8, 4, 4), (4, 8, 3, 3), nd=2)
    view = plan_convolution(geometry, (2**31, 1, 32, 8), weight_contiguous=False, weight_channels_last=True)
    assert view.index_64


def problem(
    kernel: str, pixels: int, filters: int, channels: int, *, taps: int = 3, dtype: str = "bfloat16", tf32: bool = False,
    vectors: bool = True, device: str = "NVIDIA H200",
) -> Problem:  # fmt: skip
    geometry = ConvGeometry.parse((1, channels, pixels), (filters, channels, taps), nd=1, padding=taps // 2)
    return Problem(kernel, geometry, dtype, tf32, vectors, known_devices()[device])


@pytest.mark.parametrize("kernel", ["conv_fprop", "conv_flat", "matmul"])
@pytest.mark.parametrize("gpu", known_devices())
def test_every_problem_has_a_config_on_every_gpu(kernel: str, gpu: str) -> None:
    channels = (64, 128, 192, 1280) if kernel == "conv_fprop" else (1, 3, 9, 24, 147, 1000)
    kinds = (("bfloat16", False), ("float32", True), ("float32", False), ("float64", False))
    for m, n, c, (dtype, tf32), vectors in itertools.product(
        (1, 49, 10**6), (1, 3, 17, 64, 96, 2048), channels, kinds, (False, True)
    ):
        config = choose(problem(kernel, m, n, c, dtype=dtype, tf32=tf32, vectors=vectors, device=gpu))
        assert config.kwargs["BLOCK_K"] <= 128
        if kernel == "conv_fprop":
            assert c % config.kwargs["BLOCK_K"] == 0


def test_fitting_keeps_the_pipeline_within_shared_memory() -> None:
    for module in (conv_fprop, conv_flat, matmul):
        for config in fitting(module.configs(), m=10**6, n=512, k=512, itemsize=2, tensor_cores=True, shared=65536):
            m, n, k = list(config.kwargs.values())[:3]
            assert (m + n) * k * 2 * config.num_stages <= 65536


def test_large_layers_get_large_tiles_and_small_ones_many() -> None:
    large = choose(problem("conv_fprop", 10**6, 256, 256))
    assert large.kwargs["BLOCK_M"] * large.kwargs["BLOCK_N"] >= 128 * 128
    small = choose(problem("conv_fprop", 196, 256, 256))
    assert small.kwargs["BLOCK_M"] * small.kwargs["BLOCK_N"] <= 64 * 128
