"""The measuring code, in all but the clock: results, workers, budgets, checks, dry runs."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import TEST_ALL, every
from rich.console import Console
from torch import nn

from tritonconv.bench import layers, networks, registry, suites
from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.dry import dry_records, small_jobs, verdict
from tritonconv.bench.results import Results, is_peer, read_records
from tritonconv.bench.run import columns_of, dry_run, measure, summary
from tritonconv.bench.sanitize import sanitize_jobs
from tritonconv.bench.session import Job, Session
from tritonconv.bench.tune import case_compilations
from tritonconv.measure import check, clock
from tritonconv.measure.ahead import compile_ahead
from tritonconv.measure.clock import Timing, copies_for_cold_cache
from tritonconv.measure.progress import track
from tritonconv.measure.torch_settings import set_tf32, without_tf32
from tritonconv.measure.worker import Worker, WorkerError
from tritonconv.ops.core.launch import forced, precision
from tritonconv.tuning import device_named
from tritonconv.tuning.configs import as_dict, config_name
from tritonconv.tuning.tables import Table

ROOT = Path(__file__).parents[1]
H200 = device_named("H200")
QUIET = Console(quiet=True)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would be timed")


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


# Results


def test_a_run_that_was_stopped_continues_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results.open(path, resume=False)
    first.add(dict(stage="layer", id="a", column="x", status="ok"))
    first.add(dict(stage="layer", id="b", column="x", status="stopped"))
    with path.open("a") as file:
        file.write('{"stage": "layer", "id": "c", "col')
    again = Results.open(path, resume=True)
    assert [key[:2] for key in again.done] == [("layer", "a")], "what found no time is tried again"
    again.add(dict(stage="layer", id="c", column="x", status="ok"))
    assert [r["id"] for r in read_records(path)] == ["a", "b", "c"]
    assert all(r["run"]["torch"] == torch.__version__ for r in read_records(path))


def test_results_are_not_written_over(tmp_path: Path) -> None:
    Results.open(tmp_path / "results.jsonl", resume=False)
    with pytest.raises(FileExistsError, match="--resume"):
        Results.open(tmp_path / "results.jsonl", resume=False)


@pytest.mark.parametrize("what", ["gpu", "torch", "triton", "driver", "sources"])
def test_a_run_of_another_version_is_not_continued(tmp_path: Path, what: str) -> None:
    path = tmp_path / "results.jsonl"
    Results.open(path, resume=False).add(dict(stage="layer", id="a", status="ok"))
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(header) | {what: "another"}), *rest]) + "\n")
    assert not Results.open(path, resume=True).done


def test_a_run_says_what_it_ran_on(tmp_path: Path) -> None:
    header = Results.open(tmp_path / "results.jsonl", resume=False).header
    assert {"gpu", "driver", "cuda", "torch", "triton", "cudnn", "commit", "date", "sources"} <= set(header)
    assert set(header["sources"]) >= {"conv_fprop", "conv_flat", "matmul"}


# Workers and sessions


def worker_raises() -> None:
    raise ValueError("three is not four")


def worker_dies() -> None:
    os._exit(7)


def worker_answers(value: int) -> dict[str, Any]:
    return dict(status="ok", value=value, pid=os.getpid(), interpreted=os.environ.get("TRITON_INTERPRET"))


def test_a_worker_that_raises_goes_on() -> None:
    with Worker() as worker:
        pid = worker.call(worker_answers, 1, timeout=60)["pid"]
        with pytest.raises(WorkerError, match=r"ValueError: three is not four \(test_bench.py, line \d+\)"):
            worker.call(worker_raises, timeout=60)
        assert worker.call(worker_answers, 2, timeout=60)["pid"] == pid


def test_a_worker_that_dies_or_hangs_is_replaced() -> None:
    with Worker({"TRITON_INTERPRET": "1"}) as worker:
        with pytest.raises(WorkerError, match="exit code 7"):
            worker.call(worker_dies, timeout=60)
        begin = time.monotonic()
        with pytest.raises(WorkerError, match="stopped after 1 s"):
            worker.call(time.sleep, 100, timeout=1)
        assert time.monotonic() - begin < 30
        found = worker.call(worker_answers, 3, timeout=60)
        assert (found["value"], found["interpreted"]) == (3, "1")


def worker_leaves_a_process() -> int:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]).pid


def test_what_a_worker_has_started_ends_with_it() -> None:
    with Worker() as worker:
        pid = worker.call(worker_leaves_a_process, timeout=60)
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        # Whoever inherits it may not have taken note of its end.
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def worker_sees_main() -> str | None:
    return getattr(sys.modules["__main__"], "__file__", None)


def test_a_worker_does_not_run_the_script_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('a script without a guard')")
    # Under pytest-xdist it has neither.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    with Worker() as worker:
        assert worker.call(worker_sees_main, timeout=60) != str(script)
    assert sys.modules["__main__"].__file__ == str(script)


def test_a_session_ends_in_time_and_says_what_it_left_out(tmp_path: Path) -> None:
    jobs = [Job(dict(stage="layer", id=str(i)), worker_answers, (i,)) for i in range(3)]
    slow = Job(dict(stage="layer", id="slow"), time.sleep, (100,))
    results = Results.open(tmp_path / "results.jsonl", resume=False)
    begin = time.monotonic()
    with Session(results, QUIET, seconds=12) as session:
        records = session.run("some", [*jobs, slow, Job(dict(stage="layer", id="late"), worker_answers, (9,))])
    assert time.monotonic() - begin < 30
    assert [r["status"] for r in records] == ["ok", "ok", "ok", "stopped"]
    assert session.left_out == 1
    # Continued, the rest is done and nothing twice.
    with Session(Results.open(results.path, resume=True), QUIET) as session:
        records = session.run("the rest", [*jobs, Job(dict(stage="layer", id="late"), worker_answers, (9,))])
    assert [r["id"] for r in records] == ["late"]


def test_progress_is_seen_where_no_bar_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are in the file as soon as they are written, and come neither seldom nor with every item."""
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr("tritonconv.bench.session.time.monotonic", lambda: float(next(now)))
    file = FlushedFile()
    seen = []
    for item in track(range(6), 6, "layers", Console(file=file)):
        seen.append((item, file.flushed.splitlines()[-1]))
    begin, later = "layers: 6", "layers: 4 of 6, 12 s"
    assert seen == [(0, begin), (1, begin), (2, begin), (3, begin), (4, later), (5, later)]
    assert file.flushed.endswith("layers: 6 of 6, 18 s\n")


