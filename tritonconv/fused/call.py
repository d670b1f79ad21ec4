"""Several modules in one kernel: a convolution (or linear layer), batch norm, residual add and activation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tritonconv.fused.join import Join
from tritonconv.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    count_batch,
    group_of,
    normalize,
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
    output_shape,
)
from tritonconv.nn.linear import Linear
from tritonconv.ops.conv.call import CONVOLUTIONS, LINEAR, ResidualError
from tritonconv.ops.conv.extended import convolution_into
from tritonconv.ops.conv.norm_call import CONV_NORMS
from tritonconv.ops.conv.separable_call import SEPARABLE_LAUNCH, separable_convolution
from tritonconv.ops.core.activation import ActivationSpec, from_module, parse_activation
from tritonconv.ops.core.observe import Share, is_observed, shared, sharing
from tritonconv.ops.core.operator import is_traced

__all__ = [
    "Group", "carries_hook", "eval_call", "fused_call", "fused_norm", "fused_pair", "observe_groups", "observed_group",
    "unchanged",
]  # fmt: skip

BATCH_NORMS: dict[int, tuple[type[torch.nn.Module], ...]] = {
    1: (torch.nn.BatchNorm1d, BatchNorm1d, torch.nn.SyncBatchNorm, SyncBatchNorm),
    2: (torch.nn.BatchNorm2d, BatchNorm2d, torch.nn.SyncBatchNorm, SyncBatchNorm),
    3: (torch.nn.BatchNorm3d, BatchNorm3d, torch.nn.SyncBatchNorm, SyncBatchNorm),
}
"""By the number of spatial axes of the convolution before them."""

LAYERS = (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def carries_hook(module: torch.nn.Module) -> bool:
    """Whether the module has hooks."""
    return any(module.__dict__.get(name) for name in HOOKS)


class Group(NamedTuple):
    """A fused call as an observer sees it."""

    layer: torch.nn.Module
    norm: torch.nn.Module | None
    residual: Tensor | None
    activation: torch.nn.Module | ActivationSpec | None
    input: Tensor
    output: Tensor
    more: tuple[Any, ...]
    """What else the launch computes: modules, or names of functions."""


class _Observer(threading.local):
    callback: Callable[[Group], None] | None = None


_observer = _Observer()


@contextmanager
def observe_groups(callback: Callable[[Group], None]) -> Iterator[None]:
    """Call `callback` for every fused call on this thread, after it is computed."""
    outer, _observer.callback = _observer.callback, callback
    try:
        yield
    finally:
        _observer.callback = outer


def fused_call(
    layer: torch.nn.Module, norm: torch.nn.Module | None, activation: Any, input: Tensor, residual: Tensor | None = None,
    in_place: bool = False, into: tuple[Join, int] | None = None,
) -> Tensor:  # fmt: skip
    """activation(norm(layer(input)) + residual) in one kernel, or module by module if the kernel would not do the same.

    This is decided at each call. If a module has hooks or has changed its class, or if the residual is broadcast, all
    modules are called one by one, in their order.

    Args:
        layer: our Conv1d, Conv2d or Conv3d, one of the transposed convolutions, or Linear.
        norm: a batch norm of torch.nn, or None.
        activation: a module of torch.nn, any other argument of `parse_activation`, or None.
        in_place: the sum has the dtype of norm(layer(input)), as after `+=`.
        into: a concatenation that contains the result, and the index of the result in it; without a residual.
    """
    if into is not None and not torch.compiler.is_compiling():
        found = _joined(layer, norm, activation, input, *into)
        if found is not None:
            return found
    own = norm is not None and (norm.training or norm._buffers.get("running_mean") is None)
    call = (_training_call if own else eval_call)(layer, norm, activation, input, residual, in_place)
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
            if not torch.compiler.is_compiling() and _observer.callback is not None:
                observed_group(y, layer, norm, residual, activation, input)
            return y
    y = layer(input)
    if norm is not None:
        y = norm(y)
    return _after(y, residual, in_place, activation)


Call = tuple[Any, tuple[Any, ...], tuple[Any, ...]]


def eval_call(
    layer: Any, norm: Any, activation: Any, input: Tensor, residual: Tensor | None, in_place: bool
) -> Call | None:
    """(family, tensors, numbers) of a layer with what follows it, in eval mode; None if the modules run one by one.

    Args:
        layer, norm, activation, input, residual, in_place: as for `fused_call`.
    """
    spec = None if activation is None else _spec(activation)
    if spec is CHANGED or type(layer) not in LAYERS or _is_changed(layer):
        return None
    if residual is not None and not _can_add(layer, input, residual, in_place):
        return None
    kind, numbers = ("matmul", ()) if type(layer) is Linear else numbers_of(layer)
    source = input
    if layer.__dict__.get("padding_mode") not in ZEROS:
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
    family = LINEAR if kind == "matmul" else CONVOLUTIONS[kind]
    return family, tensors, (numbers, OPS[type(layer)], eps, spec)


# A linear layer has no padding mode.
ZEROS = ("zeros", None)
OPS: dict[type[Module], str] = {
    Conv1d: "conv1d_bn_act", Conv2d: "conv2d_bn_act", Conv3d: "conv3d_bn_act", ConvTranspose1d: "conv_transpose1d_bn_act",
    ConvTranspose2d: "conv_transpose2d_bn_act", ConvTranspose3d: "conv_transpose3d_bn_act", Linear: "linear",
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


def _training_call(
    layer: Any, norm: Any, activation: Any, input: Tensor, residual: Tensor | None, in_place: bool
) -> Call | None:
    """The same as `eval_call`, with a batch norm that uses the batch's own statistics."""
    spec = _spec(activation)
    if spec is CHANGED or type(layer) not in LAYERS or type(layer) is Linear or _is_changed(layer):
        return None
    nd = len(layer.kernel_size)
    if type(norm) not in BATCH_NORMS[nd] or _is_changed(norm) or input.dim() != nd + 2 or layer.padding_mode != "zeros":
        return None
    if residual is not None and not _can_add(layer, input, residual, in_place):
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


