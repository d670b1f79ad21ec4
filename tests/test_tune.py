"""Tuning and its effect: what is measured decides configs and backends of later calls, and explain tells.

Kernels run in the interpreter with the configs of an H200, and the clock is a table of times.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tritonconv
from tritonconv.measure import tune as tune_module
from tritonconv.measure.clock import Timing
from tritonconv.ops.core.backend import current_backend
from tritonconv.ops.core.launch import captured, forced, record_launches, state
from tritonconv.ops.core.observe import Example
from tritonconv.ops.core.signature import clear_caches
from tritonconv.tuning import choose, device_named
from tritonconv.tuning.cache import cached_table, forget
from tritonconv.tuning.configs import as_dict, config_name
from tritonconv.tuning.tables import Table

H200 = device_named("H200")
BEST = "64x32x32 w4 s2"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the clock is a stub, and kernels run interpreted")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITONCONV_CACHE_DIR", str(tmp_path))
    reset()
    yield tmp_path
    reset()


def reset() -> None:
    forget()
    choose.cache_clear()
    clear_caches()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the milliseconds of our configs by their name, and of torch."""

    def set_times(ours: dict[str, float], torch_ms: float) -> None:
        def time_calls(calls: list[Callable[[], object]], **_: object) -> Timing:
            # The call must work as it would be timed.
            calls[0]()
            config = state.forced and state.forced.config
            ms = torch_ms if not config else ours.get(config_name(as_dict(config)), 1.0)
            return Timing(ms, ms, ms, 9, "graph")

        monkeypatch.setattr(tune_module, "time_calls", time_calls)

    return set_times


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(24, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU()).eval()
    return tritonconv.convert(model.half())


def image(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 24, 8, 8).half().to(memory_format=torch.channels_last)


def row(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Any]:
    with forced(device=H200):
        found: dict[str, Any] = tritonconv.explain(model, x).to_dict()["layers"][0]
    return found


def chosen(model: torch.nn.Module, x: torch.Tensor) -> str:
    with torch.no_grad(), captured(H200) as launches, tritonconv.set_backend("triton"):
        model(x)
    return config_name(as_dict(launches[0].config))


def test_without_a_measurement_ours_runs_and_says_so() -> None:
    found = row(make_model(), image())
    assert found["backend"] == "triton"
    assert found["reason"] == "conv_flat, not measured, fused"


def test_what_was_the_fastest_is_chosen_from_then_on(clock: Callable[..., None], folder: Path) -> None:
    clock({BEST: 0.1}, torch_ms=0.2)
    model, x = make_model(), image()
    assert chosen(model, x) != BEST
    with forced(device=H200):
        report = tritonconv.tune(model, x)
    assert [layer.entry and layer.entry.ms for layer in report.layers] == [0.1]
    assert report.layers[0].before_ms == 1.0 and not report.layers[0].wrong
    assert BEST in str(report) and str(folder) in str(report)
    assert chosen(model, x) == BEST
    found = row(model, x)
    assert found["backend"] == "triton"
    assert found["reason"] == "conv_flat, 0.1000 ms, torch 0.2000 ms, fused"
    # A process that starts anew finds it; here all that remembers is emptied.
    reset()
    assert chosen(model, x) == BEST
    assert chosen(model, image(batch=3)) == BEST, "three times as many pixels are near enough for a config"


def test_torch_takes_what_it_was_faster_at(clock: Callable[..., None]) -> None:
    clock({BEST: 0.1}, torch_ms=0.05)
    model, x = make_model(), image()
    with forced(device=H200):
        tritonconv.tune(model, x)
        with torch.no_grad(), record_launches() as launches, warnings.catch_warnings():
            # That is no fallback: nothing is missing.
            warnings.simplefilter("error")
            y = model(x)
        assert not launches
    torch.testing.assert_close(y, tritonconv.revert(model)(x), rtol=1e-3, atol=1e-3)
    model = make_model()
    found = row(model, x)
    assert found["backend"] == "torch"
    assert found["reason"].startswith("torch was faster: 0.0500 ms, conv_flat 0.1000 ms")
    with tritonconv.set_backend("triton"):
        assert row(model, x)["backend"] == "triton", "who asks for Triton gets it"
    assert row(model, image(batch=3))["backend"] == "triton", "another layer was not measured"


