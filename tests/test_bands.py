"""Depthwise convolution on tensor cores, as banded products: every case, dtype and candidate config against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import recorded
from cases import ConvCase, make_epilogue, make_tensors
from matrix import cover, every, named, rotate, some
from reference import assert_close, conv_reference
from torch import Tensor
from tritonconv.kernels import depthwise_bands, depthwise_bands_wgrad
from tritonconv.kernels.tiles import tile

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv import banded as bands
from tritonconv.ops.conv.banded import (
    bands_dgrad,
    bands_wgrad,
    convolve_banded,
    prefers_bands,
    supports_bands,
)  # fmt: skip
from tritonconv.ops.conv.depthwise import DepthwiseView, convolve_depthwise, depthwise_dgrad, depthwise_wgrad
from tritonconv.ops.conv.target import Target
from tritonconv.ops.core.activation import make_spec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import forced, record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.tuning import Problem, candidates, choose, device_named

F = torch.nn.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

CASES = [
    ConvCase("7x7", (2, 3, 14, 14), (3, 1, 7, 7), "", dict(padding=3)),
    ConvCase("7x7 of an image of 7x7", (3, 2, 7, 7), (2, 1, 7, 7), "", dict(padding=3)),
    ConvCase("9x13", (1, 3, 12, 16), (3, 1, 9, 13), "", dict(padding=(4, 6))),
    ConvCase("17x19 larger than the image", (1, 2, 7, 8), (2, 1, 17, 19), "", dict(padding=(8, 9))),
    ConvCase("rows over a block", (1, 2, 5, 70), (2, 1, 7, 7), "", dict(padding=3)),
    ConvCase("rows over a block that vectors divide", (1, 2, 5, 136), (2, 1, 7, 9), "", dict(padding=(3, 4))),
    ConvCase("more rows than a block", (1, 2, 75, 6), (2, 1, 7, 5), "", dict(padding=(3, 2))),
    ConvCase("unpadded", (2, 2, 11, 9), (2, 1, 5, 7), ""),
    ConvCase("padding beyond the filter", (1, 2, 6, 5), (2, 1, 5, 5), "", dict(padding=7)),
    ConvCase("even filter same", (1, 2, 8, 9), (2, 1, 6, 4), "", dict(padding="same")),
    ConvCase("stride 2", (2, 3, 15, 17), (3, 1, 7, 7), "", dict(padding=3, stride=2)),
    ConvCase("strides that do not divide blocks", (1, 2, 14, 19), (2, 1, 7, 5), "", dict(padding=(3, 2), stride=3)),
    ConvCase("stride beyond the filter", (1, 2, 13, 14), (2, 1, 2, 3), "", dict(stride=4)),
    ConvCase("dilation 2", (1, 3, 15, 18), (3, 1, 7, 5), "", dict(padding=(6, 4), dilation=2)),
    ConvCase("dilation and stride", (1, 2, 16, 15), (2, 1, 5, 5), "", dict(padding=4, dilation=2, stride=2)),
    ConvCase("dilation 3", (1, 2, 17, 14), (2, 1, 5, 5), "", dict(padding=6, dilation=3)),
    ConvCase("1-d of 31", (2, 3, 150), (3, 1, 31), "", dict(padding=15)),
    ConvCase("1-d strided", (2, 3, 61), (3, 1, 31), "", dict(padding=15, stride=2)),
    ConvCase("3-d", (1, 2, 4, 7, 8), (2, 1, 3, 5, 7), "", dict(padding=(1, 2, 3))),
    ConvCase("3-d strided", (2, 2, 5, 7, 8), (2, 1, 3, 5, 5), "", dict(padding=(1, 2, 2), stride=2)),
    ConvCase("3-d dilated", (1, 2, 7, 6, 5), (2, 1, 3, 3, 3), "", dict(padding=(2, 1, 1), dilation=(2, 1, 1))),
    ConvCase("3-d unit depth padded", (1, 2, 1, 6, 6), (2, 1, 1, 5, 5), "", dict(padding=(1, 2, 2))),
    ConvCase("multiplier", (1, 2, 10, 9), (4, 1, 7, 7), "", dict(padding=3)),
    ConvCase("multiplier strided 3-d", (1, 2, 4, 8, 7), (6, 1, 2, 5, 5), "", dict(padding=(1, 2, 2), stride=2)),
]  # fmt: skip
PLAIN, STRIDED = named(CASES, "7x7"), named(CASES, "stride 2")
FEW = [PLAIN, named(CASES, "rows over a block"), STRIDED, named(CASES, "multiplier")]


def geometry(case: ConvCase) -> ConvGeometry:
    return ConvGeometry.parse(case.input, case.weight, nd=len(case.input) - 2, groups=case.input[1], **case.arguments)


def arguments(case: ConvCase) -> dict[str, Any]:
    return dict(groups=case.input[1], **case.arguments)


def made(case: ConvCase, dtype: torch.dtype, device: str, integers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy."""
    x, w = make_tensors(case, dtype, device, x_cl=False, w_cl=False, integers=integers)
    shape = geometry(case).output_shape
    dy = torch.randint(-2, 3, shape, device=device) if integers else torch.randn(shape, device=device)
    return x, w, dy.to(dtype)


