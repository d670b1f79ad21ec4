"""What the package promises about itself is what it does."""

from __future__ import annotations

import ast
import importlib
from importlib import metadata
from pathlib import Path

import pytest

import tritonconv
from tritonconv.doctor import SUPPORTED, in_range

ROOT = Path(__file__).parents[1]


def test_doctor_knows_the_versions_that_the_package_asks_for() -> None:
    wanted = {line.split(";")[0].strip() for line in metadata.requires("tritonconv") or () if "extra ==" not in line}
    for name, (least, below) in SUPPORTED.items():
        limits = ",".join([f"<{below}"] * (below is not None) + [f">={least}"])
        assert f"{name}{limits}" in wanted


def test_the_makefile_tests_the_oldest_and_the_newest_triton() -> None:
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("OTHER_TRITONS := "))
    oldest, newest = line.split()[2:]
    least, below = SUPPORTED["triton"]
    assert oldest == f"{least}.0" and in_range(newest, least, below)
    major, minor = map(int, newest.split(".")[:2])
    assert not in_range(f"{major}.{minor + 1}", least, below)
    assert "compat-quick" in (ROOT / ".ci/run").read_text()


def test_version_is_the_packages() -> None:
    assert metadata.version("tritonconv") == tritonconv.__version__


def imported(path: Path) -> set[str]:
    """Absolute module names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


# Whom each layer may not know, so that arrows run one way.
ABOVE = {
    "tritonconv/ops": ("functional", "nn", "convert", "measure", "bench", "cli", "demo", "doctor"),
    "tritonconv/tuning": ("ops", "functional", "nn", "convert", "measure", "bench", "cli", "demo", "doctor"),
    "tritonconv/nn": ("convert", "kernels", "measure", "bench", "cli", "demo", "doctor"),
    "tritonconv/convert": ("kernels", "measure", "bench", "cli", "demo", "doctor"),
    "tritonconv/measure": ("bench", "cli", "demo", "doctor"),
    "tritonconv/bench": ("cli", "demo", "doctor"),
}


@pytest.mark.parametrize("folder", ABOVE)
def test_arrows_run_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            assert not (parts[0] == "tritonconv" and len(parts) > 1 and parts[1] in ABOVE[folder]), f"{path} imports {name}"


def test_kernels_know_no_torch_and_no_host_code() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)}.isdisjoint({"torch", "numpy", "tritonconv"}), path


@pytest.mark.parametrize("name", ["tritonconv", "tritonconv.functional", "tritonconv.nn", "tritonconv.geometry"])
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert all(hasattr(module, public) for public in module.__all__)
