"""Which chains are fused, which must not be, and that hooks see what they saw before."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from matrix import named, rotate
from models import CASES, Gate, ResNet, build, randomize
from test_convert import RESNET, assert_as_good, run
from torch import Tensor, nn
from torch.nn import functional as F

import tritonconv
from tritonconv.convert.forward import FusedForward


class Net(nn.Module):
    """Two convolutions, a batch norm and modules in place; the forward is the case's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(6, 6)
        self.valid = nn.Conv2d(8, 8, 6)


def make(body: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(type("Net", (Net,), {"forward": lambda self, x: body(self, x)})())


def fused(model: nn.Module, *inputs: Any) -> int:
    """Chains that a call of the model runs as one call each."""
    return sum(bool(row["fused"]) for row in tritonconv.explain(model, *inputs).to_dict()["layers"])


def members(model: nn.Module, x: Tensor) -> list[list[str]]:
    """The other members of every fused row, in order."""
    return [row["fused"] for row in tritonconv.explain(model, x).to_dict()["layers"] if row["fused"]]


ACTIVATIONS = {
    "relu": torch.relu, "F.relu": F.relu, "in place": lambda x: F.relu(x, inplace=True),
    "by position": lambda x: F.relu(x, True),
    "torch.relu_": torch.relu_, "F.relu_": F.relu_, "method": lambda x: x.relu(), "method_": lambda x: x.relu_(),
    "by keyword": lambda x: F.relu(input=x), "sigmoid": torch.sigmoid, "x.sigmoid": lambda x: x.sigmoid(),
    "tanh": torch.tanh, "x.tanh_": lambda x: x.tanh_(), "F.tanh": F.tanh, "F.sigmoid": F.sigmoid, "silu": F.silu,
    "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "relu6": F.relu6, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "mish": F.mish, "softplus": lambda x: F.softplus(x, 2.0, 10.0),
    "leaky": lambda x: F.leaky_relu(x, 0.3), "leaky_": lambda x: F.leaky_relu_(x, negative_slope=0.3),
    "elu": lambda x: F.elu(x, alpha=0.7), "hardtanh": lambda x: F.hardtanh(x, -0.2, 0.4),
    "clamp": lambda x: torch.clamp(x, -0.2, 0.4), "x.clamp": lambda x: x.clamp(min=-0.2, max=0.4),
    "x.clamp_": lambda x: x.clamp_(0, 6), "clip": lambda x: torch.clip(x, -1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_every_form_are_fused(name: str) -> None:
    model = make(lambda net, x: ACTIVATIONS[name](net.bn(net.conv(x))))
    x = torch.randn(2, 8, 6, 6)
    converted = tritonconv.convert(model)
    y, launches = run(converted, x)
    assert_as_good(y, model, x)
    assert launches == 1
    assert len(members(converted, x)[0]) == 2


# Nothing that a kernel computes: other arguments, other functions, limits that are no numbers.
@pytest.mark.parametrize("activation", [
    lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 1.0, -1.0), lambda x: torch.clamp(x, x.mean(), x.max()), F.selu,
    lambda x: F.threshold(x, 0.1, 20.0), lambda x: F.leaky_relu(x, x.mean().item() if False else 0.1).abs(), F.softsign,
    lambda x: F.softmax(x, 1), lambda x: F.dropout(x, 0.5, False),
])  # fmt: skip
def test_what_is_no_activation_of_ours_is_left(activation: Callable[[Tensor], Tensor]) -> None:
    model = make(lambda net, x: activation(net.bn(net.conv(x))))
    x = torch.randn(2, 8, 6, 6)
    assert_as_good(run(tritonconv.convert(model), x)[0], model, x)


@dataclass(frozen=True)
class Graph:
    """A forward, and the members beside the convolution of every chain that it may make, in order of execution."""

    name: str
    body: Callable[[Net, Tensor], Tensor]
    chains: tuple[tuple[str, ...], ...]


def _pre_activation(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = torch.relu_(x)
    return y + z


def _written_view(net: Net, x: Tensor) -> Tensor:
    t = net.other(x)
    y = net.conv(t)
    t.transpose(0, 1).mul_(2)
    return torch.relu(y) + t


def _identity_changed_by_its_sum(net: Net, x: Tensor) -> Tensor:
    identity = net.other(x)
    same = identity
    identity += net.bn(net.conv(x))
    return F.relu(identity) + same


def _alias_of_a_sum_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    alias = y
    y += x
    return alias * 2 + y


def _residual_changed_before_the_activation(net: Net, x: Tensor) -> Tensor:
    r = net.other(x)
    y = net.conv(x) + r
    r.mul_(3)
    return torch.relu(y) + r


def _numbers_in_place(net: Net, x: Tensor) -> Tensor:
    n = x.size(0)
    m = n
    n += 1
    return torch.relu(net.conv(x)) * (n - m)


def _interleaved(net: Net, x: Tensor) -> Tensor:
    a = net.conv(x)
    b = net.other(x)
    a = a.relu_()
    b = net.bn(b).relu_()
    return torch.cat([a, b], 1)


def _two_meet(net: Net, x: Tensor) -> Tensor:
    return net.relu(net.bn(net.conv(x)) + net.other(x))


def _statement(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    net.relu(y)
    return y


def _changed_by_index(net: Net, x: Tensor) -> Tensor:
    t = net.other(x)
    y = net.conv(t)
    operator.setitem(t, 0, 0.0)
    return torch.relu(y) + t


GRAPHS = [
    # The input of the convolution changes before the chain would end.
    Graph("pre-activation", _pre_activation, ()),
    Graph("input written through a view", _written_view, ()),
    Graph("input written by index", _changed_by_index, ()),
    # The chain on the left of `+=`, whose names all see the sum, takes it.
    Graph("identity changed by its sum", _identity_changed_by_its_sum, (("add",), ("bn",))),
    # Another name for the sum's left operand sees the sum.
    Graph("alias of a sum in place", _alias_of_a_sum_in_place, (("add",),)),
    # The sum may be fused, the activation must not wait until the residual has changed.
    Graph("residual changed", _residual_changed_before_the_activation, (("add",),)),
    # `n += 1` makes a new number, whoever has the old one.
    Graph("numbers in place", _numbers_in_place, (("relu",),)),
    # Writes into values that nobody else has do not matter.
    Graph("interleaved", _interleaved, (("relu",), ("bn", "relu"))),
    # One addition, two convolutions: the later one takes it.
    Graph("two chains meet", _two_meet, (("bn",), ("add", "relu"))),
    # A result in place that nobody takes is still the tensor's value.
    Graph("statement in place", _statement, (("bn", "relu"),)),
    # Every link has one reader.
    Graph("output used twice", lambda net, x: (y := net.conv(x)) + torch.relu(y), ()),
    Graph("batch norm's output used twice", lambda net, x: (y := net.bn(net.conv(x))) * torch.relu(y), (("bn",),)),
    Graph("sum with itself", lambda net, x: (y := net.conv(x)) + y, ()),
    # Additions in all spellings.
    Graph("torch.add", lambda net, x: torch.add(x, net.conv(x)).relu(), (("add", "relu"),)),
    Graph("x.add_", lambda net, x: net.conv(x).add_(x).relu(), (("add", "relu"),)),
    Graph("alpha", lambda net, x: torch.add(x, net.conv(x), alpha=2).relu(), ()),
    Graph("a number", lambda net, x: torch.relu(net.conv(x) + 1.0), ()),
    # Linear layers take a sum and an activation, but no batch norm.
    Graph("linear", lambda net, x: F.gelu(net.linear(x) + x), (("add", "gelu"),)),
    Graph("linear and batch norm", lambda net, x: net.bn(net.linear(x)), ()),
    # A product with a gate takes what follows it, too.
    Graph("gate", lambda net, x: torch.relu(net.conv(x) * net.valid(x).sigmoid() + x), (("sigmoid",), ("add", "relu"))),
    # What computes nothing is no obstacle.
    Graph("dropout between", lambda net, x: torch.relu(F.dropout(net.conv(x), 0.5, net.training)), (("relu",),)),
    Graph("dropout by keywords", lambda net, x: torch.relu(F.dropout(input=net.conv(x), training=False)), (("relu",),)),
    # A batch norm may follow without an activation, and an activation without a batch norm.
    Graph("batch norm alone", lambda net, x: net.bn(net.conv(x)), (("bn",),)),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_chains_are_those_that_compute_the_same(graph: Graph) -> None:
    model = make(graph.body)
    x = torch.randn(2, 8, 6, 6)
    converted = tritonconv.convert(model)
    expected, _ = run(model, x.clone())
    y, launches = run(converted, x.clone())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    found = members(converted, x.clone())
    assert sorted(map(tuple, found)) == sorted(graph.chains)
    rows = tritonconv.explain(converted, x.clone()).to_dict()["layers"]
    assert launches == sum(row["backend"] == "triton" for row in rows)


# A residual that torch would spread over the output, or that the output is spread over.
@pytest.mark.parametrize("body", [
    lambda net, x: torch.relu(net.conv(x) + x[:, :, :1, :1]),
    lambda net, x: torch.relu(net.conv(x) + x[0]),
    lambda net, x: torch.relu(net.conv(x) + x.mean()),
    lambda net, x: torch.relu(net.conv(x[:1]) + x),
    lambda net, x: torch.relu(net.valid(x) + x),
    lambda net, x: torch.relu(net.conv(x).add_(x[:, :1])),
    lambda net, x: torch.relu(net.linear(x[:1]) + x),
    # Another dtype: the sum takes the wider one, in place the left one's.
    lambda net, x: torch.relu(net.conv(x) + x.double()),
    lambda net, x: torch.relu(net.conv(x).add_(x.double())),
])  # fmt: skip
def test_residuals_that_do_not_fit_are_added_by_torch(body: Callable[[Net, Tensor], Tensor]) -> None:
    model = make(body)
    x = torch.randn(2, 8, 6, 6)
    converted = tritonconv.convert(model)
    y, launches = run(converted, x)
    expected, _ = run(model, x)
    assert launches == 1 and fused(converted, x) == 0
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", [
    lambda net, x: torch.relu(net.conv(x) + x[:, :, :1, :1]),
    lambda net, x: torch.relu(net.valid(x) + x),
])  # fmt: skip
def test_residuals_that_do_not_fit_are_added_by_torch_under_compile(body: Callable[[Net, Tensor], Tensor]) -> None:
    model = make(body)
    x = torch.randn(2, 8, 6, 6)
    converted = tritonconv.convert(model)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x)[0], run(model, x)[0], rtol=1e-4, atol=1e-5)


def test_an_unbatched_image_fails_and_works_as_in_torch() -> None:
    plain = make(lambda net, x: torch.relu(net.conv(x) + x))
    x = torch.randn(8, 6, 6)
    y, launches = run(tritonconv.convert(plain), x)
    torch.testing.assert_close(y, run(plain, x)[0], rtol=1e-4, atol=1e-5)
    assert launches == 1
    normed = tritonconv.convert(make(lambda net, x: net.bn(net.conv(x))))
    with pytest.raises(ValueError, match="expected 4D input"):
        run(normed, x)
    # An unbatched signal's channels are a batch norm's batch.
    rows = randomize(nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(6)))
    torch.testing.assert_close(run(tritonconv.convert(rows), x[:4, 0, :].repeat(1, 2)[:, :8])[0],
                               run(rows, x[:4, 0, :].repeat(1, 2)[:, :8])[0])  # fmt: skip


