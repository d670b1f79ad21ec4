"""The command line: what it prints, and what a colleague would say where it cannot go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import tritonconv
from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.layers import COLUMNS
from tritonconv.bench.registry import operations
from tritonconv.bench.run import STAGES, columns_of
from tritonconv.bench.session import Job
from tritonconv.doctor import Finding, first_checks, in_range
from tritonconv.tuning import device_named
from tritonconv_cli import PEERS, SUITES, main

MODEL = """
    import torch
    from neighbor import WIDTH

    def make_model():
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, WIDTH, 3, padding=1), torch.nn.BatchNorm2d(WIDTH), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(WIDTH * 64, 5),
        )

    class Holder:
        model = make_model()

    def returns_text():
        return "a model"

    def needs_width(width):
        return torch.nn.Linear(width, width)

    number = 3
"""


@pytest.fixture(autouse=True)
def no_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line would replace this very process."""

    def execve(*_: Any) -> None:
        raise AssertionError("the interpreter should be on already, or there is a GPU")

    monkeypatch.setattr(os, "execve", execve)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a user's model in it."""
    (tmp_path / "user_model.py").write_text(textwrap.dedent(MODEL))
    (tmp_path / "neighbor.py").write_text("WIDTH = 8\n")
    (tmp_path / "broken.py").write_text("import torch\nraise ValueError('no weights here')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("target", ["user_model.py:make_model", "user_model:make_model", "user_model.py:Holder.model"])
@pytest.mark.usefixtures("folder")
def test_explain_prints_a_row_for_each_layer(target: str) -> None:
    result = invoke("explain", target, "--input", "2,3,8,8", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["layers"]
    layers = {row["name"]: row for row in rows}
    assert layers["0"]["fused"], "the batch norm and the activation are fused behind the convolution"
    assert layers["0"]["backend"] == "triton"
    assert layers["0"]["macs"] == 2 * 64 * 8 * 27
    assert layers["4"]["macs"] == 2 * 5 * 8 * 64


@pytest.mark.usefixtures("folder")
def test_explain_without_fusion_and_without_conversion() -> None:
    plain = json.loads(invoke("explain", "user_model.py:make_model", "--input", "2,3,8,8", "--json", "--no-fuse").stdout)
    assert not any(row["fused"] for row in plain["layers"])
    result = invoke("explain", "user_model.py:make_model", "--input", "2,3,8,8", "--json", "--no-convert")
    assert {row["backend"] for row in json.loads(result.stdout)["layers"]} == {"torch"}


@pytest.mark.usefixtures("folder")
def test_explain_in_training_mode_says_so() -> None:
    result = invoke("explain", "user_model.py:make_model", "--input", "2,3,8,8", "--json", "--train", "--gradients")
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["0"]["fused"] == ["1", "2"] and "in training" in rows["0"]["reason"]
    gradients = {row["name"]: row for row in report["gradients"]}
    assert gradients["0"]["fused"] == ["1", "2"] and "conv_wgrad" in gradients["0"]["reason"] and report["saved"] > 0


def test_explain_looks_for_matplotlib_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "user_model.py").write_text("raise AssertionError('the model was loaded')")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("explain", "user_model.py:make_model", "--input", "2,3,8,8", "--plot", "report.png")
    assert result.exit_code == 1 and "pip install 'tritonconv[plot]'" in result.stderr


def test_explain_prints_a_table_and_draws(folder: Path) -> None:
    result = invoke(
        "explain", "user_model.py:make_model", "--input", "2,3,8,8", "--dtype", "float16", "--plot", "report.png"
    )
    assert result.exit_code == 0, result.output
    assert "conv" in result.output.lower()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


COMPLAINTS = {
    "no name": (["user_model.py"], "expected FILE.py:NAME"),
    "no file": (["absent.py:make_model"], "there is no file absent.py"),
    "no module": (["absent.package:make_model"], "No module named 'absent'"),
    "no such name": (
        ["user_model.py:make_modle"],
        "has no 'make_modle'; it has Holder, make_model, needs_width, returns_text",
    ),
    "fails to import": (["broken.py:model"], "ValueError: no weights here"),
    "not a module": (["user_model.py:number"], "is int, expected a torch.nn.Module"),
    "returns no module": (["user_model.py:returns_text"], "returned str, expected a torch.nn.Module"),
    "needs arguments": (["user_model.py:needs_width"], "missing 1 required positional argument"),
    "wrong size": (["user_model.py:make_model", "--input", "2,4,8,8"], "does not take inputs of (2, 4, 8, 8) in float32"),
    "no size": (["user_model.py:make_model", "--input", "2,three"], "'2,three' is no size"),
    "negative size": (["user_model.py:make_model", "--input", "-1,3,8,8"], "'-1,3,8,8' is no size"),
    "no folder": (["user_model.py:make_model", "--plot", "absent/report.png"], "there is no folder absent"),
}


@pytest.mark.parametrize(("arguments", "message"), COMPLAINTS.values(), ids=COMPLAINTS)
@pytest.mark.usefixtures("folder")
def test_explain_complains(arguments: list[str], message: str) -> None:
    if "--input" not in arguments:
        arguments = [*arguments, "--input", "2,3,8,8"]
    result = invoke("explain", *arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit), result.exception
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_explain_needs_an_input() -> None:
    result = invoke("explain", "user_model.py:make_model")
    assert result.exit_code == 2
    assert "--input" in result.stderr


def test_doctor() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    words = ("python", "torch", "triton", "numpy", "GPU", "kernels run", "tuning cache", "relative error")
    for word in (*words, "conv_fprop_kernel", "conv_flat_kernel", "matmul_kernel"):
        assert word in result.output


def test_doctor_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonconv.doctor.SUPPORTED", {"torch": ("99.0", None)})
    monkeypatch.setattr("tritonconv.doctor.checked_kernels", lambda: [Finding("matmul_kernel", "relative error 1", False)])
    result = invoke("doctor")
    assert result.exit_code == 1
    assert result.output.count("wrong") == 2


def test_doctor_checks_every_kernel() -> None:
    gpu = device_named("H200")

    def kernels(cases: list[Case]) -> set[str]:
        return {each.kernel.__name__ for case in cases for each in operations()[case.kind].launches(case, gpu)}

    every = [replace(case, dtype="fp16") for operation in operations().values() for case in operation.checks()]
    assert kernels(first_checks()) == kernels(every) and len(first_checks()) < len(every)


def test_versions_are_compared_as_numbers() -> None:
    assert in_range("3.10.0", "3.9", None)
    assert not in_range("3.10.0", "3.6", "3.10")
    assert in_range("3.9.1+git1234", "3.6", "3.10")
    assert not in_range("2.9.1", "2.11", None)


def test_command_line_from_a_shell() -> None:
    """`python -m tritonconv` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tritonconv", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert tritonconv.__version__ in done.stdout


CPU_SECONDS = """
import resource, sys
sys.argv = ["tritonconv", *sys.argv[1:]]
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name="tritonconv")
try:
    entry.load()()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["explain", "--no-such-option"]], ids=" ".join)
