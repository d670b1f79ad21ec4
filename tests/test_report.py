"""The benchmarks' page says what was measured, losses as plainly as wins, and nothing that was not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import hopper, traffic, traffic_blocks, traffic_direct, traffic_pools
from benchmarks.markdown import number, table
from benchmarks.plots import write_plots
from benchmarks.records import Record, bound_of, by_family, is_timed, latest, mean_of, outcome_of, read, rows_of
from benchmarks.report import IMAGES, PAGE, main, render
from tritonconv.bench.cases import load_cases
from tritonconv.bench.layers import COLUMNS, OURS
from tritonconv.bench.registry import operation_for

CONTIGUOUS, CHANNELS_LAST, _, COMPILED, TUNED = COLUMNS
NO_TIME = "**No time was measured**"


def run_on(gpu: str | None, date: str = "2026-11-22T10:00:00+00:00", **more: Any) -> Record:
    versions = dict(driver="580.1", cuda="13.0", hip=None, torch="2.13.0", triton="3.7.1", cudnn=91200, commit="abc123")
    return dict(stage="run", gpu=gpu, date=date, **versions if gpu else dict(torch="2.13.0", triton="3.7.1")) | more


H200, OTHER, NONE = run_on("NVIDIA H200"), run_on("NVIDIA A100 80GB PCIe"), run_on(None)


def layer(id: str, column: str, ms: float | None, run: Record = H200, **more: Any) -> Record:
    """A 3x3 layer of 100 Gflop and 200 MB."""
    record = dict(
        stage="layer", id=id, family="standard3x3", dtype="bf16", column=column, mode="graph", batch=256, status="ok",
        error=1e-3, timed=ms is not None, run=run,
    )  # fmt: skip
    record["pass"] = "fprop"
    if ms is not None:
        record |= dict(ms=ms, ms_20=ms, ms_80=ms, tflops=100 / ms, gbps=200 / ms, roofline_ms=0.1, percent=10 / ms)
        record |= dict(memory=50_000_000 if column == OURS else 70_000_000)
    return record | more


def compared(id: str, ours: float, peer: float, run: Record = H200, **more: Any) -> list[Record]:
    """A layer whose fastest peer is cuDNN on channels-last tensors."""
    others = {CONTIGUOUS: 3 * peer, CHANNELS_LAST: peer, COMPILED: 2 * peer, TUNED: 1.5 * peer}
    return [layer(id, OURS, ours, run, **more)] + [layer(id, name, ms, run, **more) for name, ms in others.items()]


@pytest.fixture
def records() -> list[Record]:
    """A win by 2, a loss by 2, a draw and a win by 4 in two families, something wrong and something failed."""
    dry = dict(stage="dry", family="standard3x3", target="NVIDIA H200", kernel="conv_fprop", bound="issue")
    return [
        dict(stage="ceilings", id="device", bandwidth=4.1e12, **{"16": 7.5e14, "tf32": 3.9e14}, run=H200),
        *compared("r50_l1_3x3", 1.0, 2.0),
        *compared("r50_l2_3x3_s2", 1.0, 0.5),
        *compared("r50_l3_3x3", 1.0, 1.02),
        *compared("r50_l1_pw_expand", 1.0, 4.0, family="pointwise1x1", gbps=3900.0),
        *compared("r50_l4_3x3", 1.0, 1.0)[1:],
        layer("r50_l4_3x3", OURS, None, status="wrong", reason="relative error 3.1e-01, bound 1.0e-02"),
        layer("unet_enc1", OURS, None, status="failed", reason="RuntimeError: <ptxas> | died\nat once"),
        layer("vae_512_512", OURS, None, status="stopped"),
        dict(stage="check", id="3x3 of 24, 128x64x128 w4 s3", column="bf16 contiguous", status="wrong",
             reason="two runs differ: a race", run=H200) | {"pass": "fprop"},
        dict(stage="check", id="3x3 of 24, 128x64x64 w4 s3", column="bf16 contiguous", status="ok", run=H200),
        dict(stage="tune", id="r50_l1_3x3", config="128x128x64 w4 s3", candidates=9, before_ms=1.25, ms=1.0,
             peer=CHANNELS_LAST, peer_ms=2.0, status="ok", wrong=["64x64x64 w8 s3: a pixel is off"], run=H200),
        dict(stage="module", suite="models", id="resnet50", provider="own definition", column=OURS, mode="eager", batch=1,
             status="ok", timed=True, ms=5.0, memory=1e9, run=H200) | {"pass": "inference"},
        dict(stage="module", suite="models", id="resnet50", provider="own definition", column=COMPILED, mode="eager",
             batch=1, status="ok", timed=True, ms=4.0, memory=2e9, run=H200) | {"pass": "inference"},
        dict(dry, id="aspp_d12", status="ok", config="128x256x64 w8 s3", predicted_ms=0.777, roofline_ms=0.5, run=NONE),
        dict(dry, id="maskrcnn_deconv", status="not built", run=NONE),
    ]  # fmt: skip


def written(path: Path, records: list[Record]) -> Path:
    """A result file: each record behind its run's header."""
    lines = []
    for record in records:
        lines += [record["run"], {name: value for name, value in record.items() if name != "run"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def section(page: str, title: str) -> str:
    """From a heading to the next one."""
    assert f"\n{title}\n" in page, title
    lines = page[page.index(f"\n{title}\n") + len(title) + 2 :].split("\n")
    ends = [i for i, line in enumerate(lines) if line.startswith("#")]
    return "\n".join(lines[: ends[0]] if ends else lines)


def cells(text: str, *first: str) -> list[str]:
    """The cells of a table's only row that begins so."""
    (line,) = [line for line in text.split("\n") if line.startswith(f"| {' | '.join(first)} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_wins_draws_and_losses_are_counted_and_averaged(records: list[Record]) -> None:
    page = section(render(records), "### By family")
    # (2 * 0.5 * 1.02) ** (1 / 3), and with 4 the fourth root.
    assert pytest.approx(1.0066, abs=1e-4) == 1.02 ** (1 / 3) and pytest.approx(1.4212, abs=1e-4) == 4.08**0.25
    assert cells(page, "standard3x3", "fprop")[4:] == ["3", "1", "1", "1", "1.01"]
    assert cells(page, "pointwise1x1", "fprop")[4:] == ["1", "1", "0", "0", "4.00"]
    assert cells(page, "all", "fprop")[2:] == ["98", cells(page, "all", "fprop")[3], "4", "2", "1", "1", "1.42"]
    assert cells(page, "stem", "fprop")[4:] == ["0", "", "", "", "not measured"]
    assert mean_of(by_family(records)["standard3x3", "fprop"]) == pytest.approx(1.02 ** (1 / 3))


@pytest.mark.parametrize(
    "ratio, outcome", [(1.031, "win"), (1.029, "draw"), (1.0, "draw"), (0.972, "draw"), (0.97, "loss")]
)
def test_three_percent_are_a_draw(ratio: float, outcome: str) -> None:
    assert outcome_of(ratio) == outcome


def test_losses_come_first_and_by_name(records: list[Record]) -> None:
    page = render(records)
    lost = section(page, "### Where we lose")
    assert "more than 3 %: 2 of 5 compared cases" in lost
    assert cells(lost, "r50_l2_3x3_s2")[5:] == ["1", CHANNELS_LAST, "0.5", "0.50"]
    assert cells(lost, "resnet50")[1:] == ["models", "inference", "eager", "1", "5", COMPILED, "4", "0.80"]
    assert "ours has none: r50_l4_3x3 fprop (wrong)." in lost
    assert "r50_l1_3x3 |" not in lost
    assert page.index("### Where we lose") < page.index("### By family") < page.index("### Layers")
    order = [line.split(" | ")[0] for line in section(page, "### Layers").split("\n") if line.startswith("| r50")]
    assert order == ["| r50_l2_3x3_s2", "| r50_l3_3x3", "| r50_l1_3x3", "| r50_l1_pw_expand", "| r50_l4_3x3"]


def test_page_says_what_was_measured_on_what(records: list[Record]) -> None:
    page = render(records)
    assert page.startswith("# Benchmarks\n\n*Generated by `python -m benchmarks.report`")
    assert "timed on NVIDIA H200 in 4 layers and 1 run of blocks and models" in page
    assert "With driver 580.1, CUDA 13.0, torch 2.13.0, triton 3.7.1, cuDNN 91200, commit abc123, 2026-11-22." in page
    assert NO_TIME not in page
    assert "| 4100 GB/s | 750 TFLOP/s | 390 TFLOP/s | not measured | not measured |" in page
    assert "python -m benchmarks.gpu --budget 540 --out benchmarks/results/<gpu>" in section(page, "## How to measure")


def test_layers_have_every_number(records: list[Record]) -> None:
    page = section(render(records), "### Layers")
    assert cells(page, "r50_l1_3x3") == [
        "r50_l1_3x3", "bf16", "fprop", "6", "2", "1", "4", "3", "100 TFLOP/s", "10", "50", "70", "2.00"
    ]  # fmt: skip
    # 100 TFLOP/s are 13 % of this GPU's arithmetic, 3900 GB/s are 95 % of its memory.
    assert cells(page, "r50_l1_pw_expand")[8] == "3900 GB/s"
    assert cells(page, "r50_l4_3x3")[3:] == ["3", "1", "wrong", "2", "1.5", "", "", "", "70", ""]
    assert "some peer has no time" not in page
    alone = [r for r in records if r.get("column") != TUNED]
    assert "In 4 rows some peer has no time" in section(render(alone), "### Layers")


def test_what_is_wrong_or_failed_has_its_reason(records: list[Record]) -> None:
    page = section(render(records), "### Right and wrong")
    assert cells(page, "configs on small layers") == ["configs on small layers", "1", "1", "0", "0"]
    assert cells(page, "layers in each way")[1:] == ["24", "1", "1", "1"]
    assert cells(page, "3x3 of 24, 128x64x128 w4 s3")[2:] == ["wrong", "two runs differ: a race"]
    assert cells(page, "r50_l4_3x3")[2:] == ["wrong", "relative error 3.1e-01, bound 1.0e-02"]
    assert cells(page, "r50_l1_3x3")[1:] == ["tuning", "wrong", "64x64x64 w8 s3: a pixel is off"]
    assert r"| failed | RuntimeError: &lt;ptxas> \| died at once |" in page


def test_blocks_models_and_tuning(records: list[Record]) -> None:
    page = render(records)
    module = cells(section(page, "### Blocks and models"), "resnet50")
    assert module[1:] == ["own definition", "inference", "eager", "1", "5", "4", "1000", "2000", "0.80"]
    tuned = cells(section(page, "### Tuning"), "r50_l1_3x3")
    assert tuned[1:] == ["128x128x64 w4 s3", "9", "1.25", "1", "1.25", CHANNELS_LAST, "2", "right"]


def test_layers_without_a_time_say_why(records: list[Record]) -> None:
    page = section(render(records), "### Layers without a time of ours")
    expected = dict(r50_l4_3x3="wrong", unet_enc1="failed", vae_512_512="stopped", r50_stem_7x7="not measured")
    expected |= {case.id: "not built" for case in load_cases() if operation_for(case) is None}
    assert {name: cells(page, name)[-1] for name in expected} == expected
    assert "| r50_l1_3x3 |" not in page


def test_predictions_stand_apart(records: list[Record]) -> None:
    page = render(records)
    predicted = page.index("## Predictions of the cost model")
    assert page.index("0.777") > predicted and page.count("0.777") == 1
    assert page[predicted:].startswith("## Predictions of the cost model\n\n**Nothing in this section was measured.**")
    text = section(page, "### Predicted for NVIDIA H200")
    assert "| predicted ms | predicted bound | described roofline ms |" in text
    assert cells(text, "aspp_d12")[-5:-1] == ["0.777", "issue", "0.5", "predicted"]
    assert cells(text, "maskrcnn_deconv")[-2] == "not built"
    assert cells(section(page, "### Layers without a time of ours"), "aspp_d12")[-1] == "not measured"
    # Alone they make no page of measurements.
    alone = [r for r in records if r["stage"] == "dry"]
    assert NO_TIME in render(alone) and not any(map(is_timed, alone))


def test_each_gpu_has_its_section(records: list[Record]) -> None:
    page = render([*records, *compared("r50_l1_3x3", 2.0, 1.0, OTHER)])
    first, second = page.index("\n## NVIDIA H200\n"), page.index("\n## NVIDIA A100 80GB PCIe\n")
    assert "r50_l1_3x3 |" not in section(page[first:second], "### Where we lose")
    assert cells(section(page[second:], "### Where we lose"), "r50_l1_3x3")[-1] == "0.50"
    assert cells(section(page[first:second], "### Layers"), "r50_l1_3x3")[-1] == "2.00"
    assert "What this GPU sustains: not measured." in page[second:]


def test_later_records_replace_earlier_ones(tmp_path: Path) -> None:
    early = run_on("NVIDIA H200", date="2026-11-20T10:00:00+00:00", commit="old")
    paths = [
        written(tmp_path / "a.jsonl", [layer("r50_l1_3x3", OURS, 1.0), layer("r50_l1_3x3", OURS, 9.0, OTHER)]),
        # Read last, run first.
        written(tmp_path / "b.jsonl", [layer("r50_l1_3x3", OURS, 5.0, early), layer("r50_l1_3x3", COMPILED, 3.0, early)]),
    ]
    records = read(paths)
    assert {(r["run"]["gpu"], r["column"]): r["ms"] for r in records} == {
        ("NVIDIA H200", OURS): 1.0, ("NVIDIA A100 80GB PCIe", OURS): 9.0, ("NVIDIA H200", COMPILED): 3.0
    }  # fmt: skip
    page = render(records)
    assert "From several runs:\n\n- " in page and "commit old, 2026-11-20" in page
    assert latest([*records, layer("r50_l1_3x3", OURS, None, status="failed")])[-1]["status"] == "failed"


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", compared("r50_l1_3x3", 1.0, 2.0))
    path.write_text(path.read_text()[:-20])
    assert len(read([path])) == 4


def test_nothing_timed_makes_no_plot_and_says_so(tmp_path: Path) -> None:
    page = render([])
    assert NO_TIME in page and "images/" not in page
    text = section(page, "## Layers")
    for case in load_cases():
        assert cells(text, case.id)[-1] in ("not measured", "not built")
    assert cells(text, "all", "fprop")[2] == "98"
    # Times without a GPU, as an interpreter's would be, are none.
    records = [
        *compared("r50_l1_3x3", 1.0, 2.0, NONE),
        layer("r50_l2_3x3_s2", OURS, None, NONE, status="wrong", reason="race"),
    ]
    page = render(records)
    assert NO_TIME in page and cells(section(page, "## Layers"), "r50_l1_3x3")[-1] == "not measured"
    assert cells(section(page, "## Without a GPU"), "r50_l2_3x3_s2")[-1] == "race"
    # A GPU on which everything failed.
    failed = [layer("r50_l1_3x3", OURS, None, status="failed", reason="no memory")]
    assert NO_TIME in render(failed) and "**No time was measured on this GPU.** With driver" in render(failed)
    assert write_plots([*records, *failed], tmp_path) == [] and not list(tmp_path.iterdir())


def test_plots_are_written_and_linked(tmp_path: Path, records: list[Record]) -> None:
    results = written(tmp_path / "a.jsonl", [*records, *compared("r50_l1_3x3", 2.0, 1.0, OTHER)])
    page = tmp_path / "docs" / "page.md"
    done = CliRunner().invoke(main, [str(results), "--out", str(page)], catch_exceptions=False)
    assert done.exit_code == 0 and "6 plots" in done.output
    names = sorted(path.name for path in (page.parent / IMAGES).iterdir())
    gpus = ("nvidia-a100-80gb-pcie", "nvidia-h200")
    assert names == [f"{gpu}-{plot}.png" for gpu in gpus for plot in ("families", "layers", "roofline")]
    for name in names:
        assert f"]({IMAGES.as_posix()}/{name})" in page.read_text()
        assert (page.parent / IMAGES / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = tmp_path / "page.md"
    done = CliRunner().invoke(main, [str(written(tmp_path / "a.jsonl", records)), "--out", str(page)])
    assert done.exit_code == 1 and "pip install 'tritonconv[plot]'" in done.output and not page.exists()
    # Nothing to draw, nothing to install.
    assert CliRunner().invoke(main, [str(written(tmp_path / "b.jsonl", [])), "--out", str(page)]).exit_code == 0


def test_the_bound_is_by_description_where_no_ceiling_was_measured() -> None:
    ours, unknown = layer("a", OURS, 1.0), layer("a", OURS, 1.0, run_on("A GPU of tomorrow"))
    assert bound_of(ours, [ours]) == "arithmetic" and bound_of(ours | dict(gbps=4000.0), [ours]) == "memory"
    assert bound_of(unknown, [unknown]) is None
    assert "| 100 TFLOP/s; 200 GB/s |" in render([unknown])


def test_ratios_need_right_results() -> None:
    peer = layer("a", CHANNELS_LAST, 0.5, status="wrong")
    (row,) = rows_of([layer("a", OURS, 1.0), peer, layer("a", COMPILED, 2.0)], "layer")
    assert row.ratio == 2.0 and row.outcome == "win"


def test_tables_and_numbers() -> None:
    assert table("a, b ms", [["x|y", None], [1, "2*3"]]) == "| a | b ms |\n| --- | --- |\n| x\\|y |  |\n| 1 | 2\\*3 |"
    assert [number(v) for v in (0.012345, 1.5, 123.45, 1234.5, None)] == ["0.0123", "1.5", "123", "1234", None]


def test_the_committed_page_is_current() -> None:
    """If this fails: `python -m benchmarks.report`."""
    records = read()
    page = PAGE.read_text()
    assert page == render(records)
    linked = [line.split("](")[1].rstrip(")") for line in page.split("\n") if line.startswith("![")]
    assert all((PAGE.parent / path).is_file() for path in linked)


def test_the_bytes_of_training_are_current() -> None:
    assert traffic.page() in traffic.PAGE.read_text(), "run python -m benchmarks.traffic"


@pytest.mark.parametrize("name", traffic_blocks.BLOCKS)
def test_the_bytes_of_blocks_are_current_and_at_most_those_of_eager_torch(name: str) -> None:
    (row,) = (line for line in traffic_blocks.PAGE.read_text().split("\n") if line.startswith(f"| {name} |"))
    kept = [int(cell) for cell in row.strip("| ").split(" | ")[1:]]
    counts = [
        round(count(name, training) / 1e6)
        for training in (False, True)
        for count in (traffic_blocks.ours, traffic_blocks.eager)
    ]
    assert [kept[i] for i in (0, 2, 3, 5)] == counts, "run python -m benchmarks.traffic_blocks"
    assert counts[0] <= counts[1] and counts[2] <= counts[3]


def test_the_predictions_for_hopper_are_current() -> None:
    assert hopper.page() in hopper.PAGE.read_text(), "run python -m benchmarks.traffic"


def test_the_bytes_of_the_memory_bound_layers_are_current_and_near_the_floor() -> None:
    assert traffic_direct.page() in traffic_direct.PAGE.read_text(), "run python -m benchmarks.traffic"
    assert traffic_pools.page() in traffic_pools.PAGE.read_text(), "run python -m benchmarks.traffic"
    for case in load_cases():
        if case.family in traffic_pools.FAMILIES:
            _, floor, moved = traffic_pools.bytes_of(case)
            assert floor <= moved <= 1.1 * floor, case.id
    for case in traffic_direct.cases():
        found = traffic_direct.bytes_of(case)
        assert found.floor <= found.memory
        if case.kind == "separable" or case.family == "depthwise":
            assert found.memory <= 1.15 * found.floor, case.id
        if found.l2 is not None and found.lanes is not None:
            assert found.floor <= 1.01 * found.l2 <= 1.02 * found.lanes, case.id


def test_every_tensor_is_read_and_written_once_at_least() -> None:
    cases = [case for case in load_cases() if case.id.startswith("r50_") and case.kind in ("conv", "bn")]
    for case in cases:
        found = traffic.traffic_of(case)
        assert all(a <= b for a, b in zip(found["floor"], found["ours"], strict=True)), case.id
        # Forward we never move more than cuDNN and torch's batch norm.
        assert found["ours"].forward < found["torch"].forward, case.id
