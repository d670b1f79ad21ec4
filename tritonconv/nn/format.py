"""Memory formats that callers see: torch's for the original model, although `convert` makes weights channels-last.

By torch's rule the result is channels-last if the weight is. Therefore the result of a layer that is called directly is
copied to contiguous memory if the original layer's result would be contiguous. In a graph tensors stay channels-last from
layer to layer (graph/formats.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonconv.ops.core.family import IN_GRAPHS
from tritonconv.ops.core.layout import dense_strides, suggests_channels_last
from tritonconv.ops.core.observe import notify_copy

__all__ = ["as_original", "contiguous"]


def as_original(layer: Any, input: Tensor, y: Tensor) -> Tensor:
    """The result of a layer that is called directly, in torch's format for the layer's original weight.

    Args:
        layer: a convolution; its `weight_moved` says whether `convert` made the weight channels-last.
        input: (N, C, *spatial), or unbatched; the result's format depends on the format of the input.
        y: the result.
    """
    if not layer.weight_moved:
        return y
    batch = input if input.dim() == len(layer.kernel_size) + 2 else input.unsqueeze(0)
    return y if suggests_channels_last(batch) else contiguous(y)


def contiguous(y: Tensor) -> Tensor:
    """The tensor with contiguous strides, also of axes of size one, where code sees them."""
    if y.is_contiguous():
        strides = dense_strides(tuple(y.shape), False)
        return y if y.stride() == strides else y.as_strided(y.shape, strides)
    notify_copy()
    return y.contiguous()


IN_GRAPHS.append(contiguous)
