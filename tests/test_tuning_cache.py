"""The tuning cache and tables: nothing is lost, and nothing stale is used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import triton

from tritonconv.geometry import ConvGeometry
from tritonconv.tuning import Problem, candidates, choose, device_named
from tritonconv.tuning import cache as cache_module
from tritonconv.tuning.cache import cache_path, cached_table, forget, remember
from tritonconv.tuning.configs import as_dict
from tritonconv.tuning.measured import find_entry, judge
from tritonconv.tuning.tables import Entry, Table, entry_of, shipped_table

GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITONCONV_CACHE_DIR", str(tmp_path))
    forget()
    choose.cache_clear()
    yield tmp_path
    forget()
    choose.cache_clear()


def problem(batch: int = 32, filters: int = 256, device: str = "H200") -> Problem:
    geometry = ConvGeometry.parse((batch, 256, 14, 14), (filters, 256, 3, 3), nd=2, padding=1)
    return Problem("conv_fprop", geometry, "bfloat16", False, True, device_named(device))


def entry(batch: int = 32, filters: int = 256, choice: int = 0, ms: float = 1.0, **more: object) -> Entry:
    p = problem(batch, filters)
    peer = dict(peer=None, peer_ms=None) | more
    return entry_of(p, "", candidates(p)[choice], ms, torch="2.13.0", date="2026-11-22", **peer)  # type: ignore[arg-type]


def test_nothing_measured_means_the_cost_model() -> None:
    assert cached_table(GPU) is None
    assert find_entry(problem(), None, 4.0) is None
    assert judge(problem(), "") == (False, "not measured")


@pytest.mark.parametrize("choice", [0, 3, 5])
def test_a_measured_config_is_chosen(choice: int) -> None:
    remember(GPU, [entry(choice=choice)])
    assert as_dict(choose(problem())) == entry(choice=choice).config


def test_a_near_layer_lends_its_config_and_a_far_one_does_not() -> None:
    remember(GPU, [entry(batch=32)])
    assert find_entry(problem(batch=100), None, 4.0) == entry(batch=32)
    assert find_entry(problem(batch=129), None, 4.0) is None
    assert find_entry(problem(filters=512), None, 4.0) is None, "filters are part of the layer"


def test_equal_sizes_go_before_near_ones_and_the_users_cache_before_the_shipped_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped = Table(GPU, "3.6.0", "tables/nvidia-h200.json")
    shipped.merge([entry(batch=32, ms=2.0), entry(batch=64, ms=2.0)])
    monkeypatch.setattr("tritonconv.tuning.measured.shipped_table", lambda _: shipped)
    remember(GPU, [entry(batch=32, ms=1.0)])
    assert find_entry(problem(batch=32), None, 4.0) == entry(batch=32, ms=1.0)
    assert find_entry(problem(batch=64), None, 4.0) == entry(batch=64, ms=2.0)


def test_torch_runs_what_it_was_faster_at_by_more_than_three_percent() -> None:
    remember(GPU, [entry(peer="cudnn channels_last", peer_ms=0.98)])
    assert judge(problem(), "") == (False, "1.0000 ms, torch 0.9800 ms")
    remember(GPU, [entry(peer="cudnn channels_last", peer_ms=0.96)])
    assert judge(problem(), "") == (True, "torch was faster: 0.9600 ms, conv_fprop 1.0000 ms")
    assert not judge(problem(), "batch norm+relu").torch, "measured without this epilogue"
    assert not judge(problem(batch=100), "").torch, "three times as many pixels is another layer"


def test_a_config_that_the_kernel_does_not_have_is_not_chosen() -> None:
    remember(GPU, [replace(entry(), config=dict(entry().config, BLOCK_M=512))])
    assert as_dict(choose(problem()))["BLOCK_M"] != 512


def test_entries_of_another_kernel_source_are_not_used_and_leave_the_cache() -> None:
    remember(GPU, [replace(entry(), kernel_hash="0" * 16)])
    assert find_entry(problem(), None, 4.0) is None
    remember(GPU, [entry(batch=64)])
    table = cached_table(GPU)
    assert table is not None and [e.batch for e in table.entries.values()] == [64]


def test_another_gpu_has_a_file_of_its_own() -> None:
    remember(GPU, [entry()])
    assert find_entry(problem(device="H100"), None, 4.0) is None
    # Not even under the other's name.
    cache_path("NVIDIA H100 80GB HBM3").write_text(cache_path(GPU).read_text())
    forget()
    with pytest.warns(UserWarning, match="measured on NVIDIA H200"):
        assert find_entry(problem(device="H100"), None, 4.0) is None


def test_another_triton_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(GPU, [entry()])
    old = cache_path(GPU)
    monkeypatch.setattr(cache_module, "triton_version", lambda: "9.9.9")
    forget()
    assert cached_table(GPU) is None
    cache_path(GPU).write_text(old.read_text())
    forget()
    with pytest.warns(UserWarning, match=r"expected NVIDIA H200 with triton 9\.9\.9"):
        assert cached_table(GPU) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda text: "\0" * len(text),
        lambda _: "[]",
        lambda text: text.replace('"ms": 1.0', '"ms": "fast"'),
        lambda text: text.replace('"ms": 1.0', '"ms": -1.0'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"BLOCK_M": ', '"BLOCK_M": null, "X": '),
        lambda text: text.replace('"BLOCK_M": ', '"X": -'),
        lambda text: text.replace('"ms": 1.0', '"ms": NaN'),
        lambda text: text.replace('"ms": 1.0', '"ms": Infinity'),
        lambda text: text.replace('"ms": 1.0', f'"ms": 1{"0" * 400}'),
        lambda text: text.replace('"batch": 32', f'"batch": 1{"0" * 400}'),
        lambda text: text.replace('"batch": 32', '"batch": "32"'),
        lambda text: text.replace('"batch": 32', '"batch": -1'),
        lambda text: text.replace('"layer": "', '"layer": "../'),
        lambda text: text.replace('"layer": "', '"layer": " '),
        lambda text: text.replace('"conditions": ""', '"conditions": 0'),
        lambda _: "[" * 200_000,
    ],
    ids=[
        "truncated",
        "empty",
        "zeros",
        "not a table",
        "text for a time",
        "negative time",
        "other format",
        "no block",
        "negative block",
        "NaN",
        "endless",
        "huge time",
        "huge batch",
        "text for a batch",
        "negative batch",
        "path",
        "no kernel",
        "number for an epilogue",
        "deep",
    ],
)
def test_a_corrupt_file_is_ignored_with_a_warning_and_written_anew(damage: object) -> None:
    path = remember(GPU, [entry()])
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    forget()
    with pytest.warns(UserWarning, match="tuning cache ignored"):
        assert cached_table(GPU) is None
    with pytest.warns(UserWarning, match="tuning cache ignored"):
        remember(GPU, [entry(batch=8)])
    table = cached_table(GPU)
    assert table is not None and [e.batch for e in table.entries.values()] == [8]


WRITER = """
import os, sys, time
from tritonconv.tuning import cache
sys.path.insert(0, {tests!r})
from test_tuning_cache import GPU, entry
first, kill = int(sys.argv[1]), sys.argv[2] == "stall"
if kill:
    # Stops in the middle of the file, with the lock held.
    to_json = cache.Table.to_json
    class Stalling(str):
        pass
    def fsync(handle):
        print("writing", flush=True)
        time.sleep(600)
    os.fsync = fsync
