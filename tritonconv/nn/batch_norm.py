"""torch.nn's batch norms on our kernels: same constructors, parameters, buffers, state_dict and hooks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.call import BATCH_NORM
from tritonconv.ops.core.backend import Backend

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]


class Norm(NamedTuple):
    """The arguments of torch.nn.functional.batch_norm after the input, in its order, as a module passes them."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float


def begin_batch(norm: torch.nn.modules.batchnorm._BatchNorm) -> Norm:
    """Count the batch, as the module's forward does, and return the arguments with which it is normalized."""
    momentum = count_batch(norm) if norm.training else 0.0 if norm.momentum is None else norm.momentum
    running_mean, running_var = norm.running_mean, norm.running_var
    training = norm.training or (running_mean is None and running_var is None)
    if norm.training and not norm.track_running_stats:
        running_mean = running_var = None
    return Norm(running_mean, running_var, norm.weight, norm.bias, training, momentum, norm.eps)


def count_batch(norm: torch.nn.modules.batchnorm._BatchNorm) -> float:
    """Count a batch of training, and return its weight in the running statistics."""
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def group_of(norm: torch.nn.Module) -> str:
    """Name of the process group over whose pixels a module normalizes now; "" if it normalizes only its own."""
    if not isinstance(norm, torch.nn.SyncBatchNorm) or not norm.training or not torch.distributed.is_available():
        return ""
    if not torch.distributed.is_initialized():
        return ""
    group: Any = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if group.size() > 1 else ""


def normalize(norm: Any, input: Tensor, group: str = "") -> Tensor:
    """norm(input); `group` is the name of the process group over whose pixels it normalizes."""
    mean, var, weight, bias, *numbers = begin_batch(norm)
    tensors = (input, mean, var, weight, bias, None)
    y: Tensor = BATCH_NORM(tensors, (tuple(numbers), None, group), norm.backend)
    return y


class BatchNorm1d(torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on our kernels: (N, C) or (N, C, L).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> BatchNorm1d(3)(torch.randn(4, 3)).shape
    torch.Size([4, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return normalize(self, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on our kernels: (N, C, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> BatchNorm2d(3)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return normalize(self, input)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on our kernels: (N, C, D, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> BatchNorm3d(3)(torch.randn(2, 3, 2, 2, 2)).shape
    torch.Size([2, 3, 2, 2, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return normalize(self, input)


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` on our kernels: (N, C, *), normalized over the pixels of a whole process group.

    Every process must run it on the same backend. Unlike torch's, it accepts tensors on every device that our kernels
    support. There is no second derivative over a group of several processes.
    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> SyncBatchNorm(3)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = group_of(self)
        tensors = (input, self.running_mean, self.running_var, self.weight, self.bias, None)
        if group and BATCH_NORM.refuses(tensors, ((True, 0.0, self.eps), None, group), self.backend):
            return super().forward(input)
        return normalize(self, input, group=group)
