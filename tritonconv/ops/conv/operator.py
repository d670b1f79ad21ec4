"""Convolution's operators: forward with an epilogue, transposed, and both gradients, which are one another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.activation_gradient import activation_gradient, differentiable_gradient, shows_in_result
from tritonconv.ops.conv.dense import bias_gradient, check_convolution, output_format
from tritonconv.ops.conv.numbers import conv_geometry
from tritonconv.ops.conv.route import convolve, data_gradient, weight_gradient
from tritonconv.ops.core.activation import from_numbers, to_numbers
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.operator import Operator

__all__ = [
    "CONV", "CONV_DGRAD", "CONV_TRANSPOSE", "CONV_WGRAD", "EPILOGUE", "conv_gradients", "epilogue_numbers", "make_epilogue",
    "not_built", "transpose_gradients",
]  # fmt: skip

# Names of an epilogue's tensors, in the order that operators take them.
EPILOGUE = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias", "residual")
CAST = ("x", "weight", "bias", "residual")


def make_epilogue(tensors: Sequence[Tensor | None], eps: float, activation: str, a: float, b: float) -> Epilogue:
    """An epilogue of the tensors that `EPILOGUE` names, and of its numbers."""
    bias, mean, var, weight, shift, residual = tensors
    norm = None if mean is None or var is None else BatchNorm(mean, var, weight, shift, eps)
    return Epilogue(bias, norm, residual, from_numbers(activation, a, b))


def epilogue_numbers(eps: float, activation: Any) -> tuple[float, str, float, float]:
    """(eps, activation, a, b) as operators take them."""
    return eps, *to_numbers(activation)


def not_built(op: str) -> NotImplementedError:
    """The error of an operator that has no gradient with its epilogue."""
    return NotImplementedError(
        f"{op}: the gradient with this batch norm, residual or activation is not built; call the operator alone and what "
        "follows it with torch"
    )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, eps: float, activation: str, a: float,
    b: float, kind: str,
) -> Tensor:  # fmt: skip
    """act(bn(conv(x, weight) + bias) + residual) for a batched x, on Triton alone.

    `padding` has a number for each axis, or zeros before each axis and then behind each; `padding_name` is "same", "valid",
    "causal" or "" (then `padding` counts); `activation` is a name or ""; `kind` "matmul" takes the TF32 switch of matrix
    products.
    """
    g = conv_geometry(x.shape, weight.shape, stride, padding, padding_name, dilation, groups)
    epilogue = make_epilogue((bias, running_mean, running_var, bn_weight, bn_bias, residual), eps, activation, a, b)
    check_convolution("tritonconv::conv", x, weight, epilogue, g)
    y = convolve(x, weight, epilogue, g, "matmul" if kind == "matmul" else "conv").y
    assert y is not None
    return y


def _outputs(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    g = conv_geometry(x.shape, weight.shape, *rest[6:11])
    return empty_output(x, g.output_shape, output_format(x, weight), x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers, ctx.kind = inputs[8:13], inputs[17]
    _save_epilogue(ctx, inputs, output, inputs[14:17])


def _save_epilogue(ctx: Any, inputs: tuple[Any, ...], output: Tensor, activation: Sequence[Any]) -> None:
    """Save what the gradient with an epilogue needs: the result, where there is an activation."""
    x, weight = inputs[:2]
    ctx.has_norm, ctx.activation = inputs[3] is not None, from_numbers(*activation)
    ctx.shapes, ctx.formats = (x.shape, weight.shape), (suggests_channels_last(x), suggests_channels_last(weight))
    # The data gradient needs the weight alone, the weight's gradient the input alone.
    given = x if ctx.needs[1] else None, weight if ctx.needs[0] else None
    ctx.save_for_backward(*given, None if ctx.activation is None else output)


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    def plain(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> Sequence[Tensor | None]:
        return conv_gradients(dy, x, weight, ctx.shapes, ctx.numbers, ctx.formats, ctx.needs, ctx.kind)

    return _epilogue_gradients("tritonconv::conv", ctx, dy, plain, (*ctx.numbers, False, ()), ctx.kind)


def _epilogue_gradients(
    op: str, ctx: Any, dy: Tensor, plain: Callable[..., Sequence[Tensor | None]], numbers: Sequence[Any], kind: str
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of a convolution's tensors, with what follows it.

    Args:
        plain: (dy, x, weight) to gradients of x, weight and bias, without anything behind the convolution.
        numbers: (stride, padding, padding_name, dilation, groups, transposed, output_padding).
    """
    x, weight, y = ctx.saved_tensors
    activation, needs = ctx.activation, (*ctx.needs[:3], ctx.needs[7])
    if ctx.has_norm or not shows_in_result(activation):
        raise not_built(op)
    if activation is not None and not torch.is_grad_enabled():
        found = activation_gradient(dy, x, weight, y, needs, ctx.shapes, ctx.formats, numbers, kind, activation)
        return [*found[:3], *(None,) * 4, found[3]]
    if activation is not None:
        dy = differentiable_gradient(dy, y, activation)
    return [*plain(dy, x, weight), *(None,) * 4, dy if needs[3] else None]


