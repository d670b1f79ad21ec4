"""A depthwise convolution and the 1x1 convolution after it as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tritonconv.fused.call import eval_call, fused_call
from tritonconv.fused.shared import separable
from tritonconv.nn.conv import Conv2d
from tritonconv.nn.format import as_original
from tritonconv.ops.core.activation import parse_activation

__all__ = ["DepthwiseSeparableConv2d"]


class DepthwiseSeparableConv2d(Module):
    """A depthwise convolution over (N, C, H, W), then a 1x1 convolution, each with an optional batch norm and activation.

    Args:
        in_channels, out_channels: C, and the number of filters of the 1x1 convolution.
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise convolution, as for `torch.nn.Conv2d`.
        bias: whether both convolutions have one; by default only if no batch norm follows.
        batch_norm: whether a batch norm follows each convolution.
        activation: after each convolution, as for `tritonconv.functional.conv2d_bn_act`, or None.
        eps, momentum: as for `torch.nn.BatchNorm2d`.

    Children `depthwise`, `pointwise` and, with batch norm, `depthwise_bn` and `pointwise_bn` hold the state. In eval mode,
    if it is predicted to be faster, one kernel computes both convolutions of a channels-last image, and the tensor between
    them is never written to memory. If gradients are needed, each convolution is a separate launch.
    Follows F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017.

    >>> layer = DepthwiseSeparableConv2d(8, 16, 3, padding=1, batch_norm=True, activation="relu6").eval()
    >>> layer(torch.ones(1, 8, 5, 5)).shape, sorted(dict(layer.named_children()))
    (torch.Size([1, 16, 5, 5]), ['depthwise', 'depthwise_bn', 'pointwise', 'pointwise_bn'])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        bias: bool | None = None, padding_mode: Any = "zeros", *, batch_norm: bool = False, activation: Any = None,
        eps: float = 1e-5, momentum: float | None = 0.1, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        bias = not batch_norm if bias is None else bias
        self.depthwise = Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode, **made
        )
        self.depthwise_bn = torch.nn.BatchNorm2d(in_channels, eps, momentum, **made) if batch_norm else None
        self.pointwise = Conv2d(in_channels, out_channels, 1, bias=bias, **made)
        self.pointwise_bn = torch.nn.BatchNorm2d(out_channels, eps, momentum, **made) if batch_norm else None
        spec = parse_activation(activation)
        self.act = activation if isinstance(activation, Module) else spec

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        first = eval_call(self.depthwise, self.depthwise_bn, self.act, input, None)
        second = eval_call(self.pointwise, self.pointwise_bn, self.act, input, residual)
        backend = self.depthwise.backend
        if first is None or second is None or self.pointwise.backend != backend:
            between = fused_call(self.depthwise, self.depthwise_bn, self.act, input)
            y = fused_call(self.pointwise, self.pointwise_bn, self.act, between, residual)
        else:
            y = separable(first[1:], second[1:], backend)
        return as_original(self.pointwise, input, y)

    def extra_repr(self) -> str:
        return "" if isinstance(self.act, Module) or self.act is None else f"activation={self.act}"
