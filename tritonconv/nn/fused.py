"""Modules in one kernel: a convolution (or linear layer), batch norm, residual add and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.nn.conv import Conv1d, Conv2d, Conv3d, convolve
from tritonconv.nn.linear import Linear
from tritonconv.ops.activation import ActivationSpec, from_module, parse_activation
from tritonconv.ops.dispatch import linear
from tritonconv.ops.epilogue import BatchNorm, Epilogue

__all__ = ["ConvBNAct1d", "ConvBNAct2d", "ConvBNAct3d", "ConvBNReLU2d", "carries_hook", "fused_call"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def carries_hook(module: torch.nn.Module) -> bool:
    """Whether someone watches the module's calls."""
    return any(module.__dict__.get(name) for name in HOOKS)


def fused_call(
    layer: torch.nn.Module, norm: torch.nn.Module | None, activation: Any, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """activation(norm(layer(input)) + residual) in one kernel, or member by member where that would not be the same.

    Decided at each call: members that carry hooks, normalize with the batch's statistics or have changed their class are
    called themselves, in the order they stand.

    Args:
        layer: our Conv1d, Conv2d, Conv3d or Linear.
        norm: a batch norm of torch.nn, or None.
        activation: a module of torch.nn, what `parse_activation` takes, or None.
    """
    spec = from_module(activation) if isinstance(activation, torch.nn.Module) else parse_activation(activation)
    if _one_kernel(layer, norm, activation, spec, residual):
        batch_norm = None
        if norm is not None:
            batch_norm = BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
        epilogue = Epilogue(layer.bias, batch_norm, residual, spec)  # type: ignore[arg-type]
        if isinstance(layer, Linear):
            return linear(input, layer.weight, epilogue, layer.backend)
        op = f"conv{len(layer.kernel_size)}d_bn_act"  # type: ignore[arg-type]
        y = convolve(layer, op, input, epilogue)  # type: ignore[arg-type]
        return y
    y = layer(input)
    if norm is not None:
        y = norm(y)
    if residual is not None:
        y = y + residual
    if isinstance(activation, torch.nn.Module):
        return activation(y)
    return y if spec is None else spec.torch(y)


def _one_kernel(
    layer: torch.nn.Module, norm: torch.nn.Module | None, activation: Any, spec: ActivationSpec | None, residual: Any
) -> bool:
    if type(layer) not in (Conv1d, Conv2d, Conv3d, Linear) or carries_hook(layer):
        return False
    if norm is not None and (norm.training or norm.running_mean is None or carries_hook(norm)):
        return False
    if isinstance(activation, torch.nn.Module) and (spec is None or carries_hook(activation)):
        return False
    return residual is None or isinstance(residual, Tensor)


class _ConvBNAct(torch.nn.Module):
    """A convolution, its batch norm and an activation; children `conv`, `bn` and `act` hold the state."""

    convolution: type[torch.nn.modules.conv._ConvNd]
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
        self.act = activation if isinstance(activation, torch.nn.Module) else spec

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused_call(self.conv, self.bn, self.act, input, residual)

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
            `torch.nn.Conv2d`, but without a bias by default, since a batch norm follows.
        activation: as `tritonconv.functional.conv2d_bn_act` takes it.
        eps, momentum, affine, track_running_stats: as `torch.nn.BatchNorm2d`.

    The state_dict has the keys of a convolution `conv` and a batch norm `bn`. In training mode, and for gradients, the
    parts run one by one on torch.

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
