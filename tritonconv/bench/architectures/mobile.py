"""MobileNetV2 (Sandler et al., arXiv:1801.04381) and EfficientNet-B0 (Tan and Le, arXiv:1905.11946)."""

from __future__ import annotations

from torch import Tensor, nn

from tritonconv.bench.architectures.layers import Activation, Residual, StochasticDepth, classifier, conv_bn, initialize

__all__ = ["SqueezeExcite", "efficientnet_b0", "inverted_residual", "mobilenet_v2"]

# The papers' tables. Expansion, channels, blocks, stride of the first of them.
MOBILENET_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
# The same, and the filter's size.
EFFICIENTNET_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
FEATURES = 1280


class SqueezeExcite(nn.Module):
    """Channels scaled by what a small network makes of their averages (Hu et al., arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def inverted_residual(
    inputs: int, outputs: int, *, stride: int = 1, expansion: int = 6, size: int = 3, activation: Activation = nn.ReLU6,
    squeeze: int = 0, drop: float = 0.0,
) -> nn.Module:  # fmt: skip
    """A depthwise convolution between two 1x1 ones, wide in the middle, with a shortcut where the sizes allow one.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the depthwise convolution.
        expansion: how many times wider the middle is; at 1 there is no first 1x1 convolution.
        size: of the depthwise filter.
        activation: makes the module behind each of the first two convolutions.
        squeeze: channels of the squeeze-excite network, 0 for none.
        drop: how often training drops the branch.

    >>> import torch
    >>> inverted_residual(16, 24, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 24, 4, 4])
    """
    middle = inputs * expansion
    layers: list[nn.Module] = [] if expansion == 1 else [conv_bn(inputs, middle, activation=activation)]
    layers.append(conv_bn(middle, middle, size, stride=stride, groups=middle, activation=activation))
    if squeeze:
        layers.append(SqueezeExcite(middle, squeeze))
    layers.append(conv_bn(middle, outputs, activation=None))
    if stride != 1 or inputs != outputs:
        return nn.Sequential(*layers)
    if drop:
        layers.append(StochasticDepth(drop))
    return Residual(nn.Sequential(*layers))


def mobilenet_v2(classes: int = 1000) -> nn.Module:
    """MobileNetV2 of width 1: images (N, 3, H, W) to scores (N, classes).

    >>> import torch
    >>> mobilenet_v2()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """
    layers: list[nn.Module] = [conv_bn(3, 32, 3, stride=2, activation=nn.ReLU6)]
    channels = 32
    for expansion, outputs, depth, stride in MOBILENET_STAGES:
        for index in range(depth):
            layers.append(inverted_residual(channels, outputs, stride=stride if index == 0 else 1, expansion=expansion))
            channels = outputs
    layers.append(conv_bn(channels, FEATURES, activation=nn.ReLU6))
    return initialize(classifier(nn.Sequential(*layers), FEATURES, classes, dropout=0.2))


def efficientnet_b0(classes: int = 1000) -> nn.Module:
    """EfficientNet-B0: images (N, 3, H, W) to scores (N, classes).

    >>> import torch
    >>> efficientnet_b0()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """
    layers: list[nn.Module] = [conv_bn(3, 32, 3, stride=2, activation=nn.SiLU)]
    channels, blocks = 32, sum(depth for _, _, depth, _, _ in EFFICIENTNET_STAGES)
    for expansion, outputs, depth, stride, size in EFFICIENTNET_STAGES:
        for index in range(depth):
            # The deeper a block, the more often it is dropped.
            drop = 0.2 * (len(layers) - 1) / blocks
            layers.append(
                inverted_residual(
                    channels, outputs, stride=stride if index == 0 else 1, expansion=expansion, size=size,
                    activation=nn.SiLU, squeeze=channels // 4, drop=drop,
                )
            )  # fmt: skip
            channels = outputs
    layers.append(conv_bn(channels, FEATURES, activation=nn.SiLU))
    return initialize(classifier(nn.Sequential(*layers), FEATURES, classes, dropout=0.2))
