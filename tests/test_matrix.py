"""What is left out by default: no value of any axis, no value of a config's keyword, and the same at every run."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import matrix
import pytest
from matrix import cover, named, rotate, rotated, some
from tritonconv.kernels import conv_flat, conv_wgrad, matmul


@pytest.fixture(params=["part", "all"])
def all_of_them(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(matrix, "TEST_ALL", request.param == "all")
    yield request.param == "all"


@pytest.mark.parametrize("sizes", [(12, 4, 2), (2, 46, 4, 2), (3, 3), (7, 1, 2), (5,), (16, 4, 2, 2)], ids=str)
def test_each_value_of_each_axis_occurs(sizes: tuple[int, ...], all_of_them: bool) -> None:
    axes = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    found = rotated(*axes)
    assert set(found) <= set(itertools.product(*axes)) and len(found) == (prod(sizes) if all_of_them else max(sizes))
    for place, axis in enumerate(axes):
        assert {combination[place] for combination in found} == set(axis)
    assert found == rotated(*axes)


def test_combinations_of_the_shorter_axes_occur_before_one_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TEST_ALL", False)
    found = [others for _, *others in rotated(range(20), "ab", "cd", "efg")]
    assert len({tuple(others) for others in found[:12]}) == 12 and found[12:] == found[:8]


def test_too_few_turns_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TEST_ALL", False)
    with pytest.raises(AssertionError, match="get no turn"):
        rotated(range(2), range(2), range(2), [None] * 2, range(2))


@pytest.mark.parametrize("module", [conv_flat, conv_wgrad, matmul], ids=lambda module: module.__name__.split(".")[-1])
def test_each_value_of_each_keyword_of_configs_occurs(module: object, all_of_them: bool) -> None:
    configs = module.configs()  # type: ignore[attr-defined]
    found = cover(configs)
    assert {item for c in found for item in c.kwargs.items()} == {item for c in configs for item in c.kwargs.items()}
    assert (len(found) == len(configs)) == all_of_them


def test_some_have_the_first_and_the_last(all_of_them: bool) -> None:
    assert some(range(10), 4) == (list(range(10)) if all_of_them else [0, 3, 6, 9])
    assert some(range(3), 4) == [0, 1, 2] and some(range(3), 1)[0] == 0


def test_a_name_is_one_cases() -> None:
    assert named(["a-b", "c"], "a b") == "a-b"
    with pytest.raises(ValueError, match="not enough values"):
        named(["a"], "b")


@rotate({"number, word": [(1, "one"), (2, "two"), (3, "three")]}, channels_last=[True, False])
def test_axes_of_several_arguments_are_unpacked(number: int, word: str, channels_last: bool) -> None:
    assert len(word) == (3 if number < 3 else 5) and channels_last in (True, False)


def test_make_test_all_runs_more(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from matrix import every, some\n\n@every(i=some(range(9), 2))\ndef test_it(i):\n    assert True\n"
    )
    for value, count in (("0", 2), ("1", 9)):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
        environment = {"TEST_ALL": value, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert f"{count} passed" in done.stdout, done.stdout
