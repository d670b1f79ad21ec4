"""The operator of a convolution (or a transposed one), batch norm, residual and activation for training.

Forward it gives y, z = conv(x) + bias, and the batch's statistics. z has a gradient too: second derivatives go through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm.gradient import Norm
from tritonconv.ops.batch_norm.operator import norm_form
from tritonconv.ops.conv.conv_norm import Needs, backward, forward
from tritonconv.ops.conv.dense import check_convolution, output_format
from tritonconv.ops.conv.numbers import ConvNumbers, conv_geometry, ints
from tritonconv.ops.conv.operator import conv_gradients, transpose_gradients
from tritonconv.ops.core.activation import ActivationSpec, from_numbers, to_numbers
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import ConvKind
from tritonconv.ops.core.layout import empty_output, suggests_channels_last, wide
from tritonconv.ops.core.operator import Operator, differentiate

__all__ = ["CONV_BATCH_NORM", "CONV_BATCH_NORM_BACKWARD", "conv_batch_norm"]

# So many of the numbers, the first ones, are the geometry's.
GEOMETRY = 7


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, fixed_mean: Tensor | None, fixed_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, transposed: bool,
    output_padding: Sequence[int], eps: float, activation: str, a: float, b: float, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, z, mean, var, count) with z = conv(x, weight) + bias and y = act((z - mean) / sqrt(var + eps) * bn_weight +
    bn_bias + residual), for a batched x with at least one pixel, on Triton alone.

    The statistics are the batch's (over all processes of `group`), unless fixed ones are given, which are not given back.
    """
    g = conv_geometry(x.shape, weight.shape, stride, padding, padding_name, dilation, groups, transposed, output_padding)
    check_convolution("tritonconv::conv_batch_norm", x, weight, Epilogue(bias), g)
    fixed = None if fixed_mean is None or fixed_var is None else (fixed_mean, fixed_var)
    return forward(  # type: ignore[return-value]
        "conv_transpose" if transposed else "conv", x, weight, bias, g, fixed, bn_weight, bn_bias, eps, residual,
        from_numbers(activation, a, b), group,
    )  # fmt: skip


