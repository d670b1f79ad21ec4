"""torch.nn's adaptive pooling modules on our kernels: same constructors and attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.adaptive.operator import adaptive_pool
from tritonconv.ops.core.backend import Backend

__all__ = [
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
]  # fmt: skip


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` on our kernels: (N, C, L) or (C, L).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AdaptiveAvgPool1d(2)(torch.randn(1, 3, 4)).shape
    torch.Size([1, 3, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = adaptive_pool("avg", input, self.output_size, 1, backend=self.backend)
        return result


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` on our kernels: (N, C, H, W) or (C, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AdaptiveAvgPool2d(2)(torch.randn(1, 3, 4, 4)).shape
    torch.Size([1, 3, 2, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = adaptive_pool("avg", input, self.output_size, 2, backend=self.backend)
        return result


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` on our kernels: (N, C, D, H, W) or (C, D, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AdaptiveAvgPool3d(2)(torch.randn(1, 3, 4, 4, 4)).shape
    torch.Size([1, 3, 2, 2, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = adaptive_pool("avg", input, self.output_size, 3, backend=self.backend)
        return result


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d` on our kernels: (N, C, L) or (C, L).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AdaptiveMaxPool1d(2)(torch.randn(1, 3, 4)).shape
    torch.Size([1, 3, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return adaptive_pool("max", input, self.output_size, 1, self.return_indices, self.backend)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` on our kernels: (N, C, H, W) or (C, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AdaptiveMaxPool2d(2)(torch.randn(1, 3, 4, 4)).shape
    torch.Size([1, 3, 2, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return adaptive_pool("max", input, self.output_size, 2, self.return_indices, self.backend)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d` on our kernels: (N, C, D, H, W) or (C, D, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AdaptiveMaxPool3d(2)(torch.randn(1, 3, 4, 4, 4)).shape
    torch.Size([1, 3, 2, 2, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return adaptive_pool("max", input, self.output_size, 3, self.return_indices, self.backend)
