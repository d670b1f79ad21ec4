"""Draws of convolutions, of what is fused with them, and of linear layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from deform_reference import deform_reference
from torch import Tensor

import tritonconv.functional as TF
from tritonconv.ops.core.activation import parse_activation

from .call import Call
from .draw import Draw
from .views import Input

__all__ = ["OPERATORS", "activated", "activation_of"]

F = torch.nn.functional
# With a continuous derivative: where it jumps, a rounded sum may fall on the other side.
SMOOTH = ("sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "mish", "softplus", "elu")
KINKED = ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh")


def activation_of(d: Draw) -> Any:
    # torch's hardsigmoid has a sixth in fp32 in its gradient, whatever the type.
    precise = (name for name in KINKED if name != "hardsigmoid" or d.dtype == torch.float32)
    name = d.one((None, None, *SMOOTH, *(() if d.half else precise)))
    return ("leaky_relu", 0.2) if name == "leaky_relu" else ("softplus", 2.0, 20.0) if name == "softplus" else name


def activated(x: Tensor, activation: Any) -> Tensor:
    spec = parse_activation(activation)
    return x if spec is None else spec.torch(x)


def layer(d: Draw, nd: int, transposed: bool) -> tuple[Input, Input, int, tuple[int, ...], dict[str, Any]]:
    """(input, weight, filters, the result's size, arguments) of a convolution."""
    groups = d.one((1, 1, 1, 2, 3))
    c, k = groups * d.one((1, 2, 3, 4, 8)), groups * d.one((1, 2, 3, 5, 8))
    if d.chance(0.2):
        # Depthwise, with or without a multiplier.
        groups = c
        k = c * d.one((1, 1, 2))
    kernel = d.each(nd, (1, 1, 2, 3) if nd == 3 else (1, 2, 3, 3))
    stride, dilation = d.each(nd, (1, 1, 2, 3)), d.each(nd, (1, 1, 2))
    padding = tuple(d.one(range(n + 1)) for n in kernel)
    spread = [(n - 1) * step + 1 for n, step in zip(kernel, dilation, strict=True)]
    least = [max(1, s - 2 * p) for s, p in zip(spread, padding, strict=True)]
    spatial = tuple(n + d.one(range(2 if nd == 3 else 5)) for n in least)
    arguments: dict[str, Any] = dict(groups=groups)
    if transposed:
        padding = tuple(
            min(p, (n - 1) * s + w - 1) // 2 for p, n, s, w in zip(padding, spatial, stride, spread, strict=True)
        )
        more = tuple(d.one(range(max(s, e))) for s, e in zip(stride, dilation, strict=True))
        arguments |= dict(output_padding=d.spelled(more), padding=d.spelled(padding))
        sizes = zip(spatial, stride, padding, spread, more, strict=True)
        out = tuple((n - 1) * s - 2 * p + w + m for n, s, p, w, m in sizes)
    else:
        out = tuple((n + 2 * p - w) // s + 1 for n, s, p, w in zip(spatial, stride, padding, spread, strict=True))
        named = d.one(("", "", "", "", "valid", "same"))
        if named == "same":
            stride, out = (1,) * nd, spatial
        elif named == "valid" and all(n >= w for n, w in zip(spatial, spread, strict=True)):
            out = tuple((n - w) // s + 1 for n, s, w in zip(spatial, stride, spread, strict=True))
        else:
            named = ""
        arguments |= dict(padding=named or d.spelled(padding))
    arguments |= dict(stride=d.spelled(stride), dilation=d.spelled(dilation))
    weight = d.input((c, k // groups, *kernel) if transposed else (k, c // groups, *kernel))
    return d.image(c, spatial), weight, k, out, arguments


def convolution(d: Draw, nd: int, transposed: bool) -> Call:
    name = f"conv_transpose{nd}d" if transposed else f"conv{nd}d"
    x, weight, k, _, arguments = layer(d, nd, transposed)
    inputs = dict(input=x, weight=weight, bias=d.maybe(0.5, (k,)))
    return Call(getattr(TF, name), getattr(F, name), inputs, arguments, nd)


def fused_reference(
    name: str, input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *, training: bool, momentum: float,
    eps: float, activation: Any, **numbers: Any,
) -> Tensor:  # fmt: skip
    y = getattr(F, name)(input, weight, bias, **numbers)
    if training or running_mean is not None:
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return activated(y if residual is None else y + residual, activation)


def fused(d: Draw, nd: int, transposed: bool) -> Call:
    name = f"conv_transpose{nd}d" if transposed else f"conv{nd}d"
    x, weight, k, out, arguments = layer(d, nd, transposed)
    training = d.chance(0.5)
    if training or len(x.shape) == nd + 1:
        # Of few pixels a variance is nothing but rounding errors; of an unbatched image the channels would be the batch.
        shape = (d.one((4, 6)) * (4 if d.half else 1), *x.shape[-nd - 1 :]) if training else x.shape
        x = d.input(shape, values="normal")
        # Equal images have no variance: what is left is the rounding of their results, many times over.
        x.layout = "permute" if training and x.layout == "expand" else x.layout
    normed = training or (len(x.shape) == nd + 2 and d.chance(0.7))
    wide = torch.float32 if d.half and d.chance(0.6) else d.dtype
    affine = normed and d.chance(0.7)
    tracked = normed and (not training or d.chance(0.7))
    result = (*x.shape[: -nd - 1], k, *out)
    inputs = dict(
        input=x, weight=weight, bias=d.maybe(0.4, (k,)),
        running_mean=d.input((k,), dtype=wide, differentiable=False, written=training) if tracked else None,
        running_var=d.input((k,), dtype=wide, values="positive", differentiable=False, written=training)
        if tracked else None,
        bn_weight=d.input((k,), dtype=wide) if affine else None, bn_bias=d.input((k,), dtype=wide) if affine else None,
        residual=d.maybe(0.4, result),
    )  # fmt: skip
    arguments |= dict(
        training=training, momentum=d.one((0.1, 0.3, 1.0)), eps=d.one((1e-5, 1e-3)), activation=activation_of(d)
    )
    # What the batch's statistics take away again: an offset, and the scale of a filter of one number.
    single = weight.shape[1 - transposed] // (arguments["groups"] if transposed else 1) * math.prod(weight.shape[2:]) == 1
    rounding = (("bias", "weight") if single else ("bias",)) if training else ()
    return Call(
        getattr(TF, f"{name}_bn_act"), partial(fused_reference, name), inputs, arguments, exact=False,
        slack=8.0 if normed else 4.0, cancels=1.0 if d.half or not training else 512.0, rounding=rounding,
    )  # fmt: skip


def linear(d: Draw) -> Call:
    c, k = d.channels(), d.channels()
    before = d.each(d.one((0, 1, 1, 2, 3)), (1, 2, 3, 5))
    inputs = dict(input=d.input((*before, c)), weight=d.input((k, c)), bias=d.maybe(0.5, (k,)))
    return Call(TF.linear, F.linear, inputs)


def deform(d: Draw) -> Call:
    groups = d.one((1, 1, 2))
    parts = d.one((1, 1, 2))
    c, k = 2 * groups * parts // d.one((1, 2) if groups * parts % 2 == 0 else (1,)), groups * d.one((1, 2, 3))
    c = groups * parts * max(1, c // (groups * parts))
    kernel, stride, dilation = d.each(2, (1, 2, 2, 3)), d.each(2, (1, 1, 2)), d.each(2, (1, 1, 2))
    padding = d.each(2, (0, 1))
    spread = [(n - 1) * step + 1 for n, step in zip(kernel, dilation, strict=True)]
    spatial = tuple(max(1, s - 2 * p) + d.one(range(3)) for s, p in zip(spread, padding, strict=True))
    p, q = ((n + 2 * pad - w) // s + 1 for n, pad, w, s in zip(spatial, padding, spread, stride, strict=True))
    n, taps = d.one((1, 2)), kernel[0] * kernel[1]
    places = torch.float32 if d.half and d.chance(0.5) else d.dtype
    inputs = dict(
        input=d.input((n, c, *spatial)),
        offset=d.input((n, 2 * parts * taps, p, q), values="sixteenths", dtype=places),
        weight=d.input((k, c // groups, *kernel)), bias=d.maybe(0.5, (k,)),
        mask=d.maybe(0.5, (n, parts * taps, p, q), dtype=places),
    )  # fmt: skip
    arguments = dict(stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
    return Call(TF.deform_conv2d, _deform, inputs, arguments, exact=False, slack=4.0)


def _deform(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, **numbers: Any
) -> Tensor:
    return deform_reference(input, offset, weight, bias, mask=mask, **numbers)


def causal_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: Any, return_final_state: bool
) -> Any:
    weight = weight.reshape(weight.shape[0], 1, weight.shape[-1])
    steps = weight.shape[-1] - 1
    before = x.new_zeros(*x.shape[:2], steps) if initial_state is None else initial_state
    whole = torch.cat((before, x), 2)
    y = activated(F.conv1d(whole, weight, bias, groups=x.shape[1]), "silu" if activation == "swish" else activation)
    # What is older than the sequence's last steps is forgotten.
    last = x if x.shape[2] >= steps else whole
    return (y, last[:, :, last.shape[2] - steps :]) if return_final_state else y


def causal(d: Draw) -> Call:
    b, c, t, k = d.one((1, 2, 3)), d.channels(), d.r.randint(1, 12), d.one((2, 3, 4, 4, 8))
    inputs = dict(
        x=d.input((b, c, t)), weight=d.input((c, k) if d.chance(0.7) else (c, 1, k)), bias=d.maybe(0.5, (c,)),
        initial_state=d.maybe(0.4, (b, c, k - 1)),
    )  # fmt: skip
    activation = d.one((None, "silu", "swish", "gelu"))
    arguments = dict(activation=activation, return_final_state=d.chance(0.3))
    return Call(TF.causal_conv1d, causal_reference, inputs, arguments, exact=False, slack=4.0)


def step_reference(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: Any) -> Tensor:
    steps = x.unsqueeze(2) if x.dim() == 2 else x
    whole = torch.cat((conv_state, steps), 2)
    k = weight.shape[-1]
    y = F.conv1d(whole[:, :, whole.shape[2] - steps.shape[2] - k + 1 :], weight.reshape(-1, 1, k), bias, groups=x.shape[1])
    conv_state.copy_(whole[:, :, whole.shape[2] - conv_state.shape[2] :])
    y = activated(y, activation)
    return y.squeeze(2) if x.dim() == 2 else y


def causal_update(d: Draw) -> Call:
    b, c, k = d.one((1, 2, 3)), d.channels(), d.one((2, 3, 4))
    steps = d.one((0, 1, 2, 3))
    inputs = dict(
        x=d.input((b, c, steps) if steps else (b, c), differentiable=False),
        conv_state=d.input((b, c, k - 1 + d.one((0, 0, 2))), written=True, differentiable=False),
        weight=d.input((c, k), differentiable=False), bias=d.maybe(0.5, (c,), differentiable=False),
    )  # fmt: skip
    arguments = dict(activation=d.one((None, "silu")))
    return Call(TF.causal_conv1d_update, step_reference, inputs, arguments, exact=False)


OPERATORS = {
    **{f"conv{nd}d": partial(convolution, nd=nd, transposed=False) for nd in (1, 2, 3)},
    **{f"conv_transpose{nd}d": partial(convolution, nd=nd, transposed=True) for nd in (1, 2, 3)},
    **{f"conv{nd}d_bn_act": partial(fused, nd=nd, transposed=False) for nd in (1, 2, 3)},
    **{f"conv_transpose{nd}d_bn_act": partial(fused, nd=nd, transposed=True) for nd in (1, 2, 3)},
    "linear": linear, "deform_conv2d": deform, "causal_conv1d": causal, "causal_conv1d_update": causal_update,
}  # fmt: skip
