"""The operator that torch.compile, export, fake tensors, autocast and dispatch modes see: torch.ops.tritonconv.conv.

Eager calls go past it, straight to the launcher (ops/conv/dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.conv_norm import bias_gradient
from tritonconv.ops.conv.dense import check_convolution, output_format
from tritonconv.ops.conv.route import data_gradient, prepare_call, weight_gradient
from tritonconv.ops.core.activation import from_numbers, to_numbers
from tritonconv.ops.core.backend import asking_hopper, hopper_asked
from tritonconv.ops.core.cache import Prepared, find, remember, signature
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import Kind
from tritonconv.ops.core.layout import empty_output, suggests_channels_last

__all__ = [
    "call_operator", "conv_geometry", "ints", "not_built", "padding_numbers", "put_together", "register_autocast",
    "register_gradient", "resolved", "taken_apart",
]  # fmt: skip


def call_operator(
    x: Tensor, weight: Tensor, epilogue: Epilogue, stride: Any, padding: Any, dilation: Any, groups: int,
    kind: Literal["conv", "matmul"],
) -> Tensor:  # fmt: skip
    """torch.ops.tritonconv.conv with an epilogue taken apart."""
    tensors, epilogue_numbers = taken_apart(epilogue)
    result: Tensor = torch.ops.tritonconv.conv(
        x, weight, *tensors, stride=ints(stride), **padding_numbers(padding), dilation=ints(dilation), groups=groups,
        kind=kind, **epilogue_numbers,
    )  # fmt: skip
    return result


def ints(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def padding_numbers(padding: str | int | Sequence[int]) -> dict[str, Any]:
    """What operators take for a padding: numbers, or a name."""
    if isinstance(padding, str):
        return dict(padding=[], padding_name=padding)
    return dict(padding=ints(padding), padding_name="")


def taken_apart(epilogue: Epilogue) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """An epilogue's tensors and numbers, as operators take them."""
    norm = epilogue.batch_norm
    numbers = dict(eps=norm.eps if norm else 0.0) | to_numbers(epilogue.activation)
    return (epilogue.bias, *(norm[:4] if norm else (None,) * 4), epilogue.residual), numbers


def put_together(tensors: Sequence[Tensor | None], *, eps: float, activation: str, a: float, b: float) -> Epilogue:
    """The reverse of `taken_apart`."""
    bias, mean, var, weight, shift, residual = tensors
    norm = None if mean is None or var is None else BatchNorm(mean, var, weight, shift, eps)
    return Epilogue(bias, norm, residual, from_numbers(activation, a, b))


@torch.library.custom_op("tritonconv::conv", mutates_args=())
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *, stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, eps: float, activation: str, a: float,
    b: float, kind: str,
) -> Tensor:  # fmt: skip
    """act(bn(conv(x, weight) + bias) + residual) for a batched x, on Triton alone.

    `padding_name` is "same", "valid" or "" (then `padding` counts); `activation` is a name or ""; `kind` "matmul" takes the
    TF32 switch of matrix products.
    """
    tensors = (bias, running_mean, running_var, bn_weight, bn_bias, residual)
    epilogue = put_together(tensors, eps=eps, activation=activation, a=a, b=b)
    switch: Literal["conv", "matmul"] = "matmul" if kind == "matmul" else "conv"
    call = resolved("tritonconv::conv", switch, x, weight, epilogue, stride, padding, padding_name, dilation, groups)
    return call.run(x, weight, epilogue)


def resolved(
    op: str, kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, output_padding: Sequence[int] = (), statistics: bool = False,
) -> Prepared:  # fmt: skip
    """The call of an operator, as it was resolved before or is now, checked.

    Args:
        op: the operator's name, for messages.
        statistics: whether it is to be run with room for them, which leaves some configs out.
    """
    # These numbers are the operators' alone: no one asks here who runs a call.
    numbers = (tuple(stride), tuple(padding), padding_name, tuple(dilation), groups, tuple(output_padding), statistics)
    key = signature(kind, x, weight, epilogue, numbers, None)
    call = find(key)
    if not isinstance(call, Prepared):
        geometry = conv_geometry(
            x.shape, weight.shape, stride, padding, padding_name, dilation, groups, kind == "conv_transpose", output_padding
        )
        check_convolution(op, x, weight, epilogue, geometry)
        call = prepare_call(x, weight, epilogue, geometry, kind, statistics)
        remember(key, call)
    return call


def conv_geometry(
    x_shape: Sequence[int], w_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], padding_name: str,
    dilation: Sequence[int], groups: int, transposed: bool = False, output_padding: Sequence[int] = (),
) -> ConvGeometry:  # fmt: skip
    """The geometry of an operator's sizes and numbers."""
    return ConvGeometry.parse(
        x_shape, w_shape, nd=len(x_shape) - 2, stride=list(stride), padding=padding_name or list(padding),
        dilation=list(dilation), groups=groups, transposed=transposed,
        output_padding=list(output_padding) if transposed else 0,
    )  # fmt: skip


@conv.register_fake
def _(
    x: Tensor, weight: Tensor, *_epilogue: Any, stride: Sequence[int], padding: Sequence[int], padding_name: str,
    dilation: Sequence[int], groups: int, **_numbers: Any,
) -> Tensor:  # fmt: skip
    geometry = conv_geometry(x.shape, weight.shape, stride, padding, padding_name, dilation, groups)
    return empty_output(x, geometry.output_shape, output_format(x, weight), x.dtype)


