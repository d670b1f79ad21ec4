"""Six models of other libraries, as `examples/zoo.py` measures them: right, fused, and with torch's strides."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# Hidden copies at most, where images enter and leave.
EXPECTED: dict[str, int] = {
    "timm/tf_efficientnet_b0": 2,
    "timm/densenet121": 0,
    "transformers/resnet": 0,
    "transformers/convnext": 1,
    "diffusers/autoencoder_kl": 1,
    "segmentation_models_pytorch/unet": 0,
}


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("zoo_models").declare_operators()
    # There is a zoo.py among the tests, too.
    spec = importlib.util.spec_from_file_location("examples_zoo", EXAMPLES / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "examples_zoo", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXPECTED)
def test_models_of_other_libraries_are_right_and_fused(zoo: Any, name: str) -> None:
    library, _, model = name.partition("/")
    outcome = zoo.measure(name, zoo.MODELS[library][model])
    assert outcome.is_right and not outcome.unfused and not outcome.breaks, outcome
    assert not outcome.on_torch and outcome.copies <= EXPECTED[name], outcome


def test_the_table_is_a_page_and_a_wrong_model_fails(zoo: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "zoo.md"
    assert zoo.main(["timm/lcnet_050", "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("timm/lcnet_050\t") and "1 models, 1 right." in out and "| timm/lcnet_050 |" in page.read_text()
    wrong = zoo.Outcome("m", 1, 1, 0, [], 0, 0, 0.1, 0.1, 0.5, True)
    assert not wrong.is_right and "WRONG" in zoo.row_of(wrong)[-2]


def test_links_are_norms_that_alone_read_a_convolution(zoo: Any) -> None:
    conv, norm = torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1).eval()
    with zoo.Links() as found:
        y = conv(torch.ones(1, 1, 2, 2))
        norm(y) + y
        norm(conv(y))
    assert (found.convolutions, found.norms, found.links) == (2, 2, 1)
