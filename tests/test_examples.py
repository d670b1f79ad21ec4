"""The examples run as a user would run them, and train the same with torch's layers and with ours."""

from __future__ import annotations

import copy
import importlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import every, some

import tritonconv
from tritonconv.ops.core.launch import record_launches

FOLDER = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Case:
    """A training example."""

    name: str
    steps: int
    layers: int
    """Whose weights are trained."""

    def __str__(self) -> str:
        return self.name


CASES = [
    # Three convolutions with batch norm and ReLU, two linear layers.
    Case("lenet_digits", 5, 5),
    # Ten such convolutions, two transposed ones, and a last one on its own.
    Case("unet_segmentation", 2, 13),
]
# What the others share; what tests/test_examples_zoo.py tests.
NOT_HERE = {"common.py", "zoo.py", "zoo_models.py"}
# Without arguments they train to the end.
BRIEFLY = {f"{case}.py": ("--impl", "torch", "--steps", "2") for case in CASES}


@pytest.mark.parametrize("name", sorted({path.name for path in FOLDER.glob("*.py")} - NOT_HERE))
def test_runs_in_another_folder(name: str, tmp_path: Path) -> None:
    """As a user would who copied the examples."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, name, *BRIEFLY.get(name, ())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


WITHOUT = """
import runpy, sys
for name in ("matplotlib", "sklearn"):
    sys.modules[name] = None
# find_spec asks the finders, and would find it.
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@every(case=some(CASES, 1))
def test_matplotlib_is_needed_for_pictures_alone(case: Case) -> None:
    def without(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT, f"{case}.py", *argv]
        return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=300, check=False)

    done = without("--help")
    assert done.returncode == 0 and "--batch-size" in done.stdout, done.stderr
    done = without("--picture", "loss.png")
    assert done.returncode == 2 and "--picture needs matplotlib" in done.stderr
    for option in ("--steps", "--epochs", "--batch-size"):
        done = without(option, "0")
        assert done.returncode == 2 and "expected a number from 1 on, got 0" in done.stderr


def test_a_batch_may_be_larger_than_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes all images then."""
    lenet: Any = importlib.import_module("lenet_digits")
    images, labels = torch.rand(40, 1, 8, 8), torch.randint(10, (40,))
    monkeypatch.setattr(lenet, "digits", lambda _: (images, labels))
    monkeypatch.setattr(lenet, "TEST_IMAGES", 10)
    losses = lenet.main(["--impl=torch", "--batch-size=5000", "--epochs=3", "--device=cpu"])
    assert len(losses["torch"]) == 3


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def run(name: str, device: str, *argv: str) -> dict[str, list[float]]:
    """An example's losses, by implementation, in small batches: kernels of few programs."""
    # An example chooses devices itself.
    with torch.device("cpu"):
        result: dict[str, list[float]] = importlib.import_module(name).main([*argv, "--batch-size=4", f"--device={device}"])
    return result


@every(case=some(CASES, 1))
def test_both_implementations_learn_the_same(
    case: Case, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "loss.png"
    common: Any = importlib.import_module("common")
    train = common.train

    def in_double(model: torch.nn.Module, *tensors: Any) -> Any:
        # Torch's own fp32 may be off by 1e-3 after five steps: batch norms of four images are badly conditioned.
        wide = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)
        return train(copy.deepcopy(model).double(), *wide)

    with record_launches() as launches, monkeypatch.context() as patch:
        patch.setattr(common, "train", in_double)
        expected = run(case.name, device, "--impl=torch", f"--steps={case.steps}")["torch"]
    assert not launches
    with tritonconv.set_backend("triton"), record_launches() as launches:
        found = run(case.name, device, "--impl=tritonconv", f"--steps={case.steps}", f"--picture={picture}")["tritonconv"]
    # Every gradient of a weight is ours, and so is every batch norm.
    assert launches.count("conv_wgrad_kernel") == case.layers * case.steps
    assert {"batch_norm_combine_kernel", "batch_norm_reduce_kernel", "conv_dgrad_kernel"} <= set(launches)
    assert len(found) == case.steps
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compares_both_from_one_seed(tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "loss.png"
    losses = run("lenet_digits", device, "--compare", "--steps=2", f"--picture={picture}")
    assert [len(values) for values in losses.values()] == [2, 2]
    assert losses["torch"] == pytest.approx(losses["tritonconv"], rel=1e-4)
    assert "largest relative difference of the losses" in capsys.readouterr().out
    assert picture.exists()


def test_says_where_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    common: Any = importlib.import_module("common")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    common.prepare(torch.nn.ReLU(), "tritonconv", "cpu")
    assert "tensors on cpu run on torch" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    common.prepare(torch.nn.ReLU(), "tritonconv", "cpu")
    assert "our kernels in Triton's interpreter" in capsys.readouterr().out
