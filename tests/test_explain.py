"""The report: its rows against what runs, its sums against torch's own counter, and that explaining changes nothing."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from matrix import named
from models import CASES, Case, build
from test_convert import RESNET, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tritonconv
from tritonconv.ops.core.launch import record_launches

KEYS = {
    "name", "kind", "fused", "backend", "reason", "params", "macs", "bytes", "copies", "receptive_field", "roofline_us",
}  # fmt: skip


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "original"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_macs_are_half_of_torchs_flops_and_parameters_count_once(case: Case, converted: bool) -> None:
    model, x = build(case)
    with FlopCounterMode(display=False) as counter:
        run(model, x)
    rows = tritonconv.explain(tritonconv.convert(model) if converted else model, x).to_dict()["layers"]
    assert all(row.keys() == KEYS for row in rows)
    assert sum(row["macs"] for row in rows) == counter.get_total_flops() / 2
    unused = (
        sum(p.numel() for p in model.blocks[1 if model.stem(x).sum() > 0 else 0].parameters())
        if hasattr(model, "blocks")
        else 0
    )
    assert sum(row["params"] for row in rows) == sum(p.numel() for p in model.parameters()) - unused


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_the_launches_of_a_real_run(case: Case) -> None:
    model, x = build(case)
    converted = tritonconv.convert(model)
    report = tritonconv.explain(converted, x).to_dict()
    with torch.no_grad(), record_launches() as log:
        converted(x)
    rows = [row for row in report["layers"] if row["backend"] == "triton"]
    # A second stage has no row of its own.
    second = log.count("average_kernel")
    assert [row["reason"].split(",")[0] + "_kernel" for row in rows] == [name for name in log if name != "average_kernel"]
    assert sum(bool(row["fused"]) for row in rows) == case.chains
    assert report["totals"]["triton"] == case.launches - second and report["totals"]["fused"] == case.chains


def test_rows_name_the_members_of_a_group() -> None:
    model, x = build(RESNET)
    report = tritonconv.explain(tritonconv.convert(model), x).to_dict()
    rows = {row["name"]: row for row in report["layers"]}
    assert list(rows) == [
        "conv1", "maxpool", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.downsample.0",
        "layer2.0.conv2", "fc",
    ]  # fmt: skip
    last = rows["layer2.0.conv2"]
    assert last["fused"] == ["layer2.0.bn2", "add", "layer2.0.relu", "avgpool"]
    assert last["kind"] == "Conv2d" and last["params"] == 16 * 16 * 9 + 32 and last["macs"] == 2 * 4 * 16 * 16 * 9
    assert last["reason"].endswith(", with its global average, fused")
    # Input, weight and residual, read once; of its own result only the average is kept.
    assert last["bytes"] == 4 * (2 * 16 * 4 + 16 * 16 * 9 + 2 * 16 * 4)
    assert rows["maxpool"]["backend"] == "triton" and rows["maxpool"]["reason"] == "pool"
    assert report["model"] == "ResNet"
    assert report["fusion"] == [{"root": "", "how": "graph", "chains": RESNET.chains, "reason": ""}]
    totals = report["totals"]
    for key in ("params", "macs", "bytes", "copies", "roofline_us"):
        assert totals[key] == pytest.approx(sum(row[key] for row in report["layers"]))
    json.dumps(report)


def test_functional_calls_bear_their_nodes_names() -> None:
    model, x = build(named(CASES, "functional"))
    for m in (model, tritonconv.convert(model)):
        rows = tritonconv.explain(m, x).to_dict()["layers"]
        assert rows[0]["name"] == "conv2d" and rows[0]["kind"] == "conv2d" and rows[0]["params"] == 8 * 3 * 9


def test_in_training_mode_chains_are_reported_and_nothing_changes() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model).train()
    before = copy.deepcopy(converted.state_dict())
    rng = torch.get_rng_state()
    with torch.no_grad():
        rows = {row["name"]: row for row in tritonconv.explain(converted, x).to_dict()["layers"]}
    assert rows["conv1"]["fused"] == ["bn1", "relu"] and "in training" in rows["conv1"]["reason"]
    assert converted.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), converted.state_dict().values(), strict=True))
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def test_buffers_without_memory_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to("meta")
    assert len(tritonconv.explain(model, torch.ones(1, 3, 4, 4, device="meta")).layers) == 2


def test_random_layers_leave_the_generator_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5)).train()
    rng = torch.get_rng_state()
    tritonconv.explain(model, torch.ones(1, 1, 4, 4))
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_hooked_member_is_reported_alone() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    seen: list[torch.Tensor] = []
    converted.bn1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    run(converted, x)
    rows = {row["name"]: row for row in tritonconv.explain(converted, x).to_dict()["layers"]}
    # The hook sees the batch norm's result: the chain ends there.
    assert rows["conv1"]["fused"] == ["bn1"] and rows["conv1"]["backend"] == "triton"
    assert rows["relu"]["backend"] == "torch" and len(seen) == 2


def test_receptive_fields() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.b = nn.Conv2d(4, 4, (3, 5), padding=(2, 2), dilation=(2, 1))
            self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.pool = nn.AvgPool2d(3)
            self.same = nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(self.b(self.a(x)))
            return self.fc(self.same(self.pool(x)).mean((2, 3)))

    x = torch.randn(1, 1, 64, 64)
    for convert in (False, True):
        model = Deep().eval()
        rows = {
            r["name"]: r for r in tritonconv.explain(tritonconv.convert(model) if convert else model, x).to_dict()["layers"]
        }
        fields = {name: row["receptive_field"] for name, row in rows.items()}
        # By hand: 3; + 4 taps at jump 2, twice; one input of `b` for each output; + 2 neighbors at jump 1.
        assert fields == {"a": 3, "b": [3 + 4 * 2, 3 + 4 * 2], "up": 11, "pool": 13, "same": 13, "fc": 64} | {"b": 11}
        assert rows["up"]["macs"] == 32 * 32 * 4 * 4 * 4


def test_a_receptive_field_per_axis_where_they_differ() -> None:
    conv = nn.Conv2d(1, 1, (3, 5))
    assert tritonconv.explain(conv, torch.ones(1, 1, 8, 8)).to_dict()["layers"][0]["receptive_field"] == [3, 5]
    assert tritonconv.explain(conv, torch.ones(1, 8, 8)).to_dict()["layers"][0]["receptive_field"] == [3, 5]


def test_residual_branches_see_the_wider_of_the_two() -> None:
    model, x = build(RESNET)
    rows = {r["name"]: r["receptive_field"] for r in tritonconv.explain(tritonconv.convert(model), x).to_dict()["layers"]}
    # 3, pool: 4, then 3x3 at jump 2 in a block and at jump 4.
    assert [rows[f"layer1.0.conv{i}"] for i in (1, 2)] == [8, 12]
    assert rows["layer2.0.conv1"] == 16 and rows["layer2.0.conv2"] == 24 and rows["layer2.0.downsample.0"] == 12


def test_hidden_copies_are_counted() -> None:
    conv = tritonconv.nn.Conv2d(16, 16, 3).eval()
    x = torch.randn(1, 16, 8, 8)
    contiguous = tritonconv.explain(conv, x).totals["copies"]
    converted = tritonconv.convert(conv)
    with_weight = tritonconv.explain(converted, x).totals["copies"]
    without = tritonconv.explain(converted, x.to(memory_format=torch.channels_last)).totals["copies"]
    # Of input and weight; of input and result, which is to be contiguous; of nothing.
    assert (contiguous, with_weight, without) == (2, 2, 0)
    # Behind the first layer everything is channels-last: no copy is hidden in a converted network.
    model, x = build(RESNET)
    assert tritonconv.explain(tritonconv.convert(model), x).totals["copies"] == 0


def test_roofline_follows_the_dtype_and_the_tf32_switch() -> None:
    from tritonconv.convert.roofline import roofline_us

    # 1 TFLOP of arithmetic, and 4.3 GB of traffic.
    assert roofline_us(395 * 10**9, 0, torch.bfloat16, "conv") == pytest.approx(1000)
    assert roofline_us(0, 43 * 10**8, torch.float32, "conv") == pytest.approx(1000)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision, peak in (("tf32", 395e12), ("ieee", 67e12)):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert roofline_us(10**12, 0, torch.float32, "conv") == pytest.approx(2e18 / peak)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_the_table_shows_rows_totals_and_how_roots_were_fused() -> None:
    model, x = build(named(CASES, "untraceable"))
    text = str(tritonconv.explain(tritonconv.convert(model), x))
    for part in (
        "Untraceable: what runs where",
        "stem.0",
        "fused",
        "total",
        "the model: graph break",
        "H200",
        "TF32",
    ):
        assert part in text, part
    assert "\x1b" not in text


def test_plot_writes_a_figure_and_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(RESNET)
    report = tritonconv.explain(tritonconv.convert(model), x)
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"tritonconv\[plot\]"):
        report.plot(tmp_path / "none.png")


def test_autocast_of_the_caller_is_seen(device: str) -> None:
    conv = tritonconv.convert(nn.Conv2d(3, 8, 3))
    x = torch.ones(1, 3, 8, 8)
    full = tritonconv.explain(conv, x).totals["bytes"]
    with torch.autocast(device, torch.bfloat16):
        assert tritonconv.explain(conv, x).totals["bytes"] == full // 2


def test_a_fused_module_of_ours_is_one_row() -> None:
    model = nn.Sequential(tritonconv.nn.ConvBNReLU2d(3, 8, 3)).eval()
    (row,) = tritonconv.explain(model, torch.ones(1, 3, 8, 8)).to_dict()["layers"]
    assert row["name"] == "0" and row["kind"] == "ConvBNReLU2d" and row["params"] == 8 * 3 * 9 + 16


def global_hook_tables() -> dict[str, dict[int, object]]:
    tables = {name: value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global")}
    return {name: dict(value) for name, value in tables.items() if isinstance(value, dict)}


def test_no_entry_of_a_global_hook_is_left() -> None:
    """torch.compile warns of any, and torch's own handles leave some."""
    before = global_hook_tables()
    assert any("with_kwargs" in name for name in before)
    tritonconv.explain(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2))
    with pytest.raises(RuntimeError):
        tritonconv.explain(nn.Conv2d(1, 1, 1), torch.ones(1, 2, 2, 2))
    assert global_hook_tables() == before
    # Of hooks that were there all are.
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    before = global_hook_tables()
    tritonconv.explain(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2))
    assert global_hook_tables() == before
    handle.remove()
    torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id)


