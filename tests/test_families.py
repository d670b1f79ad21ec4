"""Narrow MobileNetV2, ResNeXt and ConvNeXt, from their papers' tables: all convolutions on our kernels, in both modes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from matrix import every, some
from reference import assert_close
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.launch import record_launches


class Inverted(nn.Module):
    """Table 1 of M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = expand * inputs
        self.joins = stride == 1 and inputs == outputs
        expansion = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)]
        self.body = nn.Sequential(
            *(expansion if expand > 1 else []),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.joins else self.body(x)


class MobileNetV2(nn.Module):
    """Table 2, an eighth as wide, a block of each kind."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)]
        blocks = [Inverted(4, 4, 1, 1), Inverted(4, 6, 2, 6), Inverted(6, 6, 1, 6), Inverted(6, 8, 2, 6)]
        last = [nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*stem, *blocks, *last)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Aggregated(nn.Module):
    """Figure 3(c) of S. Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017."""

    def __init__(self, inputs: int, width: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


class ResNeXt(nn.Module):
    """Table 1, ResNeXt-50 32x4d with 8 groups of 4 channels, then of 8 as its second stage has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(
            Aggregated(8, 32, 24, 8, 1), Aggregated(24, 32, 24, 8, 1), Aggregated(24, 64, 32, 8, 2),
        )  # fmt: skip
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Modern(nn.Module):
    """Figure 4 of Z. Liu et al., "A ConvNet for the 2020s", 2022."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = (
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Table 9's stem, two stages and the step between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8, eps=1e-6))
        self.stages = nn.Sequential(
            Modern(8), LayerNorm2d(8, eps=1e-6), nn.Conv2d(8, 12, 2, 2), Modern(12), Modern(12),
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(12, eps=1e-6), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x)).mean((2, 3))))


MODELS = {
    # Every depthwise convolution has a 1x1 one behind it.
    MobileNetV2: {"separable_kernel", "matmul_kernel"},
    ResNeXt: {"conv_flat_kernel", "matmul_kernel"},
    ConvNeXt: {"depthwise_kernel", "matmul_kernel"},
}


@every(kind=some(MODELS, 2))
def test_every_convolution_runs_on_our_kernels_and_gives_what_torch_does(kind: type[nn.Module]) -> None:
    check_family(kind, MODELS[kind], ("Conv2d", "Linear"))


def check_family(kind: type[nn.Module], kernels: set[str], ours: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compare a converted network with the original in fp64: its results, and one step of training.

    Args:
        kernels: some that must have run in eval mode.
        ours: the kinds of layers that must be on our kernels.

    Returns:
        The rows of its report.
    """
    plain = kind()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    reference = copy.deepcopy(plain).double()
    model = tritonconv.convert(plain)
    x = torch.randn(3, 3, 32, 32)
    labels = torch.randint(5, model.eval()(x)[:, 0].shape)

    report = tritonconv.explain(model.eval(), x).to_dict()["layers"]
    assert all(row["backend"] == "triton" for row in report if row["kind"] in ours), report
    with torch.no_grad(), record_launches() as launches:
        out = model(x)
    assert kernels <= set(launches), launches
    assert_close(out, reference.eval()(x.double()), depth=1000)

    # One step of training: the loss, every gradient, running statistics.
    losses = []
    for network, image in ((model, x), (reference, x.double())):
        network.train()
        loss = nn.functional.cross_entropy(network(image), labels)
        loss.backward()
        losses.append(loss)
    assert_close(losses[0].reshape(1), losses[1].reshape(1), depth=1000)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        scale = expected[name].grad.abs().max()
        # Where gradients cancel, as before a batch norm, rounding is all that is left of them.
        error = (parameter.grad.double() - expected[name].grad).abs().max()
        assert error <= 1e-4 * scale + 1e-6, (name, error, scale)
    for (name, ours), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6), name
    return report
