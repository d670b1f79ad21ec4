"""Squeeze-excite: the gate in one launch, the product and its gradients, the module; against torch in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matrix import cover, rotate
from reference import assert_close
from torch import Tensor, nn

import tritonconv
from tritonconv.bench.registry import configs_of
from tritonconv.nn import SqueezeExcite
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.backend import set_backend
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import captured, device_of, forced, record_launches
from tritonconv.ops.core.layout import as_format
from tritonconv.ops.squeeze_excite.launch import scale, scale_gradients
from tritonconv.ops.squeeze_excite.operator import EXCITE, scale_channels

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ids: Any = lambda d: str(d)[6:]  # noqa: E731
# Sizes of x (N, C, *spatial).
SIZES = [(3, 40, 7, 9), (2, 17, 5, 3), (1, 1, 4, 4), (2, 24, 33), (2, 9, 3, 4, 5), (5, 64, 1, 1)]


def made(size: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> tuple[Tensor, Tensor]:
    x = as_format(torch.randn(size, device=device).to(dtype), channels_last)
    return x, torch.rand(*size[:2], *(1,) * (len(size) - 2), device=device).to(dtype)


@rotate(channels_last=[True, False], dtype=DTYPES, size=SIZES)
def test_scaled_by_a_gate(size: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> None:
    x, gate = made(size, dtype, channels_last, device)
    residual = as_format(torch.randn_like(x), not channels_last)
    act = parse_activation("relu")
    with torch.no_grad(), record_launches() as launches:
        y, whole = scale_channels(x, gate), scale_channels(x, gate, residual, act)
    assert launches == ["scale_kernel"] * 2
    assert y.stride() == torch.empty_like(x).stride()
    assert_close(y, x.double() * gate.double())
    assert_close(whole, (x.double() * gate.double() + residual.double()).relu())
    # Positive, for sums of a few elements may cancel.
    x, dy = x.abs(), torch.rand_like(x)
    dx, dgate = scale_gradients(dy, x, gate, True, True)
    assert dx is not None and dgate is not None
    axes = tuple(range(2, x.dim()))
    assert_close(dx, dy.double() * gate.double())
    assert_close(dgate, (dy.double() * x.double()).sum(axes, keepdim=True), depth=x[0, 0].numel())
    again = scale_gradients(dy, x, gate, True, True)
    assert all(a is not None and torch.equal(a, b) for a, b in zip(again, (dx, dgate), strict=True))


@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "C"])
def test_every_config(channels_last: bool, device: str) -> None:
    x, gate = made((2, 70, 9, 7), torch.float32, channels_last, device)
    dy = torch.randn_like(x)
    with captured(device_of(torch.device(device))) as launches:
        scale(x, gate)
    for config in cover(configs_of(launches[0])):
        with forced(config=config):
            y, (dx, dgate) = scale(x, gate), scale_gradients(dy, x, gate, True, True)
        assert dx is not None and dgate is not None
        assert_close(y, x.double() * gate.double(), what=str(config))
        assert_close(dx, dy.double() * gate.double(), what=str(config))
        assert_close(dgate, (dy.double() * x.double()).sum((2, 3), keepdim=True), depth=63, what=str(config))


def test_offsets_of_64_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonconv.ops.batch_norm.launch.needs_int64", lambda _: True)
    for channels_last in (True, False):
        x, gate = made((2, 24, 5, 7), torch.float32, channels_last, device)
        dx, _ = scale_gradients(x, x, gate, True, True)
        assert dx is not None
        assert_close(scale(x, gate), x.double() * gate.double())
        assert_close(dx, x.double() * gate.double())


@rotate({"c, r": [(64, 16), (96, 4), (17, 5), (200, 150), (1, 1)]}, dtype=DTYPES)
def test_the_gate_in_one_launch(c: int, r: int, dtype: torch.dtype, device: str) -> None:
    mean = torch.randn(3, c, 1, 1, device=device).to(dtype)
    w1, w2 = ((torch.randn(*s, 1, 1, device=device) / s[1] ** 0.5).to(dtype) for s in ((r, c), (c, r)))
    b1, b2 = (torch.randn(n, device=device).to(dtype) for n in (r, c))
    silu, sigmoid = parse_activation("silu"), parse_activation("sigmoid")
    for first, second in ((b1, b2), (None, None)):
        with torch.no_grad(), record_launches() as launches:
            tensors = (mean, w1, first, w2, second)
            found = EXCITE.find(tensors, ((), silu, sigmoid), "triton")
            gate = None if found is None else found.run(*tensors)
        assert gate is not None and launches == ["excite_kernel"]
        wide = [None if t is None else t.double() for t in (mean, w1, first, w2, second)]
        hidden = nn.functional.silu(nn.functional.conv2d(*wide[:3]))  # type: ignore[arg-type]
        assert_close(gate, nn.functional.conv2d(hidden, *wide[3:]).sigmoid(), depth=c + r)  # type: ignore[arg-type]


def test_not_a_number_stays_in_its_image(device: str) -> None:
    layer = SqueezeExcite(20, 4).to(device)
    x = torch.randn(3, 20, 5, 5, device=device)
    x[1, 3, 2, 2] = float("nan")
    with torch.no_grad():
        y = layer(x)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


@pytest.mark.parametrize("channels_last", [True, False], ids=["CL", "C"])
def test_the_module_in_both_modes(channels_last: bool, device: str) -> None:
    layer = SqueezeExcite(40, 10, activation="silu", gate=nn.Hardsigmoid()).to(device)
    double = copy.deepcopy(layer).double()
    x = as_format(torch.randn(3, 40, 6, 5, device=device), channels_last)
    with torch.no_grad(), record_launches() as launches:
        y = layer(x)
    assert launches[-2:] == ["excite_kernel", "scale_kernel"] and len(launches) <= 4
    with set_backend("torch"):
        wide = x.double().requires_grad_()
        expected = double(wide)
    assert_close(y, expected, depth=40)
    x.requires_grad_()
    out = layer(x)
    dy = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *layer.parameters()], dy)
    with set_backend("torch"):
        references = torch.autograd.grad(expected, [wide, *double.parameters()], dy.double())
    assert_close(out, expected, depth=40)
    for one, reference in zip(found, references, strict=True):
        assert_close(one, reference, depth=30 * 40)


def test_an_empty_batch_and_what_is_broadcast(device: str) -> None:
    layer = SqueezeExcite(8, 2).to(device)
    assert layer(torch.zeros(0, 8, 3, 3, device=device)).shape == (0, 8, 3, 3)
    x = torch.randn(2, 8, 3, 3, device=device)
    # Torch computes what is no gate of channels.
    for gate in (
        torch.rand(2, 1, 1, 1, device=device),
        torch.rand(1, 8, 3, 3, device=device),
        torch.rand(2, 8, 1, 1).double(),
    ):
        assert torch.equal(scale_channels(x, gate.to(device)), x * gate.to(device))
    expanded = x[:, :1].expand(-1, 8, -1, -1)
    gate = torch.rand(2, 8, 1, 1, device=device)
    assert_close(scale_channels(expanded, gate), expanded.double() * gate.double())


def test_torch_and_compilers(device: str) -> None:
    x, gate = made((2, 3, 2, 2), torch.float64, True, device)
    arguments = (x.requires_grad_(), gate.requires_grad_())
    assert torch.autograd.gradcheck(scale_channels, arguments)
    torch.library.opcheck(torch.ops.tritonconv.scale_channels.default, arguments)
    compiled = torch.compile(scale_channels, fullgraph=True, backend="aot_eager")
    y = compiled(*arguments)
    assert_close(y, x * gate)
    assert_close(torch.autograd.grad(y.sum(), gate)[0], x.sum((2, 3), keepdim=True), depth=4)
    with set_backend("torch"), record_launches() as launches:
        scale_channels(x, gate)
    assert not launches
    with pytest.raises(RuntimeError, match=r"expected a gate of size \[2, 3, 1, 1\]"):
        torch.ops.tritonconv.scale_channels(x, gate[:1])
    assert Epilogue().describe() == ""


def test_activations_by_name_module_or_class(device: str) -> None:
    x = torch.randn(2, 16, 4, 4, device=device)
    made = [SqueezeExcite(16, 4, act, gate).to(device) for act, gate in (
        ("silu", "hardsigmoid"), (nn.SiLU(), nn.Hardsigmoid()), (nn.SiLU, nn.Hardsigmoid))]  # fmt: skip
    for layer in made[1:]:
        layer.load_state_dict(made[0].state_dict())
    with torch.no_grad():
        results = [layer(x) for layer in made]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_the_module_is_given_is_checked() -> None:
    with pytest.raises(ValueError, match="positive channels, got input_channels=0"):
        SqueezeExcite(0)
    with pytest.raises(ValueError, match="unknown activation"):
        SqueezeExcite(8, activation="nothing")
    with pytest.raises(RuntimeError, match=r"expected 4D input \(N, C, H, W\), but got input of size \[8, 3\]"):
        SqueezeExcite(8)(torch.ones(8, 3))


class Torchvision(nn.Module):
    """The names and the order of torchvision's SqueezeExcitation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def _scale(self, input: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(input)))))

    def forward(self, input: Tensor) -> Tensor:
        return self._scale(input) * input


