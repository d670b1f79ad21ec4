"""Deformable convolution for callers: who runs it, and the operators that compilers and autograd see.

torch.ops.tritonconv.deform_conv2d has gradients where nothing but a bias follows it. Calls that need none and that no one
traces go past it, straight to the launch (ops/deform/launch.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.geometry import DeformGeometry
from tritonconv.ops.conv.conv_norm import bias_gradient
from tritonconv.ops.conv.dispatch import autocast
from tritonconv.ops.conv.library import ints, not_built, put_together, register_autocast, taken_apart
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.backend import Backend, decide, needs_gradients
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.ops.deform.gradients import Wanted, current_scatter, deform_dgrad, deform_wgrad
from tritonconv.ops.deform.launch import check_deform, deform_forward, hidden_copies
from tritonconv.ops.deform.torch_form import deform_on_torch

__all__ = ["deform_convolution"]

OP = "deform_conv2d"
Numbers = tuple[Any, Any, Any]


def deform_convolution(
    op: str, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, epilogue: Epilogue, numbers: Numbers,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """act(bn(deformable convolution + bias) + residual) on the backend that is chosen for it.

    Args:
        op: the public function's name, for messages.
        x: (N, C, H, W).
        offset: (N, 2 * offset groups * R * S, P, Q), of x's type, or fp32 for a half-precision x.
        mask: (N, offset groups * R * S, P, Q), likewise; None: ones.
        weight: (K, C/groups, R, S).
        numbers: (stride, padding, dilation).
        backend: the layer's own choice.
    """
    _check_tensors(op, input=x, offset=offset, weight=weight, mask=mask, bias=epilogue.bias, residual=epilogue.residual)
    # Offsets and mask keep their type: places in fp32 stay so fine.
    x, weight, epilogue = autocast(x, weight, epilogue)
    geometry = _geometry(x, offset, mask, weight, *numbers)
    check_deform(op, x, offset, mask, weight, epilogue, geometry)
    tensors = tuple(t for t in (x, offset, mask, weight, *epilogue.tensors()) if t is not None)
    residual = epilogue.residual
    missing = None
    if residual is not None and residual.dtype != x.dtype:
        missing = f"a residual of {residual.dtype} under an input of {x.dtype} has no kernel"
    refused = decide(tensors, backend, lambda: str(geometry), missing)

    def seen() -> Call:
        copies = hidden_copies(x, weight) if refused is None else 0
        decision = Decision("torch", refused.reason) if refused else Decision("triton", "deform_conv", copies)
        size = geometry.bytes(x.element_size())
        # Without an example: no one measures it beside a convolution.
        return Call(op, decision, geometry.conv, geometry.macs, size, x.dtype, x.device, None, epilogue.describe())

    if notify(seen) or refused is not None:
        return epilogue.torch(deform_on_torch(x, offset, mask, weight, epilogue.bias, geometry))
    if needs_gradients(tensors):
        return epilogue.torch(_operator(x, offset, mask, weight, Epilogue(epilogue.bias), numbers))
    if is_traced(tensors):
        return _operator(x, offset, mask, weight, epilogue, numbers)
    return deform_forward(x, offset, mask, weight, epilogue, geometry)


def _check_tensors(op: str, **tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("mask", "bias", "residual")):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _geometry(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> DeformGeometry:
    return DeformGeometry.parse(
        x.shape, offset.shape, weight.shape, None if mask is None else mask.shape, stride=stride, padding=padding,
        dilation=dilation,
    )  # fmt: skip


def _operator(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, epilogue: Epilogue, numbers: Numbers
) -> Tensor:
    (*vectors, residual), epilogue_numbers = taken_apart(epilogue)
    stride, padding, dilation = (ints(value) for value in numbers)
    result: Tensor = torch.ops.tritonconv.deform_conv2d(
        x, weight, *vectors, offset, mask, residual, stride=stride, padding=padding, dilation=dilation, **epilogue_numbers
    )
    return result


@torch.library.custom_op("tritonconv::deform_conv2d", mutates_args=())
def deform(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, offset: Tensor, mask: Tensor | None, residual: Tensor | None, *,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], eps: float, activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(deformable convolution + bias) + residual), on Triton alone; `activation` is a name or ""."""
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias, residual)
    epilogue = put_together(vectors, eps=eps, activation=activation, a=a, b=b)
    geometry = _geometry(x, offset, mask, weight, list(stride), list(padding), list(dilation))
    check_deform("tritonconv::deform_conv2d", x, offset, mask, weight, epilogue, geometry)
    return deform_forward(x, offset, mask, weight, epilogue, geometry)