class FlushedFile(io.StringIO):
    """Knows what a reader of the file would see."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


# Right or wrong


SMALL = Case("small", "conv", 1, 8, (5, 5), 8, (3, 3), (1, 1), (1, 1), (1, 1))


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """As they were: a worker sets what it likes, and here it is this very process."""
    switches: Any = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches], torch.backends.cudnn.benchmark, torch.get_num_threads()
    with torch.no_grad():
        yield
    # What torch starts with; the older switches cannot be read where the newer contradict them.
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    for switch, value in zip(switches, before[0], strict=True):
        switch.fp32_precision = value
    torch.backends.cudnn.benchmark = before[1]
    torch.set_num_threads(before[2])


@interpreted
def test_a_layer_that_is_right_is_not_timed_without_a_gpu() -> None:
    record = layers.measure_layer(SMALL, layers.OURS, None)
    assert record["status"] == "ok" and not record["timed"] and "ms" not in record
    assert record["error"] < 1e-2 and record["kernels"] == ["conv_flat_kernel"]


@interpreted
def test_a_layer_that_is_wrong_is_reported_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = registry.operations()["conv"]
    right = operation.ours

    def off_by_one_pixel(case: Case, *tensors: torch.Tensor) -> torch.Tensor:
        y = right(case, *tensors).clone()
        y[0, 3, 2, 2] += 1.0
        return y

    monkeypatch.setattr(operation, "ours", off_by_one_pixel)
    monkeypatch.setattr(layers, "time_layer", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setattr(layers, "prepare_torch", lambda: "cpu")
    record = layers.measure_layer(SMALL, layers.OURS, None)
    assert record["status"] == "wrong" and "relative error" in record["reason"] and not record["timed"]
    assert layers.check_layer(SMALL, None, True)["status"] == "wrong"


def inexact_convolutions(monkeypatch: pytest.MonkeyPatch, relative: float) -> None:
    """Torch's convolutions of low precision are off by so much, as some CPUs' are."""

    def inexact(exact: Any) -> Any:
        def conv(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y = exact(x, *args, **kwargs)
            return y if x.dtype in (torch.float32, torch.float64) else y + relative * y.norm() / y.numel() ** 0.5

        return conv

    for name in ("conv1d", "conv2d", "conv3d"):
        monkeypatch.setattr(nn.functional, name, inexact(getattr(nn.functional, name)))


@interpreted
def test_a_peer_that_is_wrong_is_reported_and_fails_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's bf16 is off by 1.4e-2 on CPUs without AVX-512, which is beyond the bound that holds for us."""
    inexact_convolutions(monkeypatch, 0.05)
    monkeypatch.setattr("tritonconv.bench.session.Worker", Here)
    identity = dict(id="3x3 of 128") | {"pass": "fprop"}
    jobs = [job for job in small_jobs("3x3 of 128") if job.identity.items() >= identity.items()]
    assert jobs
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert dry_run([], jobs, "H200", tmp_path, console=QUIET) == 0
    records = list(read_records(tmp_path / "results.jsonl"))
    assert {r["column"]: r["status"] for r in records} == {"cudnn channels_last": "wrong", "tritonconv": "ok"}
    assert "1 small layers in Triton's interpreter, not timed: 1 right, 0 wrong" in output.getvalue()
    assert "0 right, 1 wrong\n  3x3 of 128, cudnn channels_last: relative error" in output.getvalue()


