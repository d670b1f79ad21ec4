"""Shape arithmetic: the only place that knows it. One file a family of operations; everything here is plain integers."""

from tritonconv.geometry.adaptive import AdaptiveGeometry
from tritonconv.geometry.boxes import Taps, best_box, boxes_over, pass_extents, phase_size, phases_of, tap_hops, tap_places
from tritonconv.geometry.convolution import ConvGeometry, Pass, Triple, expand
from tritonconv.geometry.deform import DeformGeometry
from tritonconv.geometry.limits import INT32_MAX, needs_int64
from tritonconv.geometry.pooling import PoolGeometry
from tritonconv.geometry.powers import power, power_of_two_divisor, width
from tritonconv.geometry.resampling import ResampleGeometry

__all__ = [
    "INT32_MAX", "AdaptiveGeometry", "ConvGeometry", "DeformGeometry", "Pass", "PoolGeometry", "ResampleGeometry", "Taps",
    "Triple", "best_box", "boxes_over", "expand", "needs_int64", "pass_extents", "phase_size", "phases_of", "power",
    "power_of_two_divisor", "tap_hops", "tap_places", "width",
]  # fmt: skip
