"""Converted models train as they did before: losses, gradients, statistics and parameters, step by step beside torch's."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matrix import every, rotate, some
from models import ResNet, Shared
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import tritonconv
from tritonconv.ops.core.launch import record_launches

Values = dict[str, Tensor]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().train()


def twins(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model and the same one converted."""
    original = seeded(build)
    return original, tritonconv.convert(original, **options)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean_square(result: Any) -> Tensor:
    """A loss of whatever a model returns."""
    if isinstance(result, Tensor):
        return result.float().square().mean()
    return sum(map(mean_square, result.values() if isinstance(result, dict) else result))  # type: ignore[return-value]


def step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Any] | None = None) -> Values:
    """Loss, gradients and buffers of one forward and backward pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = mean_square((call or model)(x))
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad, **state(model, gradients=True)}  # type: ignore[dict-item]


def state(model: nn.Module, gradients: bool = False) -> Values:
    """Copies of parameters, or of those gradients that are there, and of buffers."""
    parameters = {name: p.grad if gradients else p for name, p in model.named_parameters()}
    found = {name: t.detach().clone() for name, t in parameters.items() if t is not None}
    return found | {name: t.clone() for name, t in model.named_buffers()}


def assert_same(ours: Values, torchs: Values, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert ours.keys() == torchs.keys()
    for name, value in torchs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_steps(original: nn.Module, converted: nn.Module, *inputs: Tensor) -> None:
    for x in inputs:
        torch.manual_seed(1), random.seed(1)
        expected = step(original, x)
        torch.manual_seed(1), random.seed(1)
        assert_same(step(converted, x), expected)


def chains(model: nn.Module, *inputs: Any) -> int:
    """Chains that a call of the model runs as one call each, in the modules' present modes."""
    return sum(bool(row["fused"]) for row in tritonconv.explain(model, *inputs).to_dict()["layers"])


@contextmanager
def layers_in_one(count: int) -> Iterator[None]:
    """Expect so many convolutions to run with their batch norms in the training operator."""
    with record_launches() as launches:
        yield
    # The statistics come with the convolution: no pass over its result takes them.
    assert launches.count("batch_norm_combine_kernel") - launches.count("batch_norm_statistics_kernel") == count


