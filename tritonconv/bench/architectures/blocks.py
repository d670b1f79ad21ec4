"""The blocks that networks repeat, each at a size at which a well-known network has it."""

from __future__ import annotations

from torch import nn

from tritonconv.bench.architectures import mobile, resnet, unet
from tritonconv.bench.architectures.layers import conv_bn, initialize

__all__ = ["bottleneck", "conv_bn_relu", "inverted_residual", "separable", "unet_stage"]


def conv_bn_relu() -> nn.Module:
    """A 3x3 convolution of 256 channels, batch norm, ReLU: images (N, 256, H, W) to the same size.

    >>> import torch
    >>> conv_bn_relu()(torch.zeros(1, 256, 2, 2)).shape
    torch.Size([1, 256, 2, 2])
    """
    return initialize(conv_bn(256, 256, 3))


def bottleneck() -> nn.Module:
    """ResNet-50's block of the third stage, without a stride: images (N, 1024, H, W) to the same size.

    >>> import torch
    >>> bottleneck()(torch.zeros(1, 1024, 2, 2)).shape
    torch.Size([1, 1024, 2, 2])
    """
    return initialize(resnet.bottleneck(1024, 256))


def inverted_residual() -> nn.Module:
    """MobileNetV2's block of 32 channels, six times wider inside: images (N, 32, H, W) to the same size.

    >>> import torch
    >>> inverted_residual()(torch.zeros(1, 32, 2, 2)).shape
    torch.Size([1, 32, 2, 2])
    """
    return initialize(mobile.inverted_residual(32, 32))


def separable() -> nn.Module:
    """MobileNet's block of 512 channels, a depthwise 3x3 convolution and a 1x1 one: images (N, 512, H, W) to the same size.

    >>> import torch
    >>> separable()(torch.zeros(1, 512, 2, 2)).shape
    torch.Size([1, 512, 2, 2])
    """
    return initialize(nn.Sequential(conv_bn(512, 512, 3, groups=512), conv_bn(512, 512)))


def unet_stage() -> nn.Module:
    """U-Net's step up to its second level: images (N, 512, H, W) to (N, 128, 2H, 2W).

    >>> import torch
    >>> unet_stage()(torch.zeros(1, 512, 2, 2)).shape
    torch.Size([1, 128, 4, 4])
    """
    return initialize(unet.unet_stage(512, 256))
