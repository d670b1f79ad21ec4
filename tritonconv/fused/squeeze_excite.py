"""Squeeze-excite as a module."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor, fx
from torch.nn import Module

from tritonconv.fused.call import eval_call
from tritonconv.fused.shared import excited
from tritonconv.nn.conv import Conv2d
from tritonconv.ops.adaptive.operator import global_average
from tritonconv.ops.core.activation import parse_activation, to_module
from tritonconv.ops.squeeze_excite.operator import scale_channels

__all__ = ["SqueezeExcite"]


class SqueezeExcite(Module):
    """input * gate(fc2(activation(fc1(global average of input)))), where each channel of each image has its own gate.

    Args:
        input_channels: C of the input (N, C, H, W).
        squeeze_channels: R, the channels between the two products; by default C / 16, at least 1.
        activation, gate: an activation as for `tritonconv.functional.conv2d_bn_act`, or a class of torch.nn.
        bias: whether both products have a bias.

    Children `fc1` and `fc2` are 1x1 convolutions, with the state_dict keys of torchvision's SqueezeExcitation and timm's
    SEModule. In eval mode the average, the gate and the product are one launch each (two for the average of large images).
    `convert` fuses the average with the convolution before it, and the product with a 1x1 convolution after it.
    Follows J. Hu, L. Shen, G. Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507.

    Raises:
        ValueError: channels that are not positive; an unknown activation.

    >>> layer = SqueezeExcite(32, 8)
    >>> layer(torch.ones(2, 32, 5, 5)).shape, sorted(layer.state_dict())
    (torch.Size([2, 32, 5, 5]), ['fc1.bias', 'fc1.weight', 'fc2.bias', 'fc2.weight'])
    """

    def __init__(
        self, input_channels: int, squeeze_channels: int | None = None, activation: Any = "relu", gate: Any = "sigmoid",
        bias: bool = True, *, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        squeezed = max(1, input_channels // 16) if squeeze_channels is None else squeeze_channels
        if input_channels < 1 or squeezed < 1:
            raise ValueError(
                f"SqueezeExcite: expected positive channels, got input_channels={input_channels}, squeeze_channels="
                f"{squeezed}"
            )
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        self.fc1 = Conv2d(input_channels, squeezed, 1, bias=bias, **made)
        self.fc2 = Conv2d(squeezed, input_channels, 1, bias=bias, **made)
        self.act, self.gate = (_activation(each) for each in (activation, gate))

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            # A tracer of torch.fx cannot answer the question below.
            return input * self.gate(self.fc2(self.act(self.fc1(input.mean((2, 3), keepdim=True)))))
        if input.dim() != 4:
            raise RuntimeError(
                f"SqueezeExcite: expected 4D input (N, C, H, W), but got input of size {list(input.shape)} "
                f"({self.fc1.in_channels} channels)"
            )
        mean = global_average(input, True, self.fc1.backend)
        first, second = eval_call(self.fc1, None, self.act, mean, None), eval_call(self.fc2, None, self.gate, mean, None)
        if first is None or second is None or self.fc1.backend != self.fc2.backend:
            gate = self.gate(self.fc2(self.act(self.fc1(mean))))
        else:
            gate = excited("conv", mean, (first[1][1:], first[2]), (second[1][1:], second[2]), self.fc1.backend)
        return scale_channels(input, gate)


def _activation(value: Any) -> Module:
    made = value() if isinstance(value, type) else value
    spec = parse_activation(made)
    return made if isinstance(made, Module) else to_module(spec)