def conv_bn(c: int, k: int, filter_: int = 3, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(c, k, filter_, padding=filter_ // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(k), nn.ReLU())


class InvertedResidual(nn.Module):
    """MobileNet's: wide, depthwise, narrow, and a sum without an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True),
            nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class UNet(nn.Module):
    """Down, up by a transposed convolution with a batch norm, and what was there before beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn(4, 6)
        self.middle = conv_bn(6, 8, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.bn = nn.BatchNorm2d(6)
        self.last = conv_bn(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y = F.relu(self.bn(self.up(self.middle(x))))
        return self.last(torch.cat([x, y], 1))


class Dense(nn.Module):
    """DenseNet's: every layer reads all before it; batch norm and activation come first."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1, bias=False) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.transition = conv_bn(13, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.transition(x)


class PreActivation(nn.Module):
    """Batch norm and activation, in place, before each convolution; the sum is in place too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        y = self.conv2(self.relu(self.bn2(y)))
        y += x
        return y


class Net(nn.Module):
    """Convolutions, batch norms and whatever else a forward needs; the forward is the case's."""

    def __init__(self, body: Callable[[Net, Tensor], Any], **others: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.other, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.body = body
        for name, value in others.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def fused(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.bn(net.conv(x)))


def small() -> nn.Module:
    """Two chains, the second of them a convolution with a bias."""
    return nn.Sequential(*conv_bn(4, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())


@dataclass(frozen=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    chains: int
    shape: tuple[int, ...] = (4, 6, 6)

    def __str__(self) -> str:
        return self.name


NETWORKS = [
    Network("resnet", ResNet, 6, (3, 8, 8)),
    Network("mobilenet", InvertedResidual, 3),
    Network("unet", UNet, 4),
    Network("densenet", Dense, 4),
    Network("pre-activation", PreActivation, 3),
    # One convolution called twice, a block used twice, one weight in two convolutions.
    Network("shared modules and weights", Shared, 6, (8, 6, 6)),
    # Statistics are updated twice in a step.
    Network("convolution and batch norm used twice", lambda: Net(lambda net, x: fused(net, fused(net, x))), 2),
    Network("1d", lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.Tanh()), 1, (4, 9)),
    Network("3d", lambda: nn.Sequential(nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), nn.GELU()), 1, (2, 4, 4, 4)),
]


@every(network=some(NETWORKS, 5))
def test_networks_have_the_same_gradients_and_statistics(network: Network) -> None:
    original, converted = twins(network.build)
    # The last batch of an epoch is smaller.
    assert_steps(original, converted, images(3, *network.shape), images(2, *network.shape, seed=1))
    assert chains(converted, images(2, *network.shape)) == network.chains


def test_steps_are_the_same_bit_by_bit_when_repeated() -> None:
    first, second = twins(UNet)[1], twins(UNet)[1]
    for _ in range(2):
        a, b = (step(model, images(2, 4, 6, 6)) for model in (first, second))
        assert all(torch.equal(a[name], b[name]) for name in a)


def _residual_written_after(net: Net, x: Tensor) -> Tensor:
    residual = net.other(x)
    y = F.relu(net.bn(net.conv(x)) + residual)
    residual.mul_(3)
    return y + residual


def _residual_written_through_a_view(net: Net, x: Tensor) -> Tensor:
    residual = net.other(x)
    y = F.relu(net.bn(net.conv(x)) + residual)
    residual.transpose(0, 1)[0] += 1
    return y + residual


def _residual_written_by_whoever_called(net: Net, x: Tensor) -> Tensor:
    residual = net.other(x)
    y, again = net.inner(x, residual)
    # Which a graph does not tell.
    if x.sum() > -1e9:
        again += 1
    return y + residual


def _two_orders(net: Net, x: Tensor) -> Tensor:
    a, b = net.bn(net.conv(x)), net.bn(net.other(x))
    b = F.relu(b)
    return F.relu(a) * b


def _statistics_of_this_batch(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    return F.relu(y + net.bn.running_mean.view(1, 4, 1, 1) * net.other(x))


def _statistics_before_this_batch(net: Net, x: Tensor) -> Tensor:
    mean = net.bn.running_mean.clone()
    return fused(net, x) + mean.view(1, 4, 1, 1)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.bn(self.conv(x)) + residual), residual


IN_PLACE = [
    _residual_written_after, _residual_written_through_a_view, _residual_written_by_whoever_called, _two_orders,
    _statistics_of_this_batch, _statistics_before_this_batch,
]  # fmt: skip


@rotate(body=IN_PLACE, training=[True, False])
def test_what_is_changed_in_place_is_as_torch_has_it(body: Callable[[Net, Tensor], Tensor], training: bool) -> None:
    original, converted = (model.train(training) for model in twins(lambda: Net(body, inner=Sum())))
    assert_steps(original, converted, images(2, 4, 6, 6))


def test_residuals_that_torch_saves_too_are_fused_up_to_the_activation() -> None:
    def block(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.other(x)), inplace=True)
        y = net.bn(net.conv(x))
        y += x
        return F.relu(y, inplace=True), x

    original, converted = twins(lambda: Net(block))
    with layers_in_one(2):
        assert_steps(original, converted, images(2, 4, 6, 6))
    assert chains(converted, images(2, 4, 6, 6)) == 2


MODES: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "frozen backbone": lambda m: (m.train(), m.layer1.eval()),
    "frozen batch norms": lambda m: (m.train(), [n.eval() for n in m.modules() if isinstance(n, nn.BatchNorm2d)]),
    "one trains in eval mode": lambda m: (m.eval(), m.layer2.train()),
    "one batch norm trains": lambda m: (m.eval(), m.bn1.train()),
}


def test_modes_may_be_switched_back_and_forth() -> None:
    original, converted = twins(small)
    for mode in ["train", "eval"] * 10:
        for model in (original, converted):
            MODES[mode](model)
        assert_steps(original, converted, images(2, 4, 4, 4))
    assert chains(converted, images(2, 4, 4, 4)) == 2


def test_parts_may_be_in_other_modes() -> None:
    original, converted = twins(ResNet)
    for mode in MODES:
        for model in (original, converted):
            MODES[mode](model)
        assert_steps(original, converted, images(2, 3, 6, 6))


def _freeze(chosen: Callable[[str], bool]) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not chosen(name))

    return freeze


FROZEN = {
    "convolutions": _freeze(lambda name: name[0] in "03"),
    "batch norms": _freeze(lambda name: name[0] in "14"),
    "biases of batch norms": _freeze(lambda name: name in ("1.bias", "4.bias")),
    "the first layer": _freeze(lambda name: name[0] in "01"),
    "everything but one bias": _freeze(lambda name: name != "3.bias"),
    "everything": _freeze(bool),
}


@pytest.mark.parametrize("what", FROZEN)
def test_frozen_parameters_have_no_gradient_and_others_theirs(what: str) -> None:
    original, converted = twins(small)
    for model in (original, converted):
        FROZEN[what](model)
    assert_steps(original, converted, images(2, 4, 4, 4))
    for model in (original, converted):
        model[1].eval()
    assert_steps(original, converted, images(2, 4, 4, 4))


NORMS: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "cumulative average": lambda norm: setattr(norm, "momentum", None),
    "another momentum and eps": lambda norm: norm.__dict__.update(momentum=0.7, eps=0.1),
    "statistics no longer tracked": lambda norm: setattr(norm, "track_running_stats", False),
    "statistics reset": lambda norm: norm.reset_running_stats(),
    "no count": lambda norm: setattr(norm, "num_batches_tracked", None),
}


@pytest.mark.parametrize("change", NORMS)
def test_batch_norms_may_be_changed_between_steps(change: str) -> None:
    original, converted = twins(small)
    x = images(2, 4, 4, 4)
    assert_steps(original, converted, x)
    for model in (original, converted):
        NORMS[change](model[1])
    # A cumulative average knows the weight of a batch after it has counted it: that layer has launches of its own.
    with layers_in_one(2 if change == "cumulative average" else 4):
        assert_steps(original, converted, x, x + 1)
    assert_steps(original.eval(), converted.eval(), x)


@pytest.mark.parametrize("options", [dict(affine=False), dict(track_running_stats=False), dict(momentum=None)], ids=str)
def test_batch_norms_of_every_kind_train(options: dict[str, Any]) -> None:
    original, converted = twins(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU()))
    with layers_in_one(0 if "momentum" in options else 2):
        assert_steps(original, converted, images(2, 4, 5, 5), images(1, 4, 5, 5))
    assert_steps(original.eval(), converted.eval(), images(2, 4, 5, 5))


