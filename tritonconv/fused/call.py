"""Modules in one kernel: a convolution (or linear layer), batch norm, residual add and activation."""

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
from tritonconv.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, begin_batch, group_of
from tritonconv.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    convolve,
    member,
    numbers_of,
    output_shape,
)
from tritonconv.nn.linear import Linear
from tritonconv.ops.batch_norm.dispatch import batch_norm
from tritonconv.ops.conv.dispatch import linear, replay
from tritonconv.ops.conv.dispatch_extended import convolution_into
from tritonconv.ops.conv.dispatch_separable import Part, separable_convolution, would_join
from tritonconv.ops.conv.dispatch_training import convolution_batch_norm
from tritonconv.ops.conv.library_training import OwnNorm
from tritonconv.ops.core.activation import ActivationSpec, from_module, parse_activation
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.observe import Share, is_observed, shared, sharing

__all__ = [
    "Group", "carries_hook", "fused_call", "fused_norm",
    "fused_pair", "observe_groups", "running", "shown", "unchanged",
]  # fmt: skip

BATCH_NORMS: dict[int, tuple[type[torch.nn.Module], ...]] = {
    1: (torch.nn.BatchNorm1d, BatchNorm1d, torch.nn.SyncBatchNorm, SyncBatchNorm),
    2: (torch.nn.BatchNorm2d, BatchNorm2d, torch.nn.SyncBatchNorm, SyncBatchNorm),
    3: (torch.nn.BatchNorm3d, BatchNorm3d, torch.nn.SyncBatchNorm, SyncBatchNorm),
}
"""By the dimensions of the convolution before them."""

