"""torch.nn's poolings on our kernels: same constructors, attributes and hooks; also minimum and sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.core.backend import Backend
from tritonconv.ops.pool.call import PoolKind, lp_pool, pool, pool_with_indices, unpool
from tritonconv.ops.stochastic import stochastic_pool

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "MinPool1d",
    "MinPool2d",
    "MinPool3d",
    "StochasticPool2d",
    "SumPool1d",
    "SumPool2d",
    "SumPool3d",
]  # fmt: skip


def _extremum(kind: PoolKind, nd: int, layer: Any, input: Tensor) -> Any:
    function: Any = pool_with_indices if layer.return_indices else pool
    numbers = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode
    return function(kind, input, *numbers, nd=nd, backend=layer.backend)


def _mean(nd: int, layer: Any, input: Tensor, divisor: int | None, include_pad: bool) -> Tensor:
    numbers = layer.kernel_size, layer.stride, layer.padding, 1, layer.ceil_mode
    return pool("avg", input, *numbers, nd=nd, divisor=divisor, include_pad=include_pad, backend=layer.backend)


class MaxPool1d(torch.nn.MaxPool1d):
    """`torch.nn.MaxPool1d` on our kernels: (N, C, L) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MaxPool1d(2)(torch.randn(2, 3, 6)).shape
    torch.Size([2, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return _extremum("max", 1, self, input)


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on our kernels: (N, C, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MaxPool2d(2)(torch.randn(2, 3, 6, 6)).shape
    torch.Size([2, 3, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return _extremum("max", 2, self, input)


class MaxPool3d(torch.nn.MaxPool3d):
    """`torch.nn.MaxPool3d` on our kernels: (N, C, D, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MaxPool3d(2)(torch.randn(2, 3, 6, 6, 6)).shape
    torch.Size([2, 3, 3, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return _extremum("max", 3, self, input)


class MinPool1d(torch.nn.MaxPool1d):
    """Minimum of every window: `-MaxPool1d(...)(-input)`, with the same arguments; (N, C, L) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MinPool1d(2)(torch.arange(4.0).view(1, 4)).tolist()
    [[0.0, 2.0]]
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return _extremum("min", 1, self, input)


class MinPool2d(torch.nn.MaxPool2d):
    """Minimum of every window: `-MaxPool2d(...)(-input)`, with the same arguments; (N, C, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MinPool2d(2)(torch.arange(4.0).view(1, 2, 2)).item()
    0.0
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return _extremum("min", 2, self, input)


class MinPool3d(torch.nn.MaxPool3d):
    """Minimum of every window: `-MaxPool3d(...)(-input)`, with the same arguments; (N, C, D, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MinPool3d(2)(torch.arange(8.0).view(1, 2, 2, 2)).item()
    0.0
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Any:
        return _extremum("min", 3, self, input)


class AvgPool1d(torch.nn.AvgPool1d):
    """`torch.nn.AvgPool1d` on our kernels: (N, C, L) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AvgPool1d(2)(torch.randn(2, 3, 6)).shape
    torch.Size([2, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _mean(1, self, input, None, self.count_include_pad)


class AvgPool2d(torch.nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on our kernels: (N, C, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AvgPool2d(2)(torch.randn(2, 3, 6, 6)).shape
    torch.Size([2, 3, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _mean(2, self, input, self.divisor_override, self.count_include_pad)


class AvgPool3d(torch.nn.AvgPool3d):
    """`torch.nn.AvgPool3d` on our kernels: (N, C, D, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> AvgPool3d(2)(torch.randn(2, 3, 6, 6, 6)).shape
    torch.Size([2, 3, 3, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _mean(3, self, input, self.divisor_override, self.count_include_pad)


class SumPool1d(torch.nn.AvgPool1d):
    """Sum of every window: an `AvgPool1d` whose divisor is always 1; (N, C, L) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> SumPool1d(2)(torch.ones(1, 2)).item()
    2.0
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _mean(1, self, input, 1, True)


class SumPool2d(torch.nn.AvgPool2d):
    """Sum of every window: an `AvgPool2d` whose divisor is always 1; (N, C, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> SumPool2d(2)(torch.ones(1, 2, 2)).item()
    4.0
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _mean(2, self, input, 1, True)


class SumPool3d(torch.nn.AvgPool3d):
    """Sum of every window: an `AvgPool3d` whose divisor is always 1; (N, C, D, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> SumPool3d(2)(torch.ones(1, 2, 2, 2)).item()
    8.0
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return _mean(3, self, input, 1, True)


class LPPool1d(torch.nn.LPPool1d):
    """`torch.nn.LPPool1d` on our kernels: (N, C, L) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> LPPool1d(2, 2)(torch.randn(2, 3, 6)).shape
    torch.Size([2, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return lp_pool(1, input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode, self.backend)


class LPPool2d(torch.nn.LPPool2d):
    """`torch.nn.LPPool2d` on our kernels: (N, C, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> LPPool2d(2, 2)(torch.randn(2, 3, 6, 6)).shape
    torch.Size([2, 3, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return lp_pool(2, input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode, self.backend)


class LPPool3d(torch.nn.LPPool3d):
    """`torch.nn.LPPool3d` on our kernels: (N, C, D, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> LPPool3d(2, 2)(torch.randn(2, 3, 6, 6, 6)).shape
    torch.Size([2, 3, 3, 3, 3])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return lp_pool(3, input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode, self.backend)


class MaxUnpool1d(torch.nn.MaxUnpool1d):
    """`torch.nn.MaxUnpool1d` on our kernels: (N, C, L) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MaxUnpool1d(2)(torch.randn(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 6])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return unpool(1, input, indices, self.kernel_size, self.stride, self.padding, output_size, self.backend)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """`torch.nn.MaxUnpool2d` on our kernels: (N, C, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MaxUnpool2d(2)(torch.randn(2, 3, 3, 3), torch.zeros(2, 3, 3, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 6, 6])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return unpool(2, input, indices, self.kernel_size, self.stride, self.padding, output_size, self.backend)


class MaxUnpool3d(torch.nn.MaxUnpool3d):
    """`torch.nn.MaxUnpool3d` on our kernels: (N, C, D, H, W) or without N.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> MaxUnpool3d(2)(torch.randn(2, 3, 3, 3, 3), torch.zeros(2, 3, 3, 3, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 6, 6, 6])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return unpool(3, input, indices, self.kernel_size, self.stride, self.padding, output_size, self.backend)


class StochasticPool2d(torch.nn.Module):
    """One drawn element of each window in training, its weighted mean in eval mode; (N, C, H, W) or (C, H, W).

    Args:
        kernel_size, stride, padding, ceil_mode: as for `tritonconv.functional.stochastic_pool2d`.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

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