def no_bias() -> nn.Module:
    """A bias before a batch norm has no gradient; torch's rounding errors there become whole steps of Adam."""
    return nn.Sequential(*conv_bn(4, 4), *conv_bn(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [dict(params=parameters[:3]), dict(params=parameters[3:], lr=0.05, weight_decay=0.1)]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 1e-2),
    "AdamW in groups": lambda m: torch.optim.AdamW(two_groups(m), 1e-2, foreach=True),
}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, middle: Any = None) -> Values:
    """Parameters after steps of two batches each, with clipped and scaled gradients; `middle` follows the first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for i in steps:
        for j in range(2):
            scaler.scale(mean_square(model(images(2, 4, 4, 4, seed=2 * i + j))) / 2).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=bool(i % 2))
        if i == 0 and middle is not None:
            middle(model)
    return state(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_same_steps(name: str) -> None:
    found = [trained(model, OPTIMIZERS[name](model), range(3)) for model in twins(no_bias)]
    assert_same(found[1], found[0], rtol=1e-3, atol=1e-4)


MIDDLES: dict[str, Callable[[nn.Module], object]] = {
    "converted": lambda model: tritonconv.convert(model, inplace=True),
    "converted and reverted": lambda model: tritonconv.revert(tritonconv.convert(model, inplace=True)),
    "converted and validated": lambda model: (
        tritonconv.convert(model, inplace=True).eval()(images(1, 4, 4, 4)),
        model.train(),
    ),
}


@pytest.mark.parametrize("middle", MIDDLES)
def test_a_model_may_be_converted_in_the_middle_of_training(middle: str) -> None:
    """The optimizer goes on with the parameters that it holds, and with the moments that it has."""
    found = []
    for change in (None, MIDDLES[middle]):
        model = seeded(no_bias)
        found.append(trained(model, OPTIMIZERS["Adam"](model), range(3), change))
    assert_same(found[1], found[0], rtol=1e-3, atol=1e-4)


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tritonconv.convert(no_bias())
    other.load_state_dict(torch.load(file))
    return other


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": _saved_and_loaded,
    "state_dict of torch's": lambda model: tritonconv.revert(_saved_and_loaded(model)),
    "revert": lambda model: tritonconv.revert(copy.deepcopy(model)),
    "converted again": lambda model: tritonconv.convert(model),
}


@pytest.mark.parametrize("how", COPIES)
def test_training_goes_on_with_a_copy(how: str) -> None:
    original, converted = twins(no_bias)
    x = images(2, 4, 4, 4)
    assert_steps(original, converted, x)
    before = state(converted)
    twin = COPIES[how](converted)
    assert_steps(original, twin, x + 1)
    # And the one it was made of stays behind.
    assert all(torch.equal(t, before[name]) for name, t in state(converted).items())


def test_a_copy_may_be_changed_before_its_first_call() -> None:
    def scaled(net: Net, x: Tensor) -> Tensor:
        return fused(net, x) * net.scale

    original, converted = twins(lambda: Net(scaled, scale=1.0))
    assert_steps(original, converted, images(2, 4, 4, 4))
    twins_of_both = copy.deepcopy(original), copy.deepcopy(converted)
    for model in twins_of_both:
        model.scale, model.bn = 3.0, nn.Identity()
    assert_steps(*twins_of_both, images(2, 4, 4, 4))


def test_averaged_weights_and_their_statistics() -> None:
    averages = []
    for model in twins(no_bias):
        optimizer = OPTIMIZERS["SGD"](model)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        for i in range(2):
            trained(model, optimizer, range(i, i + 1))
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn([images(2, 4, 4, 4, seed=s) for s in range(3)], average)
        averages.append(state(average) | {"y": average.eval()(images(2, 4, 4, 4)).detach()})
    assert_same(averages[1], averages[0], rtol=1e-3, atol=1e-4)


class Seen:
    """Hooks of every kind on one module, and what they saw."""

    def __init__(self, module: nn.Module) -> None:
        self.values: list[Tensor] = []
        self.handles = [
            module.register_forward_pre_hook(lambda _, args: self.keep(args)),
            module.register_forward_hook(lambda *call: self.keep(call[2:])),
            module.register_full_backward_pre_hook(lambda _, dy: self.keep(dy)),
            module.register_full_backward_hook(lambda *call: self.keep(call[1])),
        ]

    def keep(self, tensors: Any) -> None:
        self.values += [t.detach().clone() for t in tensors if t is not None]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", ["0", "1", "2", "3", ""])
def test_hooks_see_the_same_whenever_they_are_registered(name: str) -> None:
    original, converted = twins(no_bias)
    x = images(2, 4, 4, 4)
    for when in ("before", "after"):
        seen = [Seen(model.get_submodule(name)) for model in (original, converted)]
        assert_steps(original, converted, x)
        torch.testing.assert_close(seen[1].values, seen[0].values, rtol=1e-4, atol=1e-5, msg=when)
        assert len(seen[0].values) == 4
        for one in seen:
            one.remove()
        with layers_in_one(2):
            assert_steps(original, converted, x)


def test_hooks_of_parameters_are_called() -> None:
    original, converted = twins(no_bias)
    for model in (original, converted):
        model[0].weight.register_hook(lambda grad: 2 * grad)
        model[1].bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad + 1))
    with layers_in_one(2):
        assert_steps(original, converted, images(2, 4, 4, 4))


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    # Each use of the weight is a step of the power iteration.
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[3]),
    "prune": lambda m: prune.ln_structured(m[0], "weight", 0.5, n=2, dim=0),
    "pruned batch norm": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
}


@rotate(when=["before", "after"], how=PARAMETRIZED)
def test_parametrized_layers_train(how: str, when: str) -> None:
    original = seeded(no_bias)
    models = [original, copy.deepcopy(original)]
    if when == "after":
        tritonconv.convert(models[1], inplace=True)
        assert_steps(*models, images(2, 4, 4, 4))
    for model in models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            PARAMETRIZED[how](model)
    if when == "before":
        tritonconv.convert(models[1], inplace=True)
    assert_steps(*models, images(2, 4, 4, 4), images(2, 4, 4, 4, seed=1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_the_same(reentrant: bool) -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        # Torch stops recomputing once all is saved again, so that something must come behind the batch norm.
        return checkpoint(lambda x: net.other(fused(net, x)), x, use_reentrant=reentrant)

    assert_steps(*twins(lambda: Net(body)), images(2, 4, 4, 4))


def test_a_compiled_model_trains_with_batches_of_any_size() -> None:
    original, converted = twins(no_bias)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    for n in (3, 2, 4):
        expected = step(original, images(n, 4, 4, 4))
        with layers_in_one(2):
            assert_same(step(converted, images(n, 4, 4, 4), compiled), expected)
    for model in (original, converted):
        model.eval()
    assert_same(step(converted, images(2, 4, 4, 4), compiled), step(original, images(2, 4, 4, 4)))
    for model in (original, converted):
        model.train()
    assert_same(step(converted, images(2, 4, 4, 4), compiled), step(original, images(2, 4, 4, 4)))


def test_functional_call_trains_other_parameters() -> None:
    gradients = []
    for model in twins(no_bias):
        others = {name: (1.5 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        with layers_in_one(2 * len(gradients)):
            mean_square(torch.func.functional_call(model, others, (images(2, 4, 4, 4),))).backward()
        gradients.append({name: p.grad for name, p in others.items()} | dict(model.named_buffers()))
        assert all(p.grad is None for p in model.parameters())
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_are_taken_without_gradients_too(mode: Any) -> None:
    original, converted = twins(no_bias)
    x = images(2, 4, 4, 4)
    with mode():
        torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)
    assert_same(state(converted), state(original))
    assert_steps(original, converted, x)


def test_graphs_may_be_kept_for_another_backward_pass() -> None:
    found = []
    for model in twins(no_bias):
        loss = mean_square(model(images(2, 4, 4, 4)))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (loss + mean_square(model(images(2, 4, 4, 4, seed=1)))).backward()
        found.append(state(model, gradients=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert_same(found[1], found[0])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_of_gradients_are_torchs(backend: str) -> None:
    original, converted = twins(no_bias)
    with tritonconv.set_backend(backend):
        ours = penalty(converted)
    assert_same(ours, penalty(original), rtol=1e-3)


def penalty(model: nn.Module) -> Values:
    model.zero_grad()
    x = images(2, 4, 4, 4).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
    dx.square().sum().backward()
    return state(model, gradients=True)


def _drop_path(net: Net, x: Tensor) -> Tensor:
    if net.training and random.random() < 0.5:
        return x + net.other(x)
    return x + fused(net, x)


def _drop_path_in_torch(net: Net, x: Tensor) -> Tensor:
    keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)
    return x + fused(net, x) * keep


def _own_generator(net: Net, x: Tensor) -> Tensor:
    return fused(net, x) if net.generator.random() < 0.5 else net.other(x)


def _dropout(net: Net, x: Tensor) -> Tensor:
    return F.dropout(net.dropout(fused(net, x)), 0.3, net.training)


def _auxiliary(net: Net, x: Tensor) -> Any:
    y = fused(net, x)
    return {"y": y, "auxiliary": (net.norm(net.other(y)), y.mean())} if net.training else y


def _collects(net: Net, x: Tensor) -> Tensor:
    y = fused(net, x)
    net.losses.append(y.detach().abs().mean())
    return y + sum(net.losses[-2:])


def _counts(net: Net, x: Tensor) -> Tensor:
    net.options.calls += 1
    return fused(net, x) * net.options.calls


def _counts_in_a_tensor(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return fused(net, x) * net.calls


def _momentum_encoder(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        for slow, fast in zip(net.norm.parameters(), net.bn.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data + 1, alpha=0.1)
    return fused(net, x) + net.norm(net.other(x))


def _penalty_on_weights(net: Net, x: Tensor) -> Tensor:
    return fused(net, x) + sum(p.square().mean() for p in net.parameters())


FORWARDS: dict[str, tuple[Callable[[Net, Tensor], Any], Callable[[], dict[str, Any]]]] = {
    "drop path, drawn in Python": (_drop_path, dict),
    "drop path, drawn in torch": (_drop_path_in_torch, dict),
    "a generator of its own": (_own_generator, lambda: dict(generator=random.Random(0))),
    "a generator of numpy's": (_own_generator, lambda: dict(generator=np.random.default_rng(0))),
    "dropout": (_dropout, lambda: dict(dropout=nn.Dropout2d(0.4))),
    "another result in training": (_auxiliary, dict),
    "losses that are collected": (_collects, lambda: dict(losses=[])),
    "a count in an object": (_counts, lambda: dict(options=SimpleNamespace(calls=0))),
    "a count in a tensor": (_counts_in_a_tensor, lambda: dict(calls=torch.zeros(()))),
    "a momentum encoder": (_momentum_encoder, dict),
    "a penalty on weights": (_penalty_on_weights, dict),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_do_at_every_call_what_they_did(name: str) -> None:
    body, others = FORWARDS[name]
    original = seeded(lambda: Net(body, **others()))
    converted = tritonconv.convert(original)
    for i in range(5):
        # Numbers are drawn in the order of memory, which is that of channels-last weights.
        x = images(2, 4, 4, 4, seed=i).contiguous(memory_format=torch.channels_last)
        expected, found = [], []
        for model, results in ((original, expected), (converted, found)):
            torch.manual_seed(i), random.seed(i)
            results.append(step(model, x))
        assert_same(found[0], expected[0])
    for model in (original, converted):
        model.eval()
    assert_steps(original, converted, images(2, 4, 4, 4))


def test_options_may_change_between_steps() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        y = fused(net, x.to(next(net.parameters()).dtype)) * net.options.scale
        return y + net.other(y) if net.options.deep[0] else y

    original, converted = twins(lambda: Net(body, options=SimpleNamespace(scale=1.0, deep=[True])))
    x = images(2, 4, 4, 4)
    for change in ({}, dict(scale=0.5), dict(deep=[False])):
        for model in (original, converted):
            model.options.__dict__.update(change)
        assert_steps(original, converted, x)
    for model in (original, converted):
        model.double()
    assert_steps(original, converted, x)


def test_batches_that_torch_refuses_or_takes_empty() -> None:
    original, converted = twins(small)
    for model in (original, converted):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(images(1, 4, 1, 1))
        assert model(images(0, 4, 4, 4)).shape == (0, 4, 4, 4)
    # What was counted on the way is what torch counts.
    assert_same(state(converted), state(original))
    assert_steps(original, converted, images(1, 4, 2, 1))


@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_formats_make_no_difference_but_in_memory(model_format: Any, input_format: Any) -> None:
    original, converted = twins(lambda: nn.Sequential(*conv_bn(4, 6)).to(memory_format=model_format))
    x = images(2, 4, 5, 5).contiguous(memory_format=input_format)
    assert_steps(original, converted, x)
    weight = converted[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.grad.stride() == weight.stride()
    x.requires_grad_()
    y = converted(x)
    y.backward(torch.ones_like(y, memory_format=torch.contiguous_format))
    assert y.stride() == original(x).stride() and x.grad.stride() == x.stride()


@pytest.fixture
def rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes bf16 of fp32; the interpreter cuts it off, which shows in a batch norm's gradient, a difference."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(values: Any, source: Any, target: Any, *rest: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(values, source, target, *rest)
        bits = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.mark.parametrize("dtype", ["autocast", torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("rounded_to_nearest")
def test_half_precision_is_as_close_to_fp64_as_torchs(dtype: Any) -> None:
    original, converted = twins(no_bias)
    x = images(4, 4, 6, 6)
    truth = step(copy.deepcopy(original).double(), x.double())
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if dtype == "autocast" else nullcontext
    if dtype != "autocast":
        original, converted, x = original.to(dtype), converted.to(dtype), x.to(dtype)
    with context(), layers_in_one(2):
        ours = step(converted, x)
    with context():
        torchs = step(original, x)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in torchs.items()}
    # Of all gradients together, since single ones are differences of large sums.
    names = [name for name, p in original.named_parameters() if p.grad is not None]
    reference = torch.cat([truth[name].flatten() for name in names])
    off, torchs_off = (
        (torch.cat([t[name].double().flatten() for name in names]) - reference).norm() / reference.norm()
        for t in (ours, torchs)
    )
    assert off <= 2 * torchs_off, f"off by {off:.1e}, torch by {torchs_off:.1e}"


def test_double_precision_is_exact() -> None:
    original, converted = (model.double() for model in twins(no_bias))
    x = images(2, 4, 4, 4).double()
    assert_same(step(converted, x), step(original, x), rtol=1e-9, atol=1e-12)
