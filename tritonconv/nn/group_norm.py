"""torch.nn's group, instance and layer norms on our kernels: same constructors, parameters, state_dict and hooks."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.ops.core.backend import Backend
from tritonconv.ops.group_norm.call import GROUP_NORM_FAMILY, INSTANCE_NORM, LAYER_NORM, LAYER_NORM_CHANNELS

__all__ = ["GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "LayerNorm2d"]

ALONE = (None, None, None)
"""No scale, shift or residual."""


class GroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` on our kernels: (N, C) or (N, C, *spatial).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> GroupNorm(2, 4)(torch.randn(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        tensors = (input, self.weight, self.bias, *ALONE)
        y: Tensor = GROUP_NORM_FAMILY(tensors, ((self.num_groups, self.eps), None), self.backend)
        return y


def normalize(norm: torch.nn.modules.instancenorm._InstanceNorm, input: Tensor) -> Tensor:
    """The norm of a batch, as the module has it."""
    tensors = (input, norm.running_mean, norm.running_var, norm.weight, norm.bias, *ALONE)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    numbers = (norm.training or not norm.track_running_stats, momentum, norm.eps)
    y: Tensor = INSTANCE_NORM(tensors, (numbers, None, False), norm.backend)  # type: ignore[arg-type]
    return y


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` on our kernels: (N, C, L) or (C, L).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> InstanceNorm1d(4)(torch.randn(2, 4, 9)).shape
    torch.Size([2, 4, 9])
    """

    backend: Backend | None = None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return normalize(self, input)


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` on our kernels: (N, C, H, W) or (C, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> InstanceNorm2d(4)(torch.randn(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    """

    backend: Backend | None = None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return normalize(self, input)


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` on our kernels: (N, C, D, H, W) or (C, D, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> InstanceNorm3d(4)(torch.randn(2, 4, 2, 3, 3)).shape
    torch.Size([2, 4, 2, 3, 3])
    """

    backend: Backend | None = None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return normalize(self, input)


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on our kernels over the last axis; over several axes it runs on torch.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> LayerNorm(4)(torch.randn(2, 3, 3, 4)).shape
    torch.Size([2, 3, 3, 4])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        tensors = (input, self.weight, self.bias, *ALONE)
        y: Tensor = LAYER_NORM(tensors, ((self.normalized_shape, self.eps), None), self.backend)
        return y


class LayerNorm2d(torch.nn.LayerNorm):
    """Layer norm over the channels of each pixel of (N, C, *spatial) images, with `torch.nn.LayerNorm`'s constructor.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> LayerNorm2d(4)(torch.randn(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        tensors = (input, self.weight, self.bias, *ALONE)
        y: Tensor = LAYER_NORM_CHANNELS(tensors, ((self.eps,), None), self.backend)
        return y
