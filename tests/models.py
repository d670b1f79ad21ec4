"""Narrow networks for the tests of convert and explain: every form of a chain, and what must not become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """torchvision's: one ReLU module for both places, in place, and `+=`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18's parts with 8 and 16 channels: a block of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class LeNet(nn.Module):
    """Functions where ResNet has modules; a linear layer with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.max_pool2d(torch.sigmoid(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Functional(nn.Module):
    """Functional calls, methods, statements in place, and a convolution with the model's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(16, 8, 1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, None, 1, padding=1)
        x = F.relu(x, inplace=True)
        y = self.a(x)
        y.relu_()
        z = self.b(y).clamp(0.1, 0.9)
        w = self.bn(self.c(torch.cat([y, z], 1)))
        w += y
        return F.leaky_relu(w, 0.2)


class Grouped(nn.Module):
    """Grouped, dilated, reflect-padded and depthwise convolutions, each with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, 12, 3, padding="same", groups=4), nn.BatchNorm2d(12, affine=False), nn.GELU("tanh"),
            nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"), nn.ELU(0.5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Untraceable(nn.Module):
    """Branches on a value in its own forward, around Sequential blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([BasicBlock(8, 8), BasicBlock(8, 8)])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        block = self.blocks[0] if x.sum() > 0 else self.blocks[1]
        return self.head(block(x))


class Gate(nn.Module):
    """A module that does not trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Shared(nn.Module):
    """One convolution called twice, one block under two names, one weight in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.block = BasicBlock(8, 8)
        self.again = self.block
        self.tied = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        x = F.relu(self.bn2(self.conv(x)))
        return self.tied(self.again(self.block(x)))


def net_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, stride=2), nn.Softplus()
    )


def net_3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Hardtanh(-0.5, 2.0), nn.Conv3d(8, 4, 2, 2))


@dataclass(frozen=True)
class Case:
    """A network, its input, and what convert is expected to make of it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    launches: int
    """Kernels that one call in eval mode launches: one for each convolution, pooling or linear layer.

    An average that comes with a convolution is a launch too, of its second stage.
    """
    chains: int
    """How many of them stand for more than the layer."""

    def __str__(self) -> str:
        return self.name


CASES = [
    # Residual chains that end in `+=` and an activation, with and without a downsampling branch; an average behind one.
    Case("resnet", ResNet, (2, 3, 8, 8), 9, 6),
    # Activations as functions; linear layers.
    Case("lenet", LeNet, (2, 1, 8, 8), 6, 3),
    # Methods, statements in place, a concatenation between chains, a functional convolution.
    Case("functional", Functional, (2, 3, 8, 8), 4, 4),
    # Geometries and activations.
    Case("grouped", Grouped, (2, 4, 8, 8), 4, 4),
    # Parts of a model that does not trace; one of its two blocks runs.
    Case("untraceable", Untraceable, (2, 3, 8, 8), 4, 3),
    # Modules used twice.
    Case("shared", Shared, (2, 8, 6, 6), 7, 6),
    Case("1d", net_1d, (2, 4, 9), 2, 2),
    Case("3d", net_3d, (1, 2, 4, 4, 4), 2, 1),
]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with statistics and affine parameters that a forgotten one would show."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 2)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0.0, 0.5, generator=generator)
    return model.eval()


def build(case: Case, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The case's network in eval mode and an input, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize(case.build(), seed), torch.randn(case.shape)
