"""Memory formats that callers see: those that torch gives the original, although `convert` moves weights to channels-last.

By torch's rule a channels-last weight makes a channels-last result. What a layer gives when it is called on its own, and
what leaves a converted forward, therefore goes back to contiguous memory where the original's would lie so; between the
layers of a traced forward it stays channels-last (convert/formats.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonconv.ops.core.layout import dense_strides, suggests_channels_last
from tritonconv.ops.core.observe import notify_copy

__all__ = ["are_contiguous", "as_original", "restore"]


def as_original(layer: Any, input: Tensor, y: Tensor) -> Tensor:
    """The result of a layer that is called on its own, in the format that torch gives it with the layer's original weight.

    Args:
        layer: a convolution; its `weight_moved` tells whether `convert` made the weight channels-last.
        input: (N, C, *spatial), or unbatched: the result's format follows its.
        y: the result.
    """
    if not layer.weight_moved:
        return y
    batched = input.dim() == len(layer.kernel_size) + 2
    return restore(y, are_contiguous(input if batched else input.unsqueeze(0)))


def are_contiguous(*inputs: Tensor) -> bool:
    """Whether none of them is channels-last, so that torch's convolutions of them are contiguous."""
    return not any(input.dim() > 2 and suggests_channels_last(input) for input in inputs)


def restore(value: Any, contiguous: bool, unless: bool = False) -> Any:
    """A tensor, or tensors in tuples and lists, contiguous if the former flag says so and the latter does not."""
    if not contiguous or unless:
        return value
    if isinstance(value, (tuple, list)):
        restored = [restore(item, True) for item in value]
        return type(value)(*restored) if hasattr(value, "_fields") else type(value)(restored)
    return _contiguous(value) if isinstance(value, Tensor) else value


def _contiguous(y: Tensor) -> Tensor:
    if y.is_contiguous():
        strides = dense_strides(tuple(y.shape), False)
        # Where sizes are one, other strides reach the same elements; but callers see them.
        return y if y.stride() == strides else y.as_strided(y.shape, strides)
    notify_copy()
    return y.contiguous()
