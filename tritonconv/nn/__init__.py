"""torch.nn's modules on our kernels, and fused ones beside them."""

from tritonconv.nn.conv import Conv1d, Conv2d, Conv3d
from tritonconv.nn.fused import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d, ConvBNReLU2d
from tritonconv.nn.linear import Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvBNAct1d", "ConvBNAct2d", "ConvBNAct3d", "ConvBNReLU2d", "Linear"]
