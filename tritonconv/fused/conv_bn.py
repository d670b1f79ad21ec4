"""A convolution, its batch norm and an activation as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tritonconv.fused.call import fused_call
from tritonconv.nn.conv import Conv1d, Conv2d, Conv3d
from tritonconv.nn.format import as_original
from tritonconv.ops.core.activation import parse_activation

__all__ = ["ConvBNAct1d", "ConvBNAct2d", "ConvBNAct3d", "ConvBNReLU2d"]


class _ConvBNAct(torch.nn.Module):
    """A convolution, its batch norm and an activation; children `conv`, `bn` and `act` hold the state."""

    # The class of the convolution; the common base of these classes has another constructor.
    convolution: Any
    batch_norm: type[torch.nn.modules.batchnorm._BatchNorm]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, bias: bool = False, padding_mode: str = "zeros", *, activation: Any = "relu", eps: float = 1e-5,
        momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = self.convolution(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = self.batch_norm(
            out_channels, eps=eps, momentum=momentum, affine=affine, track_running_stats=track_running_stats,
            device=device, dtype=dtype,
        )  # fmt: skip
        spec = parse_activation(activation)
        self.act = activation if isinstance(activation, Module) else spec

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        modules = self._modules
        # As in `member`; the activation may be a module or not.
        act = modules.get("act") or self.act
        conv: Any = modules["conv"]
        y = fused_call(conv, modules["bn"], act, input, residual)
        return as_original(conv, input, y) if conv.weight_moved else y

    def extra_repr(self) -> str:
        return "" if isinstance(self.act, torch.nn.Module) else f"activation={self.act}"


class ConvBNAct1d(_ConvBNAct):
    """act(batch_norm(conv(x)) + residual) over (N, C, L), one kernel in eval mode; see `ConvBNAct2d`."""

    convolution = Conv1d
    batch_norm = torch.nn.BatchNorm1d


class ConvBNAct2d(_ConvBNAct):
    """act(batch_norm(conv(x)) + residual) over (N, C, H, W), one kernel in eval mode.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            for `torch.nn.Conv2d`, but by default without a bias, because a batch norm follows.
        activation: as for `tritonconv.functional.conv2d_bn_act`.
        eps, momentum, affine, track_running_stats: as for `torch.nn.BatchNorm2d`.

    The state_dict has the keys of a convolution `conv` and a batch norm `bn`. In training mode the convolution computes the
    batch's statistics together with its result, and one more pass does the rest; gradients run on our kernels.

    >>> block = ConvBNAct2d(3, 8, 3, padding=1, activation="silu").eval()
    >>> block(torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """

    convolution = Conv2d
    batch_norm = torch.nn.BatchNorm2d


class ConvBNAct3d(_ConvBNAct):
    """act(batch_norm(conv(x)) + residual) over (N, C, D, H, W), one kernel in eval mode; see `ConvBNAct2d`."""

    convolution = Conv3d
    batch_norm = torch.nn.BatchNorm3d


class ConvBNReLU2d(ConvBNAct2d):
    """`ConvBNAct2d` with the activation "relu"."""
