"""U-Net (Ronneberger et al., arXiv:1505.04597), padded and with batch norm, as it is trained today."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonconv.bench.architectures.layers import conv_bn, initialize

__all__ = ["UNet", "double_conv", "unet", "unet_stage"]

LEVELS = 4


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU.

    >>> double_conv(4, 8)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 6, 6])
    """
    return nn.Sequential(conv_bn(inputs, outputs, 3), conv_bn(outputs, outputs, 3))


def unet_stage(inputs: int, channels: int) -> nn.Sequential:
    """A step up: two convolutions, then a transposed 2x2 one to twice the size and half the channels.

    >>> unet_stage(8, 4)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 2, 12, 12])
    """
    return nn.Sequential(*double_conv(inputs, channels), nn.ConvTranspose2d(channels, channels // 2, 2, 2))


class UNet(nn.Module):
    """Four levels down and up again; on the way up each level sees what it was on the way down."""

    def __init__(self, inputs: int, classes: int, base: int) -> None:
        super().__init__()
        widths = [base << level for level in range(LEVELS + 1)]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([inputs, *widths], widths[:-1], strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            [
                unet_stage(widths[-2], widths[-1]),
                # Half of the channels come from below, half from the way down.
                *(unet_stage(2 * width, width) for width in reversed(widths[1:-1])),
            ]
        )
        self.last = double_conv(2 * base, base)
        self.head = nn.Conv2d(base, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for level in self.down:
            x = level(x)
            seen.append(x)
            x = self.pool(x)
        for stage in self.up:
            x = torch.cat([seen.pop(), stage(x)], 1)
        return self.head(self.last(x))


def unet(inputs: int = 3, classes: int = 2, base: int = 64) -> nn.Module:
    """U-Net: images (N, inputs, H, W), H and W divisible by 16, to scores (N, classes, H, W).

    >>> unet(base=4)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 2, 32, 32])
    """
    return initialize(UNet(inputs, classes, base))