def test_the_command_line_is_parsed_before_torch_is_imported(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", CPU_SECONDS, *arguments], capture_output=True, text=True, timeout=60)
    seconds, torch_imported = done.stderr.splitlines()[-1].split()
    assert "Usage: tritonconv" in done.stdout + done.stderr
    assert torch_imported == "False" and float(seconds) < 0.5


def test_the_command_line_has_the_words_of_the_benchmarks() -> None:
    assert SUITES == STAGES
    assert {column for peer in PEERS for column in columns_of([peer])} == set(COLUMNS)


class SeenError(Exception):
    """What a dry run was given."""


@pytest.mark.parametrize(
    "arguments, layers, checks",
    [
        ([], True, True),
        (["--suite", "layers"], True, False),
        (["--suite", "check"], False, True),
        (["--suite", "check", "--suite", "layers"], True, True),
    ],
    ids=["all", "layers", "check", "both"],
)
def test_a_dry_run_walks_the_suites_that_were_named(
    arguments: list[str], layers: bool, checks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dry_run(cases: list[Case], small: list[Job], *_: Any, **__: Any) -> int:
        raise SeenError(cases, small)

    monkeypatch.setattr("tritonconv.bench.run.dry_run", dry_run)
    result = invoke("bench", "--dry-run", *arguments)
    assert isinstance(result.exception, SeenError)
    cases, small = result.exception.args
    assert (len(cases) == len(load_cases())) is layers and bool(cases) is layers and bool(small) is checks
    # By name, in both.
    (cases, small) = invoke("bench", "--dry-run", *arguments, "--only", "3x3").exception.args  # type: ignore[union-attr]
    assert all("3x3" in case.id or "3x3" in case.family for case in cases) and bool(cases) is layers
    assert all("3x3" in job.identity["id"] for job in small) and bool(small) is checks
    # And no peers but those.
    for peer, columns in (("cudnn", {"cudnn channels_last", "tritonconv"}), ("compile", {"tritonconv"})):
        (_, small) = invoke("bench", "--dry-run", *arguments, "--peer", peer).exception.args  # type: ignore[union-attr]
        assert {job.identity["column"] for job in small} == (columns if checks else set())


def test_bench_says_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = invoke("bench")
    assert result.exit_code == 1 and "torch sees no GPU" in result.output and "--dry-run" in result.output
    assert invoke("bench", "--only", "no such layer").exit_code == 2
    for dry in ([], ["--dry-run"]):
        result = invoke("bench", *dry, "--peer", "foo")
        assert result.exit_code == 2 and "'cudnn', 'compile', 'max-autotune'" in result.output
    result = invoke("bench", "--dry-run", "--suite", "check", "--suite", "models")
    assert result.exit_code == 2 and "a dry run has no models" in " ".join(result.output.split())
    result = invoke("bench", "--dry-run", "--target", "GTX 285")
    assert result.exit_code == 1 and "names no described GPU" in result.output


@pytest.mark.usefixtures("folder")
def test_tune_says_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = invoke("tune", "user_model.py:make_model", "--input", "1,3,8,8")
    assert result.exit_code == 1 and "tune measures on a GPU, and torch sees none" in result.output
    # A word on the file comes first.
    result = invoke("tune", "absent.py:make_model", "--input", "1,3,8,8")
    assert result.exit_code == 1 and "there is no file absent.py" in result.output
    result = invoke("tune", "broken.py:model", "--input", "1,3,8,8")
    assert result.exit_code == 1 and "ValueError: no weights here" in result.output


def test_the_package_has_it_too() -> None:
    from tritonconv import cli

    assert cli.main is main
