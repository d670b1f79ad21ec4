"""ConvNeXt (Liu et al., arXiv:2201.03545)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonconv.bench.architectures.layers import StochasticDepth, classifier

__all__ = ["ChannelNorm", "ConvNeXtBlock", "convnext_tiny"]

DEPTHS = (3, 3, 9, 3)
WIDTHS = (96, 192, 384, 768)
EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of images (N, C, H, W).

    >>> ChannelNorm(2)(torch.tensor([[[[1.0]], [[3.0]]]])).flatten().round().tolist()
    [-1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        # Permuting channels-last images moves nothing in memory.
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, then two linear layers over the channels of each pixel, beside a shortcut.

    >>> ConvNeXtBlock(8, 0.0)(torch.zeros(1, 8, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        # So small at first that every block begins as the identity.
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels, EPS), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * self.mlp(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.drop(y.permute(0, 3, 1, 2))


def convnext_tiny(classes: int = 1000) -> nn.Module:
    """ConvNeXt-T: images (N, 3, H, W) to scores (N, classes).

    >>> convnext_tiny()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, 4), ChannelNorm(WIDTHS[0], EPS)]
    # From never in the first block to every tenth time in the last.
    drops = iter(torch.linspace(0, 0.1, sum(DEPTHS), device="cpu").tolist())
    for number, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        if number > 0:
            before = WIDTHS[number - 1]
            layers.append(nn.Sequential(ChannelNorm(before, EPS), nn.Conv2d(before, width, 2, 2)))
        layers.append(nn.Sequential(*(ConvNeXtBlock(width, next(drops)) for _ in range(depth))))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ChannelNorm(WIDTHS[-1], EPS))
    model = classifier(nn.Sequential(*layers), WIDTHS[-1], classes, pool=pool)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return model
