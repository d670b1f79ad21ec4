"""ResNet with 3-D convolutions for videos (Tran et al., arXiv:1711.11248)."""

from __future__ import annotations

from torch import nn

from tritonconv.bench.architectures.layers import ReLU, Residual, classifier, initialize

__all__ = ["r3d_18"]

DEPTHS = (2, 2, 2, 2)


def conv_bn_3d(inputs: int, outputs: int, size: int, stride: int = 1, *, relu: bool = True) -> nn.Sequential:
    convolution = nn.Conv3d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(outputs), *([ReLU()] if relu else []))


def basic_block(inputs: int, outputs: int, stride: int) -> Residual:
    """Two 3x3x3 convolutions and a shortcut."""
    body = nn.Sequential(conv_bn_3d(inputs, outputs, 3, stride), conv_bn_3d(outputs, outputs, 3, relu=False))
    same = stride == 1 and inputs == outputs
    return Residual(body, None if same else conv_bn_3d(inputs, outputs, 1, stride, relu=False), ReLU())


def r3d_18(classes: int = 400) -> nn.Module:
    """The 18-layer R3D: videos (N, 3, frames, H, W) to scores (N, classes).

    >>> import torch
    >>> r3d_18()(torch.zeros(2, 3, 8, 16, 16)).shape
    torch.Size([2, 400])
    """
    stem = nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    layers: list[nn.Module] = [nn.Sequential(stem, nn.BatchNorm3d(64), ReLU())]
    channels = 64
    for number, depth in enumerate(DEPTHS):
        width = 64 << number
        for index in range(depth):
            layers.append(basic_block(channels, width, 2 if number > 0 and index == 0 else 1))
            channels = width
    return initialize(classifier(nn.Sequential(*layers), channels, classes, pool=nn.AdaptiveAvgPool3d(1)))