def _outputs(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    g = conv_geometry(x.shape, weight.shape, *rest[6 : 6 + GEOMETRY])
    y, z = (empty_output(x, g.output_shape, output_format(x, weight), x.dtype) for _ in range(2))
    if rest[1] is not None:
        return y, z, None, None, None
    return y, z, *(x.new_empty(n, dtype=wide(x.dtype)) for n in (g.out_channels, g.out_channels, 1))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, fixed_mean, fixed_var, bn_weight, bn_bias, residual, *ctx.numbers = inputs
    z = output[1]
    ctx.shapes, ctx.formats = (x.shape, weight.shape), (suggests_channels_last(x), suggests_channels_last(weight))
    ctx.fixed = fixed_mean is not None
    mean, var, count = (fixed_mean, fixed_var, None) if ctx.fixed else output[2:]
    ctx.save_for_backward(
        x if ctx.needs[1] else None, weight if ctx.needs[0] else None, z, mean, var, count, bn_weight, bn_bias,
        residual if ctx.numbers[GEOMETRY + 1] else None,
    )  # fmt: skip


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> list[Tensor | None]:
    needs = ctx.needs
    if ctx.fixed and (needs[3] or needs[4]):
        raise NotImplementedError("tritonconv::conv_batch_norm: fixed statistics have no gradient")
    if dy is None or dz is not None or torch.is_grad_enabled():
        return _differentiable(ctx, dy, dz)
    wanted = (needs[0], needs[1], needs[2], needs[5], needs[6], needs[7])
    found = CONV_BATCH_NORM_BACKWARD(
        dy, *ctx.saved_tensors, wanted, tuple(ctx.shapes[0]), tuple(ctx.shapes[1]), ctx.formats, *ctx.numbers
    )
    dx, dw, db, d_norm_weight, d_norm_bias, d_residual = found
    # Without an activation the residual's gradient is dy.
    d_residual = d_residual if ctx.numbers[GEOMETRY + 1] else dy
    return [dx, dw, db, None, None, d_norm_weight, d_norm_bias, d_residual]


def _differentiable(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> list[Tensor | None]:
    """Gradients that can be differentiated: those of the convolution are operators, those of what follows torch's."""
    x, weight, z, mean, var, _, bn_weight, bn_bias, residual = ctx.saved_tensors
    stride, padding, padding_name, dilation, groups, transposed, extra, eps, activation, a, b, group = ctx.numbers
    needs = ctx.needs
    if group:
        raise NotImplementedError("conv_batch_norm: there is no second derivative over the processes of a group")
    d_norm: list[Tensor | None] = [None] * 4
    if dy is not None:
        form = norm_form((mean, var) if ctx.fixed else None, eps, from_numbers(activation, a, b))
        before = any(needs[:3])
        d_norm = differentiate(
            form, (z, bn_weight, bn_bias, residual), (before, needs[5], needs[6], needs[7] and bool(activation)), dy
        )
    through, d_weight, d_bias, d_residual = d_norm
    if needs[7] and not activation:
        d_residual = dy
    dz = through if dz is None else dz if through is None else dz + through
    found: tuple[Tensor | None, ...] = (None, None, None)
    if dz is not None and transposed:
        numbers = (stride, padding, extra, groups, dilation)
        found = transpose_gradients(dz, x, weight, ctx.shapes, numbers, ctx.formats[1], needs)
    elif dz is not None:
        numbers = (stride, padding, padding_name, dilation, groups)
        found = conv_gradients(dz, x, weight, ctx.shapes, numbers, ctx.formats, needs)
    return [*found, None, None, d_weight, d_bias, d_residual]


def _flops(x: Sequence[int], weight: Sequence[int], *rest: Any) -> int:
    return 2 * conv_geometry(x, weight, *rest[6 : 6 + GEOMETRY]).macs


CONV_BATCH_NORM = Operator(
    "conv_batch_norm", _forward, _outputs, save=_save, backward=_backward, differentiable=2, flops=_flops,
    cast=("x", "weight", "bias", "residual"), collective=lambda *arguments: bool(arguments[-1]),
)  # fmt: skip


def conv_batch_norm(
    kind: ConvKind, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Sequence[Any], residual: Tensor | None,
    activation: ActivationSpec | None, numbers: ConvNumbers, group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, var, count) of the operator.

    Args:
        norm: (mean, variance, weight, bias, eps); without the first two the statistics are the batch's own.
    """
    stride, padding, name, dilation, groups = numbers.for_operators()
    *vectors, eps = norm
    y, _, mean, var, count = CONV_BATCH_NORM(
        x, weight, bias, *vectors, residual, stride, padding, name, dilation, groups, kind == "conv_transpose",
        ints(numbers.output_padding), eps, *to_numbers(activation), group,
    )  # fmt: skip
    return y, mean, var, count


# The gradient.


def _gradient(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, z: Tensor, mean: Tensor, var: Tensor, count: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, needs: Sequence[bool],
    input_shape: Sequence[int], weight_shape: Sequence[int], channels_last: Sequence[bool], stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, transposed: bool,
    output_padding: Sequence[int], eps: float, activation: str, a: float, b: float, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tritonconv::conv_batch_norm's x, weight, bias, bn_weight, bn_bias and residual; empty if not needed.

    Without an activation the residual's gradient is dy, and is not given. `count` is None for fixed statistics.
    """
    norm = Norm(mean, var, bn_weight, bn_bias, eps, residual, from_numbers(activation, a, b), count)
    geometry: ConvGeometry = conv_geometry(
        input_shape, weight_shape, stride, padding, padding_name, dilation, groups, transposed, output_padding
    )
    return backward(  # type: ignore[return-value]
        dy, x, weight, z, norm, geometry, (channels_last[0], channels_last[1]), Needs(*needs), group
    )


def _gradient_outputs(
    _dy: Tensor, _x: Any, _weight: Any, z: Tensor, _mean: Any, _var: Any, _count: Any, bn_weight: Tensor | None,
    bn_bias: Tensor | None, residual: Tensor | None, needs: Sequence[bool], input_shape: Sequence[int],
    weight_shape: Sequence[int], channels_last: Sequence[bool], *numbers: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    wanted, activation, channels = Needs(*needs), numbers[GEOMETRY + 1], z.shape[1]

    def dense(shape: Sequence[int], channels_last: bool) -> Tensor:
        return empty_output(z, tuple(shape), channels_last, z.dtype)

    return (
        dense(input_shape, channels_last[0]) if wanted.x else None,
        dense(weight_shape, channels_last[1]) if wanted.weight else None,
        z.new_empty(channels) if wanted.bias else None,
        None if bn_weight is None or not wanted.norm_weight else bn_weight.new_empty(channels),
        None if bn_bias is None or not wanted.norm_bias else bn_bias.new_empty(channels),
        torch.empty_like(z) if wanted.residual and residual is not None and activation else None,
    )


def _gradient_flops(*arguments: Any) -> int:
    wanted = Needs(*arguments[10])
    geometry = conv_geometry(*arguments[11:13], *arguments[14 : 14 + GEOMETRY])
    return 2 * (wanted.x + wanted.weight) * geometry.macs


CONV_BATCH_NORM_BACKWARD = Operator(
    "conv_batch_norm_backward", _gradient, _gradient_outputs, flops=_gradient_flops,
    collective=lambda *arguments: bool(arguments[-1]),
)  # fmt: skip