def conv_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, shapes: Sequence[Any], numbers: Sequence[Any],
    formats: Sequence[bool], needs: Sequence[bool], kind: str = "conv",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of a convolution's x, weight and bias by operators, each where it is needed.

    Args:
        shapes, formats: of x and weight.
        numbers: (stride, padding, padding_name, dilation, groups).
    """
    dx = dw = db = None
    if needs[0]:
        dx = CONV_DGRAD(dy, weight, tuple(shapes[0]), *numbers, formats[0], kind)
    if needs[1]:
        dw, db = CONV_WGRAD(dy, x, tuple(shapes[1]), *numbers, formats[1], bool(needs[2]), kind)
    elif needs[2]:
        db = bias_gradient(dy)
    return dx, dw, db


def _flops(x: Sequence[int], weight: Sequence[int], *rest: Any) -> int:
    return 2 * conv_geometry(x, weight, *rest[6:11]).macs


CONV = Operator("conv", _forward, _outputs, save=_save, backward=_backward, flops=_flops, cast=CAST)


# The data gradient.


def _dgrad(
    dy: Tensor, weight: Tensor, input_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, channels_last: bool, kind: str,
) -> Tensor:  # fmt: skip
    """Gradient of tritonconv::conv's x, of this size and format, on Triton alone."""
    g = conv_geometry(input_shape, weight.shape, stride, padding, padding_name, dilation, groups)
    _check_gradient("conv_dgrad", dy, g)
    return data_gradient(dy, weight, g, channels_last, "matmul" if kind == "matmul" else "conv")


def _check_gradient(op: str, dy: Tensor, g: ConvGeometry) -> None:
    if tuple(dy.shape) != g.output_shape:
        raise RuntimeError(
            f"tritonconv::{op}: expected a gradient of size {list(g.output_shape)}, but got {list(dy.shape)} ({g})"
        )


def _dgrad_outputs(dy: Tensor, _weight: Tensor, input_shape: Sequence[int], *rest: Any) -> Tensor:
    return empty_output(dy, tuple(input_shape), rest[5], dy.dtype)


def _dgrad_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    dy, weight, _, *ctx.numbers, _, ctx.kind = inputs
    ctx.shape, ctx.channels_last = weight.shape, suggests_channels_last(weight)
    ctx.save_for_backward(dy if ctx.needs[1] else None, weight if ctx.needs[0] else None)


def _dgrad_backward(ctx: Any, ddx: Tensor) -> list[Tensor | None]:
    dy, weight = ctx.saved_tensors
    ddy = dw = None
    if ctx.needs[0]:
        ddy = CONV(ddx, weight, *NO_EPILOGUE, *ctx.numbers, *PLAIN, ctx.kind)
    if ctx.needs[1]:
        dw, _ = CONV_WGRAD(dy, ddx, tuple(ctx.shape), *ctx.numbers, ctx.channels_last, False, ctx.kind)
    return [ddy, dw]


NO_EPILOGUE, PLAIN = (None,) * 6, (0.0, "", 0.0, 0.0)


def _dgrad_flops(_dy: Sequence[int], weight: Sequence[int], input_shape: Sequence[int], *given: Any) -> int:
    return 2 * conv_geometry(input_shape, weight, *given[:5]).macs


CONV_DGRAD = Operator("conv_dgrad", _dgrad, _dgrad_outputs, save=_dgrad_save, backward=_dgrad_backward, flops=_dgrad_flops)


# The weight's gradient.