@deform.register_fake
def _(
    x: Tensor, weight: Tensor, *tensors: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    **_numbers: Any,
) -> Tensor:  # fmt: skip
    offset, mask = tensors[5], tensors[6]
    geometry = _geometry(x, offset, mask, weight, list(stride), list(padding), list(dilation))
    shape = geometry.conv.output_shape
    return empty_output(x, shape, suggests_channels_last(x) or suggests_channels_last(weight), x.dtype)


@torch.library.custom_op("tritonconv::deform_conv2d_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, *, needs: Sequence[bool],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tritonconv::deform_conv2d's x, weight, bias, offset and mask on Triton alone; empty if not needed.

    The first one is added up as `set_scatter` and torch.use_deterministic_algorithms have it at the call.
    """
    g = _geometry(x, offset, mask, weight, list(stride), list(padding), list(dilation))
    need_x, need_weight, need_bias, need_offset, need_mask = needs
    dx = dw = db = d_offset = d_mask = None
    if need_x or need_offset or need_mask:
        wanted = Wanted(need_x, need_offset, need_mask)
        dx, d_offset, d_mask = deform_dgrad(
            dy, x, offset, mask, weight, g, wanted, suggests_channels_last(x), current_scatter()
        )
    if need_weight:
        dw = deform_wgrad(dy, x, offset, mask, g, suggests_channels_last(weight))
    if need_bias:
        db = bias_gradient(dy)
    dx, dw, db, d_offset, d_mask = (dy.new_empty(0) if t is None else t for t in (dx, dw, db, d_offset, d_mask))
    return dx, dw, db, d_offset, d_mask


@backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, *, needs: Sequence[bool], **_numbers: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, need: bool) -> Tensor:
        if t is None or not need:
            return dy.new_empty(0)
        return empty_output(t, tuple(t.shape), suggests_channels_last(t), t.dtype)

    db = dy.new_empty(weight.shape[0] if needs[2] else 0)
    return like(x, needs[0]), like(weight, needs[1]), db, like(offset, needs[3]), like(mask, needs[4])


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, *norm, offset, mask, residual = inputs
    ctx.numbers = {name: keyword_only_inputs[name] for name in ("stride", "padding", "dilation")}
    ctx.fused = any(t is not None for t in (*norm, residual)) or bool(keyword_only_inputs["activation"])
    # No samples: they are computed again.
    ctx.save_for_backward(x, weight, offset, mask)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.fused:
        raise not_built("tritonconv::deform_conv2d", "a deformable convolution")
    need = ctx.needs_input_grad
    needs = [need[0], need[1], need[2], need[7], need[8]]
    found = torch.ops.tritonconv.deform_conv2d_backward(dy, *ctx.saved_tensors, needs=needs, **ctx.numbers)
    dx, dw, db, d_offset, d_mask = (t if n else None for t, n in zip(found, needs, strict=True))
    return dx, dw, db, None, None, None, None, d_offset, d_mask, None


deform.register_autograd(_backward, setup_context=_save)
register_autocast(torch.ops.tritonconv.deform_conv2d)


def _macs(
    x: Sequence[int], weight: Sequence[int], offset: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:  # fmt: skip
    """Multiply-adds of the products, and all."""
    g = DeformGeometry.parse(x, offset, weight, stride=list(stride), padding=list(padding), dilation=list(dilation))
    return g.conv.macs, g.macs


@register_flop_formula([torch.ops.tritonconv.deform_conv2d])
def _flops(
    x: Sequence[int], weight: Sequence[int], *shapes: Any, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], **_numbers: Any,
) -> int:  # fmt: skip
    return 2 * _macs(x, weight, shapes[5], stride, padding, dilation)[1]


@register_flop_formula([torch.ops.tritonconv.deform_conv2d_backward])
def _backward_flops(
    _dy: Sequence[int], x: Sequence[int], weight: Sequence[int], offset: Sequence[int], *_shapes: Any,
    needs: Sequence[bool], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], **_numbers: Any,
) -> int:  # fmt: skip
    products, every = _macs(x, weight, offset, stride, padding, dilation)
    samples = every - products
    inner = needs[0] or needs[3] or needs[4]
    return 2 * math.floor(products * (inner + needs[1]) + samples * (needs[0] + (needs[3] or needs[4]) + needs[1]))
