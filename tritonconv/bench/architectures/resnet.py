"""ResNet (He et al., arXiv:1512.03385) and ResNeXt (Xie et al., arXiv:1611.05431)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from tritonconv.bench.architectures.layers import ReLU, Residual, classifier, conv_bn, initialize

__all__ = ["FEATURES", "bottleneck", "resnet50", "resnext50_32x4d", "trunk"]

DEPTHS = (3, 4, 6, 3)
EXPANSION = 4

# Channels of the last stage.
FEATURES = 512 * EXPANSION


def bottleneck(
    inputs: int, planes: int, *, stride: int = 1, dilation: int = 1, groups: int = 1, group_width: int = 64
) -> Residual:
    """1x1, 3x3 and 1x1 convolutions around a narrower middle, and a shortcut.

    The stride sits in the 3x3 convolution, where every current implementation has it; the paper's first 1x1 drops three
    pixels of four unread.

    Args:
        inputs: channels that come in; four times `planes` go out.
        planes: channels of the middle in ResNet-50.
        stride: of the 3x3 convolution and of the shortcut.
        dilation: of the 3x3 convolution.
        groups: of the 3x3 convolution.
        group_width: channels of each group in the first stage, where `planes` is 64.

    >>> import torch
    >>> bottleneck(256, 128, stride=2)(torch.zeros(1, 256, 8, 8)).shape
    torch.Size([1, 512, 4, 4])
    """
    middle, outputs = planes * group_width // 64 * groups, planes * EXPANSION
    body = nn.Sequential(
        conv_bn(inputs, middle),
        conv_bn(middle, middle, 3, stride=stride, dilation=dilation, groups=groups),
        conv_bn(middle, outputs, activation=None),
    )
    same = stride == 1 and inputs == outputs
    return Residual(body, None if same else conv_bn(inputs, outputs, stride=stride, activation=None), ReLU())


def trunk(*, groups: int = 1, group_width: int = 64, output_stride: int = 32) -> nn.Sequential:
    """The convolutions of a 50-layer network: images (N, 3, H, W) to (N, 2048, H / output_stride, W / output_stride).

    Past the output stride dilations take the place of strides.

    Raises:
        ValueError: an output stride that is not 8, 16 or 32.

    >>> import torch
    >>> trunk(output_stride=8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 2048, 4, 4])
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    stages = OrderedDict(stem=conv_bn(3, 64, 7, stride=2), pool=nn.MaxPool2d(3, 2, 1))
    channels, reached, dilation = 64, 4, 1
    for number, depth in enumerate(DEPTHS):
        planes = 64 << number
        stride, before = (1, dilation) if number == 0 else (2, dilation)
        if reached * stride > output_stride:
            stride, dilation = 1, 2 * dilation
        reached *= stride
        blocks = []
        for index in range(depth):
            # A block that would have had the stride sees its input as the stage before saw it.
            first = dict(stride=stride, dilation=before) if index == 0 else dict(stride=1, dilation=dilation)
            blocks.append(bottleneck(channels, planes, groups=groups, group_width=group_width, **first))
            channels = planes * EXPANSION
        stages[f"stage{number + 1}"] = nn.Sequential(*blocks)
    return nn.Sequential(stages)


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50: images (N, 3, H, W) to scores (N, classes).

    >>> import torch
    >>> resnet50()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """
    return initialize(classifier(trunk(), FEATURES, classes))


def resnext50_32x4d(classes: int = 1000) -> nn.Module:
    """ResNeXt-50 with 32 groups, of 4 channels in the first stage: images (N, 3, H, W) to scores (N, classes).

    >>> import torch
    >>> resnext50_32x4d()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """
    return initialize(classifier(trunk(groups=32, group_width=4), FEATURES, classes))