class Timm(nn.Module):
    """Those of timm's SEModule."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn, self.act = nn.Conv2d(channels, hidden, 1), nn.Identity(), nn.ReLU(inplace=True)
        self.fc2, self.gate = nn.Conv2d(hidden, channels, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.fc2(self.act(self.bn(self.fc1(x_se))))
        return x * self.gate(x_se)


class Functional(nn.Module):
    """Functions throughout, and a reshape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1)
        y = torch.sigmoid(self.fc2(nn.functional.relu(self.fc1(y))))
        return torch.mul(x, y.reshape(x.shape[0], -1, 1, 1))


@pytest.mark.parametrize("block", [Torchvision, Timm, Functional, SqueezeExcite], ids=lambda block: block.__name__)
def test_convert_knows_a_block_by_what_it_computes(block: type[nn.Module], device: str) -> None:
    layers = [nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), block(24, 6), nn.Conv2d(24, 16, 1), nn.SiLU()]
    model = nn.Sequential(*layers).to(device).eval()
    double, x = copy.deepcopy(model).double(), torch.randn(3, 8, 7, 6, device=device)
    with set_backend("torch"):
        expected = double(x.double())
    fused = tritonconv.convert(model)
    with torch.no_grad(), record_launches() as launches:
        y = fused(x)
    # The average with the convolution, the gate, and the product in the convolution behind it.
    assert launches == ["conv_flat_kernel", "average_kernel", "excite_kernel", "matmul_kernel"]
    assert_close(y, expected, depth=500)
    # With gradients each part runs on its own.
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    with set_backend("torch"):
        reference = torch.autograd.grad(double(wide).sum(), wide)[0]
    assert_close(torch.autograd.grad(fused(x).sum(), x)[0], reference, depth=5000)
    assert set(fused.state_dict()) == set(double.state_dict())
