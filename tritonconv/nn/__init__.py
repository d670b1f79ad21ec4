"""torch.nn's modules on our kernels, and fused ones beside them."""

from tritonconv.fused.conv_bn import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d, ConvBNReLU2d
from tritonconv.fused.separable import DepthwiseSeparableConv2d
from tritonconv.fused.squeeze_excite import SqueezeExcite
from tritonconv.nn.adaptive_pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
)
from tritonconv.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from tritonconv.nn.causal import CausalConv1d
from tritonconv.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from tritonconv.nn.deform import DeformConv2d, DeformConv2dPack
from tritonconv.nn.linear import Linear
from tritonconv.nn.pooling import (
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    MinPool1d,
    MinPool2d,
    MinPool3d,
    SumPool1d,
    SumPool2d,
    SumPool3d,
)
from tritonconv.nn.resampling import (
    ChannelShuffle,
    PixelShuffle,
    PixelUnshuffle,
    Upsample,
    UpsamplingBilinear2d,
    UpsamplingNearest2d,
)
from tritonconv.nn.stochastic import StochasticPool2d

__all__ = [
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d",
    "CausalConv1d", "ChannelShuffle", "Conv1d", "Conv2d", "Conv3d", "ConvBNAct1d", "ConvBNAct2d", "ConvBNAct3d",
    "ConvBNReLU2d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "DeformConv2d", "DeformConv2dPack",
    "DepthwiseSeparableConv2d", "LPPool1d", "LPPool2d", "LPPool3d", "Linear", "MaxPool1d", "MaxPool2d", "MaxPool3d",
    "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "MinPool1d", "MinPool2d", "MinPool3d", "PixelShuffle", "PixelUnshuffle",
    "SqueezeExcite", "StochasticPool2d", "SumPool1d", "SumPool2d", "SumPool3d", "SyncBatchNorm", "Upsample",
    "UpsamplingBilinear2d", "UpsamplingNearest2d",
]  # fmt: skip