class Named(nn.Module):
    """Takes its image by name, as models of language and vision do; around its layers are some that compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same, self.drop, self.flat = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.Flatten()
        self.act, self.fc = nn.Softsign(), nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        assert ids is None and pixel_values is not None
        return self.fc(self.flat(self.drop(self.act(self.same(self.conv(pixel_values))))))


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "original"])
def test_inputs_have_names_and_what_computes_nothing_has_no_row(converted: bool) -> None:
    model = Named().eval()
    report = tritonconv.explain(tritonconv.convert(model) if converted else model, pixel_values=torch.randn(1, 3, 4, 4))
    assert [row.name for row in report.layers] == ["conv", "act", "fc"]
    backends = [row.backend for row in report.layers]
    assert backends == (["triton", "torch", "triton"] if converted else ["torch"] * 3)
    assert report.layers[1].reason == ("Softsign has no kernel of its own" if converted else "not converted")


def test_dropout_in_training_has_a_row() -> None:
    report = tritonconv.explain(tritonconv.convert(Named().train()), pixel_values=torch.randn(1, 3, 4, 4))
    assert [row.name for row in report.layers] == ["conv", "act", "drop", "fc"]


class Decoder(nn.Module):
    """Decodes a step with a short causal convolution: as a function, or by a layer of ours."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.layer = tritonconv.nn.CausalConv1d(6, 6, 4, groups=6) if layer else None
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        if self.layer is not None:
            return self.layer.step(x, state)
        return tritonconv.functional.causal_conv1d_update(x, state, self.weight)


