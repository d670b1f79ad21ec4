"""Shape arithmetic: the only place that knows it. One file a family of operations; everything here is plain integers."""

from tritonconv.geometry.adaptive import AdaptiveGeometry
from tritonconv.geometry.convolution import INT32_MAX, ConvGeometry, Pass, Triple, expand
from tritonconv.geometry.pooling import PoolGeometry
from tritonconv.geometry.powers import power, power_of_two_divisor, width
from tritonconv.geometry.resampling import ResampleGeometry

__all__ = [
    "INT32_MAX", "AdaptiveGeometry", "ConvGeometry", "Pass", "PoolGeometry", "ResampleGeometry", "Triple", "expand",
    "power", "power_of_two_divisor", "width",
]  # fmt: skip