def _can_add(layer: Any, input: Tensor, residual: Any, in_place: bool) -> bool:
    """Whether a kernel can add the residual, by checks that take little time; its size is checked with the call's."""
    if not isinstance(residual, Tensor) or (in_place and residual.dtype != input.dtype):
        return False
    if not is_traced((input, residual)):
        return True
    if isinstance(layer, Linear):
        return bool(residual.shape == (*input.shape[:-1], layer.weight.shape[0]))
    return bool(residual.shape == output_shape(layer, input))


def _joined(layer: Any, norm: Any, activation: Any, input: Tensor, join: Join, place: int) -> Tensor | None:
    """The result, written into its part of a concatenation, or None if it gets separate memory."""
    call = eval_call(layer, norm, activation, input, None, False)
    if call is None or call[0] is not CONVOLUTIONS["conv"]:
        return None
    _, tensors, numbers = call
    memory = functools.partial(join.memory, place)
    return convolution_into(tensors, numbers, layer.backend, join.pitch, join.starts[place], memory)


def fused_norm(
    norm: torch.nn.Module, activation: Any, input: Tensor, residual: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """activation(norm(input) + residual) in one pass, or module by module if the pass would compute something else.

    Args:
        norm: our BatchNorm1d, BatchNorm2d or BatchNorm3d, which follows no convolution of ours.
        activation, in_place: as for `fused_call`.
    """
    spec = _spec(activation)
    fits = residual is None or (
        isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (input.shape, input.dtype)
    )
    if isinstance(norm, (BatchNorm1d, BatchNorm2d, BatchNorm3d)) and spec is not CHANGED and fits and not _is_changed(norm):
        norm._check_input_dim(input)
        y = normalize(norm, input, residual, spec)
        if not torch.compiler.is_compiling() and _observer.callback is not None:
            observed_group(y, norm, None, residual, activation, input)
        return y
    return _after(norm(input), residual, in_place, activation)


def fused_pair(
    first: torch.nn.Module, first_norm: torch.nn.Module | None, first_activation: Any, layer: torch.nn.Module,
    norm: torch.nn.Module | None, activation: Any, input: Tensor, residual: Tensor | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """activation(norm(layer(first_activation(first_norm(first(input))))) + residual): depthwise, then 1x1 convolution.

    In eval mode, if it is predicted to be faster, one kernel computes both, and the tensor between them is never written to
    memory; else each is a separate fused call.

    Args:
        first, layer: our Conv2d; `first` has as many groups as channels, `layer` has a filter of one tap.
        first_norm, first_activation, norm, activation, in_place: as for `fused_call`.
    """
    joined = False
    calls = _pair(first, first_norm, first_activation, layer, norm, activation, input, residual, in_place)
    if calls is not None:
        tensors, numbers, backend = calls
        y = separable_convolution(tensors, numbers, backend)
        if y is not None:
            return y
        joined = is_observed() and SEPARABLE_LAUNCH.resolve(tensors, numbers, backend) is not None
    with sharing(Share("separable, its first part", unwritten=True)) if joined else nullcontext():
        between = fused_call(first, first_norm, first_activation, input)
    with sharing(Share("separable, its second part", unread=True)) if joined else nullcontext():
        return fused_call(layer, norm, activation, between, residual, in_place)


def _pair(
    first: Any, first_norm: Any, first_activation: Any, layer: Any, norm: Any, activation: Any, input: Tensor,
    residual: Tensor | None, in_place: bool,
) -> tuple[tuple[Any, ...], tuple[Any, ...], Any] | None:  # fmt: skip
    """Both for one kernel, in the form that `separable_convolution` expects, or None if each is a separate launch."""
    if type(first) is not Conv2d or type(layer) is not Conv2d:
        return None
    before = eval_call(first, first_norm, first_activation, input, None, False)
    after = eval_call(layer, norm, activation, input, residual, in_place)
    backends = (first.backend, layer.backend)
    if before is None or after is None:
        return None
    (_, tensors1, (given1, _, eps1, act1)), (_, tensors2, (given2, _, eps2, act2)) = before, after
    backend = "torch" if "torch" in backends else first.backend
    return (*tensors1[:7], *tensors2[1:]), ((given1, given2), eps1, act1, eps2, act2), backend


def observed_group(
    y: Tensor, layer: Module, norm: Module | None, residual: Tensor | None, activation: Any, input: Tensor
) -> None:
    """Report a fused call to its observer, if there is one."""
    if _observer.callback is not None:
        what = activation if isinstance(activation, Module) else parse_activation(activation)
        share = shared()
        _observer.callback(Group(layer, norm, residual, what, input, y, share.members if share else ()))


def _after(y: Tensor, residual: Tensor | None, in_place: bool, activation: Any) -> Tensor:
    """Residual and activation, one by one."""
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    if isinstance(activation, Module):
        result: Tensor = activation(y)
        return result
    spec = parse_activation(activation)
    return y if spec is None else spec.torch(y)


def unchanged(member: torch.nn.Module) -> bool:
    """Whether a call of the module is only its class's forward, without hooks."""
    return not _is_changed(member)


def _is_changed(member: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    state = member.__dict__
    # `carries_hook`, written out, because this runs for every module at every call.
    return bool(
        "forward" in state or state.get("_forward_hooks") or state.get("_forward_pre_hooks") or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
    )  # fmt: skip
