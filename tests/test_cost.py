"""The cost model: grows with the work, never picks what cannot run, and what it chooses, with the reason."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonconv.bench.cases import load_cases
from tritonconv.bench.dry import predicted
from tritonconv.bench.registry import operation_for
from tritonconv.geometry import ConvGeometry
from tritonconv.tuning import Device, Problem, candidates, choose, device_named, known_devices, like
from tritonconv.tuning.candidates import possible
from tritonconv.tuning.compiled import blocks_of, resources_of
from tritonconv.tuning.configs import as_dict, config_name
from tritonconv.tuning.cost import perf_model, predict
from tritonconv.tuning.devices import INTERPRETER

H200 = device_named("H200")


def problem(
    kernel: str = "conv_fprop", x: tuple[int, ...] = (32, 256, 14, 14), w: tuple[int, ...] = (256, 256, 3, 3), *,
    dtype: str = "bfloat16", tf32: bool = False, vectors: bool = True, device: Device = H200, **arguments: Any,
) -> Problem:  # fmt: skip
    geometry = ConvGeometry.parse(x, w, nd=len(x) - 2, **dict(padding=w[2] // 2) | arguments)
    return Problem(kernel, geometry, dtype, tf32, vectors, device)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["conv_fprop", "conv_flat", "matmul"]), st.integers(1, 300), st.integers(1, 60), st.integers(1, 12),
    st.integers(1, 700), st.sampled_from([1, 3]), st.sampled_from(list(known_devices())),
)  # fmt: skip
def test_more_work_takes_no_less_time(kernel: str, n: int, size: int, blocks: int, k: int, taps: int, gpu: str) -> None:
    """With the same config, whichever size grows."""
    taps = 1 if kernel == "matmul" else taps
    c = 64 * blocks
    base = problem(kernel, (n, c, size, size), (k, c, taps, taps), device=known_devices()[gpu])
    larger = [
        problem(kernel, (n + 1, c, size, size), (k, c, taps, taps), device=base.device),
        problem(kernel, (n, c, size + 3, size), (k, c, taps, taps), device=base.device),
        problem(kernel, (n, c + 64, size, size), (k, c + 64, taps, taps), device=base.device),
        problem(kernel, (n, c, size, size), (k + 5, c, taps, taps), device=base.device),
    ]
    for config in possible(base):
        before = predict(base, config).seconds
        for more in larger:
            assert predict(more, config).seconds >= before * (1 - 1e-9), (config, more)


def test_no_prediction_is_below_the_roofline_of_its_bytes() -> None:
    for case in load_cases():
        operation = operation_for(case)
        if operation is None:
            continue
        _, size = operation.count(case)
        # The zeros of causal padding are read from memory by both libraries.
        assert sum(predicted(launch, H200).seconds for launch in operation.launches(case, H200)) >= size / H200.bandwidth


@pytest.mark.parametrize("gpu", known_devices())
def test_a_choice_can_always_launch(gpu: str) -> None:
    """Shared memory as the compiler counts it, registers and warps of one program fit, on every GPU."""
    device = known_devices()[gpu]
    kinds = (("bfloat16", False), ("float32", True), ("float32", False), ("float64", False))
    sizes = itertools.product((1, 77, 4096), (1, 17, 64, 512), (64, 192, 1280), kinds)
    for n, k, c, (dtype, tf32) in sizes:
        for kernel in ("conv_fprop", "conv_flat", "matmul"):
            p = problem(kernel, (n, c, 7, 7), (k, c, 1, 1), dtype=dtype, tf32=tf32, device=device)
            config = choose(p)
            assert config in possible(p) and config in candidates(p)
            code = resources_of(p, blocks_of(as_dict(config)))
            assert code.shared <= device.shared_memory
            assert code.registers * device.warp_size * config.num_warps <= device.registers


A100, B200, L40S, MI300X = (device_named(name) for name in ("A100", "B200", "L40S", "MI300X"))
RESNET = dict(x=(256, 256, 14, 14), w=(256, 256, 3, 3))

# (what, problem, config, why). A change of the model that changes one of these must say why here.
CHOICES = [
    ("3x3 of ResNet-50's third stage", problem(**RESNET), "256x128x64 w8 s3", "large tiles read least"),
    ("its TF32 products", problem(**RESNET, dtype="float32", tf32=True), "128x128x64 w4 s3", "larger ones do not fit"),
    ("its fp32 products", problem(**RESNET, dtype="float32"), "64x64x16 w4 s3", "larger tiles spill"),
    ("one image", problem(x=(1, 256, 14, 14)), "64x16x128 w4 s3", "one wave at most: many small tiles"),
    ("on an A100", problem(**RESNET, device=A100), "128x64x128 w4 s3", "no TMA, and 163 KB: deep steps hide latency"),
    ("on an L40S", problem(**RESNET, device=L40S), "128x128x64 w4 s3", "99 KB hold no larger tile"),
    ("on an MI300X", problem(**RESNET, device=MI300X), "64x64x64 w4 s4", "64 KB of LDS"),
    ("on a B200", problem(**RESNET, device=B200), "256x128x64 w8 s3", "bound by L2: the largest tile reads least"),
    (
        "3x3 of the fourth stage", problem(x=(256, 512, 7, 7), w=(512, 512, 3, 3)), "128x128x64 w4 s3",
        "196 tiles of 256 x 128 are one and a half waves, 392 of these fill two programs a multiprocessor",
    ),
    (
        "3x3 with three filters", problem(x=(1, 128, 1024, 1024), w=(3, 128, 3, 3)), "64x16x128 w4 s3",
        "wider tiles would compute zeros",
    ),
    (
        "1x1 that widens", problem("matmul", (256, 64, 56, 56), (256, 64, 1, 1)), "64x128x64 w4 s3",
        "bound by memory: three programs a multiprocessor keep it busy",
    ),
    ("a linear layer", problem("matmul", (8, 2048, 1, 1), (1000, 2048, 1, 1)), "16x64x64 w2 s4", "the least rows"),
    (
        "stem", problem("conv_flat", (256, 3, 224, 224), (64, 3, 7, 7), stride=2, vectors=False), "128x64x16 w4 s2",
        "bound by instructions of single-element loads, of which this tile has the fewest a product",
    ),
    (
        "3x3 of the first stage", problem("conv_flat", (256, 64, 56, 56), (64, 64, 3, 3)), "128x64x64 w4 s3",
        "64 filters wide, three programs a multiprocessor",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "chosen_for", "config", "why"), CHOICES, ids=[row[0] for row in CHOICES])
def test_exact_choices(what: str, chosen_for: Problem, config: str, why: str) -> None:
    assert config_name(as_dict(choose(chosen_for))) == config, f"{what}: {why}"


def test_small_layers_fill_the_gpu_and_large_ones_save_instructions() -> None:
    large = predict(problem(x=(256, 256, 56, 56)), choose(problem(x=(256, 256, 56, 56))))
    assert large.bound == "products" and large.waves >= 3
    small = choose(problem(x=(1, 256, 14, 14)))
    assert predict(problem(x=(1, 256, 14, 14)), small).programs > 4


def test_a_1x1_layer_is_bound_by_memory() -> None:
    p = problem("matmul", (256, 64, 56, 56), (256, 64, 1, 1))
    assert predict(p, choose(p)).bound == "memory"


def test_more_bandwidth_helps_what_memory_bounds() -> None:
    p = problem("matmul", (256, 64, 56, 56), (256, 64, 1, 1))
    config = choose(p)
    faster = replace(p, device=replace(H200, bandwidth=1.5 * H200.bandwidth))
    assert predict(faster, config).seconds < 0.8 * predict(p, config).seconds


def test_resources_are_those_of_the_code_table() -> None:
    """tuning/resources.json is made from benchmarks/codegen.json, and nobody forgot to."""
    rows = json.loads((Path(__file__).parents[1] / "benchmarks/codegen.json").read_text())
    code = resources_of(problem(), (256, 128, 64, 8, 3, True))
    (row,) = [
        r for r in rows
        if (r["case"], r["config"], r["target"], r["triton"]) == ("3x3", "256x128x64 w8 s3", "sm_90", "3.7.1")
    ]  # fmt: skip
    assert code.registers >= row["registers"] and code.shared >= row["shared"] and code.issue_cycles


def test_perf_model_prunes_for_triton_autotune() -> None:
    """triton's own Autotuner keeps the configs that the model finds fastest."""
    from triton.runtime.autotuner import Autotuner
    from tritonconv.kernels.conv_fprop import configs, conv_fprop_kernel

    case = next(case for case in load_cases() if case.id == "r50_l3_3x3")
    operation = operation_for(case)
    assert operation is not None
    (launch,) = operation.launches(case, H200)
    named = {name: launch.arguments[name] for name in launch.arguments if not name.startswith("BLOCK") and name != "STAGES"}
    tuner = Autotuner(
        conv_fprop_kernel, conv_fprop_kernel.arg_names, configs(), key=[], reset_to_zero=None, restore_value=None,
        prune_configs_by={"perf_model": perf_model("conv_fprop", H200), "top_k": 3},
    )  # fmt: skip
    tuner.nargs = named | {"USE_TMA": None}
    del tuner.nargs["USE_TMA"], tuner.nargs["GROUP_M"]
    kept = tuner.prune_configs({})
    assert len(kept) == 3 and launch.problem is not None
    predicted = sorted(configs(), key=lambda config: predict(launch.problem, config).seconds)
    assert {id(c.kwargs["BLOCK_M"]) for c in kept} and [predict(launch.problem, c).seconds for c in kept] == [
        predict(launch.problem, c).seconds for c in predicted[:3]
    ]


def test_devices_are_found_by_name_word_and_code() -> None:
    assert device_named("h100").name == "NVIDIA H100 80GB HBM3"
    assert device_named("sm_90") is H200, "of two with the same code the measured one"
    assert device_named("MI300X").arch == "gfx942"
    with pytest.raises(ValueError, match="names no described GPU"):
        device_named("GTX 285")
    with pytest.raises(ValueError, match="names no described GPU"):
        device_named("NVIDIA")


def test_a_gpu_that_is_not_described_scales_with_its_multiprocessors() -> None:
    half = like("NVIDIA A30", "sm_80", 54, 166912)
    whole = device_named("A100")
    assert half.bandwidth == pytest.approx(whole.bandwidth / 2) and half.flops["16"] == pytest.approx(whole.flops["16"] / 2)
    assert not half.measured and "A100" in half.source
    assert like("NVIDIA H200", "sm_90", 132, 232448) is H200
    assert like("NVIDIA RTX PRO 6000", "sm_120", 188, 101376).shared_memory == 101376
    assert INTERPRETER.arch not in {d.arch for d in known_devices().values()}
