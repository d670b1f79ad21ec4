"""Adaptive and global pooling for callers: who runs it, and the operators that compilers and autograd see.

Calls that need no gradient and that no one traces go past the operators, straight to the launches (ops/adaptive/launch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.geometry import AdaptiveGeometry
from tritonconv.ops.adaptive.launch import (
    adaptive_average,
    adaptive_average_gradient,
    adaptive_maximum,
    adaptive_maximum_gradient,
    geometry_of,
)
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.backend import Backend, OnTorch, decide, needs_gradients
from tritonconv.ops.core.layout import empty_output, reads_in_place, suggests_channels_last
from tritonconv.ops.core.observe import Call, Decision, notify

__all__ = ["Kind", "adaptive_pool", "global_average"]

Kind = Literal["avg", "max"]


def adaptive_pool(
    kind: Kind, x: Tensor, output_size: Any, nd: int, return_indices: bool = False, backend: Backend | None = None
) -> Any:
    """What torch's function of that kind and dimension gives, on the backend that is chosen for it.

    Args:
        return_indices: return (maxima, their places, int64).
        backend: the layer's own choice.
    """
    geometry = _geometry(x, output_size, nd)
    # Torch says best what is wrong, and where there is no element there is nothing to compute.
    if geometry is None:
        return _on_torch(kind, x, output_size, nd, return_indices)
    refused = decide((x,), backend, lambda: f"adaptive_{kind}_pool{nd}d of {geometry}", geometry.limit)
    observed = notify(lambda: _as_call(kind, x, geometry, refused))
    if observed or refused is not None:
        return _on_torch(kind, x, output_size, nd, return_indices)
    # As torch has it in autocast: on CPUs the 3-d ones are computed in fp32.
    if nd == 3 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.element_size() == 2:
        x = x.float()
    if x.dim() == nd + 1:
        found = _run(kind, x.unsqueeze(0), geometry, return_indices)
        return tuple(t.squeeze(0) for t in found) if return_indices else found.squeeze(0)
    return _run(kind, x, geometry, return_indices)


def _run(kind: Kind, x: Tensor, geometry: AdaptiveGeometry, return_indices: bool) -> Any:
    registered = is_traced((x,)) or needs_gradients((x,))
    sizes = geometry.output[3 - geometry.nd :]
    if kind == "avg":
        return torch.ops.tritonconv.adaptive_avg_pool(x, sizes) if registered else adaptive_average(x, geometry)
    if registered:
        y, index = torch.ops.tritonconv.adaptive_max_pool(x, sizes, return_indices)
    else:
        y, index = adaptive_maximum(x, geometry, torch.int64 if return_indices else None)
    return (y, index) if return_indices else y


def global_average(x: Tensor, keepdim: bool, backend: Backend | None = None) -> Tensor:
    """x.mean over all spatial axes.

    Args:
        x: (N, C, *spatial), one to three axes.
        keepdim: whether the result is (N, C, 1, ...), in x's format, and not (N, C).
        backend: the layer's own choice.

    Raises:
        RuntimeError: an input of other dimensions.
    """
    if x.dim() not in (3, 4, 5):
        raise RuntimeError(f"global_average: expected input (N, C, *spatial) of 3 to 5 axes, but got size {list(x.shape)}")
    nd = x.dim() - 2
    geometry = _geometry(x, 1, nd)
    axes = tuple(range(2, 2 + nd))
    if geometry is None:
        return x.mean(axes, keepdim)
    refused = decide((x,), backend, lambda: f"global_average of {geometry}", geometry.limit)
    observed = notify(lambda: _as_call("avg", x, geometry, refused))
    if observed or refused is not None:
        return x.mean(axes, keepdim)
    if is_traced((x,)) or needs_gradients((x,)):
        result: Tensor = torch.ops.tritonconv.global_average(x, keepdim)
        return result
    return _global_average(x, geometry, keepdim)


def _global_average(x: Tensor, geometry: AdaptiveGeometry, keepdim: bool) -> Tensor:
    y = adaptive_average(x, geometry)
    # One number an image and channel lies in this order in either format.
    return y if keepdim else y.as_strided(x.shape[:2], (x.shape[1], 1))


def _geometry(x: Any, output_size: Any, nd: int) -> AdaptiveGeometry | None:
    """Of a call that torch would take and that has results; else None."""
    if not isinstance(x, Tensor) or x.dim() not in (nd + 1, nd + 2):
        return None
    # As in torch, other integers count as Python's in a tuple, and 1-d functions know no None.
    if isinstance(output_size, (tuple, list)):
        output_size = [_plain(o) for o in output_size]
    elif not isinstance(output_size, (int, torch.SymInt)):
        return None
    if nd == 1 and isinstance(output_size, list) and None in output_size:
        return None
    shape = (1, *x.shape) if x.dim() == nd + 1 else tuple(x.shape)
    try:
        return AdaptiveGeometry.parse(shape, output_size, nd)
    except (TypeError, ValueError):
        return None


def _plain(size: Any) -> Any:
    if size is None or isinstance(size, (int, torch.SymInt)) or not hasattr(size, "__index__"):
        return size
    return int(size)


def _on_torch(kind: Kind, x: Tensor, output_size: Any, nd: int, return_indices: bool) -> Any:
    name = f"adaptive_{kind}_pool{nd}d" + ("_with_indices" if return_indices else "")
    return getattr(torch.nn.functional, name)(x, output_size)


def _as_call(kind: Kind, x: Tensor, geometry: AdaptiveGeometry, refused: OnTorch | None) -> Call:
    batched = x.unsqueeze(0) if x.dim() == geometry.nd + 1 else x
    copies = int(not reads_in_place(batched, suggests_channels_last(batched)))
    kernel = "global_reduce" if geometry.is_global else "adaptive_forward"
    size = (geometry.elements + geometry.results) * x.element_size()
    decision = Decision("torch", refused.reason) if refused is not None else Decision("triton", kernel, copies)
    return Call(f"adaptive_{kind}_pool{geometry.nd}d", decision, None, 0, size, x.dtype, x.device, None, "")


def check_operator(x: Tensor, output_size: Sequence[int]) -> None:
    """Raise RuntimeError for what the kernels cannot be given."""
    fits = x.dim() - 2 == len(output_size) and x.dim() in (3, 4, 5) and all(n > 0 for n in (*x.shape, *output_size))
    if not fits:
        raise RuntimeError(
            f"tritonconv adaptive pooling: expected input (N, C, *spatial) and a positive output size for each spatial "
            f"axis, but got input {list(x.shape)} and output_size {list(output_size)}"
        )


@torch.library.custom_op("tritonconv::adaptive_avg_pool", mutates_args=())
def average(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Means over bins for x (N, C, *spatial), on Triton alone."""
    check_operator(x, output_size)
    return adaptive_average(x, geometry_of(x.shape, output_size))


