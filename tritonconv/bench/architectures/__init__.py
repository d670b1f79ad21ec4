"""Networks and blocks that the benchmarks time, in torch's own layers, each written from its paper."""

from tritonconv.bench.architectures.blocks import bottleneck, conv_bn_relu, inverted_residual, separable, unet_stage
from tritonconv.bench.architectures.convnext import convnext_tiny
from tritonconv.bench.architectures.deeplab import deeplabv3_resnet50
from tritonconv.bench.architectures.mobile import efficientnet_b0, mobilenet_v2
from tritonconv.bench.architectures.resnet import resnet50, resnext50_32x4d
from tritonconv.bench.architectures.resnet3d import r3d_18
from tritonconv.bench.architectures.unet import unet

__all__ = [
    "bottleneck", "conv_bn_relu", "convnext_tiny", "deeplabv3_resnet50", "efficientnet_b0", "inverted_residual",
    "mobilenet_v2", "r3d_18", "resnet50", "resnext50_32x4d", "separable", "unet", "unet_stage",
]  # fmt: skip
