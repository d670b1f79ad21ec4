"""torch.nn.functional's names and signatures on our kernels, and fused convolutions beside them."""

from tritonconv.functional.causal import causal_conv1d, causal_conv1d_update
from tritonconv.functional.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    linear,
)
from tritonconv.functional.fused import (
    conv1d_bn_act,
    conv2d_bn_act,
    conv3d_bn_act,
    conv_transpose1d_bn_act,
    conv_transpose2d_bn_act,
    conv_transpose3d_bn_act,
)
from tritonconv.functional.normalization import batch_norm

__all__ = [
    "batch_norm", "causal_conv1d", "causal_conv1d_update", "conv1d", "conv1d_bn_act", "conv2d", "conv2d_bn_act",
    "conv3d", "conv3d_bn_act", "conv_transpose1d", "conv_transpose1d_bn_act", "conv_transpose2d",
    "conv_transpose2d_bn_act", "conv_transpose3d", "conv_transpose3d_bn_act", "linear",
]  # fmt: skip