@average.register_fake
def _(x: Tensor, output_size: Sequence[int]) -> Tensor:
    check_operator(x, output_size)
    return empty_output(x, (*x.shape[:2], *output_size), suggests_channels_last(x), x.dtype)


@torch.library.custom_op("tritonconv::adaptive_avg_pool_backward", mutates_args=())
def average_backward(dy: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """The gradient of an input of these sizes, in that format, on Triton alone."""
    check_operator(dy, sizes[2:])
    return adaptive_average_gradient(dy, geometry_of(sizes, dy.shape[2:]), channels_last)


@average_backward.register_fake
def _(dy: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    return empty_output(dy, tuple(sizes), channels_last, dy.dtype)


@torch.library.custom_op("tritonconv::adaptive_max_pool", mutates_args=())
def maximum(x: Tensor, output_size: Sequence[int], long_indices: bool) -> tuple[Tensor, Tensor]:
    """Maxima over bins and their places, int64 or int32, for x (N, C, *spatial), on Triton alone."""
    check_operator(x, output_size)
    dtype = torch.int64 if long_indices else torch.int32
    y, index = adaptive_maximum(x, geometry_of(x.shape, output_size), dtype)
    assert index is not None
    return y, index


@maximum.register_fake
def _(x: Tensor, output_size: Sequence[int], long_indices: bool) -> tuple[Tensor, Tensor]:
    check_operator(x, output_size)
    shape, channels_last = (*x.shape[:2], *output_size), suggests_channels_last(x)
    dtype = torch.int64 if long_indices else torch.int32
    return empty_output(x, shape, channels_last, x.dtype), empty_output(x, shape, channels_last, dtype)


@torch.library.custom_op("tritonconv::adaptive_max_pool_backward", mutates_args=())
def maximum_backward(dy: Tensor, index: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """The gradient of an input of these sizes, in that format, on Triton alone."""
    check_operator(dy, sizes[2:])
    return adaptive_maximum_gradient(dy, index, geometry_of(sizes, dy.shape[2:]), channels_last)


@maximum_backward.register_fake
def _(dy: Tensor, index: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:  # noqa: ARG001
    return empty_output(dy, tuple(sizes), channels_last, dy.dtype)


@torch.library.custom_op("tritonconv::global_average", mutates_args=())
def average_of_all(x: Tensor, keepdim: bool) -> Tensor:
    """Means over all pixels for x (N, C, *spatial), on Triton alone."""
    check_operator(x, (1,) * (x.dim() - 2))
    return _global_average(x, geometry_of(x.shape, (1,) * (x.dim() - 2)), keepdim)


@average_of_all.register_fake
def _(x: Tensor, keepdim: bool) -> Tensor:
    if not keepdim:
        return x.new_empty(x.shape[:2])
    return empty_output(x, (*x.shape[:2], *(1,) * (x.dim() - 2)), suggests_channels_last(x), x.dtype)


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    # A mean's gradient does not look at the input.
    ctx.sizes, ctx.channels_last = tuple(inputs[0].shape), suggests_channels_last(inputs[0])


def _backward_average(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    dy = dy.reshape(*dy.shape[:2], *(1,) * (len(ctx.sizes) - 2)) if dy.dim() == 2 else dy
    return torch.ops.tritonconv.adaptive_avg_pool_backward(dy, ctx.sizes, ctx.channels_last), None


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save_sizes(ctx, inputs, output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward_maximum(ctx: Any, dy: Tensor, _index: Tensor | None) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.tritonconv.adaptive_max_pool_backward(dy, index, ctx.sizes, ctx.channels_last), None, None


average.register_autograd(_backward_average, setup_context=_save_sizes)
average_of_all.register_autograd(_backward_average, setup_context=_save_sizes)
maximum.register_autograd(_backward_maximum, setup_context=_save_index)