def forward(case: ConvCase, x: Tensor, w: Tensor, epilogue: Epilogue | None = None) -> Tensor:
    y = convolve_banded(x, w, epilogue or Epilogue(), geometry(case)).y
    assert y is not None
    return y


def gradients(case: ConvCase, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
    """torch's in fp64: of x, of the weight and of a bias."""
    leaves = [t.double().requires_grad_() for t in (x, w)]
    y = getattr(F, f"conv{x.dim() - 2}d")(*leaves, **arguments(case))
    wide = dy.double()
    return [*torch.autograd.grad(y, leaves, wide), wide.sum([d for d in range(dy.dim()) if d != 1])]


def ours(case: ConvCase, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
    dw, db = bands_wgrad(dy, x, geometry(case), False, True)
    assert db is not None
    return [bands_dgrad(dy, w, geometry(case)), dw, db]


@rotate(case=CASES, dtype=DTYPES)
def test_forward_with_the_whole_epilogue_matches_fp64(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    x, w, dy = made(case, dtype, device)
    epilogue = make_epilogue(case.weight[0], dy, dtype, device, activation=make_spec("silu"))
    with record_launches() as launches:
        out = forward(case, x, w, epilogue)
    assert launches == ["depthwise_bands_kernel"] and out.is_contiguous()
    assert_close(out, conv_reference(x, w, epilogue, **arguments(case)), depth=case.depth, what=case)


@rotate(case=CASES, dtype=DTYPES)
def test_gradients_match_fp64(case: ConvCase, dtype: torch.dtype, device: str) -> None:
    x, w, dy = made(case, dtype, device)
    g = geometry(case)
    depths = case.depth * g.out_channels // g.groups, dy.numel() // g.out_channels, dy.numel() // g.out_channels
    names = "dx", "dw", "db"
    for name, out, ref, depth in zip(names, ours(case, x, w, dy), gradients(case, x, w, dy), depths, strict=True):
        assert out.dtype == dtype
        assert_close(out, ref, depth=depth, what=(case, name))


@every(case=some(CASES, 8))
def test_small_integers_are_exact(case: ConvCase, device: str) -> None:
    x, w, dy = made(case, torch.float32, device, integers=True)
    assert torch.equal(forward(case, x, w).double(), conv_reference(x, w, **arguments(case)))
    for out, ref in zip(ours(case, x, w, dy), gradients(case, x, w, dy), strict=True):
        assert torch.equal(out.double(), ref)


BLOCKS = [(16, 16, 128), (32, 64, 64), (64, 128, 64)]


def tiles_of(case: ConvCase, module: Any, pass_: str, least: int) -> list[Any]:
    problem = Problem(module.__name__.split(".")[-1], geometry(case), "bfloat16", False, True, device_named("H200"), pass_)  # type: ignore[arg-type]
    found = candidates(problem)
    assert len(found) >= least, found
    return found


EVERY = ConvCase("every config", (6, 2, 60, 14), (2, 1, 5, 7), "", dict(padding=(2, 3)))


@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_every_config_is_exact(pass_: str, device: str) -> None:
    x, w, dy = made(EVERY, torch.bfloat16, device, integers=True)
    found = tiles_of(EVERY, depthwise_bands, pass_, len(depthwise_bands.configs()) - 1)
    expected = conv_reference(x, w, **arguments(EVERY)) if pass_ == "fprop" else gradients(EVERY, x, w, dy)[0]
    # bf16 holds integers up to 256.
    exact = expected.abs() <= 256
    for config in cover(found):
        with forced(config=config):
            out = forward(EVERY, x, w) if pass_ == "fprop" else bands_dgrad(dy, w, geometry(EVERY))
        assert torch.equal(out.double()[exact], expected[exact]), config


def test_every_config_of_the_weight_gradient_is_exact(device: str) -> None:
    x, w, dy = made(EVERY, torch.float32, device, integers=True)
    for config in cover(tiles_of(EVERY, depthwise_bands_wgrad, "wgrad", len(depthwise_bands_wgrad.configs()))):
        with forced(config=config):
            found = bands_wgrad(dy, x, geometry(EVERY), False, True)
        for out, ref in zip(found, gradients(EVERY, x, w, dy)[1:], strict=True):
            assert torch.equal(out.double(), ref), config


@rotate(case=[*FEW[:3], *(named(CASES, name) for name in ("dilation 2", "1-d of 31", "3-d"))], blocks=BLOCKS)
def test_small_blocks_are_exact(case: ConvCase, blocks: tuple[int, int, int], device: str) -> None:
    """Several programs, and windows of every division: few columns and many, one source row a step and several."""
    x, w, dy = made(case, torch.float32, device, integers=True)
    with forced(config=tile(*blocks, 4, 2, tma=False)):
        assert torch.equal(forward(case, x, w).double(), conv_reference(x, w, **arguments(case)))
        assert torch.equal(bands_dgrad(dy, w, geometry(case)).double(), gradients(case, x, w, dy)[0])


@every(case=FEW)
def test_statistics_are_of_the_result_before_rounding(case: ConvCase, device: str) -> None:
    x, w, _ = made(case, torch.float16, device)
    bias = torch.randn(case.weight[0], device=device).half()
    with forced(config=tile(4, 16, 128, 4, 2, tma=False)):
        parts = convolve_banded(x, w, Epilogue(bias), geometry(case), Target(statistics=True)).statistics
    assert parts is not None and parts.counts.numel() > 1
    counts, moments = parts
    ref = conv_reference(x, w, Epilogue(bias), **arguments(case)).transpose(0, 1).flatten(1)
    assert counts.sum() == ref.shape[1]
    n, means = counts[:, None].double(), moments[0].double()
    mean = (n * means).sum(0) / n.sum()
    squares = moments[1].double().sum(0) + (n * (means - mean).square()).sum(0)
    torch.testing.assert_close(mean, ref.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares / n.sum(), ref.var(1, correction=0), rtol=1e-5, atol=1e-5)


@every(case=some([named(CASES, "even filter same"), *FEW], 1))
def test_equal_to_the_direct_kernel(case: ConvCase, device: str) -> None:
    x, w, dy = made(case, torch.float32, device, integers=True)
    g = geometry(case)
    y = convolve_depthwise(x, w, Epilogue(), g).y
    assert y is not None and torch.equal(forward(case, x, w), y)
    direct = [depthwise_dgrad(dy, w, g, False), *depthwise_wgrad(dy, x, g, False, True)]
    assert all(torch.equal(a, b) for a, b in zip(ours(case, x, w, dy), direct, strict=True))


def test_a_transposed_convolution_is_the_gradient(device: str) -> None:
    x, w = (torch.randint(-2, 3, shape, device=device).float() for shape in ((2, 3, 6, 7), (3, 1, 7, 7)))
    numbers = dict(stride=2, padding=3, output_padding=1, groups=3)
    g = ConvGeometry.parse(x.shape, w.shape, nd=2, transposed=True, **numbers)  # type: ignore[arg-type]
    y = convolve_banded(x, w, Epilogue(), g).y
    assert y is not None and torch.equal(y, F.conv_transpose2d(x, w, **numbers))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["channels-last", "rows apart", "columns apart", "broadcast"])
def test_images_that_are_not_contiguous(kind: str, device: str) -> None:
    case = PLAIN
    x, w, dy = made(case, torch.float32, device, integers=True)

    def other(t: Tensor) -> Tensor:
        if kind == "channels-last":
            return as_format(t, True)
        if kind == "broadcast":
            return t[:1].expand(t.shape)
        pad = (0, 5, 0, 3) if kind == "rows apart" else (0, t.shape[-1])
        wide = F.pad(t, pad, value=float("nan"))
        return wide[..., : t.shape[-2], : t.shape[-1]] if kind == "rows apart" else _spread(t)

    x, dy = other(x), other(dy)
    copies = {"channels-last": 2, "columns apart": 1}.get(kind, 0)  # a channels-last result is copied back, too
    assert recorded(lambda x, w: forward(case, x, w), x, w).copies == copies
    assert torch.equal(forward(case, x, w).double(), conv_reference(x, w, **arguments(case)))
    for out, ref in zip(ours(case, x, w, dy), gradients(case, x, w, dy), strict=True):
        assert torch.equal(out.double(), ref)


def _spread(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(-2)[..., ::2]


def test_what_is_not_finite_stays_in_its_image_and_channel(device: str) -> None:
    case = STRIDED
    x, w, dy = made(case, torch.float32, device)
    clean = forward(case, x, w)
    x[1, 2, 4, 5] = float("inf")
    out, ref = forward(case, x, w), conv_reference(x, w, **arguments(case))
    assert not out[~ref.isfinite()].isfinite().any()
    others = torch.ones_like(out, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out[others], clean[others])
    dw, _ = bands_wgrad(dy, x, geometry(case), False, False)
    ref = gradients(case, x, w, dy)[1]
    assert not dw[~ref.isfinite()].isfinite().any() and dw[:2].isfinite().all()


def test_elements_that_no_tap_reaches_do_not_matter_to_the_weight(device: str) -> None:
    case = ConvCase("rest", (2, 2, 12, 12), (2, 1, 5, 5), "", dict(stride=4))
    x, w, dy = made(case, torch.float32, device, integers=True)
    x[:, :, 9:] = float("nan")
    x[..., 9:] = float("nan")
    found, _ = bands_wgrad(dy, x, geometry(case), False, False)
    assert torch.equal(found.double(), gradients(case, x.nan_to_num(0), w, dy)[1])


@every(case=[*FEW[1:3], named(CASES, "3-d strided"), named(CASES, "multiplier strided 3-d")])
def test_offsets_of_64_bits(case: ConvCase, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "_index_64", lambda *_: True)
    x, w, dy = made(case, torch.float32, device, integers=True)
    assert torch.equal(forward(case, x, w).double(), conv_reference(x, w, **arguments(case)))
    for out, ref in zip(ours(case, x, w, dy), gradients(case, x, w, dy), strict=True):
        assert torch.equal(out.double(), ref)


def test_empty_batch(device: str) -> None:
    case = ConvCase("empty batch", (0, 3, 9, 9), (3, 1, 7, 7), "", dict(padding=3))
    x, w, dy = made(case, torch.float32, device)
    assert forward(case, x, w).shape == (0, 3, 9, 9)
    dx, dw, db = ours(case, x, w, dy)
    assert dx.shape == x.shape and not dw.any() and not db.any()


def preferred(
    size: int, filter_: int, channels_last: bool, dtype: torch.dtype = torch.bfloat16, pass_: Any = "fprop"
) -> bool:
    shape = (64, 128, size, size)
    g = ConvGeometry.parse(shape, (128, 1, filter_, filter_), nd=2, padding=filter_ // 2, groups=128)
    return prefers_bands(
        DepthwiseView(g, pass_ == "dgrad", channels_last, device_named("H200"), dtype.itemsize), dtype, pass_
    )


def test_large_filters_prefer_products() -> None:
    for pass_ in ("fprop", "dgrad", "wgrad"):
        assert preferred(56, 31, True, pass_=pass_) and preferred(14, 27, True, pass_=pass_)
        assert preferred(56, 31, False, pass_=pass_) and not preferred(56, 3, True, pass_=pass_)
    # Copies cost as much as products save.
    assert preferred(56, 7, False) and not preferred(56, 7, True)
    # There are no tensor cores for these.
    assert not preferred(56, 31, False, torch.float32)


def test_a_window_that_no_tile_holds_is_not_supported() -> None:
    g = ConvGeometry.parse((2, 4, 4096), (4, 1, 300), nd=1, groups=4)
    assert not supports_bands(DepthwiseView(g, False, False, device_named("H200"), 2), torch.bfloat16)


def test_a_config_is_chosen_for_every_device() -> None:
    g = ConvGeometry.parse((8, 64, 56, 56), (64, 1, 31, 31), nd=2, padding=15, groups=64)
    for name in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942"):
        for pass_, kernel in (("fprop", ""), ("dgrad", ""), ("wgrad", "_wgrad")):
            problem = Problem(f"depthwise_bands{kernel}", g, "float16", False, True, device_named(name), pass_)  # type: ignore[arg-type]
            assert choose(problem) in candidates(problem)
