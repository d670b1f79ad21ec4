"""What the compilers make of every candidate config, checked in a process without the interpreter."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import TEST_ALL, every

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks/codegen.json"
KEYS = {
    "kernel", "case", "config", "target", "triton", "source", "registers", "stack", "shared", "serialized", "issue_ratio",
    "lane_instructions_per_output", "counts",
}  # fmt: skip


POOLING = (
    "pool", "pool_backward", "unpool", "adaptive_pool", "adaptive_pool_backward", "global_pool", "stochastic_pool",
    "resample", "resample_backward", "shuffle", "squeeze_excite",
)  # fmt: skip


@pytest.mark.codegen
@every(target=["every"] if TEST_ALL else ["sm_90"])
def test_every_config_keeps_the_rules_and_is_no_worse_than_the_table(target: str) -> None:
    """On one target, or on all of them."""
    only = [] if target == "every" else ["--target", target]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", "--check", *only],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "0 complaints" in done.stdout


def test_the_table_has_every_config_of_every_kernel() -> None:
    from tritonconv.kernels import (
        conv_dgrad,
        conv_flat,
        conv_fprop,
        conv_up,
        conv_wgrad,
        deform_conv,
        deform_conv_dgrad,
        deform_conv_wgrad,
        depthwise_bands,
        depthwise_bands_wgrad,
        matmul,
        separable,
    )

    rows = json.loads(TABLE.read_text())
    assert all(set(row) == KEYS for row in rows)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    products = (conv_dgrad, conv_flat, conv_fprop, conv_up, conv_wgrad, matmul, separable)
    products += (deform_conv, deform_conv_dgrad, deform_conv_wgrad)
    for module in (*products, depthwise_bands, depthwise_bands_wgrad):
        kernel = module.__name__.rsplit(".", 1)[1]
        tiles = {row["config"] for row in rows if row["kernel"] == kernel}
        for config in module.configs():
            m, n, k = list(config.kwargs.values())[:3]
            assert any(tile.startswith(f"{m}x{n}x{k} w{config.num_warps}") for tile in tiles), (kernel, config)


def test_hopper_s_kernels_keep_their_promises_under_three_versions_of_triton() -> None:
    from tritonconv.kernels.hopper import conv, wgrad

    from tritonconv.tuning.configs import name_of

    rows = [row for row in json.loads(TABLE.read_text()) if row["kernel"].startswith("hopper.")]
    for module, kernel in ((conv, "hopper.conv"), (wgrad, "hopper.wgrad")):
        for version in ("3.6.0", "3.7.1", "3.8.0"):
            own = [row for row in rows if (row["kernel"], row["triton"]) == (kernel, version)]
            assert {row["config"] for row in own} == set(map(name_of, module.configs())), (kernel, version)
    for row in rows:
        names = " ".join(row["counts"])
        assert row["target"] == "sm_90" and row["stack"] == 0 and row["serialized"] is False, row
        assert row["issue_ratio"] <= 0.2 and row["shared"] <= 232448, row
        assert all(part in names for part in ("UTMALDG", "HGMMA", "UTMASTG")), row


def test_the_table_has_every_config_of_the_kernels_without_products() -> None:
    from tritonconv.kernels import batch_norm, causal_conv1d, depthwise, depthwise_wgrad, group_norm, group_norm_backward

    from tritonconv import kernels as folder
    from tritonconv.tuning.configs import name_of

    rows = json.loads(TABLE.read_text())
    kernels = dict(batch_norm=batch_norm, batch_norm_backward=batch_norm, depthwise=depthwise)
    kernels |= dict(group_norm=group_norm, group_norm_backward=group_norm_backward)
    kernels |= dict(depthwise_wgrad=depthwise_wgrad, causal_conv1d=causal_conv1d)
    kernels |= {name: importlib.import_module(f"{folder.__name__}.{name}") for name in POOLING}
    for kernel, module in kernels.items():
        assert {row["config"] for row in rows if row["kernel"] == kernel} >= set(map(name_of, module.configs())), kernel