def _wgrad(
    dy: Tensor, x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, channels_last: bool, bias: bool, kind: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of tritonconv::conv's weight, in this format, and of its bias (empty without one), on Triton alone."""
    g = conv_geometry(x.shape, weight_shape, stride, padding, padding_name, dilation, groups)
    _check_gradient("conv_wgrad", dy, g)
    return weight_gradient(dy, x, g, channels_last, bias, "matmul" if kind == "matmul" else "conv")  # type: ignore[return-value]


def _wgrad_outputs(dy: Tensor, _x: Tensor, weight_shape: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor | None]:
    dw = empty_output(dy, tuple(weight_shape), rest[5], dy.dtype)
    return dw, dy.new_empty(weight_shape[0]) if rest[6] else None


def _wgrad_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    dy, x, _, *ctx.numbers, _, _, ctx.kind = inputs
    ctx.x_shape, ctx.dy_shape, ctx.channels_last = x.shape, dy.shape, suggests_channels_last(x)
    ctx.save_for_backward(dy if ctx.needs[1] else None, x if ctx.needs[0] else None)


def _wgrad_backward(ctx: Any, ddw: Tensor | None, ddb: Tensor | None) -> list[Tensor | None]:
    dy, x = ctx.saved_tensors
    ddy = dx = None
    if ctx.needs[0] and ddw is not None:
        ddy = CONV(x, ddw, *NO_EPILOGUE, *ctx.numbers, *PLAIN, ctx.kind)
    if ctx.needs[0] and ddb is not None:
        rows = ddb.view(1, -1, *(1,) * (len(ctx.dy_shape) - 2)).expand(ctx.dy_shape)
        ddy = rows if ddy is None else ddy + rows
    if ctx.needs[1] and ddw is not None:
        dx = CONV_DGRAD(dy, ddw, tuple(ctx.x_shape), *ctx.numbers, ctx.channels_last, ctx.kind)
    return [ddy, dx]


def _wgrad_flops(_dy: Sequence[int], x: Sequence[int], weight_shape: Sequence[int], *given: Any) -> int:
    return 2 * conv_geometry(x, weight_shape, *given[:5]).macs


CONV_WGRAD = Operator(
    "conv_wgrad", _wgrad, _wgrad_outputs, save=_wgrad_save, backward=_wgrad_backward, differentiable=2, flops=_wgrad_flops
)


# Transposed convolution.


def _transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int], eps: float,
    activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(conv_transpose(x, weight) + bias) + residual) for a batched x, on Triton alone; `activation` may be ""."""
    g = conv_geometry(x.shape, weight.shape, stride, padding, "", dilation, groups, True, output_padding)
    epilogue = make_epilogue((bias, running_mean, running_var, bn_weight, bn_bias, residual), eps, activation, a, b)
    check_convolution("tritonconv::conv_transpose", x, weight, epilogue, g)
    y = convolve(x, weight, epilogue, g, "conv_transpose").y
    assert y is not None
    return y


def _transposed_geometry(x: Sequence[int], weight: Sequence[int], rest: Sequence[Any]) -> ConvGeometry:
    stride, padding, output_padding, groups, dilation = rest[6:11]
    return conv_geometry(x, weight, stride, padding, "", dilation, groups, True, output_padding)


def _transpose_outputs(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    g = _transposed_geometry(x.shape, weight.shape, rest)
    return empty_output(x, g.output_shape, output_format(x, weight), x.dtype)


def _transpose_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = inputs[8:13]
    _save_epilogue(ctx, inputs, output, inputs[14:17])


def _transpose_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    def plain(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> Sequence[Tensor | None]:
        return transpose_gradients(dy, x, weight, ctx.shapes, ctx.numbers, ctx.formats[1], ctx.needs)

    stride, padding, output_padding, groups, dilation = ctx.numbers
    numbers = stride, padding, "", dilation, groups, True, output_padding
    return _epilogue_gradients("tritonconv::conv_transpose", ctx, dy, plain, numbers, "conv_transpose")


def transpose_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, shapes: Sequence[Any], numbers: Sequence[Any],
    channels_last: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of a transposed convolution's x, weight and bias by operators, each where it is needed.

    The input's is a convolution of dy, the weight's that convolution's with dy as its input.

    Args:
        shapes: of x and weight.
        numbers: (stride, padding, output_padding, groups, dilation).
        channels_last: the format of the weight.
    """
    stride, padding, extra, groups, dilation = numbers
    conv = (stride, padding, "", dilation, groups)
    g = conv_geometry(shapes[0], shapes[1], stride, padding, "", dilation, groups, True, extra)
    # Where output_padding reaches the stride, the convolution of dy has pixels after those of x: so many on each axis.
    overhang = [n // step for n, step in zip(g.output_padding, g.stride, strict=True)][3 - g.nd :]
    dx = dw = None
    if needs[0]:
        dx = CONV(dy, weight, *NO_EPILOGUE, *conv, *PLAIN, "conv")
        for axis, over in enumerate(overhang, 2):
            dx = dx.narrow(axis, 0, shapes[0][axis]) if over else dx
    if needs[1] and x is not None:
        if any(overhang):
            x = torch.nn.functional.pad(x, [n for over in reversed(overhang) for n in (0, over)])
        dw, _ = CONV_WGRAD(x, dy, tuple(shapes[1]), *conv, channels_last, False, "conv")
    return dx, dw, bias_gradient(dy) if needs[2] else None


def _transpose_flops(x: Sequence[int], weight: Sequence[int], *rest: Any) -> int:
    return 2 * _transposed_geometry(x, weight, rest).macs


CONV_TRANSPOSE = Operator(
    "conv_transpose", _transpose, _transpose_outputs, save=_transpose_save, backward=_transpose_backward,
    flops=_transpose_flops, cast=CAST,
)  # fmt: skip