class Log:
    """Hooks that keep what they see."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def forward(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen += [args[0].clone(), output.clone()]

    def pre(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append(args[0].clone())


HOOKED = ["conv1", "bn1", "relu", "layer1.0.conv2", "layer1.0.bn2", "layer1", "layer1.0", "layer2.0.downsample", "fc", ""]


@rotate(when=["before", "after"], name=HOOKED)
def test_hooks_see_what_they_saw_before_and_fusion_returns_without_them(name: str, when: str) -> None:
    original, x = build(RESNET)
    logs = Log(), Log()
    handles = []

    def register(model: nn.Module, log: Log) -> None:
        module = model.get_submodule(name)
        handles.extend([module.register_forward_pre_hook(log.pre), module.register_forward_hook(log.forward)])

    if when == "before":
        register(original, logs[0])
        model = tritonconv.convert(original, inplace=True)
        twin, _ = build(RESNET)
    else:
        model = tritonconv.convert(original)
        register(model, logs[0])
        twin, _ = build(RESNET)
    register(twin, logs[1])
    y, _ = run(model, x)
    expected, _ = run(twin, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert len(logs[0].seen) == len(logs[1].seen) == 3
    for a, b in zip(*(log.seen for log in logs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert sum(bool(row["fused"]) for row in tritonconv.explain(model, x).to_dict()["layers"]) == RESNET.chains


def test_a_hooked_container_is_fused_inside() -> None:
    model, x = build(RESNET)
    converted = tritonconv.convert(model)
    converted.layer1.register_forward_hook(lambda *seen: seen[2] * 2)
    converted.layer2[0].register_full_backward_hook(lambda *_: None)
    run(converted, x)
    assert fused(converted, x) == RESNET.chains


def test_hooks_may_come_and_go_for_ever() -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original, backend="torch")
    expected, _ = run(converted, x)
    seen: list[object] = []
    for _ in range(10):
        handle = converted.layer1[0].register_forward_hook(lambda *call: seen.append(call))
        torch.testing.assert_close(run(converted, x)[0], expected)
        handle.remove()
        torch.testing.assert_close(run(converted, x)[0], expected)
    assert len(seen) == 10 and fused(converted, x) == RESNET.chains
    assert "forward" not in converted.layer1[0].__dict__


def test_an_attribute_that_changes_at_every_call_costs_the_graph_not_the_result() -> None:
    model = make(lambda net, x: torch.relu(net.conv(x)) * net.step)
    model.step = 0.0
    converted = tritonconv.convert(model, backend="torch")
    x = torch.randn(1, 8, 6, 6)
    one = torch.relu(model.conv(x)).detach()
    for step in range(12):
        converted.step = float(step)
        torch.testing.assert_close(run(converted, x)[0], step * one)


def test_hooks_that_replace_values_do_so() -> None:
    original, x = build(RESNET)
    converted = tritonconv.convert(original)
    for model in (original, converted):
        model.layer1[0].bn1.register_forward_hook(lambda *seen: seen[2] + 1)
        model.layer2[0].register_forward_pre_hook(lambda *seen: (seen[1][0] * 2,))
    assert_as_good(run(converted, x)[0], original, x)


def test_global_hooks_see_every_module() -> None:
    original, x = build(RESNET)
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *seen: names.append(type(seen[0]).__name__))
    try:
        converted = tritonconv.convert(original)
        run(converted, x)
        seen = names.copy()
        names.clear()
        run(original, x)
    finally:
        handle.remove()
    assert seen == names
    assert len(names) > 15


def test_an_untraceable_model_is_fused_in_its_parts() -> None:
    case = named(CASES, "untraceable")
    model, x = build(case)
    report = tritonconv.explain(tritonconv.convert(model), x).to_dict()
    assert [entry["how"] for entry in report["fusion"]] == ["graph", "graph break", "graph"]
    # Where the forward branches on a value.
    assert "models.py" in report["fusion"][1]["reason"] and "in Untraceable.forward" in report["fusion"][1]["reason"]
    reasons = {row["name"]: row["reason"] for row in report["layers"]}
    assert reasons["stem.0"].endswith("fused") and reasons["head"] in ("conv_fprop", "conv_flat", "matmul")


def test_a_sequential_is_walked_around_what_does_not_trace() -> None:
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), Gate(), nn.Conv2d(8, 8, 1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), Gate(), inner, nn.Tanh()).eval()
    x = torch.randn(2, 3, 6, 6)
    converted = tritonconv.convert(model)
    y, launches = run(converted, x)
    assert_as_good(y, model, x)
    assert launches == 3 and fused(converted, x) == 2
    report = tritonconv.explain(converted, x).to_dict()
    assert [row["fused"] for row in report["layers"] if row["fused"]] == [["1", "2"], ["4.3"]]
    assert report["layers"][0]["reason"].endswith("fused")


class Losing(nn.Module):
    """Forwards that a graph would not reproduce."""

    def __init__(self, body: Callable[[Losing, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.register_buffer("calls", torch.zeros(()))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def _sets_attribute(net: Losing, x: Tensor) -> Tensor:
    net.count = net.count + 1
    return net.block(x) * net.count


def _counts(net: Losing, x: Tensor) -> Tensor:
    net.calls += 1
    return net.block(x) * net.calls


def _no_grad(net: Losing, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.block(x)


def _asks_type(net: Losing, x: Tensor) -> Tensor:
    return net.block(x) if isinstance(x, Tensor) else net.block(x[0]) * 0


def _draws(net: Losing, x: Tensor) -> Tensor:
    return net.block(x) + torch.rand(())


def _sets_data(net: Losing, x: Tensor) -> Tensor:
    x = x.clone()
    x.data = x.data * 2
    return net.block(x)


def _asks_for_gradients(net: Losing, x: Tensor) -> Tensor:
    return net.block(x) * 2 if torch.is_grad_enabled() else net.block(x)


def _asks_for_an_attribute(net: Losing, x: Tensor) -> Tensor:
    return net.block(x) * 2 if hasattr(x, "pyramid") else net.block(x)


@pytest.mark.parametrize("body", [
    _sets_attribute, _counts, _no_grad, _asks_type, _draws, _sets_data, _asks_for_gradients, _asks_for_an_attribute,
], ids=lambda f: f.__name__)  # fmt: skip
def test_a_forward_that_a_graph_would_not_reproduce_is_its_own(body: Callable[[Losing, Tensor], Tensor]) -> None:
    x = torch.randn(1, 3, 5, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = Losing(body).eval()
    converted = tritonconv.convert(original)
    assert converted.count == 0 and converted.calls == 0
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            expected = run(original, x)[0]
            torch.manual_seed(1)
            y, launches = run(converted, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert launches == 1
    assert converted.count == original.count and converted.calls == original.calls
    # The block within is fused all the same.
    assert fused(converted, x) == 1


def test_structured_results_and_several_inputs() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> dict[str, object]:
            y = torch.relu(self.a(x) + pair[0])
            return {"sum": y, "both": (self.b(pair[1]), [y.shape[0]])}

    model = Many().eval()
    converted = tritonconv.convert(model)
    args = torch.randn(2, 3, 4, 4), (torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4))
    with torch.no_grad():
        a, b = converted(*args), model(*args)
    assert fused(converted, *args) == 1 and a["both"][1] == [2]
    torch.testing.assert_close(a, b)


class Named(dict):
    """A result of the user's own class."""


@dataclass
class Counted:
    value: Tensor
    made: int = 0

    def __post_init__(self) -> None:
        self.made += 1


@pytest.mark.parametrize("make_result", [
    lambda y: OrderedDict(b=y, a=(y, 1)), lambda y: Named(y=y), lambda y: Counted(y), lambda y: (y, torch.Size([1, 2])),
    lambda y: [y, {"y": y}],
])  # fmt: skip
def test_results_keep_their_type(make_result: Callable[[Tensor], object]) -> None:
    model = make(lambda net, x: make_result(torch.relu(net.conv(x))))
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        a, b = model(x), tritonconv.convert(model, backend="torch")(x)
    assert type(a) is type(b) and str(a) == str(b)


def test_a_fused_forward_adds_no_reference_to_a_reverted_model() -> None:
    model = tritonconv.convert(ResNet().eval())
    assert isinstance(model.__dict__["forward"], FusedForward)
    assert "forward" not in tritonconv.revert(model).__dict__