def test_the_layer_alone_was_not_measured(clock: Callable[..., None]) -> None:
    clock({}, torch_ms=0.05)
    model, x = make_model(), image()
    with forced(device=H200):
        tritonconv.tune(model, x)
    with forced(device=H200), torch.no_grad(), record_launches() as launches:
        tritonconv.functional.conv2d(x, model[0].weight, padding=1)
    assert launches == ["conv_flat_kernel"], "without batch norm and ReLU torch may be slower or faster than it was"


def test_a_candidate_that_is_wrong_is_never_timed(clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    clock({BEST: 0.1}, torch_ms=0.2)
    right = Example.run

    def wrong(example: Example) -> Any:
        y = right(example)
        config = state.forced and state.forced.config
        return y + 1 if config and config_name(as_dict(config)) == BEST else y

    monkeypatch.setattr(Example, "run", wrong)
    with forced(device=H200):
        report = tritonconv.tune(make_model(), image())
    (layer,) = report.layers
    assert layer.entry is not None and config_name(layer.entry.config) != BEST
    assert len(layer.wrong) == 1 and "relative error" in layer.wrong[0]


def test_whatever_a_candidate_raises_is_reported(clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    clock({}, torch_ms=2.0)
    run = Example.run

    def failing(example: Example) -> Any:
        config = state.forced and state.forced.config
        if config and config_name(as_dict(config)) == BEST:
            raise OutOfResources(300000, 232448, "shared memory")
        return run(example)

    monkeypatch.setattr(Example, "run", failing)
    with forced(device=H200):
        (layer,) = tritonconv.tune(make_model(), image()).layers
    assert layer.entry is not None
    assert ["OutOfResources" in complaint for complaint in layer.wrong] == [True]


class Noisy(torch.nn.Module):
    """Draws random numbers and counts its calls."""

    def __init__(self, error: type[Exception] | None) -> None:
        super().__init__()
        self.conv, self.bn, self.error = torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8), error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = torch.dropout(self.bn(self.conv(x)), 0.5, True)
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("error", [None, KeyError])
def test_all_is_as_it_was_afterwards(error: type[Exception] | None, clock: Callable[..., None]) -> None:
    clock({}, torch_ms=2.0)
    model = tritonconv.convert(Noisy(error).train())
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with forced(device=H200), tritonconv.set_backend("torch"), contextlib.suppress(KeyError):
        tritonconv.tune(model, torch.randn(1, 8, 4, 4, generator=torch.Generator()))
        assert current_backend() == "torch"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled() and model.training


def test_what_is_measured_lies_as_the_models_tensors_do(
    clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock({}, torch_ms=2.0)
    seen = set()
    time_calls = tune_module.time_calls

    def look(calls: list[Any], **more: Any) -> Timing:
        seen.update(call.__self__.tensors[0].stride() for call in calls)
        return time_calls(calls, **more)

    monkeypatch.setattr(tune_module, "time_calls", look)
    monkeypatch.setattr(tune_module, "copies_for_cold_cache", lambda *_: 3)
    x = torch.randn(1, 48, 8, 8).half().to(memory_format=torch.channels_last)[:, :24]
    with forced(device=H200):
        tritonconv.tune(make_model(), x)
    assert seen == {x.stride()}


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_measured(
    clock: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock({}, torch_ms=2.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITONCONV_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(tune_module, "tune_example", None)
    with forced(device=H200), pytest.raises(FileExistsError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tritonconv.tune(make_model(), image())


def test_nothing_to_tune_writes_nothing(folder: Path) -> None:
    for model, x, reasons in (
        (torch.nn.ReLU(), image(), []),
        (make_model(), image(0), ["it has no elements"]),
    ):
        with forced(device=H200):
            report = tritonconv.tune(model, x)
        assert not report.layers and [reason.rpartition(": ")[2] for reason in report.skipped] == reasons
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "layer, op, elements",
    [
        (tritonconv.nn.MaxPool2d(2), "max_pool2d", True),
        (tritonconv.nn.AdaptiveAvgPool2d(1), "adaptive_avg_pool2d", True),
        (tritonconv.nn.Upsample(scale_factor=2), "interpolate", True),
        (tritonconv.nn.BatchNorm2d(3).eval(), "batch_norm", True),
        (tritonconv.nn.CausalConv1d(3, 3, 4, groups=3), "causal_conv1d of conv1d", True),
        (tritonconv.nn.Conv2d(3, 3, 3), "conv2d of conv2d", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_tuned_is_called_by_its_name(layer: torch.nn.Module, op: str, elements: bool) -> None:
    x = torch.randn(2, 3, 8) if op.startswith("causal") else torch.randn(2 if elements else 0, 3, 8, 8)
    with forced(device=H200):
        (skipped,) = tritonconv.tune(layer, x).skipped
    assert skipped.startswith(op) and "None" not in skipped
    assert skipped.endswith("a rule chooses its config, and no measurement would change it" if elements else "no elements")


@pytest.mark.filterwarnings("ignore:tritonconv")
def test_gradients_go_their_way_whatever_was_measured(clock: Callable[..., None]) -> None:
    clock({}, torch_ms=0.001)
    conv, x = tritonconv.nn.Conv2d(8, 8, 3), torch.randn(1, 8, 6, 6)
    with forced(device=H200):
        tritonconv.tune(conv, x)
        for _ in range(2):
            with torch.no_grad():
                assert not conv(x).requires_grad
            conv.weight.grad = None
            conv(x).sum().backward()
            expected = torch.autograd.grad(torch.nn.functional.conv2d(x, conv.weight, conv.bias).sum(), conv.weight)[0]
            assert torch.allclose(conv.weight.grad, expected, atol=1e-5)


def test_equal_layers_are_measured_once(clock: Callable[..., None]) -> None:
    clock({}, torch_ms=0.2)
    model = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)), torch.nn.Conv2d(8, 8, 1)).half()
    with forced(device=H200):
        report = tritonconv.tune(tritonconv.convert(model.eval()), torch.randn(1, 8, 6, 6).half())
    assert len(report.layers) == 3, "the first gets a contiguous image, three are alike, one is 1x1"


def test_linear_layers_and_residuals_are_measured(clock: Callable[..., None]) -> None:
    clock({}, torch_ms=0.2)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
            self.linear = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.conv(x) + x)
            return self.linear(y.mean((2, 3)))

    with forced(device=H200):
        report = tritonconv.tune(tritonconv.convert(Model().eval()), torch.randn(2, 8, 6, 6))
    assert [layer.conditions for layer in report.layers] == ["bias+residual+relu+2 hidden copies", "bias"]
    assert all(layer.entry is not None for layer in report.layers)


def test_a_table_can_be_exported(clock: Callable[..., None], tmp_path: Path) -> None:
    clock({BEST: 0.1}, torch_ms=0.2)
    path = tmp_path / "exported.json"
    with forced(device=H200):
        tritonconv.tune(make_model(), image(), export=path)
    table, kept = Table.from_json(path.read_text(), str(path)), cached_table(H200.name)
    assert kept is not None and table.entries == kept.entries and table.gpu == "NVIDIA H200"


def test_depthwise_layers_are_measured_as_others_are(clock: Callable[..., None]) -> None:
    model = tritonconv.convert(torch.nn.Conv2d(16, 16, 3, padding=1, groups=16).half().eval())
    x = torch.randn(1, 16, 8, 8).half()
    found = row(model, x)
    assert found["backend"] == "triton" and found["reason"] == "depthwise, not measured"
    clock({}, torch_ms=0.001)
    with forced(device=H200):
        tritonconv.tune(model, x)
    assert row(model, x)["backend"] == "torch", "it was faster"


def test_the_interpreter_runs_everything() -> None:
    model = tritonconv.convert(torch.nn.Conv2d(16, 16, 3, padding=1, groups=16).eval())
    assert tritonconv.explain(model, torch.randn(1, 16, 8, 8)).to_dict()["layers"][0]["reason"] == "depthwise"


def test_tune_needs_a_module_and_a_clock() -> None:
    with pytest.raises(TypeError, match=r"tune\(\): argument 'model' must be torch.nn.Module, not str"):
        tritonconv.tune("model")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        tritonconv.tune(make_model(), image())
