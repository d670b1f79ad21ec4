"""A convolution, a batch norm, a residual and an activation that modules hold, as one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tritonconv.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    count_batch,
    group_of,
)
from tritonconv.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    member,
    numbers_of,
)
from tritonconv.ops.conv.call import CONVOLUTIONS, ResidualError
from tritonconv.ops.conv.norm_call import CONV_NORMS
from tritonconv.ops.core.activation import ActivationSpec, from_module, parse_activation

__all__ = ["HOOKS", "carries_hook", "eval_call", "fused_call"]

BATCH_NORMS: dict[int, tuple[type[torch.nn.Module], ...]] = {
    1: (torch.nn.BatchNorm1d, BatchNorm1d, torch.nn.SyncBatchNorm, SyncBatchNorm),
    2: (torch.nn.BatchNorm2d, BatchNorm2d, torch.nn.SyncBatchNorm, SyncBatchNorm),
    3: (torch.nn.BatchNorm3d, BatchNorm3d, torch.nn.SyncBatchNorm, SyncBatchNorm),
}
"""By the number of spatial axes of the convolution before them."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def carries_hook(module: torch.nn.Module) -> bool:
    """Whether the module has hooks."""
    return any(module.__dict__.get(name) for name in HOOKS)


def fused_call(
    layer: torch.nn.Module, norm: torch.nn.Module | None, activation: Any, input: Tensor, residual: Tensor | None = None
) -> Tensor:  # fmt: skip
    """activation(norm(layer(input)) + residual) in one call, or module by module if the call would not do the same.

    This is decided at each call. If a module has hooks or has changed its class, or if the residual is broadcast, all
    modules are called one by one, in their order.

    Args:
        layer: our Conv1d, Conv2d or Conv3d, or one of the transposed convolutions.
        norm: a batch norm of torch.nn, or None.
        activation: a module of torch.nn, any other argument of `parse_activation`, or None.
    """
    own = norm is not None and (norm.training or norm._buffers.get("running_mean") is None)
    call = (_training_call if own else eval_call)(layer, norm, activation, input, residual)
    if call is not None:
        family, tensors, numbers = call
        counts = own and norm is not None and norm.training and norm.momentum is not None
        try:
            y: Tensor = family(tensors, numbers, layer.backend)
        # Raised before anything ran.
        except ResidualError:
            pass
        except ValueError:
            # Torch counts a batch that its batch norm refuses.
            if counts:
                count_batch(norm)  # type: ignore[arg-type]
            raise
        else:
            if counts:
                count_batch(norm)  # type: ignore[arg-type]
            return y
    y = layer(input)
    if norm is not None:
        y = norm(y)
    if residual is not None:
        y = y + residual
    spec = None if isinstance(activation, Module) else parse_activation(activation)
    return activation(y) if isinstance(activation, Module) else y if spec is None else spec.torch(y)


Call = tuple[Any, tuple[Any, ...], tuple[Any, ...]]


def eval_call(layer: Any, norm: Any, activation: Any, input: Tensor, residual: Tensor | None) -> Call | None:
    """(family, tensors, numbers) of a layer with what follows it, in eval mode; None if the modules run one by one.

    Args:
        layer, norm, activation, input, residual: as for `fused_call`.
    """
    spec = None if activation is None else _spec(activation)
    if spec is CHANGED or type(layer) not in OPS or _is_changed(layer):
        return None
    if residual is not None and not isinstance(residual, Tensor):
        return None
    kind, numbers = numbers_of(layer)
    source = input
    if layer.padding_mode != "zeros":
        # For other padding modes pad first, as torch does.
        source = torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        numbers = (*numbers[:2], (0,) * numbers[0], *numbers[3:])
    mean = var = gamma = beta = None
    eps = 0.0
    if norm is not None:
        nd = len(layer.kernel_size)
        # A batch norm uses an unbatched image's channels as its batch, or raises an error.
        if type(norm) not in BATCH_NORMS[nd] or _is_changed(norm) or input.dim() != nd + 2 or norm.training:
            return None
        try:
            # As in `member`.
            parameters, buffers = norm._parameters, norm._buffers
            gamma, beta = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:
            mean, var, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
        if mean is None:
            return None
        eps = norm.eps
    parameters = layer._parameters
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:
        weight, bias = layer.weight, layer.bias
    tensors = (source, weight, bias, mean, var, gamma, beta, residual)
    return CONVOLUTIONS[kind], tensors, (numbers, OPS[type(layer)], eps, spec)


OPS: dict[type[Module], str] = {
    Conv1d: "conv1d_bn_act", Conv2d: "conv2d_bn_act", Conv3d: "conv3d_bn_act", ConvTranspose1d: "conv_transpose1d_bn_act",
    ConvTranspose2d: "conv_transpose2d_bn_act", ConvTranspose3d: "conv_transpose3d_bn_act",
}  # fmt: skip
CHANGED: Any = object()
"""Stands for an activation whose module must be called."""


def _spec(activation: Any) -> ActivationSpec | None:
    """The activation that a launch computes, or `CHANGED`."""
    if activation is None or type(activation) is ActivationSpec:
        return activation
    if not isinstance(activation, Module):
        return parse_activation(activation)
    spec = from_module(activation)
    return CHANGED if spec is None or _is_changed(activation) else spec


def _training_call(layer: Any, norm: Any, activation: Any, input: Tensor, residual: Tensor | None) -> Call | None:
    """The same as `eval_call`, with a batch norm that uses the batch's own statistics."""
    spec = _spec(activation)
    if spec is CHANGED or type(layer) not in OPS or _is_changed(layer):
        return None
    nd = len(layer.kernel_size)
    if type(norm) not in BATCH_NORMS[nd] or _is_changed(norm) or input.dim() != nd + 2 or layer.padding_mode != "zeros":
        return None
    if residual is not None and not isinstance(residual, Tensor):
        return None
    kind, given = numbers_of(layer)
    group = group_of(norm) if isinstance(norm, torch.nn.SyncBatchNorm) else ""
    # As in `begin_batch`.
    keeps = norm.track_running_stats or not norm.training
    mean, var = (norm.running_mean, norm.running_var) if keeps else (None, None)
    tensors = (input, member(layer, "weight"), member(layer, "bias"), mean, var, norm.weight, norm.bias, residual)
    family = CONV_NORMS[kind]
    numbers = (given, OPS[type(layer)], norm.eps, spec)
    if group and family.refuses(tensors, (*numbers, 0.0, group), layer.backend):
        return None
    # For a cumulative average the weight must be known before; otherwise a batch is counted after it is normalized.
    momentum = norm.momentum if norm.momentum is not None else count_batch(norm) if norm.training else 0.0
    return family, tensors, (*numbers, momentum, group)


def _is_changed(member: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    state = member.__dict__
    # `carries_hook`, written out, because this runs for every module at every call.
    return bool(
        "forward" in state or state.get("_forward_hooks") or state.get("_forward_pre_hooks") or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
    )  # fmt: skip