@pytest.mark.parametrize("layer", [True, False], ids=["layer", "function"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_decoding_step_has_a_row_and_launches_nothing(layer: bool, backend: str) -> None:
    model, x, state = Decoder(layer), torch.randn(2, 6), torch.randn(2, 6, 3)
    expected_state = torch.cat((state, x[:, :, None]), 2)[:, :, 1:]
    with tritonconv.set_backend(backend), record_launches() as log:  # type: ignore[arg-type]
        (row,) = tritonconv.explain(model, x, state).to_dict()["layers"]
    assert not log and torch.equal(state, expected_state)
    assert (row["kind"], row["macs"]) == ("causal_conv1d_update", 2 * 6 * 4)
    assert row["backend"] == ("triton" if backend == "auto" else "torch")
    biased = 6 if layer else 0
    assert row["bytes"] == 4 * (2 * x.numel() + 2 * state.numel() + 6 * 4 + biased)


class NormAndActivation(nn.BatchNorm2d):
    """As model libraries have them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_a_subclass_of_a_layer_is_fused_by_what_it_computes() -> None:
    model = tritonconv.convert(nn.Sequential(nn.Conv2d(3, 8, 3), NormAndActivation(8), nn.Conv2d(8, 8, 3)).eval())
    rows = tritonconv.explain(model, torch.randn(1, 3, 8, 8)).layers
    assert [row.fused for row in rows] == [["1"], []]
    assert [row.copies for row in rows] == [0, 1]
