"""torch.ops.tritonconv.conv_batch_norm: a convolution, batch norm, residual and activation for training, as one operator.

The convolution may be a transposed one. Forward it gives y and, for its backward and for running statistics, z, mean, var
and count, which carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.ops.conv.conv_norm import Needs, Norm, backward, forward
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.library import conv_geometry, ints, padding_numbers, register_autocast, register_gradient, resolved
from tritonconv.ops.core.activation import from_numbers, to_numbers
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import Kind
from tritonconv.ops.core.layout import empty_output, suggests_channels_last, wide

__all__ = ["OwnNorm", "call_training"]

GEOMETRY = ("stride", "padding", "padding_name", "dilation", "groups", "transposed", "output_padding")
NAMES = (*GEOMETRY, "eps", "activation", "a", "b", "group")


class OwnNorm(NamedTuple):
    """A batch norm by the batch's own statistics, or by fixed ones."""

    mean: Tensor | None
    """(K,): the running statistics that the batch's are mixed into, or the fixed ones."""
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def call_training(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, norm: OwnNorm | BatchNorm, *, stride: Any, padding: Any,
    dilation: Any, groups: int, output_padding: Any = (), fixed: bool, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, var, count) of torch.ops.tritonconv.conv_batch_norm; running statistics stay as they are.

    Args:
        kind: "conv" or "conv_transpose".
        epilogue: bias, residual and activation.
        fixed: normalize with the statistics of `norm`, not with the batch's own.
        group: name of the process group that shares statistics, "" for none.
    """
    mean, var = (norm.mean, norm.var) if fixed else (None, None)
    y, _, mean, var, count = torch.ops.tritonconv.conv_batch_norm(
        x, weight, epilogue.bias, mean, var, norm.weight, norm.bias, epilogue.residual, stride=ints(stride),
        **padding_numbers(padding), dilation=ints(dilation), groups=groups, transposed=kind == "conv_transpose",
        output_padding=ints(output_padding), eps=norm.eps, **to_numbers(epilogue.activation), group=group,
    )  # fmt: skip
    return y, mean, var, count


@torch.library.custom_op("tritonconv::conv_batch_norm", mutates_args=())
def conv_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, fixed_mean: Tensor | None, fixed_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *, stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, transposed: bool,
    output_padding: Sequence[int], eps: float, activation: str, a: float, b: float, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, z, mean, var, count) with z = conv(x, weight) + bias and y = act((z - mean) / sqrt(var + eps) * bn_weight +
    bn_bias + residual), for a batched x with at least one pixel, on Triton alone.

    The statistics are the batch's (over all processes of `group`), unless fixed ones are given.
    """
    kind: Kind = "conv_transpose" if transposed else "conv"
    numbers = stride, padding, padding_name, dilation, groups, output_padding
    call = resolved("tritonconv::conv_batch_norm", kind, x, weight, Epilogue(bias), *numbers, statistics=fixed_mean is None)
    act = from_numbers(activation, a, b)
    fixed = None if fixed_mean is None or fixed_var is None else (fixed_mean, fixed_var)
    return forward(call, x, weight, bias, fixed, bn_weight, bn_bias, eps, residual, act, group)


@conv_batch_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, fixed_mean: Tensor | None, *_norm: Any, stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, transposed: bool,
    output_padding: Sequence[int], **_numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del bias
    g = conv_geometry(x.shape, weight.shape, stride, padding, padding_name, dilation, groups, transposed, output_padding)
    y, z = (empty_output(x, g.output_shape, output_format(x, weight), x.dtype) for _ in range(2))
    size = g.out_channels if fixed_mean is None else 0
    mean, var, count = (x.new_empty(n, dtype=wide(x.dtype)) for n in (size, size, 1 if fixed_mean is None else 0))
    return y, z, mean, var, count


