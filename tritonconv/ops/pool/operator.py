"""Operators of pooling over windows and of max unpooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.activation import from_numbers
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.operator import Operator, differentiate
from tritonconv.ops.pool.launch import Pool, index_dtype, pool_backward, pool_forward, unpool_backward, unpool_forward

__all__ = ["MAX_UNPOOL", "NAMES", "POOL", "POOL_BACKWARD", "gather_taps", "pool_on_torch"]

NAMES = {"max": "max_pool", "min": "min_pool", "avg": "avg_pool", "lp": "lp_pool"}
F = torch.nn.functional
# Of the numbers: those of the geometry, then what is reduced.
GEOMETRY, SPEC = 5, 9


def _geometry(shape: Sequence[int], numbers: Sequence[Any], kind: str) -> PoolGeometry:
    *windows, ceil_mode = numbers
    k, s, p, d = map(tuple, windows)
    return PoolGeometry.parse(tuple(shape), k, s, p, d, ceil_mode, nd=len(shape) - 2, name=NAMES[kind])


def _forward(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, kind: str, power: float, divisor: float | None, include_pad: bool, indices: str, activation: str,
    a: float, b: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(act(pooled), indices) of a batched x, on Triton alone; kind, indices and the rest as in ops/pool/launch.py.

    Indices are empty where none are asked for; `activation` is a name or "".
    """
    g = _geometry(x.shape, (kernel, stride, padding, dilation, ceil_mode), kind)
    pool = Pool(kind, power, divisor, include_pad)  # type: ignore[arg-type]
    return pool_forward(x, g, pool, indices, from_numbers(activation, a, b))  # type: ignore[arg-type, return-value]


def _outputs(x: Tensor, *numbers: Any) -> tuple[Tensor, Tensor | None]:
    g = _geometry(x.shape, numbers[:GEOMETRY], numbers[GEOMETRY])
    channels_last, indices = suggests_channels_last(x), numbers[SPEC]
    found = empty_output(x, g.output_shape, channels_last, index_dtype(g, indices)) if indices else None
    return empty_output(x, g.output_shape, channels_last, x.dtype), found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *numbers = inputs
    ctx.numbers, (indices, activation) = tuple(numbers[:SPEC]), numbers[SPEC : SPEC + 2]
    ctx.size, ctx.channels_last = tuple(x.shape), suggests_channels_last(x)
    ctx.activated, ctx.indexed = bool(activation), bool(indices)
    y, found = output
    kind = numbers[GEOMETRY]
    if kind == "lp":
        ctx.save_for_backward(x, y)
    elif kind != "avg":
        ctx.save_for_backward(found if ctx.indexed else x)


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    if ctx.activated:
        raise NotImplementedError("tritonconv::pool: an activation in the same kernel has no gradient")
    found = x = y = None
    kind = ctx.numbers[GEOMETRY]
    if kind == "lp":
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiate(lambda x: _lp_form(x, ctx.numbers), (x,), (True,), dy)
    elif kind != "avg":
        (found,) = ctx.saved_tensors
        if not ctx.indexed:
            _, found = POOL(found.detach(), *ctx.numbers, "tap", "", 0.0, 0.0)
    return [POOL_BACKWARD(dy, found, x, y, ctx.size, *ctx.numbers, ctx.channels_last)]


POOL = Operator("pool", _forward, _outputs, save=_save, backward=_backward)


def _lp_form(x: Tensor, numbers: tuple[Any, ...]) -> Tensor:
    kernel, stride, _, _, ceil_mode, _, power, *_ = numbers
    arguments = ("lp", x.dim() - 2, x, (*_settled(kernel, stride, x.dim() - 2), 0, 1, ceil_mode, power, None, True))
    return pool_on_torch(*arguments, False)[0]


def _settled(kernel: tuple[int, ...], stride: tuple[int, ...], nd: int) -> tuple[Any, Any]:
    """As torch's functions take them: one number for all axes, or one each."""

    def of(value: tuple[int, ...]) -> Any:
        return None if not value else value[0] if len(value) == 1 or nd == 1 else value

    return of(kernel), of(stride)


def pool_on_torch(kind: str, nd: int, x: Tensor, arguments: tuple[Any, ...], indices: bool) -> tuple[Tensor, Tensor | None]:
    """What torch computes, or raises.

    Args:
        arguments: (kernel, stride, padding, dilation, ceil_mode, power, divisor, include_pad) as users give them.
    """
    kernel, stride, padding, dilation, ceil_mode, power, divisor, include_pad = arguments
    found = None
    y: Any
    if kind in ("max", "min"):
        function: Any = getattr(F, f"max_pool{nd}d")
        y = function(x if kind == "max" else -x, kernel, stride, padding, dilation, ceil_mode, return_indices=indices)
        y, found = y if indices else (y, None)
        y = y if kind == "max" else -y
    elif kind == "lp":
        y = getattr(F, f"lp_pool{nd}d")(x, power, kernel, stride, ceil_mode)
    elif nd > 1:
        stride = () if stride is None else stride
        y = getattr(F, f"avg_pool{nd}d")(x, kernel, stride, padding, ceil_mode, include_pad, divisor)
    elif divisor is None:
        y = F.avg_pool1d(x, kernel, () if stride is None else stride, padding, ceil_mode, include_pad)
    else:
        k, s, p = (_as_list(value) for value in (kernel, stride, padding))
        lists = ((1, *k), (1, *s) if s else (), (0, *p))
        y = F.avg_pool2d(x.unsqueeze(-2), *lists, ceil_mode, include_pad, divisor).squeeze(-2)
    return y, found


