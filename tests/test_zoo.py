"""Networks of the textbook convert whole: no layer that computes is left on torch, and they train as they did."""

from __future__ import annotations

from matrix import every, some
from test_families import check_family
from torch import nn
from zoo import VGG, DenseNet, EfficientNet, Inception, SEResNet, ShuffleNet, UNet

COMPUTING = (
    "Conv2d", "ConvTranspose2d", "Linear", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Upsample",
    "ChannelShuffle",
)  # fmt: skip
MODELS = {
    VGG: {"conv_flat_kernel", "pool_kernel", "adaptive_forward_kernel"},
    # Branches are written where the concatenation wants them, and the pooled one too.
    Inception: {"pool_kernel", "global_reduce_kernel"},
    DenseNet: {"batch_norm_normalize_kernel", "pool_kernel"},
    # The average comes with the convolution before it.
    SEResNet: {"average_kernel", "excite_kernel", "scale_kernel"},
    ShuffleNet: {"shuffle_kernel", "pool_kernel"},
    # The product with the gate goes into the convolution behind it.
    EfficientNet: {"average_kernel", "excite_kernel", "depthwise_kernel"},
    UNet: {"resample_kernel", "conv_up_kernel"},
}


@every(kind=some(MODELS, 4))
def test_it_runs_on_our_kernels_and_gives_what_torch_does(kind: type[nn.Module]) -> None:
    check_family(kind, MODELS[kind], COMPUTING)
