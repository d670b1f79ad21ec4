"""torch.nn.functional's names and signatures on our kernels, and fused convolutions beside them."""

from tritonconv.functional.adaptive_pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d,
    adaptive_max_pool2d_with_indices,
    adaptive_max_pool3d,
    adaptive_max_pool3d_with_indices,
)
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
from tritonconv.functional.deform import deform_conv2d
from tritonconv.functional.fused import (
    conv1d_bn_act,
    conv2d_bn_act,
    conv3d_bn_act,
    conv_transpose1d_bn_act,
    conv_transpose2d_bn_act,
    conv_transpose3d_bn_act,
)
from tritonconv.functional.normalization import batch_norm
from tritonconv.functional.pooling import (
    max_pool1d,
    max_pool1d_with_indices,
    max_pool2d,
    max_pool2d_with_indices,
    max_pool3d,
    max_pool3d_with_indices,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
    min_pool1d,
    min_pool2d,
    min_pool3d,
)
from tritonconv.functional.pooling_sums import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    sum_pool1d,
    sum_pool2d,
    sum_pool3d,
)
from tritonconv.functional.resampling import channel_shuffle, interpolate, pixel_shuffle, pixel_unshuffle
from tritonconv.functional.stochastic import stochastic_pool2d

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d", "adaptive_max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "batch_norm", "causal_conv1d", "causal_conv1d_update", "channel_shuffle", "conv1d", "conv1d_bn_act", "conv2d",
    "conv2d_bn_act", "conv3d", "conv3d_bn_act", "conv_transpose1d", "conv_transpose1d_bn_act", "conv_transpose2d",
    "conv_transpose2d_bn_act", "conv_transpose3d", "conv_transpose3d_bn_act", "deform_conv2d", "interpolate", "linear",
    "lp_pool1d", "lp_pool2d", "lp_pool3d", "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices",
    "max_pool3d", "max_pool3d_with_indices", "max_unpool1d", "max_unpool2d", "max_unpool3d", "min_pool1d",
    "min_pool2d", "min_pool3d", "pixel_shuffle", "pixel_unshuffle", "stochastic_pool2d", "sum_pool1d", "sum_pool2d",
    "sum_pool3d",
]  # fmt: skip