LAYERS = (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def carries_hook(module: torch.nn.Module) -> bool:
    """Whether someone watches the module's calls."""
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
    """What else its launch computes: modules, or names of functions."""


class _Observer(threading.local):
    callback: Callable[[Group], None] | None = None


_observer = _Observer()


@contextmanager
def observe_groups(callback: Callable[[Group], None]) -> Iterator[None]:
    """Show every call on this thread that was fused to `callback`, once it is computed."""
    outer, _observer.callback = _observer.callback, callback
    try:
        yield
    finally:
        _observer.callback = outer


def fused_call(
    layer: torch.nn.Module, norm: torch.nn.Module | None, activation: Any, input: Tensor, residual: Tensor | None = None,
    in_place: bool = False, into: tuple[Join, int] | None = None,
) -> Tensor:  # fmt: skip
    """activation(norm(layer(input)) + residual) in one kernel, or member by member where that would not be the same.

    Decided at each call: members that carry hooks or have changed their class are called themselves, in the order they
    stand; so is everything where the residual is broadcast, and where torch is to run a batch norm that normalizes with the
    batch's own statistics.

    Args:
        layer: our Conv1d, Conv2d, Conv3d, one of their transposed ones, or Linear.
        norm: a batch norm of torch.nn, or None.
        activation: a module of torch.nn, what `parse_activation` takes, or None.
        in_place: the sum has the dtype of norm(layer(input)), as `+=` gives it.
        into: a concatenation that the result has a place in, and which; without a residual.
    """
    spec = from_module(activation) if isinstance(activation, Module) else parse_activation(activation)
    if into is not None and not torch.compiler.is_compiling():
        found = _joined(layer, norm, activation, input, *into)
        if found is not None:
            return found
    if _one_kernel(layer, norm, activation, spec, input):
        epilogue = Epilogue(member(layer, "bias"), None, residual, spec)
        if norm is not None and (norm.training or norm._buffers.get("running_mean") is None):
            y = _train(layer, norm, input, epilogue, in_place)
        else:
            batch_norm = None if norm is None else _batch_norm(norm)
            y = _run(layer, input, epilogue._replace(batch_norm=batch_norm), in_place)
        if y is not None:
            return shown(y, layer, norm, residual, activation if isinstance(activation, Module) else spec, input)
    y = layer(input)
    if norm is not None:
        y = norm(y)
    return _behind(y, residual, in_place, activation, spec)


def _joined(layer: Any, norm: Any, activation: Any, input: Tensor, join: Join, place: int) -> Tensor | None:
    """The result in its place of a concatenation, or None where it gets memory of its own."""
    if isinstance(layer, Linear) or layer.padding_mode != "zeros":
        return None
    epilogue = running(layer, norm, activation, input, None, False)
    if epilogue is None:
        return None
    kind, numbers = numbers_of(layer)
    if kind != "conv":
        return None
    memory = functools.partial(join.memory, place)
    return convolution_into(input, member(layer, "weight"), epilogue, numbers, layer.backend, join.pitch, memory)


def fused_norm(
    norm: torch.nn.Module, activation: Any, input: Tensor, residual: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """activation(norm(input) + residual) in one pass, or member by member where that would not be the same.

    Args:
        norm: our BatchNorm1d, BatchNorm2d or BatchNorm3d, behind anything but a convolution of ours.
        activation, in_place: as `fused_call` takes them.
    """
    spec = from_module(activation) if isinstance(activation, Module) else parse_activation(activation)
    known = not isinstance(activation, Module) or (spec is not None and not _is_changed(activation))
    fits = residual is None or (
        isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (input.shape, input.dtype)
    )
    if isinstance(norm, (BatchNorm1d, BatchNorm2d, BatchNorm3d)) and known and fits and not _is_changed(norm):
        norm._check_input_dim(input)
        y = batch_norm(input, *begin_batch(norm), backend=norm.backend, residual=residual, activation=spec)
        return shown(y, norm, None, residual, activation if isinstance(activation, Module) else spec, input)
    return _behind(norm(input), residual, in_place, activation, spec)


def fused_pair(
    first: torch.nn.Module, first_norm: torch.nn.Module | None, first_activation: Any, layer: torch.nn.Module,
    norm: torch.nn.Module | None, activation: Any, input: Tensor, residual: Tensor | None = None, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """activation(norm(layer(first_activation(first_norm(first(input))))) + residual): depthwise, then 1x1 convolution.

    In eval mode, where it is worth it, one kernel computes both and what lies between never goes to memory; else each is a
    fused call of its own.

    Args:
        first, layer: our Conv2d, the former of as many groups as channels, the latter with a filter of one tap.
        first_norm, first_activation, norm, activation, in_place: as `fused_call` takes them.
    """
    parts = _parts(first, first_norm, first_activation, layer, norm, activation, input, residual, in_place)
    y = separable_convolution(input, *parts) if parts else None
    if y is not None:
        return y
    joined = is_observed() and parts is not None and would_join(input, *parts)
    with sharing(Share("separable, its first part", unwritten=True)) if joined else nullcontext():
        between = fused_call(first, first_norm, first_activation, input)
    with sharing(Share("separable, its second part", unread=True)) if joined else nullcontext():
        return fused_call(layer, norm, activation, between, residual, in_place)


def _parts(
    first: Any, first_norm: Any, first_activation: Any, layer: Any, norm: Any, activation: Any, input: Tensor,
    residual: Tensor | None, in_place: bool,
) -> tuple[Part, Part] | None:  # fmt: skip
    """Both for one kernel, or None where each is to run on its own."""
    parts = []
    for conv, bn, act, added in ((first, first_norm, first_activation, None), (layer, norm, activation, residual)):
        epilogue = running(conv, bn, act, input, added, in_place)
        if epilogue is None or type(conv) is not Conv2d or conv.padding_mode != "zeros":
            return None
        parts.append(Part(member(conv, "weight"), epilogue, numbers_of(conv)[1], conv.backend))
    return parts[0], parts[1]


def running(
    layer: Any, norm: Any, activation: Any, input: Tensor, residual: Tensor | None, in_place: bool
) -> Epilogue | None:
    """What follows a layer in one kernel in eval mode; None where its members are to run one by one, or train.

    Args:
        layer, norm, activation, input, residual, in_place: as `fused_call` takes them.
    """
    if in_place and residual is not None and getattr(residual, "dtype", None) != input.dtype:
        return None
    spec = from_module(activation) if isinstance(activation, Module) else parse_activation(activation)
    own = norm is not None and (norm.training or norm._buffers.get("running_mean") is None)
    if own or not _one_kernel(layer, norm, activation, spec, input):
        return None
    return Epilogue(member(layer, "bias"), None if norm is None else _batch_norm(norm), residual, spec)


def shown(
    y: Tensor, layer: Module, norm: Module | None, residual: Tensor | None, activation: Module | ActivationSpec | None,
    input: Tensor,
) -> Tensor:  # fmt: skip
    """The result of a fused call, once its observer has seen it."""
    if not torch.compiler.is_compiling() and _observer.callback is not None:
        share = shared()
        _observer.callback(Group(layer, norm, residual, activation, input, y, share.members if share else ()))
    return y


def _behind(y: Tensor, residual: Tensor | None, in_place: bool, activation: Any, spec: ActivationSpec | None) -> Tensor:
    """What follows, one by one."""
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    if isinstance(activation, Module):
        result: Tensor = activation(y)
        return result
    return y if spec is None else spec.torch(y)


def _batch_norm(norm: Any) -> BatchNorm:
    try:
        # As in `member`.
        parameters, buffers = norm._parameters, norm._buffers
        return BatchNorm(
            buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"], norm.eps
        )
    except KeyError:
        return BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _train(layer: Any, norm: Any, input: Tensor, epilogue: Epilogue, in_place: bool) -> Tensor | None:
    """The layer with a batch norm by the batch's own statistics, or None where the parts are to run one by one."""
    residual = epilogue.residual
    if in_place and residual is not None and getattr(residual, "dtype", None) != input.dtype:
        return None
    if isinstance(layer, Linear) or layer.padding_mode != "zeros" or not _fits(layer, input, residual):
        return None
    kind, numbers = numbers_of(layer)
    # As `begin_batch` has it.
    keeps = norm.track_running_stats or not norm.training
    mean, var = (norm.running_mean, norm.running_var) if keeps else (None, None)
    return convolution_batch_norm(
        f"{kind}{numbers[0]}d_bn_act", kind, input, member(layer, "weight"), epilogue,
        OwnNorm(mean, var, norm.weight, norm.bias, norm.eps), numbers, lambda: begin_batch(norm).momentum, layer.backend,
        group_of(norm),
    )  # fmt: skip


def _run(layer: Any, input: Tensor, epilogue: Epilogue, in_place: bool) -> Tensor | None:
    """The layer with its epilogue, or None where the residual does not fit."""
    weight, residual = member(layer, "weight"), epilogue.residual
    if in_place and residual is not None and getattr(residual, "dtype", None) != input.dtype:
        return None
    is_linear = type(layer) is Linear
    # The short way, for most calls were seen before. Then the residual fits, and asking would cost as much as all the rest.
    y = None
    if is_linear:
        y = replay("matmul", input, weight, epilogue, (), layer.backend)
    elif layer.padding_mode == "zeros":
        kind, numbers = numbers_of(layer)
        y = replay(kind, input, weight, epilogue, numbers, layer.backend)
    if y is not None or not _fits(layer, input, residual):
        return y
    if is_linear:
        return linear(input, weight, epilogue, layer.backend)
    return convolve(layer, f"{numbers_of(layer)[0]}{len(layer.kernel_size)}d_bn_act", input, epilogue)


def _one_kernel(
    layer: torch.nn.Module, norm: torch.nn.Module | None, activation: Any, spec: ActivationSpec | None, input: Tensor
) -> bool:
    """Whether the members are what they were when they were put together, and no one watches them."""
    if type(layer) not in LAYERS or _is_changed(layer):
        return False
    if norm is not None:
        nd = len(layer.kernel_size)  # type: ignore[arg-type]
        if type(norm) not in BATCH_NORMS[nd] or _is_changed(norm):
            return False
        # A batch norm takes an unbatched image's channels for its batch, or refuses it.
        if input.dim() != nd + 2:
            return False
    return not isinstance(activation, Module) or (spec is not None and not _is_changed(activation))


def unchanged(member: torch.nn.Module) -> bool:
    """Whether a call of the member is its class's forward, and no one watches it."""
    return not _is_changed(member)


def _is_changed(member: torch.nn.Module) -> bool:
    """Whether a call of the member is more than its class's forward."""
    state = member.__dict__
    # `carries_hook`, said one by one, for this is asked of every member at every call.
    return bool(
        "forward" in state or state.get("_forward_hooks") or state.get("_forward_pre_hooks") or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
    )  # fmt: skip


def _fits(layer: torch.nn.Module, input: Tensor, residual: Any) -> bool:
    """Whether a kernel can add the residual: it has the output's size."""
    if residual is None:
        return True
    if not isinstance(residual, Tensor):
        return False
    if isinstance(layer, Linear):
        return bool(residual.shape == (*input.shape[:-1], layer.weight.shape[0]))
    return bool(residual.shape == output_shape(layer, input))  # type: ignore[arg-type]
