"""torch.nn's modules on our kernels, and fused ones beside them."""

from tritonconv.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from tritonconv.nn.causal import CausalConv1d
from tritonconv.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from tritonconv.nn.fused import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d, ConvBNReLU2d
from tritonconv.nn.linear import Linear
from tritonconv.nn.separable import DepthwiseSeparableConv2d
from tritonconv.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CausalConv1d", "Conv1d", "Conv2d", "Conv3d", "ConvBNAct1d",
    "ConvBNAct2d", "ConvBNAct3d", "ConvBNReLU2d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "DepthwiseSeparableConv2d", "Linear", "SqueezeExcite", "SyncBatchNorm",
]  # fmt: skip
