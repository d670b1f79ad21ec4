"""`fuse` as a graph pass: the four ways to use it find the same chains, in forwards as people write them."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import named, rotate
from models import CASES, Case, build, randomize
from test_convert import assert_as_good, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import tritonconv
from tritonconv.graph.fuse import fuse_graph
from tritonconv.graph.nodes import call_of
from tritonconv.ops.core.launch import record_launches

RESNET = named(CASES, "resnet")


def by_backend(model: nn.Module, _x: Tensor) -> Callable[..., Tensor]:
    return torch.compile(model, backend="tritonconv")


def by_other_backend(model: nn.Module, _x: Tensor) -> Callable[..., Tensor]:
    return torch.compile(tritonconv.convert(model), backend="aot_eager")


def by_export(model: nn.Module, x: Tensor) -> Callable[..., Tensor]:
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
    return tritonconv.fuse(program).module()


WAYS = [by_backend, by_other_backend, by_export]


@rotate(case=[case for case in CASES if case.name != "untraceable"], way=WAYS)
def test_every_way_fuses_the_same_chains(case: Case, way: Callable[..., Any]) -> None:
    model, x = build(case)
    torch._dynamo.reset()
    y, launches = run(way(model, x), x)
    assert_as_good(y, model, x)
    # Operators of a compiler are not joined: an average is a launch instead of a second stage.
    assert launches == case.launches
    assert y.stride() == model(x).stride()


def test_inductor_fuses_models_that_are_not_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.SiLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    torch._dynamo.reset()
    with tritonconv.enable_inductor():
        y, launches = run(torch.compile(model), x)
    assert_as_good(y, model, x)
    assert launches == 2
    torch._dynamo.reset()
    assert run(torch.compile(model), x)[1] == 0


def test_exported_programs_are_fused_for_any_batch_and_after_decomposition() -> None:
    model, x = build(RESNET)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for given in (program, program.run_decompositions()):
        fused = tritonconv.fuse(given)
        targets = [str(node.target) for node in fused.graph.nodes]
        assert not any("batch_norm" in target or "relu" in target for target in targets)
        more = torch.randn(5, *x.shape[1:])
        assert_as_good(run(fused.module(), more)[0], model, more)
        # The program that was given is as it was.
        assert any("batch_norm" in str(node.target) for node in given.graph.nodes)


def test_what_fuse_takes() -> None:
    with pytest.raises(TypeError, match="must be a GraphModule or ExportedProgram, not Conv2d"):
        tritonconv.fuse(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="no example values"):
        tritonconv.fuse(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1))))


def test_a_graph_that_cannot_be_rewritten_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonconv.graph import fuse

    def settle_formats(_graph: torch.fx.Graph) -> int:
        raise KeyError("format")

    monkeypatch.setattr(fuse, "settle_formats", settle_formats)
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    with pytest.warns(UserWarning, match="a graph runs without fusion: KeyError: 'format'"):
        y, launches = run(converted, x)
    assert_as_good(y, model, x)
    assert launches > RESNET.launches


def test_a_call_that_fails_leaves_the_next_one_fused(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 4 channels"):
            converted(torch.randn(1, 4, 8, 8))
        y, launches = run(converted, x)
        assert_as_good(y, model, x)
        assert launches == RESNET.launches
    assert "WON'T CONVERT" not in capfd.readouterr().err


# Layers as model libraries write them.


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        average = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        own = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own, average, self.eps)
        return self.act(self.drop(x))


class Same(nn.Conv2d):
    """Padding as TensorFlow's."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max((-(size // -s) - 1) * s + k - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Weight standardization."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Block(nn.Module):
    """A forward with an argument that may be missing, and questions about its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if isinstance(x, list):
            x = torch.cat(x, 1)
        if x.ndim != 4 or x.shape[1] != self.conv.in_channels:
            raise ValueError("expected images")
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        y = self.bn(self.conv(x))
        return self.act(y) if skip is None else self.act(y + skip)


class Walked(nn.Module):
    """A parent that walks over its layers, and saves some results, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Block(), nn.Conv2d(8, 4, 1), Block(), nn.Conv2d(8, 8, 1))
        self.save = {0}

    def forward(self, x: Tensor) -> Tensor:
        saved: list[Tensor | None] = []
        for i, layer in enumerate(self.model):
            x = layer(x) if i < 3 else layer(x + saved[0])
            saved.append(x if i in self.save else None)
        return x


