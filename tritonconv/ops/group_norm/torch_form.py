"""Group norm and what follows it by torch: for calls that torch has to run, and for second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.backend import needs_gradients
from tritonconv.ops.core.epilogue import Epilogue

__all__ = ["by_image", "followed", "group_norm_on_torch", "layer_norm_of_channels", "normalized"]

F = torch.nn.functional


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """The norm of x (N, C, *spatial) over groups of channels, or (`groups` 0) over the channels of each pixel."""
    if groups == 0:
        return layer_norm_of_channels(x, weight, bias, eps)
    return group_norm_on_torch(x, groups, weight, bias, eps)


def group_norm_on_torch(x: Tensor, groups: Any, weight: Any, bias: Any, eps: Any) -> Tensor:
    """torch.nn.functional.group_norm, whose backward pass on CPUs (torch 2.13) fails for two kinds of calls.

    It crashes for a channels-last input that needs no gradient, and raises an error for a bias without a weight.
    """
    if x.device.type == "cpu" and not x.requires_grad and needs_gradients((weight, bias)):
        x = x.detach().requires_grad_()
    if weight is None and isinstance(bias, Tensor):
        weight = torch.ones_like(bias)
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
