"""torch.ops.tritonconv.conv_transpose: transposed convolution for torch.compile, export, autograd and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.ops.conv.conv_norm import bias_gradient
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.library import (
    conv_geometry,
    ints,
    not_built,
    put_together,
    register_autocast,
    register_gradient,
    resolved,
    taken_apart,
)
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import empty_output, suggests_channels_last

__all__ = ["call_transposed"]


def call_transposed(
    x: Tensor, weight: Tensor, epilogue: Epilogue, stride: Any, padding: Any, output_padding: Any, groups: int,
    dilation: Any,
) -> Tensor:  # fmt: skip
    """torch.ops.tritonconv.conv_transpose with an epilogue taken apart."""
    tensors, numbers = taken_apart(epilogue)
    result: Tensor = torch.ops.tritonconv.conv_transpose(
        x, weight, *tensors, stride=ints(stride), padding=ints(padding), output_padding=ints(output_padding), groups=groups,
        dilation=ints(dilation), **numbers,
    )  # fmt: skip
    return result


@torch.library.custom_op("tritonconv::conv_transpose", mutates_args=())
def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int], eps: float,
    activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(conv_transpose(x, weight) + bias) + residual) for a batched x, on Triton alone; `activation` may be ""."""
    tensors = (bias, running_mean, running_var, bn_weight, bn_bias, residual)
    epilogue = put_together(tensors, eps=eps, activation=activation, a=a, b=b)
    numbers = (stride, padding, "", dilation, groups, output_padding)
    call = resolved("tritonconv::conv_transpose", "conv_transpose", x, weight, epilogue, *numbers)
    return call.run(x, weight, epilogue)


@conv_transpose.register_fake
def _(
    x: Tensor, weight: Tensor, *_epilogue: Any, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int], **_numbers: Any,
) -> Tensor:  # fmt: skip
    geometry = conv_geometry(x.shape, weight.shape, stride, padding, "", dilation, groups, True, output_padding)
    return empty_output(x, geometry.output_shape, output_format(x, weight), x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, *rest = inputs
    needs = ctx.needs_input_grad
    ctx.numbers = {name: keyword_only_inputs[name] for name in ("stride", "padding", "dilation", "groups")}
    output_padding = keyword_only_inputs["output_padding"]
    g = conv_geometry(x.shape, weight.shape, **ctx.numbers, padding_name="", transposed=True, output_padding=output_padding)
    # Where output_padding reaches the stride, the convolution of dy has pixels behind those of x: so many on each axis.
    ctx.overhang = [extra // step for extra, step in zip(g.output_padding, g.stride, strict=True)][3 - g.nd :]
    ctx.fused = any(t is not None for t in rest) or bool(keyword_only_inputs["activation"])
    ctx.shapes, ctx.w_channels_last = (x.shape, weight.shape), suggests_channels_last(weight)
    # As of a convolution: the input's gradient needs the weight alone, the weight's gradient the input alone.
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The input's gradient is a convolution of dy, the weight's that convolution's with dy as its input."""
    if ctx.fused:
        raise not_built("tritonconv::conv_transpose", "a transposed convolution")
    x, weight = ctx.saved_tensors
    x_shape, w_shape = ctx.shapes
    needs, numbers = ctx.needs_input_grad, ctx.numbers | dict(padding_name="", kind="conv")
    dx = dw = db = None
    if needs[0]:
        plain = dict(eps=0.0, activation="", a=0.0, b=0.0)
        dx = torch.ops.tritonconv.conv(dy, weight, *(None,) * 6, **numbers, **plain)
        for axis, over in enumerate(ctx.overhang, 2):
            dx = dx.narrow(axis, 0, x_shape[axis]) if over else dx
    if needs[1]:
        if any(ctx.overhang):
            x = torch.nn.functional.pad(x, [n for over in reversed(ctx.overhang) for n in (0, over)])
        dw, _ = torch.ops.tritonconv.conv_wgrad(
            x, dy, weight_shape=w_shape, channels_last=ctx.w_channels_last, bias=False, **numbers
        )
    if needs[2]:
        db = bias_gradient(dy)
    return dx, dw, db, None, None, None, None, None


register_gradient(conv_transpose, _backward, _save)


@register_flop_formula(torch.ops.tritonconv.conv_transpose)
def _flops(
    x_shape: Sequence[int], w_shape: Sequence[int], *_epilogue: Any, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int], **_numbers: Any,
) -> int:  # fmt: skip
    return 2 * conv_geometry(x_shape, w_shape, stride, padding, "", dilation, groups, True, output_padding).macs


register_autocast(torch.ops.tritonconv.conv_transpose)