def _as_list(value: Any) -> tuple[int, ...]:
    """An argument as operators take it; no stride is an empty one."""
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)


# The gradient.


def _gradient(
    dy: Tensor, found: Tensor | None, x: Tensor | None, y: Tensor | None, size: Sequence[int], kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, kind: str, power: float,
    divisor: float | None, include_pad: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """Gradient of tritonconv::pool's input of this size, dense in a format, on Triton alone."""
    g = _geometry(size, (kernel, stride, padding, dilation, ceil_mode), kind)
    if tuple(dy.shape) != g.output_shape:
        raise RuntimeError(f"tritonconv::pool_backward: expected a gradient of size {list(g.output_shape)}, got "
                           f"{list(dy.shape)} ({g})")  # fmt: skip
    pool = Pool(kind, power, divisor, include_pad)  # type: ignore[arg-type]
    return pool_backward(dy, g, pool, channels_last, found, x, y)


def _gradient_outputs(dy: Tensor, _found: Any, _x: Any, _y: Any, size: Sequence[int], *numbers: Any) -> Tensor:
    return empty_output(dy, tuple(size), numbers[-1], dy.dtype)


def _gradient_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, found, _, _, ctx.size, *numbers, _ = inputs
    ctx.numbers = tuple(numbers)
    ctx.save_for_backward(found)


def _gradient_backward(ctx: Any, ddx: Tensor) -> list[Tensor | None]:
    kind = ctx.numbers[GEOMETRY]
    # Linear in dy: what leads back from a mean's gradient is the mean, from a maximum's what lies in the same places.
    if kind == "avg":
        return [POOL(ddx, *ctx.numbers, "", "", 0.0, 0.0)[0], None, None, None]
    if kind == "lp":
        raise RuntimeError("tritonconv::pool_backward: no second derivative of lp_pool is implemented")
    (found,) = ctx.saved_tensors
    return [gather_taps(ddx, found, _geometry(ctx.size, ctx.numbers[:GEOMETRY], kind)), None, None, None]


POOL_BACKWARD = Operator("pool_backward", _gradient, _gradient_outputs, save=_gradient_save, backward=_gradient_backward)


def gather_taps(x: Tensor, found: Tensor, g: PoolGeometry, none: int | None = None) -> Tensor:
    """Elements of x where a pooling found its results, by torch.

    Args:
        x: (N, C, *spatial).
        found: (N, C, *output): int64 positions in a plane of x, or numbers of taps in a window (uint8, int32).
        none: the number that stands for no tap, whose element is zero.
    """
    places = found.long()
    if found.dtype != torch.int64:
        (_, r, s), tap = g.kernel, places if none is None else places.clamp(max=g.taps - 1)
        axes = (tap // (r * s), tap // s % r, tap % s)
        places = torch.zeros_like(places)
        for axis in range(3 - g.nd, 3):
            size = [1] * found.dim()
            size[axis - 3] = g.output[axis]
            first = torch.arange(g.output[axis], device=x.device).view(size) * g.stride[axis] - g.padding[axis]
            places = places * g.input[axis] + first + axes[axis] * g.dilation[axis]
    outside = None if none is None or found.dtype == torch.int64 else found == none
    planes = math.prod(g.input)
    y = x.flatten(2).gather(2, places.flatten(2).clamp(0, planes - 1)).view(found.shape)
    return y if outside is None else torch.where(outside, 0, y)


# Max unpooling, and its gradient, of which each is the other's.


def _unpool(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros of (N, C, *size) with the values of a batched x where indices say, on Triton alone."""
    return unpool_forward(x, indices, tuple(size))


def _unpool_outputs(x: Tensor, _indices: Tensor, size: Sequence[int]) -> Tensor:
    return empty_output(x, (*x.shape[:2], *size), suggests_channels_last(x), x.dtype)


def _unpool_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, indices, _ = inputs
    ctx.channels_last = suggests_channels_last(x)
    ctx.save_for_backward(indices)


MAX_UNPOOL: Operator = Operator(
    "max_unpool", _unpool, _unpool_outputs, save=_unpool_save,
    backward=lambda ctx, dy: [MAX_UNPOOL_BACKWARD(dy, *ctx.saved_tensors, ctx.channels_last), None],
)  # fmt: skip


def _unpool_gradient(dy: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    """Gradient of tritonconv::max_unpool's x, dense in a format, on Triton alone."""
    return unpool_backward(dy, indices, channels_last)


def _unpool_gradient_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    dy, indices, _ = inputs
    ctx.size = tuple(dy.shape[2:])
    ctx.save_for_backward(indices)


MAX_UNPOOL_BACKWARD: Operator = Operator(
    "max_unpool_backward", _unpool_gradient,
    lambda dy, indices, channels_last: empty_output(dy, tuple(indices.shape), channels_last, dy.dtype),
    save=_unpool_gradient_save, backward=lambda ctx, ddx: [MAX_UNPOOL(ddx, *ctx.saved_tensors, ctx.size), None],
)  # fmt: skip
