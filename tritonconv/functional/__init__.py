"""Functions with torch.nn.functional's names and signatures on our kernels, and fused convolutions."""

from tritonconv.functional.adaptive_pooling import *
from tritonconv.functional.causal import *
from tritonconv.functional.convolution import *
from tritonconv.functional.deform import *
from tritonconv.functional.fused import *
from tritonconv.functional.normalization import *
from tritonconv.functional.pooling import *
from tritonconv.functional.pooling_sums import *
from tritonconv.functional.resampling import *

__all__ = [name for name, value in globals().items() if name[0] != "_" and callable(value)]
