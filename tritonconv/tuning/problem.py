"""What a choice of config may depend on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tritonconv.geometry import ConvGeometry, Pass, Triple
from tritonconv.tuning.devices import Device, Products, products_of

__all__ = ["ITEMSIZE", "Problem"]

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Problem:
    """One product that a kernel is to compute on a device."""

    kernel: str
    """conv_fprop, conv_flat, matmul, depthwise, ..."""
    geometry: ConvGeometry
    """As the kernel sees it: patches may have become channels, and groups that share a tile one group."""
    dtype: str
    """torch's name of the element type, such as "bfloat16"."""
    tf32: bool
    """Whether fp32 products run on tensor cores."""
    vectors: bool
    """Whether the image is read by vectors; of direct kernels: whether it is channels-last."""
    device: Device
    pass_: Pass = "fprop"
    computed: bool = False
    """Whether the kernel computes an operand on its way in: a batch norm's gradient from two tensors."""
    statistics: bool = False
    """Whether its epilogue does more than to store: a batch norm's statistics, sums, another tensor's channels.

    What was measured without counts.
    """
    pack: int = 1
    """How many of the layer's groups are one of the geometry's: all but a share of 1 / pack of its weights are zeros."""

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def products(self) -> Products:
        return products_of(self.dtype, self.tf32)

    @property
    def tensor_cores(self) -> bool:
        """Whether products run there: not for IEEE fp32, nor for fp64."""
        return self.products in ("16", "tf32")

    @property
    def result(self) -> Triple:
        """Extents of the image that is written, or, for a weight gradient, of the one whose pixels are added up."""
        return self.geometry.input if self.pass_ == "dgrad" else self.geometry.output

    @functools.cached_property
    def gemm(self) -> tuple[int, int, int]:
        """(M, N, K) of one group."""
        return self.geometry.gemm(self.pass_)

    @property
    def run(self) -> int:
        """Length of the reduction's contiguous runs: a tap's channels, or all where no tap interrupts it."""
        g = self.geometry
        if self.pass_ == "wgrad":
            return self.gemm[2]
        return (g.out_channels if self.pass_ == "dgrad" else g.in_channels) // g.groups
