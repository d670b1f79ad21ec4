"""DeepLabV3 (Chen et al., arXiv:1706.05587) on a dilated ResNet-50."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonconv.bench.architectures.layers import conv_bn, initialize
from tritonconv.bench.architectures.resnet import FEATURES, trunk

__all__ = ["PyramidPooling", "deeplabv3_resnet50"]

WIDTH = 256

# The paper's for an output stride of 8.
RATES = (12, 24, 36)


class PyramidPooling(nn.Module):
    """The same features seen through ever wider filters, and as one average: (N, C, H, W) to (N, 256, H, W).

    >>> PyramidPooling(16)(torch.zeros(2, 16, 4, 4)).shape
    torch.Size([2, 256, 4, 4])
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn(inputs, WIDTH), *(conv_bn(inputs, WIDTH, 3, dilation=rate) for rate in RATES)]
        )
        self.average = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn(inputs, WIDTH))
        self.project = nn.Sequential(*conv_bn((len(RATES) + 2) * WIDTH, WIDTH), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        seen = [branch(x) for branch in self.branches]
        average = F.interpolate(self.average(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*seen, average], 1))


class DeepLabV3(nn.Module):
    """Scores at an eighth of the size, then as large as the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = trunk(output_stride=8)
        self.head = nn.Sequential(PyramidPooling(FEATURES), conv_bn(WIDTH, WIDTH, 3), nn.Conv2d(WIDTH, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.trunk(x))
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3_resnet50(classes: int = 21) -> nn.Module:
    """DeepLabV3 with output stride 8 and no auxiliary head: images (N, 3, H, W) to scores (N, classes, H, W).

    >>> deeplabv3_resnet50()(torch.zeros(2, 3, 17, 17)).shape
    torch.Size([2, 21, 17, 17])
    """
    return initialize(DeepLabV3(classes))
