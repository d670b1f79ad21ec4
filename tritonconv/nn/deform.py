"""Deformable convolution as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.nn.conv import Conv2d, member
from tritonconv.nn.format import as_original
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.deform.operator import deform_convolution

__all__ = ["DeformConv2d", "DeformConv2dPack"]


class DeformConv2d(torch.nn.Module):
    """`torchvision.ops.DeformConv2d`, with its parameters and state_dict: from (N, C, H, W) and offsets to (N, K, P, Q).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in torchvision.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> layer = DeformConv2d(4, 6, 3, padding=1)
    >>> x, offset, mask = torch.randn(1, 4, 5, 5), torch.zeros(1, 18, 5, 5), torch.ones(1, 9, 5, 5)
    >>> plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    >>> torch.allclose(layer(x, offset, mask), plain, atol=1e-5)
    True
    """

    backend: Backend | None = None
    weight_moved = False
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if in_channels % groups != 0:
            raise ValueError(f"in_channels must be divisible by groups, got in_channels={in_channels}, groups={groups}")
        if out_channels % groups != 0:
            raise ValueError(f"out_channels must be divisible by groups, got out_channels={out_channels}, groups={groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = pair(kernel_size), pair(stride)
        self.padding, self.dilation = pair(padding), pair(dilation)
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random values from torchvision's distributions, in torchvision's order."""
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1] * self.kernel_size[0] * self.kernel_size[1])
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """The deformable convolution.

        Args:
            input: (N, C, H, W).
            offset: (N, 2 * offset_groups * R * S, P, Q).
            mask: (N, offset_groups * R * S, P, Q).
        """
        y = deform_convolution(
            "deform_conv2d", input, offset, mask, member(self, "weight"), Epilogue(member(self, "bias")),
            (self.stride, self.padding, self.dilation), self.backend,
        )  # fmt: skip
        return as_original(self, input, y)

    def __repr__(self) -> str:
        parts = [str(self.in_channels), str(self.out_channels), f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        parts += [f"padding={self.padding}"] * (self.padding != (0, 0))
        parts += [f"dilation={self.dilation}"] * (self.dilation != (1, 1))
        parts += [f"groups={self.groups}"] * (self.groups != 1)
        parts += ["bias=False"] * (self.bias is None)
        return f"{type(self).__name__}({', '.join(parts)})"


class DeformConv2dPack(DeformConv2d):
    """mmcv's packed layers: a deformable convolution and the convolution that predicts its offsets and its mask.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for `DeformConv2d`.
        deform_groups: number of groups of channels; each group has its own offsets.
        modulated: whether there is also a mask, as in version 2 (Zhu et al. 2019).

    Parameters are `weight`, `bias`, `conv_offset.weight` and `conv_offset.bias`, as in mmcv's
    `ModulatedDeformConv2dPack` and `DeformConv2dPack`. The parameters of `conv_offset` are initialized with zeros.

    >>> layer = DeformConv2dPack(4, 6, 3, padding=1)
    >>> layer(torch.randn(1, 4, 5, 5)).shape
    torch.Size([1, 6, 5, 5])
    """

    deform_groups: int

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, deform_groups: int = 1, bias: bool = True, *, modulated: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.deform_groups = deform_groups
        predicted = (3 if modulated else 2) * deform_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = Conv2d(in_channels, predicted, self.kernel_size, self.stride, self.padding, self.dilation)
        torch.nn.init.zeros_(self.conv_offset.weight)
        torch.nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """The deformable convolution of the image (N, C, H, W), with the offsets and mask predicted from the image."""
        predicted, weight = self.conv_offset(input), member(self, "weight")
        # The attribute's name in present and in older versions of mmcv.
        groups: int = self.__dict__.get("deform_groups") or self.__dict__["deformable_groups"]
        pairs = 2 * groups * weight.shape[2] * weight.shape[3]
        offset, mask = predicted[:, :pairs], None
        if predicted.shape[1] > pairs:
            mask = predicted[:, pairs:].sigmoid()
        y = deform_convolution(
            "deform_conv2d", input, offset, mask, weight, Epilogue(member(self, "bias")),
            (pair(self.stride), pair(self.padding), pair(self.dilation)), self.backend,
        )  # fmt: skip
        return as_original(self, input, y)


def pair(value: Any) -> tuple[int, int]:
    """A pair, from one number for both axes or from one for each."""
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return first, second
