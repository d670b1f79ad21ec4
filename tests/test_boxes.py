"""Boxes, phases of strides, and what Hopper's kernels choose by them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_hopper_cases import SUPPORTED, layer_of
from tritonconv.kernels.hopper import conv, wgrad

from tritonconv.geometry import (
    ConvGeometry,
    Pass,
    best_box,
    boxes_over,
    pass_extents,
    phase_size,
    phases_of,
    tap_hops,
    tap_places,
)
from tritonconv.tuning import Problem, candidates, choose, device_named
from tritonconv.tuning.cost import predict
from tritonconv.tuning.families.hopper import LEAST_STEPS, WORKSPACE, hopper_ranges

H200 = device_named("H200")
PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")

EXTENTS = [
    (1, 1, 1, 1), (1, 1, 1, 5), (70, 1, 3, 3), (256, 1, 14, 14), (1, 1, 512, 512), (3, 7, 5, 9), (1, 2, 300, 1),
    (1, 1, 1, 10**6), (10**6, 1, 1, 1), (2, 1, 17, 1), (1, 16, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("extents", EXTENTS, ids=str)
@pytest.mark.parametrize("pixels", [64, 128, 256])
def test_the_best_box_leaves_least_outside(extents: tuple[int, int, int, int], pixels: int) -> None:
    box = best_box(extents, pixels)
    assert math.prod(box) == pixels and max(box) <= 256 and all(side & (side - 1) == 0 for side in box)
    sides = [1 << i for i in range(9)]
    others = (other for other in itertools.product(sides, repeat=4) if math.prod(other) == pixels)
    assert boxes_over(extents, box) == min(boxes_over(extents, other) for other in others)
    assert boxes_over(extents, box) * pixels >= math.prod(extents)


def test_a_box_has_one_plane_of_an_image_without_depth() -> None:
    """There groups stand in the depth's place, and a box must not reach into the neighbor's."""
    for n, p, q in itertools.product((1, 2, 9, 300), (1, 3, 8, 33), (1, 7, 16, 300)):
        for pixels in (64, 128, 256):
            assert best_box((n, 1, p, q), pixels)[1] == 1, (n, p, q, pixels)


def test_of_equal_boxes_the_squarest() -> None:
    assert best_box((1, 1, 512, 512), 128) == (1, 1, 8, 16)
    assert best_box((64, 64, 64, 64), 64) == (1, 1, 8, 8)


AXES = [
    (taps, stride, padding, dilation)
    for taps, stride, padding, dilation in itertools.product(range(1, 6), range(1, 6), range(5), range(1, 7))
]


def test_forward_phases_see_each_pixel_of_each_tap_once() -> None:
    for taps, stride, padding, dilation in AXES:
        phases = phases_of(taps, stride, padding, dilation, back=False)
        step, hop = tap_hops(stride, dilation)
        assert all(0 <= phase.pixel < stride and phase.number > 0 for phase in phases)
        for pixel in (0, 1, 7):
            seen = [
                (phase.first + j * step, phase.pixel + stride * (pixel + phase.shift + j * hop))
                for phase in phases for j in range(phase.number)
            ]  # fmt: skip
            expected = [(tap, pixel * stride + tap * dilation - padding) for tap in range(taps)]
            assert sorted(seen) == expected, (taps, stride, padding, dilation)


def test_places_of_taps_are_their_phases() -> None:
    for taps, stride, padding, dilation in AXES:
        phases = phases_of(taps, stride, padding, dilation, back=False)
        for tap, (phase, place) in enumerate(tap_places(taps, stride, padding, dilation)):
            at = phases[phase].pixel + stride * place
            assert at == tap * dilation - padding, (taps, stride, padding, dilation)


def test_backward_phases_see_each_result_of_each_tap_once() -> None:
    for taps, stride, padding, dilation in AXES:
        phases = phases_of(taps, stride, padding, dilation, back=True)
        step, hop = tap_hops(stride, dilation)
        assert sorted(phase.pixel for phase in phases) == list(range(stride))
        for phase, row in itertools.product(phases, (0, 1, 5)):
            pixel = phase.pixel + stride * row
            seen = sorted((phase.first + j * step, row + phase.shift - j * hop) for j in range(phase.number))
            reached = ((tap, pixel + padding - tap * dilation) for tap in range(taps))
            assert seen == [(tap, at // stride) for tap, at in reached if at % stride == 0], (
                taps,
                stride,
                padding,
                dilation,
            )


def test_phases_have_every_pixel_of_an_axis() -> None:
    for size, stride in itertools.product(range(1, 20), range(1, 7)):
        sizes = [phase_size(size, pixel, stride) for pixel in range(stride)]
        assert sizes == [len(range(pixel, size, stride)) for pixel in range(stride)] and sum(sizes) == size


def test_extents_of_passes() -> None:
    g = ConvGeometry.parse((2, 64, 9, 8), (64, 64, 3, 3), nd=2, stride=2, padding=1)
    assert pass_extents(g, "fprop") == pass_extents(g, "wgrad") == (2, 1, 5, 4)
    assert pass_extents(g, "dgrad") == (2, 1, 5, 4)
    assert pass_extents(ConvGeometry.parse((2, 64, 10, 8), (64, 64, 1, 1), nd=2, stride=3), "dgrad") == (2, 1, 4, 3)


# What is chosen by them.


def problem(g: ConvGeometry, pass_: Pass) -> Problem:
    return Problem("hopper.wgrad" if pass_ == "wgrad" else "hopper.conv", g, "bfloat16", False, True, H200, pass_)


def geometries() -> list[ConvGeometry]:
    every = [layer_of(case).geometry for case in SUPPORTED]
    return [g.mirrored if g.transposed else g for g in every]


def blocks(config: object) -> tuple[int, int, int]:
    kwargs = config.kwargs  # type: ignore[attr-defined]
    return kwargs["BLOCK_M"], kwargs["BLOCK_N"], kwargs["BLOCK_K"]


def test_ranges_cover_all_boxes_and_fit_their_workspace() -> None:
    for g, config in itertools.product(geometries(), wgrad.configs()):
        p = problem(g, "wgrad")
        count, size = hopper_ranges(p, *blocks(config))
        extents = pass_extents(g, "wgrad")
        boxes = boxes_over(extents, best_box(extents, config.kwargs["BLOCK_K"]))
        # All have some, so that none leaves its sums unwritten.
        assert (count - 1) * size < boxes <= count * size, (str(g), config)
        if count > 1:
            assert 4 * count * g.elements()[1] <= WORKSPACE and size >= LEAST_STEPS, (str(g), config)


def test_every_layer_has_candidates() -> None:
    for g, pass_ in itertools.product(geometries(), PASSES):
        p = problem(g, pass_)
        assert choose(p) in candidates(p), (str(g), pass_)


def test_small_layers_have_small_tiles() -> None:
    g = ConvGeometry.parse((1, 64, 5, 5), (64, 64, 3, 3), nd=2, padding=1)
    for pass_, module in (("fprop", conv), ("dgrad", conv), ("wgrad", wgrad)):
        kept = candidates(problem(g, pass_))  # type: ignore[arg-type]
        assert 0 < len(kept) < len(module.configs())
        assert all(m <= 128 and n <= 64 for m, n, _ in map(blocks, kept))


@pytest.mark.parametrize(("c", "k"), [(128, 128), (384, 128), (128, 384), (256, 640)])
def test_tiles_of_groups_in_3d_end_with_their_group(c: int, k: int) -> None:
    g = ConvGeometry.parse((1, 2 * c, 8, 9, 9), (2 * k, c, 3, 3, 3), nd=3, padding=1, groups=2)
    for pass_, (columns, run) in (("fprop", (k, c)), ("dgrad", (c, k))):
        kept = candidates(problem(g, pass_))  # type: ignore[arg-type]
        assert kept and all(columns % n == 0 and run % k_ == 0 for _, n, k_ in map(blocks, kept))


# The model of their time.


def test_predictions_are_finite_and_no_faster_than_memory() -> None:
    for g, pass_ in itertools.product(geometries(), PASSES):
        p = problem(g, pass_)
        for config in candidates(p):
            seconds = predict(p, config).seconds
            assert math.isfinite(seconds) and seconds >= g.bytes(2, pass_) / H200.bandwidth, (str(g), pass_, config)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PASSES[:2]), st.integers(1, 300), st.integers(3, 60), st.integers(1, 12), st.integers(1, 90),
    st.sampled_from([1, 3]), st.sampled_from([1, 2]),
)  # fmt: skip
# Steps are rounded up over phases, and channels of the last block count only as far as there are any.
@example("dgrad", 1, 3, 1, 73, 1, 2)
def test_more_work_takes_no_less_time(pass_: Pass, n: int, size: int, c: int, k: int, taps: int, stride: int) -> None:
    """With the same config, whichever size grows."""

    def of(n: int, c: int, height: int, k: int) -> Problem:
        g = ConvGeometry.parse((n, 8 * c, height, size), (8 * k, 8 * c, taps, taps), nd=2, padding=taps // 2, stride=stride)
        return problem(g, pass_)

    base = of(n, c, size, k)
    for config in conv.configs():
        before = predict(base, config).seconds
        for more in (of(n + 1, c, size, k), of(n, c + 8, size, k), of(n, c, size + 2, k), of(n, c, size, k + 8)):
            assert predict(more, config).seconds >= before * (1 - 1e-9), (config, str(more.geometry))


def test_much_more_work_takes_longer() -> None:
    for pass_ in PASSES:
        times = []
        for n in (4, 32, 256):
            p = problem(ConvGeometry.parse((n, 256, 28, 28), (256, 256, 3, 3), nd=2, padding=1), pass_)
            times.append(predict(p, choose(p)).seconds)
        assert times[2] > 4 * times[1] > 8 * times[0], (pass_, times)