for batch in range(first, first + 20):
    cache.remember(GPU, [entry(batch=batch)])
"""


def writer(first: int, mode: str = "run") -> subprocess.Popen[str]:
    script = WRITER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", script, str(first), mode], stdout=subprocess.PIPE, text=True)


def test_two_writers_at_once_lose_nothing() -> None:
    processes = [writer(1), writer(101)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    table = cached_table(GPU)
    assert table is not None
    assert sorted(e.batch for e in table.entries.values()) == [*range(1, 21), *range(101, 121)]


def test_a_writer_that_is_killed_leaves_the_old_file_whole(folder: Path) -> None:
    remember(GPU, [entry(batch=7)])
    process = writer(50, "stall")
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("*.tmp")), "it was killed while it wrote"
    forget()
    table = cached_table(GPU)
    assert table is not None and [e.batch for e in table.entries.values()] == [7]
    start = time.monotonic()
    remember(GPU, [entry(batch=8)])
    assert time.monotonic() - start < 10, "its lock went with it"
    assert not list(folder.glob("*.tmp"))


def test_a_table_is_read_as_it_was_written() -> None:
    table = Table(GPU, "3.7.1")
    table.merge([entry(batch=b, peer="cudnn channels_last", peer_ms=0.5) for b in (1, 2, 300)])
    assert Table.from_json(table.to_json(), "text").entries == table.entries
    assert json.loads(table.to_json())["gpu"] == GPU


def test_a_large_table_is_read_and_searched_in_time() -> None:
    table = Table(GPU, "3.7.1")
    rows = [replace(entry(), batch=batch) for batch in range(1, 20_001)]
    start = time.monotonic()
    table.merge(rows)
    # Again, each in place of the one that is there.
    table.merge(reversed(rows))
    found = table.find(problem(), "", 2.0, [entry().config])
    assert time.monotonic() - start < 5
    assert found is not None and found.batch == 32 and len(table.entries) == 20_000


def test_the_folder_may_be_under_home_or_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    for chosen, expected in (("~/kept", tmp_path / "me" / "kept"), ("kept", tmp_path / "kept")):
        monkeypatch.setenv("TRITONCONV_CACHE_DIR", chosen)
        assert cache_path(GPU).parent == expected
        assert remember(GPU, [entry()]).is_file() and cached_table(GPU) is not None


def test_a_triton_whose_distribution_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", version)
    assert f"triton-{triton.__version__}" in cache_path(GPU).name


def test_every_shipped_table_is_one() -> None:
    tables = Path(cache_module.__file__).parent / "tables"
    for path in tables.glob("*.json"):
        table = Table.from_json(path.read_text(), path.name)
        assert shipped_table(table.gpu) is not None
    assert shipped_table("no such GPU") is None


def test_the_cache_is_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITONCONV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "somewhere")
    assert cache_path(GPU).parent == Path(os.sep, "somewhere", "tritonconv") or sys.platform != "linux"


def test_times_of_a_config_that_is_gone_decide_nothing() -> None:
    gone = replace(entry(peer="torch", peer_ms=0.5), config=dict(entry().config, BLOCK_M=512))
    remember(GPU, [gone])
    assert judge(problem(), "") == (False, "not measured")


def test_which_configs_there_are_and_what_comments_say_is_not_the_kernels_version() -> None:
    import ast

    from tritonconv.tuning.sources import device_code

    def code(text: str) -> str:
        return device_code(ast.parse(text))

    kernel = "def configs():\n    return [1, 2]\n\n@jit\ndef kernel(x):\n    return x + 1\n"
    assert code(kernel) == code(kernel.replace("[1, 2]", "[1]").replace("x + 1", "x + 1  # why"))
    assert code(kernel) != code(kernel.replace("x + 1", "x + 2"))