class Mixer(nn.Module):
    """A short causal convolution as a function, between products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 1, 3) / 2), nn.Parameter(torch.randn(8))
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).transpose(1, 2)
        y = F.silu(F.conv1d(y, self.weight, self.bias, padding=2, groups=8)[..., : x.shape[1]])
        return self.outer(y.transpose(1, 2))


class Cached(nn.Module):
    """A causal 3-d convolution with the frames before, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if cache is None else torch.cat([cache, x], 2)
        return F.relu(self.conv(x))


def with_norm(conv: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(conv, norm or nn.BatchNorm2d(8), nn.ReLU())


def normalized(how: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: with_norm(how(nn.Conv2d(4, 8, 3)))


IMAGES = (2, 4, 6, 6)
# (model, input, launches in eval mode)
LINKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "norm and activation in one class": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), NormAct(8)), IMAGES, 1),
    "same padding": (lambda: with_norm(Same(4, 8, 3, 2)), (2, 4, 7, 7), 1),
    "standardized weights": (lambda: with_norm(Standardized(4, 8, 3)), IMAGES, 4),
    "questions about the input": (Block, (2, 4, 5, 5), 1),
    "a parent that walks": (Walked, IMAGES, 4),
    "a functional mixer": (Mixer, (2, 5, 6), 3),
    "a causal volume": (Cached, (1, 2, 3, 4, 4), 1),
    "weight norm": (normalized(parametrizations.weight_norm), IMAGES, 1),
    "weight norm by a hook": (normalized(nn.utils.weight_norm), IMAGES, 1),
    "spectral norm": (normalized(parametrizations.spectral_norm), IMAGES, 1),
    "spectral norm by a hook": (normalized(nn.utils.spectral_norm), IMAGES, 1),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LINKS)
def test_links_of_real_models_are_fused(name: str) -> None:
    make, shape, expected = LINKS[name]
    models = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models.append(randomize(make()))
    x, model = torch.randn(shape), models[0]
    # Weights that hooks compute cannot be copied.
    converted = tritonconv.convert(models[1], inplace=True)
    y, launches = run(converted, x)
    torch.testing.assert_close(y, run(model, x)[0], rtol=1e-4, atol=1e-5, check_stride=True)
    assert launches == expected
    if name != "standardized weights":
        assert all(
            row["backend"] == "triton" for row in tritonconv.explain(converted, x).to_dict()["layers"] if row["macs"]
        )
    # And one step of training.
    results = []
    for each in (model.train(), converted.train()):
        each.zero_grad()
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in each.parameters())))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_optional_arguments_have_graphs_of_their_own() -> None:
    model = randomize(Block())
    converted = tritonconv.convert(model)
    x, skip = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 6, 6)
    for args in ((x,), (x, skip), (x, None), ([x[:, :1], x[:, 1:]],)):
        with torch.no_grad(), record_launches() as launches:
            torch.testing.assert_close(converted(*args), model(*args), rtol=1e-4, atol=1e-5)
        assert len(launches) == 1


