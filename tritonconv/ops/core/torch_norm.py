"""torch's batch norm, for calls that torch has to run."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batch_norm_on_torch"]


def batch_norm_on_torch(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.batch_norm, for vectors with any strides.

    torch's channels-last backward pass on CPUs reads these vectors as if they were contiguous (torch 2.13). It therefore
    gets contiguous copies, and running statistics are written back.
    """
    given = running_mean, running_var
    mean, var, weight, bias = (_dense(t) for t in (*given, weight, bias))
    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    if training:
        for old, new in zip(given, (mean, var), strict=True):
            if old is not None and new is not None and new is not old:
                old.copy_(new)
    return y


def _dense(t: Tensor | None) -> Tensor | None:
    # torch raises the error for an argument that is not a tensor.
    return t.contiguous() if isinstance(t, Tensor) else t
