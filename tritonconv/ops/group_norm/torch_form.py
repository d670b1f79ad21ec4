"""Group norm and what follows it by torch: for calls that torch has to run, and for second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import Epilogue

__all__ = ["by_image", "followed", "layer_norm_of_channels", "normalized"]

F = torch.nn.functional


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """The norm of x (N, C, *spatial) over groups of channels, or (`groups` 0) over the channels of each pixel."""
    if groups == 0:
        return layer_norm_of_channels(x, weight, bias, eps)
    return F.group_norm(x, groups, weight, bias, eps)


def layer_norm_of_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's layer norm over axis 1."""
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, eps).movedim(-1, 1)


def by_image(t: Tensor, y: Tensor, axis: int = 1) -> Tensor:
    """t (N, C), or with unit axes, as it goes with y, whose channels are on this axis."""
    shape = [1] * y.dim()
    shape[0], shape[axis] = y.shape[0], y.shape[axis]
    return t.reshape(shape)


def followed(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: ActivationSpec | None,
    axis: int = 1,
) -> Tensor:  # fmt: skip
    """act(y * (1 + scale) + shift + residual)"""
    if scale is not None:
        y = y * (1 + by_image(scale, y, axis))
    if shift is not None:
        y = y + by_image(shift, y, axis)
    return Epilogue(residual=residual, activation=activation).torch(y)