def test_a_layer_of_ours_that_is_wrong_fails_a_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def small(column: str, status: str) -> Job:
        identity = dict(stage="layer", id="a", column=column)
        return Job(identity, lambda: dict(status=status), ())

    monkeypatch.setattr("tritonconv.bench.session.Worker", Here)
    jobs = [small(layers.OURS, "wrong"), small(layers.HOPPER, "failed"), small("compile", "wrong"), small("x", "failed")]
    assert dry_run([], jobs, "H200", tmp_path, console=QUIET) == 2


@interpreted
def test_a_module_is_judged_by_torchs_better_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is wrong widens no limit of ours, and is wrong itself."""
    right = networks.way

    def way(model: nn.Module, column: str) -> Any:
        function, layout = right(model, column)
        return (lambda x: function(x) * float("nan")) if column == "cudnn channels_last" else function, layout

    monkeypatch.setattr(networks, "way", way)
    monkeypatch.setattr(networks, "_prepared", {})
    for pass_ in ("inference", "training"):
        peer = networks.measure_module("conv_bn_relu", pass_, 1, "cudnn channels_last", "eager")  # type: ignore[arg-type]
        ours = networks.measure_module("conv_bn_relu", pass_, 1, "tritonconv", "eager")  # type: ignore[arg-type]
        assert (peer["status"], ours["status"]) == ("wrong", "ok") and 0 < ours["torch_error"] < 0.1


def test_numbers_of_a_timed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """TFLOP/s, GB/s and the share of the roofline follow from the median."""
    monkeypatch.setattr(layers, "time_calls", lambda *_, **__: Timing(0.5, 0.4, 0.6, 9, "graph"))
    monkeypatch.setattr(layers, "peak_memory", lambda _: 1000)
    operation = registry.operations()["conv"]
    case = next(case for case in load_cases() if case.id == "r50_l3_3x3_b1")
    tensors = operation.tensors(case, "cpu", torch.bfloat16, True)
    ceilings = {"bandwidth": 4e12, "16": 800e12}
    record = layers.time_layer(operation, case, lambda *_: None, tensors, ceilings, 0.1)  # type: ignore[arg-type, return-value]
    assert record["tflops"] == pytest.approx(2 * case.macs / 0.5e-3 / 1e12)
    assert record["gbps"] == pytest.approx(case.bytes / 0.5e-3 / 1e9)
    floor = max(2 * case.macs / 800e12, case.bytes / 4e12)
    assert record["percent"] == pytest.approx(100 * floor / 0.5e-3)
    assert record["memory"] == 1000 and record["timed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_wrong_pixel_cannot_hide(dtype: torch.dtype) -> None:
    reference = torch.randn(4, 64, 32, 32, dtype=torch.float64)
    out = reference.to(dtype).clone()
    assert check.compare(out, reference, depth=576).complaint is None
    out[1, 2, 3, 4] += 0.5
    complaint = check.compare(out, reference, depth=576).complaint
    # The norm sees it where rounding is small, the element's own bound everywhere.
    assert complaint is not None and ("relative error" in complaint or "element [1, 2, 3, 4]" in complaint)
    out[1, 2, 3, 4] = float("nan")
    assert "differ in being finite, first at [1, 2, 3, 4]" in str(check.compare(out, reference).complaint)


def test_tf32_may_round_its_operands_and_ieee_may_not() -> None:
    reference = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    rounded = (reference * (1 + 2**-12 * torch.randn(reference.shape, dtype=torch.float64))).float()
    assert check.compare(rounded, reference, tf32=True).complaint is None
    assert check.compare(rounded, reference, depth=1).complaint is not None


def test_large_results_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torch.randn(7, 3, 5, dtype=torch.float64)
    out = reference.float() * (1 + 1e-7)
    whole = check.compare(out, reference)
    monkeypatch.setattr(check, "PIECE", 2 * 3 * 5)
    pieces = check.compare(out, reference)
    assert pieces.complaint is None and pieces.error == pytest.approx(whole.error)
    reference[5, 1, 2] = 1.0
    out[5, 1, 2] = 1.0 + 6e-6
    assert "element [5, 1, 2] is" in str(check.compare(out, reference).complaint)
    out[6, 2, 4] = out[0, 0, 0] = float("inf")
    assert "2 elements differ in being finite, first at [0, 0, 0]" in str(check.compare(out, reference).complaint)


@pytest.mark.parametrize("on", [True, False])
def test_torchs_switches_of_tf32_agree(on: bool) -> None:
    """torch.compile reads the older ones, and torch raises where they contradict the newer."""
    set_tf32(on)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is on
    assert (precision(torch.float32, "conv"), precision(torch.float32, "matmul")) == (("tf32" if on else "ieee",) * 2)
    with without_tf32():
        assert precision(torch.float32, "conv") == "ieee" and not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is on


class FakeGPU:
    """A clock, streams and graphs: calls take time on it when they run, and none while they are captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.capturing, self.graph = 0.0, False, []  # type: ignore[var-annotated]
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                assert not gpu.capturing

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                gpu.now += sum(gpu.graph)

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

        @contextmanager
        def capture(_graph: Graph, stream: Stream) -> Iterator[None]:  # noqa: ARG001
            gpu.capturing = True
            yield
            gpu.capturing = False

        def sleep(cycles: int) -> None:
            gpu.now += cycles * 1e-6

        fakes = dict(
            Event=Event, CUDAGraph=Graph, Stream=Stream, graph=capture, stream=lambda _: nullcontext(), _sleep=sleep,
            current_stream=Stream,
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(clock, "can_time", lambda: True)

    def call(self, ms: float) -> None:
        if self.capturing:
            self.graph.append(ms)
        else:
            # The host is slower than the device, which a graph must not see.
            self.now += ms + 0.02


@pytest.mark.parametrize("ms, copies", [(0.003, 3), (0.04, 1), (5.0, 2)])
def test_a_graph_is_long_enough_for_the_clock(monkeypatch: pytest.MonkeyPatch, ms: float, copies: int) -> None:
    gpu = FakeGPU(monkeypatch)
    timing = clock.time_calls([lambda: gpu.call(ms)] * copies, seconds=0.001)
    assert timing.ms == pytest.approx(ms) and timing.mode == "graph" and timing.samples >= 5
    turns, rest = divmod(len(gpu.graph), copies)
    assert rest == 0 and turns == max(1, -(-1.0 // (copies * (ms + 0.02))))
    eager = clock.time_calls([lambda: gpu.call(ms)] * copies, mode="eager", seconds=0.001)
    assert eager.ms == pytest.approx(ms + 0.02)


def test_inputs_rotate_until_the_cache_is_cold() -> None:
    small, large = torch.empty(1000, device="meta"), torch.empty(10**9, device="meta")
    assert copies_for_cold_cache([small], H200.l2_bytes) == 64
    assert copies_for_cold_cache([large], H200.l2_bytes) == 1
    megabytes = torch.empty(10 * 2**20, dtype=torch.float32, device="meta")
    assert copies_for_cold_cache([megabytes], H200.l2_bytes) * 40 * 2**20 >= 3 * H200.l2_bytes


def test_nothing_is_timed_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="no GPU"):
        clock.time_calls([lambda: None])
    with pytest.raises(RuntimeError, match="--dry-run"):
        measure(load_cases(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_dies_is_no_failure_of_what_waited_behind_it() -> None:
    assert compile_ahead([], H200, QUIET) == {}
    assert compile_ahead([(str(i), functools.partial(os._exit, 3)) for i in range(3)], H200, QUIET) == {}


def test_what_is_compiled_ahead_is_what_waits() -> None:
    jobs = suites.check_jobs(H200)
    assert [what for what, _ in suites.check_compilations(jobs[-2:], H200)] == [
        f"{job.identity['id']}, {job.identity['column']}" for job in jobs[-2:]
    ]
    case = load_cases()[0]
    assert [what for what, _ in suites.layer_compilations(suites.layer_jobs([case]), H200)] == 3 * [case.id]
    names = {config_name(as_dict(launches.args[1])) for _, launches in case_compilations(case, H200)}  # type: ignore[attr-defined]
    assert len(names) > 1


# What there is to measure


def test_every_possible_config_of_every_kernel_is_checked() -> None:
    seen: dict[str, set[str]] = {}
    for case, config, channels_last in suites.check_layers(H200):
        launches = registry.operations()[case.kind].launches(case, H200, config, channels_last)
        # Others beside them may have no configs to choose from.
        taken = {registry.module_of(launch) for launch in launches if str(launch.config) == str(config)}
        assert taken
        for kernel in taken:
            seen.setdefault(kernel, set()).add(str(config))
    for operation in registry.operations().values():
        for kernel in operation.kernels:
            module = __import__(f"tritonconv.kernels.{kernel}", fromlist=["configs"])
            # A kernel may have but one.
            assert seen.get(kernel, set()) == {str(config) for config in module.configs()}, kernel


def test_jobs_have_names_of_their_own() -> None:
    jobs = suites.check_jobs(H200) + suites.layer_jobs(load_cases())
    jobs += suites.module_jobs("models") + suites.module_jobs("blocks")
    from tritonconv.bench.results import key_of

    assert len({key_of(job.identity) for job in jobs}) == len(jobs)


def test_an_operation_that_registers_itself_is_measured_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = load_cases()
    others = {kind: operation for kind, operation in registry.operations().items() if kind != "deform"}
    monkeypatch.setattr(registry, "_registered", others)
    monkeypatch.setattr(registry, "operations", lambda: registry._registered)
    before = {case.id for case in cases if registry.operation_for(case) is None}

    @registry.register
    class Deformable(type(registry.operations()["conv"])):  # type: ignore[misc]
        kind = "deform"

    assert before - {case.id for case in cases if registry.operation_for(case) is None} == {
        case.id for case in cases if case.kind == "deform"
    }
    with pytest.raises(ValueError, match="'deform' is registered already"):
        registry.register(Deformable)


def test_columns_by_word() -> None:
    assert columns_of(()) == layers.COLUMNS
    assert columns_of(("cudnn",)) == ("cudnn contiguous", "cudnn channels_last", "tritonconv")
    with pytest.raises(ValueError, match="'xla' is unknown"):
        columns_of(("xla",))


def test_the_summary_counts_wins_and_losses() -> None:
    def timed(id: str, column: str, ms: float) -> dict[str, Any]:
        return dict(stage="layer", id=id, family="f", column=column, ms=ms, timed=True, status="ok", mode="graph") | {
            "pass": "fprop"
        }

    records = [
        timed("a", "tritonconv", 1.0), timed("a", "cudnn contiguous", 3.0), timed("a", "cudnn channels_last", 2.0),
        timed("b", "tritonconv", 1.0), timed("b", "compile", 0.5), dict(stage="check", column="bf16", status="wrong"),
        timed("b", "cudnn channels_last", 0.1) | dict(status="wrong", timed=False),
    ]  # fmt: skip
    table = summary(records)
    cells = [list(column.cells) for column in table.columns]
    assert [column[1] for column in cells] == ["f", "2", "0", "1", "1", "1", "1.00x"]
    assert [column[0] for column in cells][:4] == ["checks of candidates", "0", "1", "0"]


@interpreted
@pytest.mark.parametrize("column", ["tritonconv", "cudnn channels_last", "cudnn contiguous"])
def test_a_block_is_compared_before_it_would_be_timed(column: str) -> None:
    record = networks.measure_module("conv_bn_relu", "inference", 1, column, "graph")
    # Torch's own are judged by the better one of them, which need not be close to the other.
    assert record["status"] == "ok" if column == "tritonconv" else record["status"] in ("ok", "wrong")
    assert not record["timed"] and record["provider"] == "own definition"
    assert column != "tritonconv" or 0 < record["error"] < 0.05


@interpreted
def test_what_is_timed_in_both_modes_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [job.arguments[4] for job in suites.module_jobs("blocks", ("compile",))[:2]]
    made: list[str] = []
    prepare = networks.prepare_module
    monkeypatch.setattr(networks, "_prepared", {})
    monkeypatch.setattr(networks, "prepare_module", lambda *args: (made.append(args[1]), prepare(*args))[1])
    for column in ("cudnn contiguous", "cudnn channels_last"):
        for mode in modes:
            assert not networks.measure_module("conv_bn_relu", "inference", 1, column, mode)["timed"]
    assert sorted(modes) == ["eager", "graph"] and made == ["cudnn contiguous", "cudnn channels_last"]
    assert len(networks._prepared) == 1


def test_gradients_of_modules_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    record = networks.measure_module("conv_bn_relu", "training", 1, "tritonconv", "eager")
    assert record["status"] == "ok" and 0 < record["error"] < 0.1 and record["torch_error"] > 0
    wrong = networks.gradients
    monkeypatch.setattr(networks, "gradients", lambda *a, **k: wrong(*a, **k) * (2 if a[2] == "tritonconv" else 1))
    assert networks.measure_module("conv_bn_relu", "training", 1, "tritonconv", "eager")["status"] == "wrong"


# A whole run, with a stub for the GPU's clock


class Here:
    """A worker that is this process."""

    def __init__(self, _environment: object) -> None:
        pass

    def call(self, function: Any, *args: Any, timeout: float) -> Any:  # noqa: ARG002
        try:
            return function(*args)
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        pass


@pytest.fixture
def stub_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels run in the interpreter with an H200's configs, and every call takes a millisecond."""
    monkeypatch.setenv("TRITONCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tritonconv.bench.session.Worker", Here)

    def time_calls(calls: list[Any], **_: object) -> Timing:
        calls[0]()
        return Timing(1.0, 0.9, 1.1, 9, "graph")

    for module in ("bench.layers", "bench.networks", "measure.tune"):
        monkeypatch.setattr(f"tritonconv.{module}.time_calls", time_calls)
    for module in ("layers", "networks"):
        monkeypatch.setattr(f"tritonconv.bench.{module}.can_time", lambda: True)
        monkeypatch.setattr(f"tritonconv.bench.{module}.prepare_torch", lambda: "cpu")
        monkeypatch.setattr(f"tritonconv.bench.{module}.peak_memory", lambda _: 1000)
        monkeypatch.setattr(f"tritonconv.bench.{module}.copies_for_cold_cache", lambda *_, **__: 2)
    monkeypatch.setattr("tritonconv.bench.tune.prepare_torch", lambda: "cpu")
    monkeypatch.setattr("tritonconv.measure.tune.copies_for_cold_cache", lambda *_: 1)
    monkeypatch.setattr("tritonconv.bench.run.can_time", lambda: True)
    monkeypatch.setattr("tritonconv.bench.run.this_device", lambda: H200)
    monkeypatch.setattr("tritonconv.bench.run.compile_ahead", lambda *_, **__: {})
    ceilings = {"bandwidth": 4e12, "16": 8e14, "tf32": 4e14, "fp32": 6e13, "fp64": 6e13}
    monkeypatch.setattr("tritonconv.bench.run.measure_ceilings", lambda: ceilings)
    checks = suites.check_jobs(H200)
    monkeypatch.setattr("tritonconv.bench.run.check_jobs", lambda _: checks[:3])
    blocks = [
        job for job in suites.module_jobs("blocks")
        if job.identity["id"] == "conv_bn_relu" and job.identity["batch"] == 256 and job.identity["mode"] == "eager"
    ]  # fmt: skip
    monkeypatch.setattr(
        "tritonconv.bench.run.module_jobs",
        lambda suite, columns: [j for j in blocks if suite == "blocks" and j.identity["column"] in columns],
    )
    # A block of few channels.
    block = replace(networks.MODULES["conv_bn_relu"], make=lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()), input=(8, 4, 4))  # fmt: skip
    monkeypatch.setitem(networks.MODULES, "conv_bn_relu", block)
    images = networks.ModuleCase.images
    monkeypatch.setattr("tritonconv.bench.modules.ModuleCase.images", lambda case, n, **kw: images(case, min(n, 2), **kw))
    with forced(device=H200):
        yield


@interpreted
@pytest.mark.usefixtures("stub_gpu")
def test_a_run_does_its_stages_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [replace(SMALL, family="f"), replace(SMALL, id="imagined", kind="imagined", family="f")]
    columns = columns_of(("cudnn",))
    assert measure(cases, tmp_path / "out", columns=columns, console=QUIET) == 0
    records = list(read_records(tmp_path / "out" / "results.jsonl"))
    count = {stage: sum(r["stage"] == stage for r in records) for stage in ("ceilings", "check", "layer", "tune", "module")}
    checks = 3 + len(sanitize_jobs())
    assert count == {"ceilings": 1, "check": checks, "layer": 3 * 4 + 1, "tune": 1, "module": 6}
    layers_ = {r["column"]: r for r in records if r["stage"] == "layer" and r["id"] == "small" and r["pass"] == "wgrad"}
    # Asked for as well, since the GPU says that it is an H200; but the interpreter runs no such kernel.
    assert layers_.pop(layers.HOPPER)["status"] == "skipped"
    assert layers_[layers.OURS]["timed"] and len(layers_) == 3
    (tuned,) = (r for r in records if r["stage"] == "tune")
    assert tuned["status"] == "ok" and tuned["candidates"] > 1 and tuned["ms"] == 1.0 == tuned["peer_ms"]
    table = Table.from_json((tmp_path / "out" / "table.json").read_text(), "table.json")
    assert table.gpu == "NVIDIA H200" and [e.ms for e in table.entries.values()] == [1.0]
    modules = [r for r in records if r["stage"] == "module"]
    assert all(r["timed"] or is_peer(r) for r in modules), modules
    assert "checks of candidates" in capsys.readouterr().out
    # Continued, nothing is done twice.
    measure(cases, tmp_path / "out", columns=columns, resume=True, console=QUIET)
    again = [r for r in read_records(tmp_path / "out" / "results.jsonl") if r["status"] != "not built"]
    assert len(again) == len([r for r in records if r["status"] != "not built"])


# Without a GPU


def test_a_layer_that_cannot_be_compiled_fails_and_says_why() -> None:
    case = replace(SMALL, id="odd", macs=1)
    (record,) = dry_records([case], "NVIDIA H200", QUIET)
    assert record["status"] == "failed" and "expected 1 and 0" in record["reason"]
    assert verdict([record]) == "1 cases: 0 ok, 0 not built, 1 failed"


@pytest.mark.codegen
@every(only=[""] if TEST_ALL else ["stem"])
def test_a_dry_run_goes_through_its_cases_and_its_results_make_a_page(tmp_path: Path, only: str) -> None:
    """Through all of them, or through those of a name."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path), "--only", only]
    done = subprocess.run(command, cwd=ROOT, env=without_interpreter(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    cases = [case for case in load_cases() if only in case.id or only in case.family]
    assert only or len(cases) == 98
    missing = sum(registry.operation_for(case) is None for case in cases)
    assert lines[-1] == f"{len(cases)} cases: {len(cases) - missing} ok, {missing} not built, 0 failed"
    assert "Predictions of the cost model for NVIDIA H200; no time was measured." in done.stdout
    results = tmp_path / "results.jsonl"
    records = list(read_records(results))
    checks = [(operation, case) for operation in registry.operations().values() for case in operation.checks()]
    small = sum(len(operation.passes) for operation, case in checks if only in case.id or only in "small")
    columns = {ours: [r for r in records if r["stage"] == "layer" and is_peer(r) is not ours] for ours in (True, False)}
    assert len(columns[True]) == len(columns[False]) == small
    assert all(r["status"] == "ok" for r in columns[True]), "of torch's kernels nothing is demanded"
    page = tmp_path / "page.md"
    report = [sys.executable, "-m", "benchmarks.report", str(results), "--out", str(page)]
    subprocess.run(report, cwd=ROOT, check=True, capture_output=True)
    assert "No time was measured" in page.read_text() and cases[0].id in page.read_text()


LAYERS_AHEAD = ("3x3 of 128", "stem 5x5 stride 2", "1x1 of 72")
AHEAD = """
import functools, sys
from pathlib import Path
import torch, triton
from rich.console import Console
from tritonconv.measure.ahead import compile_ahead
from tritonconv.measure.offline import IdleDriver
from tritonconv.bench.registry import case_launches, operations
from tritonconv.ops.core.launch import captured, forced
from tritonconv.ops.core.launch import forced
from tritonconv.tuning import device_named
from tritonconv.tuning.tables import Table
if __name__ == "__main__":
    device, operation = device_named("H200"), operations()["conv"]
    cases = [case for case in operation.checks() if case.id in sys.argv[2:]]
    tasks = [(case.id, functools.partial(case_launches, case, None, cl, device)) for case in cases for cl in (True, False)]
    assert not compile_ahead(tasks, device, Console(quiet=True))
    cache = Path(sys.argv[1])
    compiled = sorted(cache.iterdir())
    # What a process with the GPU does, but for the driver: real tensors, Triton's own launcher.
    triton.runtime.driver.set_active(IdleDriver(device, 0))
    for case in cases:
        for channels_last in (True, False):
            tensors = operation.tensors(case, "cpu", torch.bfloat16, channels_last)
            with torch.no_grad(), captured(device) as launches:
                operation.ours(case, *tensors)
            for launch in launches:
                launch.kernel[(launch.programs,)](*launch.arguments.values(), **launch.options)
    assert sorted(cache.iterdir()) == compiled, "the JIT compiled again"
    print(len(compiled))
"""


@pytest.mark.codegen
@every(names=[LAYERS_AHEAD] if TEST_ALL else [LAYERS_AHEAD[-1:]])
def test_the_jit_finds_what_was_compiled_ahead(tmp_path: Path, names: tuple[str, ...]) -> None:
    script = tmp_path / "script.py"
    script.write_text(AHEAD)
    cache = tmp_path / "cache"
    environment = without_interpreter() | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, script, cache, *names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 2 * len(names)
