"""Shape arithmetic: the only place that knows it. One file a family of operations; everything here is plain integers."""

from tritonconv.geometry.convolution import INT32_MAX, ConvGeometry, Pass, Triple, expand

__all__ = ["INT32_MAX", "ConvGeometry", "Pass", "Triple", "expand"]
