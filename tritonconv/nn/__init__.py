"""torch.nn's modules on our kernels, and fused modules; `__all__` of each file lists its names."""

from tritonconv.fused.conv_bn import *
from tritonconv.fused.separable import *
from tritonconv.fused.squeeze_excite import *
from tritonconv.nn.adaptive_pooling import *
from tritonconv.nn.batch_norm import *
from tritonconv.nn.causal import *
from tritonconv.nn.conv import *
from tritonconv.nn.deform import *
from tritonconv.nn.group_norm import *
from tritonconv.nn.linear import *
from tritonconv.nn.pooling import *
from tritonconv.nn.resampling import *

__all__ = [name for name, value in globals().items() if name[0] != "_" and callable(value)]
