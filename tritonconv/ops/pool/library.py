"""Pooling and max unpooling as registered operators: what torch.compile, export, fake tensors and autograd see.

Calls without gradients go past them (ops/pool/dispatch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.activation import from_numbers
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.pool.launch import Pool, index_dtype, pool_backward, pool_forward, unpool_backward, unpool_forward

__all__ = ["NAMES", "pool_operator"]

NAMES = {"max": "max_pool", "min": "min_pool", "avg": "avg_pool", "lp": "lp_pool"}


def _geometry(
    shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, kind: str,
) -> PoolGeometry:  # fmt: skip
    k, s, p, d = (tuple(values) for values in (kernel, stride, padding, dilation))
    return PoolGeometry.parse(tuple(shape), k, s, p, d, ceil_mode, nd=len(shape) - 2, name=NAMES[kind])


@torch.library.custom_op("tritonconv::pool", mutates_args=())
def pool_operator(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, *, kind: str, power: float, divisor: float | None, include_pad: bool, indices: str, activation: str,
    a: float, b: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(act(pooled), indices) of a batched x, on Triton alone; kind, indices and the rest as in ops/pool/launch.py.

    Indices are empty where none are asked for; `activation` is a name or "".
    """
    g = _geometry(x.shape, kernel, stride, padding, dilation, ceil_mode, kind)
    pool = Pool(kind, power, divisor, include_pad)  # type: ignore[arg-type]
    y, found = pool_forward(x, g, pool, indices, from_numbers(activation, a, b))  # type: ignore[arg-type]
    return y, x.new_empty(0, dtype=torch.uint8) if found is None else found


@pool_operator.register_fake
def _(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, *, kind: str, indices: str, **_numbers: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g = _geometry(x.shape, kernel, stride, padding, dilation, ceil_mode, kind)
    channels_last = suggests_channels_last(x)
    y = empty_output(x, g.output_shape, channels_last, x.dtype)
    if not indices:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, empty_output(x, g.output_shape, channels_last, index_dtype(g, indices))  # type: ignore[arg-type]


@torch.library.custom_op("tritonconv::pool_backward", mutates_args=())
def backward(
    dy: Tensor, found: Tensor | None, x: Tensor | None, y: Tensor | None, size: Sequence[int], kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, *, kind: str, power: float,
    divisor: float | None, include_pad: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """Gradient of tritonconv::pool's input of this size, dense in a format, on Triton alone."""
    g = _geometry(size, kernel, stride, padding, dilation, ceil_mode, kind)
    if tuple(dy.shape) != g.output_shape:
        raise RuntimeError(f"tritonconv::pool_backward: expected a gradient of size {list(g.output_shape)}, got "
                           f"{list(dy.shape)} ({g})")  # fmt: skip
    pool = Pool(kind, power, divisor, include_pad)  # type: ignore[arg-type]
    return pool_backward(dy, g, pool, channels_last, found, x, y)


@backward.register_fake
def _(
    dy: Tensor, found: Tensor | None, x: Tensor | None, y: Tensor | None, size: Sequence[int], *_numbers: Any,  # noqa: ARG001
    channels_last: bool, **_more: Any,
) -> Tensor:  # fmt: skip
    return empty_output(dy, tuple(size), channels_last, dy.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.numbers = inputs
    ctx.more = {name: keyword_only_inputs[name] for name in ("kind", "power", "divisor", "include_pad")}
    ctx.size, ctx.channels_last = tuple(x.shape), suggests_channels_last(x)
    ctx.activated, ctx.indexed = bool(keyword_only_inputs["activation"]), bool(keyword_only_inputs["indices"])
    y, found = output
    ctx.mark_non_differentiable(found)
    kind = keyword_only_inputs["kind"]
    if kind == "avg":
        return
    if kind == "lp":
        ctx.save_for_backward(x, y)
    else:
        ctx.save_for_backward(found if ctx.indexed else x)


def _backward(ctx: Any, dy: Tensor, _found: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.activated:
        raise NotImplementedError("tritonconv::pool: an activation in the same kernel has no gradient")
    found = x = y = None
    kind = ctx.more["kind"]
    if kind == "lp":
        x, y = ctx.saved_tensors
    elif kind != "avg":
        (found,) = ctx.saved_tensors
        if not ctx.indexed:
            more = dict(indices="tap", activation="", a=0.0, b=0.0)
            _, found = torch.ops.tritonconv.pool(found, *ctx.numbers, **ctx.more, **more)
    dx = torch.ops.tritonconv.pool_backward(
        dy, found, x, y, ctx.size, *ctx.numbers, **ctx.more, channels_last=ctx.channels_last
    )
    return dx, None, None, None, None, None


pool_operator.register_autograd(_backward, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG001
    ctx.numbers = inputs[5:]
    ctx.more = {name: keyword_only_inputs[name] for name in ("kind", "power", "divisor", "include_pad")}


def _double_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.more["kind"] != "avg":
        raise RuntimeError(f"tritonconv::pool_backward: no second derivative of {NAMES[ctx.more['kind']]} is implemented")
    # A mean is linear: what leads back from its gradient is the mean itself.
    more = dict(indices="", activation="", a=0.0, b=0.0)
    return (torch.ops.tritonconv.pool(ddx, *ctx.numbers, **ctx.more, **more)[0], *(None,) * 9)


backward.register_autograd(_double_backward, setup_context=_save_backward)


@torch.library.custom_op("tritonconv::max_unpool", mutates_args=())
def unpool(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros of (N, C, *size) with the values of a batched x where indices say, on Triton alone."""
    return unpool_forward(x, indices, tuple(size))


@unpool.register_fake
def _(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:  # noqa: ARG001
    return empty_output(x, (*x.shape[:2], *size), suggests_channels_last(x), x.dtype)


@torch.library.custom_op("tritonconv::max_unpool_backward", mutates_args=())
def unpool_gradient(dy: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    """Gradient of tritonconv::max_unpool's x, dense in a format, on Triton alone."""
    return unpool_backward(dy, indices, channels_last)


@unpool_gradient.register_fake
def _(dy: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    return empty_output(dy, tuple(indices.shape), channels_last, dy.dtype)


def _save_unpool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, indices, _ = inputs
    ctx.channels_last = suggests_channels_last(x)
    ctx.save_for_backward(indices)


def _unpool_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return torch.ops.tritonconv.max_unpool_backward(dy, indices, ctx.channels_last), None, None


unpool.register_autograd(_unpool_backward, setup_context=_save_unpool)


def _save_unpool_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    dy, indices, _ = inputs
    ctx.size = tuple(dy.shape[2:])
    ctx.save_for_backward(indices)


def _unpool_double_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return torch.ops.tritonconv.max_unpool(ddx, indices, ctx.size), None, None


unpool_gradient.register_autograd(_unpool_double_backward, setup_context=_save_unpool_backward)