@torch.library.custom_op("tritonconv::conv_batch_norm_backward", mutates_args=())
def conv_batch_norm_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, z: Tensor, mean: Tensor, var: Tensor, count: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *, needs: Sequence[bool],
    input_shape: Sequence[int], weight_shape: Sequence[int], channels_last: Sequence[bool], stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, transposed: bool,
    output_padding: Sequence[int], eps: float, activation: str, a: float, b: float, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tritonconv::conv_batch_norm's x, weight, bias, bn_weight, bn_bias and residual; empty if not needed.

    Without an activation the residual's gradient is dy, and is not given. `count` is None for fixed statistics.
    """
    norm = Norm(mean, var, bn_weight, bn_bias, eps, residual, from_numbers(activation, a, b), count)
    numbers = stride, padding, padding_name, dilation, groups, transposed, output_padding
    geometry = conv_geometry(input_shape, weight_shape, *numbers)
    found = backward(dy, x, weight, z, norm, geometry, (channels_last[0], channels_last[1]), Needs(*needs), group)
    dx, dw, db, d_norm_weight, d_norm_bias, d_residual = (z.new_empty(0) if t is None else t for t in found)
    return dx, dw, db, d_norm_weight, d_norm_bias, d_residual


@conv_batch_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, z: Tensor, mean: Tensor, var: Tensor, count: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *, needs: Sequence[bool],
    input_shape: Sequence[int], weight_shape: Sequence[int], channels_last: Sequence[bool], activation: str,
    **_numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    del dy, x, weight, mean, var, count
    wanted = Needs(*needs)

    def dense(shape: Sequence[int], channels_last: bool) -> Tensor:
        return empty_output(z, tuple(shape), channels_last, z.dtype)

    channels = z.shape[1]
    return (
        dense(input_shape, channels_last[0]) if wanted.x else z.new_empty(0),
        dense(weight_shape, channels_last[1]) if wanted.weight else z.new_empty(0),
        z.new_empty(channels if wanted.bias else 0),
        z.new_empty(0) if bn_weight is None or not wanted.norm_weight else bn_weight.new_empty(channels),
        z.new_empty(0) if bn_bias is None or not wanted.norm_bias else bn_bias.new_empty(channels),
        torch.empty_like(z) if wanted.residual and residual is not None and activation else z.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    x, weight, _, fixed_mean, fixed_var, bn_weight, bn_bias, residual = inputs
    _, z, mean, var, count = output
    ctx.mark_non_differentiable(z, mean, var, count)
    ctx.set_materialize_grads(False)
    ctx.numbers = {name: keyword_only_inputs[name] for name in NAMES}
    ctx.shapes, ctx.formats = (x.shape, weight.shape), (suggests_channels_last(x), suggests_channels_last(weight))
    act = bool(keyword_only_inputs["activation"])
    ctx.fixed = fixed_mean is not None
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        x if needs[1] else None, weight if needs[0] else None, z, fixed_mean if ctx.fixed else mean,
        fixed_var if ctx.fixed else var, None if ctx.fixed else count, bn_weight, bn_bias, residual if act else None,
    )  # fmt: skip


def _backward(ctx: Any, dy: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needs)
    if ctx.fixed and (needs[3] or needs[4]):
        raise NotImplementedError("tritonconv::conv_batch_norm: fixed statistics have no gradient")
    x, weight, *saved, residual = ctx.saved_tensors
    wanted = [needs[0], needs[1], needs[2], needs[5], needs[6], needs[7]]
    found = torch.ops.tritonconv.conv_batch_norm_backward(
        dy, x, weight, *saved, residual, needs=wanted, input_shape=ctx.shapes[0], weight_shape=ctx.shapes[1],
        channels_last=list(ctx.formats), **ctx.numbers,
    )  # fmt: skip
    dx, dw, db, d_norm_weight, d_norm_bias, d_residual = (
        t if need else None for t, need in zip(found, wanted, strict=True)
    )
    if needs[7] and not ctx.numbers["activation"]:
        d_residual = dy
    return dx, dw, db, None, None, d_norm_weight, d_norm_bias, d_residual


register_gradient(conv_batch_norm, _backward, _save)


@register_flop_formula(torch.ops.tritonconv.conv_batch_norm)
def _flops(x_shape: Sequence[int], w_shape: Sequence[int], *_norm: Any, **numbers: Any) -> int:
    return 2 * conv_geometry(x_shape, w_shape, **{name: numbers[name] for name in GEOMETRY}).macs


@register_flop_formula(torch.ops.tritonconv.conv_batch_norm_backward)
def _gradient_flops(
    *_tensors: Any, needs: Sequence[bool], input_shape: Sequence[int], weight_shape: Sequence[int], **numbers: Any
) -> int:
    wanted = Needs(*needs)
    geometry = conv_geometry(input_shape, weight_shape, **{name: numbers[name] for name in GEOMETRY})
    return 2 * (wanted.x + wanted.weight) * geometry.macs


register_autocast(torch.ops.tritonconv.conv_batch_norm)