# Traces: how many, and whose.


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What became of each graph that was fused."""
    from tritonconv.graph import dynamo

    found: list[Any] = []

    def noted(module: torch.fx.GraphModule, backend: Any = None) -> Any:
        found.append(fuse_graph(module, backend))
        return found[-1]

    monkeypatch.setattr(dynamo, "fuse_graph", noted)
    return found


def test_many_sequentials_have_limits_of_their_own(traces: list[Any]) -> None:
    x = torch.randn(1, 2, 2, 2)
    models = [tritonconv.convert(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), backend="torch") for _ in range(300)]
    with torch.no_grad():
        for model in models * 2:
            model(x)
    assert [graph.chains for graph in traces] == [1] * 300


def test_twenty_sizes_take_at_most_three_traces(traces: list[Any]) -> None:
    model, _ = build(RESNET)
    converted = tritonconv.convert(model)
    for size in range(8, 28):
        x = torch.randn(1 + size % 3, 3, size, size + 1)
        y, launches = run(converted, x)
        assert_as_good(y, model, x)
        assert launches == RESNET.launches
    assert len(traces) <= 3


def test_modes_and_types_alternate(traces: list[Any]) -> None:
    model = randomize(with_norm(nn.Conv2d(4, 8, 3)))
    converted, x = tritonconv.convert(model), torch.randn(2, 4, 6, 6)
    for _ in range(2):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for grad in (False, True):
                converted.to(dtype)
                with torch.set_grad_enabled(grad), record_launches() as launches:
                    converted(x.to(dtype))
                # With gradients the fixed statistics are applied by a launch after the convolution.
                assert len(launches) <= 2 and "batch_norm_statistics_kernel" not in launches
        converted.float()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), record_launches() as launches:
            assert converted(x).dtype == torch.bfloat16
        assert len(launches) == 1
    assert len(traces) <= 8


def test_the_backend_may_be_changed_after_tracing() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    assert run(converted, x)[1] == RESNET.launches
    with tritonconv.set_backend("torch"):
        assert run(converted, x)[1] == 0
    assert run(converted, x)[1] == RESNET.launches


def test_threads_may_call_first_at_once() -> None:
    model, x = build(RESNET)
    converted, found = tritonconv.convert(model), []

    def call() -> None:
        with torch.no_grad():
            found.append(converted(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for y in found:
        assert_as_good(y, model, x)


def test_a_model_that_is_deleted_leaves_no_memory() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    run(converted, x)
    weight = weakref.ref(converted.conv1.weight)
    del converted
    gc.collect()
    assert weight() is None


def test_without_dynamo_layers_run_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    y, launches = run(converted, x)
    assert_as_good(y, model, x)
    assert launches > RESNET.launches - 2
    report = tritonconv.explain(converted, x).to_dict()
    assert report["fusion"][0]["how"] == "not traced" and "TORCHDYNAMO_DISABLE" in report["fusion"][0]["reason"]


def test_layers_and_unfused_models_import_no_dynamo() -> None:
    code = (
        "import sys, torch, tritonconv\n"
        "model = tritonconv.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), fuse=False)\n"
        "model(torch.ones(1, 3, 5, 5)), tritonconv.nn.Conv2d(3, 4, 3)(torch.ones(1, 3, 5, 5))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    # Triton's interpreter imports it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# Regions that are computed again in the backward pass.


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)).square()


def test_checkpointed_regions_draw_the_same_numbers_again() -> None:
    model = Checkpointed().train()
    converted = tritonconv.convert(copy.deepcopy(model))
    # Numbers are drawn in the order of memory, which is that of channels-last weights.
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    results = []
    for each in (model, converted):
        torch.manual_seed(3)
        leaf, sizes = x.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=sizes: (into.append(t.numel()), t)[1], lambda t: t):
            y = each(leaf)
        y.sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in each.parameters())))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_modes_in_the_middle_of_a_forward_are_kept_apart() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x)
            y = torch.relu(y)
            z = self.b(y)
            with torch.autocast("cpu", torch.bfloat16):
                return self.bn(z), self.b(torch.relu(z))

    model = randomize(Frozen())
    converted, x = tritonconv.convert(model), torch.randn(2, 4, 5, 5)
    ours, theirs = converted(x), model(x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    ours[0].sum().backward()
    assert converted.a.weight.grad is None and converted.b.weight.grad is not None


class Breaks(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


def test_a_trace_that_fails_leaves_operators_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonconv.graph import dynamo

    traced = []

    def fail(module: torch.fx.GraphModule, _: Any = None) -> None:
        traced.append(module)
        if any(call_of(node) for node in module.graph.nodes):
            raise NotImplementedError

    monkeypatch.setattr(dynamo, "fuse_or_warn", fail)
    model = Breaks()
    converted, x = tritonconv.convert(model), torch.randn(2, 4)
    with record_launches() as launches:
        y = converted(x)
    assert len(launches) == 2
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    # Nothing that only an operator or a launcher computes.
    assert all(any(call_of(node) for node in module.graph.nodes) for module in traced)


def test_warnings_of_dynamos_are_none_of_the_models(traces: list[Any]) -> None:
    converted = tritonconv.convert(Breaks().train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(torch.randn(2, 4)), converted(torch.randn(2, 4))
    # The value between the two needs a gradient, and Dynamo asks for its `grad`.
    assert len(traces) == 2
