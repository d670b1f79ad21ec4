"""Memory formats that callers see: torch's for the original model, although `convert` makes weights channels-last.

By torch's rule the result is channels-last if the weight is. Therefore the result of a layer that is called directly, and
the results of a converted forward, are copied to contiguous memory if the original model's results would be contiguous.
Between the layers of a traced forward tensors stay channels-last (convert/formats.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonconv.ops.core.layout import dense_strides, suggests_channels_last
from tritonconv.ops.core.observe import notify_copy

__all__ = ["are_contiguous", "as_original", "restore"]


def as_original(layer: Any, input: Tensor, y: Tensor) -> Tensor:
    """The result of a layer that is called directly, in torch's format for the layer's original weight.

    Args:
        layer: a convolution; its `weight_moved` says whether `convert` made the weight channels-last.
        input: (N, C, *spatial), or unbatched; the result's format depends on the format of the input.
        y: the result.
    """
    if not layer.weight_moved:
        return y
    batched = input.dim() == len(layer.kernel_size) + 2
    return restore(y, are_contiguous(input if batched else input.unsqueeze(0)))


def are_contiguous(*inputs: Tensor) -> bool:
    """Whether none of the inputs is channels-last, so that torch's convolutions of them give contiguous results."""
    return not any(input.dim() > 2 and suggests_channels_last(input) for input in inputs)


def restore(value: Any, contiguous: bool, unless: bool = False) -> Any:
    """A tensor, or tensors in tuples and lists; made contiguous if `contiguous` is true and `unless` is not."""
    if not contiguous or unless:
        return value
    if isinstance(value, (tuple, list)):
        restored = [restore(item, True) for item in value]
        return type(value)(*restored) if hasattr(value, "_fields") else type(value)(restored)
    return _contiguous(value) if isinstance(value, Tensor) else value


def _contiguous(y: Tensor) -> Tensor:
    if y.is_contiguous():
        strides = dense_strides(tuple(y.shape), False)
        # If sizes are one, other strides reach the same elements, but callers see the strides.
        return y if y.stride() == strides else y.as_strided(y.shape, strides)
    notify_copy()
    return y.contiguous()
