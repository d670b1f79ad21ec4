"""Which kernel a batched call is prepared for."""

from __future__ import annotations

from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.calls import Prepared
from tritonconv.ops.convolution import prepare
from tritonconv.ops.epilogue import Epilogue
from tritonconv.ops.launch import Kind
from tritonconv.ops.transposed import prepare_transposed

__all__ = ["prepare_call"]


def prepare_call(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: Kind, statistics: bool = False
) -> Prepared:
    """Everything of a batched call but its tensors, which are what `check_convolution` wants; touches no memory.

    Args:
        kind: "matmul" takes the TF32 switch of matrix products.
        statistics: whether it is to be run with room for them.
    """
    if kind == "conv_transpose":
        return prepare_transposed(x, weight, epilogue, geometry, statistics)
    return prepare(x, weight, epilogue, geometry, kind, statistics)
