"""What explain tells of gradients, and of what Dynamo did with a model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from matrix import named
from models import CASES, build
from test_convert import RESNET, run
from test_graph import Checkpointed
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.launch import record_launches


def backward_of(model: nn.Module, x: Tensor) -> tuple[set[str], int]:
    """Kernels that a backward pass launches, and the bytes that were saved for it, besides parameters and buffers."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def save(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in known:
            saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with record_launches() as launches:
        torch.autograd.grad(y, parameters, torch.ones_like(y))
    return {name.removesuffix("_kernel") for name in launches}, sum(storage.nbytes() for storage in saved.values())


def kernels(rows: list[dict[str, Any]]) -> set[str]:
    return {kernel for row in rows if row["backend"] == "triton" for kernel in row["reason"].split(", ")}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_those_that_a_backward_pass_computes(training: bool) -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model).train(training)
    report = tritonconv.explain(converted, x, training=True).to_dict()
    rows = report["gradients"]
    assert (kernels(rows), report["saved"]) == backward_of(converted, x)
    # Each parameter once, in the order of the backward pass; what chains there are, the forward pass has too.
    assert sorted(name for row in rows for name in row["of"] if name != "input") == sorted(dict(model.named_parameters()))
    assert [rows[0]["name"], rows[-1]["name"]] == ["fc", "conv1"] and rows[-1]["fused"] == ["bn1", "relu"]
    assert "input" in rows[0]["of"] and "input" not in rows[-1]["of"]
    assert sum(row["saved"] for row in rows) == report["saved"]
    # Fewer than torch saves.
    theirs = tritonconv.explain(model.train(training), x, training=True).to_dict()
    assert report["saved"] <= theirs["saved"] and {row["backend"] for row in theirs["gradients"]} == {"torch"}
    assert {row["name"]: row["reason"] for row in theirs["gradients"]}["conv1"] == "ConvolutionBackward0"


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model).train()
    converted.conv1.requires_grad_(False), converted.bn1.requires_grad_(False), converted.fc.weight.requires_grad_(False)
    rows = {row["name"]: row for row in tritonconv.explain(converted, x, training=True).to_dict()["gradients"]}
    assert "conv1" not in rows and "maxpool" not in rows
    assert rows["fc"]["of"] == ["input", "fc.bias"] and "dgrad" in rows["fc"]["reason"]


def test_a_backward_pass_changes_nothing() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model).train()
    converted.conv1.weight.grad = torch.ones_like(converted.conv1.weight)
    before, rng = copy.deepcopy(converted.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        text = str(tritonconv.explain(converted, x, training=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), converted.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), rng) and converted.fc.weight.grad is None
    assert torch.equal(converted.conv1.weight.grad, torch.ones_like(converted.conv1.weight))
    assert "Gradients, in the order of the backward pass" in text and "conv_wgrad" in text and "\x1b" not in text


def test_gradients_of_a_checkpointed_region_and_of_code_between_graphs() -> None:
    converted = tritonconv.convert(Checkpointed().train())
    report = tritonconv.explain(converted, torch.randn(2, 4, 6, 6), training=True)
    assert [(row.name, row.fused) for row in report.layers if row.backend == "triton"] == [
        ("inner.0", ["inner.1", "inner.2"]), ("last", []),
    ]  # fmt: skip
    rows = {row["name"]: row for row in report.to_dict()["gradients"]}
    assert "inner.0.weight" in rows["inner.0"]["of"] and "conv_wgrad" in rows["inner.0"]["reason"]
    model, x = build(named(CASES, "untraceable"))
    rows = tritonconv.explain(tritonconv.convert(model), x, training=True).to_dict()["gradients"]
    assert {"stem.0", "head"} < {row["name"] for row in rows}


def test_without_parameters_that_need_gradients_there_are_none() -> None:
    model, x = build(RESNET)
    assert tritonconv.explain(model, x).to_dict()["gradients"] == []
    with pytest.raises(ValueError, match="no result of the model needs a gradient"):
        tritonconv.explain(tritonconv.convert(model).requires_grad_(False), x, training=True)


class Loop(nn.Module):
    """What it cannot trace lies in a loop: Dynamo gives the whole function up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def lines(report: Any, how: str) -> list[str]:
    return [entry["reason"] for entry in report.to_dict()["fusion"] if entry["how"] == how]


def test_a_function_that_is_given_up_has_a_line_and_its_layers_have_rows() -> None:
    report = tritonconv.explain(tritonconv.convert(Loop().eval()), torch.randn(1, 3, 4, 4))
    (line,) = lines(report, "not traced")
    assert "test_explain_training.py:" in line and "in Loop.forward" in line
    assert [(row.name, row.backend, row.fused) for row in report.layers] == [
        ("layers.0", "triton", []), ("layers.1", "triton", []),
    ]  # fmt: skip


def test_a_graph_break_has_its_class_and_place() -> None:
    model, x = build(named(CASES, "untraceable"))
    (place,) = lines(tritonconv.explain(tritonconv.convert(model), x), "graph break")
    assert "models.py:" in place and "in Untraceable.forward: " in place


def test_traces_are_counted_and_a_limit_that_is_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonconv.graph import dynamo

    monkeypatch.setattr(dynamo, "MOST_TRACES", 2)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), torch.randn(1, 3, 4, 4)
    converted = tritonconv.convert(model)
    assert lines(tritonconv.explain(converted, x), "traces") == []
    run(converted, x)
    converted(x)
    assert lines(tritonconv.explain(converted, x), "traces") == ["2 traces since it was converted"]
    converted.double()
    with pytest.warns(UserWarning, match=r"Sequential\.forward has 2 traces"):
        y = run(converted, x.double())[0]
    torch.testing.assert_close(y, run(model.double(), x.double())[0])
    # Once, and not for what has its trace.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(converted, x.double())
        assert run(converted.float(), x)[1] == 1
    report = tritonconv.explain(converted, x)
    assert lines(report, "traces") == ["2 traces, and calls that needed more: their layers ran on their own"]
    assert "the model: 2 traces, and calls that needed more" in str(report)


def test_a_plain_layer_that_came_after_convert_is_not_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    converted, x = tritonconv.convert(model, fuse=False), torch.randn(1, 3, 4, 4)
    converted[1] = nn.Conv2d(4, 4, 1)
    rows = tritonconv.explain(converted, x).layers
    assert [(row.name, row.backend) for row in rows] == [("0", "triton"), ("1", "torch")]
    assert rows[1].reason == "not converted"
