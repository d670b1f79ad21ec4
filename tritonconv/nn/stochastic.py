"""Stochastic pooling as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.core.backend import Backend
from tritonconv.ops.stochastic import stochastic_pool

__all__ = ["StochasticPool2d"]


class StochasticPool2d(torch.nn.Module):
    """One drawn element of each window in training, its weighted mean in eval mode: (N, C, H, W) or (C, H, W).

    Args:
        kernel_size, stride, padding, ceil_mode: as `tritonconv.functional.stochastic_pool2d` takes them.

    `backend` ("auto", "triton", "torch") is the layer's own choice; None leaves it to `tritonconv.set_backend`.

    >>> StochasticPool2d(2)(torch.rand(1, 3, 4, 4)).shape
    torch.Size([1, 3, 2, 2])
    """

    backend: Backend | None = None

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False) -> None:
        super().__init__()
        self.kernel_size, self.padding, self.ceil_mode = kernel_size, padding, ceil_mode
        self.stride = kernel_size if stride is None else stride

    def forward(self, input: Tensor) -> Tensor:
        return stochastic_pool(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.training, None, self.backend
        )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}"