@torch.library.custom_op("tritonconv::conv_dgrad", mutates_args=())
def dgrad(
    dy: Tensor, weight: Tensor, *, input_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, channels_last: bool, kind: str,
) -> Tensor:  # fmt: skip
    """Gradient of tritonconv::conv's x, of this size and format, on Triton alone."""
    geometry = conv_geometry(input_shape, weight.shape, stride, padding, padding_name, dilation, groups)
    return data_gradient(dy, weight, geometry, channels_last, "matmul" if kind == "matmul" else "conv")


@dgrad.register_fake
def _(dy: Tensor, weight: Tensor, *, input_shape: Sequence[int], channels_last: bool, **_numbers: Any) -> Tensor:  # noqa: ARG001
    return empty_output(dy, tuple(input_shape), channels_last, dy.dtype)


@torch.library.custom_op("tritonconv::conv_wgrad", mutates_args=())
def wgrad(
    dy: Tensor, x: Tensor, *, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, channels_last: bool, bias: bool, kind: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of tritonconv::conv's weight, in this format, and of its bias (empty without one), on Triton alone."""
    geometry = conv_geometry(x.shape, weight_shape, stride, padding, padding_name, dilation, groups)
    dw, db = weight_gradient(dy, x, geometry, channels_last, bias, "matmul" if kind == "matmul" else "conv")
    return dw, dw.new_empty(0) if db is None else db


@wgrad.register_fake
def _(
    dy: Tensor, x: Tensor, *, weight_shape: Sequence[int], channels_last: bool, bias: bool, **_numbers: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dw = empty_output(dy, tuple(weight_shape), channels_last, dy.dtype)
    return dw, dy.new_empty(weight_shape[0] if bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, *rest = inputs
    needs = ctx.needs_input_grad
    ctx.numbers = {
        name: keyword_only_inputs[name] for name in ("stride", "padding", "padding_name", "dilation", "groups", "kind")
    }
    ctx.fused = any(t is not None for t in rest) or bool(keyword_only_inputs["activation"])
    ctx.shapes, ctx.formats = (x.shape, weight.shape), (suggests_channels_last(x), suggests_channels_last(weight))
    # The data gradient needs the weight alone, the weight's gradient the input alone.
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.fused:
        raise not_built("tritonconv::conv", "a convolution")
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dw = db = None
    if needs[0]:
        dx = torch.ops.tritonconv.conv_dgrad(
            dy, weight, input_shape=ctx.shapes[0], channels_last=ctx.formats[0], **ctx.numbers
        )
    if needs[1]:
        dw, db = torch.ops.tritonconv.conv_wgrad(
            dy, x, weight_shape=ctx.shapes[1], channels_last=ctx.formats[1], bias=needs[2], **ctx.numbers
        )
    elif needs[2]:
        db = bias_gradient(dy)
    return dx, dw, db if needs[2] else None, None, None, None, None, None


def register_gradient(operator: Any, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Register an operator's gradient, which runs on Hopper's kernels too where the forward pass was asked to."""

    def remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.hopper = hopper_asked()
        save(ctx, inputs, keyword_only_inputs, output)

    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        with asking_hopper(ctx.hopper):
            return backward(ctx, *gradients)

    operator.register_autograd(run, setup_context=remember)


def not_built(op: str, what: str) -> NotImplementedError:
    """The error of an operator that has no gradient with an epilogue."""
    return NotImplementedError(
        f"{op}: the gradient of {what} with batch norm, residual or activation is not built; call the convolution alone "
        "and what follows it with torch"
    )


register_gradient(conv, _backward, _save)


@register_flop_formula([torch.ops.tritonconv.conv_dgrad, torch.ops.tritonconv.conv_wgrad])
def _gradient_flops(
    dy_shape: Sequence[int], other_shape: Sequence[int], *, stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, input_shape: Sequence[int] | None = None,
    weight_shape: Sequence[int] | None = None, **_numbers: Any,
) -> int:  # fmt: skip
    del dy_shape
    x_shape, w_shape = input_shape or other_shape, weight_shape or other_shape
    return 2 * conv_geometry(x_shape, w_shape, stride, padding, padding_name, dilation, groups).macs


@register_flop_formula(torch.ops.tritonconv.conv)
def _flops(
    x_shape: Sequence[int], w_shape: Sequence[int], *_epilogue: Any, stride: Sequence[int], padding: Sequence[int],
    padding_name: str, dilation: Sequence[int], groups: int, **_numbers: Any,
) -> int:  # fmt: skip
    return 2 * conv_geometry(x_shape, w_shape, stride, padding, padding_name, dilation, groups).macs


def register_autocast(operator: Any) -> None:
    """Cast x, weight, bias and residual to the dtype that autocast has at the call; batch norm's tensors stay."""
    _autocast_on(operator, "cuda", torch._C.DispatchKey.AutocastCUDA)
    _autocast_on(operator, "cpu", torch._C.DispatchKey.AutocastCPU)


def _autocast_on(operator: Any, device: str, key: Any) -> None:
    def autocast(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor | None) -> Tensor | None:
            return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)

        *norm, residual = args
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            result: Tensor = operator(cast(x), cast(weight), cast(bias), *norm, cast(residual), **kwargs)
            return result

    _library.impl(operator._qualified_op_name.split("::")[1], autocast, f"Autocast{device.upper()}")


_library = torch.library.Library("tritonconv", "FRAGMENT")
register_autocast(torch.ops.tritonconv.conv)
