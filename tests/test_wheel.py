"""The package as a user installs it: a wheel elsewhere, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODEL = """
import torch

def make_model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel was unpacked, with a model beside it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    # A build leaves files behind, and takes along what an earlier one left.
    for name in ("tritonconv", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "tritonconv_cli.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", source / "dist", source], check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True)
    (site / "model.py").write_text(MODEL)
    return site


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone's root, other than that of the tests."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("tritonconv", "kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    return clone


# Without the site module there is no package but what PYTHONPATH says: nothing is installed in editable mode.
@pytest.mark.parametrize(
    "options, wheel",
    [([], False), (["-S"], True), (["-S"], False)],
    ids=["editable from elsewhere", "wheel", "not installed"],
)
def test_python_in_a_clone_runs_the_clone(clone: Path, site: Path, options: list[str], wheel: bool) -> None:
    script = """
import pickle, tritonconv, tritonconv.kernels.hopper, tritonconv.kernels.matmul as k
from tritonconv.bench.cases import load_cases
from tritonconv.tuning.sources import kernel_hash
assert pickle.loads(pickle.dumps(k.configs)) is k.configs
kernel_hash("matmul"), load_cases()
print(tritonconv.__file__, k.__file__, tritonconv.kernels.hopper.__file__)
"""
    installed = [sysconfig.get_path("purelib")]
    paths = [str(site)] * wheel + (installed if options else [])
    done = subprocess.run(
        [sys.executable, *options, "-c", script], cwd=clone, env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(Path(name).is_relative_to(clone) for name in done.stdout.split()), done.stdout


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(site), "TRITONCONV_CACHE_DIR": str(site / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tritonconv", *arguments],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_is_what_runs(site: Path) -> None:
    script = "import tritonconv, tritonconv.kernels.matmul as k; print(tritonconv.__file__); print(k.__file__)"
    environment = dict(os.environ, PYTHONPATH=str(site))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=site, env=environment, capture_output=True, text=True, check=True
    )
    assert all(Path(line).is_relative_to(site) for line in done.stdout.split()), done.stdout


@pytest.mark.all
def test_doctor(site: Path) -> None:
    done = run(site, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "matmul_kernel" in done.stdout and "wrong" not in done.stdout


def test_explain(site: Path) -> None:
    done = run(site, "explain", "model.py:make_model", "--input", "1,3,16,16")
    assert done.returncode == 0, done.stderr
    assert "triton" in done.stdout


@pytest.mark.codegen
@pytest.mark.all
def test_bench_dry_run(site: Path) -> None:
    done = run(site, "bench", "--dry-run", "--only", "pointwise", "--target", "sm_80")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == "7 cases: 7 ok, 0 not built, 0 failed"
    assert "Predictions of the cost model for NVIDIA A100-SXM4-80GB" in done.stdout


def test_tune_needs_a_gpu_and_says_so(site: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(site, "tune", "model.py:make_model", "--input", "1,3,16,16")
    assert done.returncode == 1 and "tune measures on a GPU, and torch sees none" in done.stderr


@pytest.mark.all
def test_demo(site: Path) -> None:
    done = run(site, "demo", "--epochs", "1")
    # One pass trains badly, but our kernels must agree with torch all the same.
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "demo.png").stat().st_size > 1000
