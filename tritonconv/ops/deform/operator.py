"""Deformable convolution: operators, and who runs a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import DeformGeometry
from tritonconv.ops.conv.dense import bias_gradient
from tritonconv.ops.conv.numbers import ints
from tritonconv.ops.conv.operator import epilogue_numbers, make_epilogue, not_built
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.family import Cost, Family
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.operator import Operator, differentiate, gradients_wanted
from tritonconv.ops.deform.gradients import Wanted, current_scatter, deform_dgrad, deform_wgrad
from tritonconv.ops.deform.launch import check_deform, deform_forward
from tritonconv.ops.deform.torch_form import deform_on_torch

__all__ = ["DEFORM", "DEFORM_CONV2D", "DEFORM_CONV2D_BACKWARD", "deform_convolution"]

Numbers = tuple[Any, Any, Any]


def _geometry(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> DeformGeometry:
    return DeformGeometry.parse(
        x.shape, offset.shape, weight.shape, None if mask is None else mask.shape, stride=stride, padding=padding,
        dilation=dilation,
    )  # fmt: skip


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, offset: Tensor, mask: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], eps: float, activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(deformable convolution + bias) + residual), on Triton alone; `activation` is a name or ""."""
    epilogue = make_epilogue((bias, running_mean, running_var, bn_weight, bn_bias, residual), eps, activation, a, b)
    geometry = _geometry(x, offset, mask, weight, list(stride), list(padding), list(dilation))
    check_deform("tritonconv::deform_conv2d", x, offset, mask, weight, epilogue, geometry)
    return deform_forward(x, offset, mask, weight, epilogue, geometry)


def _outputs(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    offset, mask = rest[5:7]
    geometry = _geometry(x, offset, mask, weight, *map(list, rest[8:11]))
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    return empty_output(x, geometry.conv.output_shape, channels_last, x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, bias, mean, _, _, _, offset, mask, residual = inputs[:10]
    ctx.numbers = inputs[10:13]
    ctx.fused = mean is not None or residual is not None or bool(inputs[14])
    # No samples: they are computed again.
    ctx.save_for_backward(x, weight, bias, offset, mask)


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    if ctx.fused:
        raise not_built("tritonconv::deform_conv2d")
    need = ctx.needs
    needs = (need[0], need[1], need[2], need[7], need[8])
    x, weight, _, offset, mask = ctx.saved_tensors
    if torch.is_grad_enabled():
        geometry = _geometry(x, offset, mask, weight, *map(list, ctx.numbers))

        def form(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, mask: Tensor | None) -> Tensor:
            return deform_on_torch(x, offset, mask, weight, bias, geometry)

        found = differentiate(form, ctx.saved_tensors, needs, dy)
    else:
        found = DEFORM_CONV2D_BACKWARD(dy, x, weight, offset, mask, needs, *ctx.numbers, current_scatter())
    dx, dw, db, d_offset, d_mask = found
    return [dx, dw, db, None, None, None, None, d_offset, d_mask, None]


def _macs(x: Sequence[int], weight: Sequence[int], offset: Sequence[int], numbers: Sequence[Any]) -> tuple[int, int]:
    """Multiply-adds of the products, and all."""
    stride, padding, dilation = map(list, numbers)
    g = DeformGeometry.parse(x, offset, weight, stride=stride, padding=padding, dilation=dilation)
    return g.conv.macs, g.macs


def _flops(x: Sequence[int], weight: Sequence[int], *rest: Any) -> int:
    return 2 * _macs(x, weight, rest[5], rest[8:11])[1]


DEFORM_CONV2D = Operator(
    "deform_conv2d", _forward, _outputs, save=_save, backward=_backward, flops=_flops,
    cast=("x", "weight", "bias", "residual"),
)  # fmt: skip


def _gradient(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, needs: Sequence[bool],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    scatter: str = "deterministic",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tritonconv::deform_conv2d's x, weight, bias, offset and mask on Triton alone; empty if not needed.

    `scatter` says how the first one is added up, as `set_deform_scatter` has it.
    """
    g = _geometry(x, offset, mask, weight, list(stride), list(padding), list(dilation))
    need_x, need_weight, need_bias, need_offset, need_mask = needs
    dx = dw = db = d_offset = d_mask = None
    if need_x or need_offset or need_mask:
        wanted = Wanted(need_x, need_offset, need_mask)
        last = suggests_channels_last(x)
        dx, d_offset, d_mask = deform_dgrad(dy, x, offset, mask, weight, g, wanted, last, scatter)  # type: ignore[arg-type]
    if need_weight:
        dw = deform_wgrad(dy, x, offset, mask, g, suggests_channels_last(weight))
    if need_bias:
        db = bias_gradient(dy)
    return dx, dw, db, d_offset, d_mask  # type: ignore[return-value]


def _gradient_outputs(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, needs: Sequence[bool], *_numbers: Any
) -> tuple[Tensor | None, ...]:
    def like(t: Tensor | None, need: bool) -> Tensor | None:
        if t is None or not need:
            return None
        return empty_output(t, tuple(t.shape), suggests_channels_last(t), t.dtype)

    db = dy.new_empty(weight.shape[0]) if needs[2] else None
    return like(x, needs[0]), like(weight, needs[1]), db, like(offset, needs[3]), like(mask, needs[4])


def _gradient_flops(
    _dy: Sequence[int], x: Sequence[int], weight: Sequence[int], offset: Sequence[int], _mask: Any, needs: Sequence[bool],
    *numbers: Any,
) -> int:  # fmt: skip
    products, every = _macs(x, weight, offset, numbers[:3])
    samples = every - products
    inner = needs[0] or needs[3] or needs[4]
    return 2 * math.floor(products * (inner + needs[1]) + samples * (needs[0] + (needs[3] or needs[4]) + needs[1]))


DEFORM_CONV2D_BACKWARD = Operator("deform_conv2d_backward", _gradient, _gradient_outputs, flops=_gradient_flops)


class DeformCall(NamedTuple):
    """A call that parsed."""

    numbers: Numbers
    geometry: DeformGeometry
    eps: float
    activation: ActivationSpec | None


class Deform(Family[DeformCall]):
    """act(bn(deformable convolution + bias) + residual).

    A call's numbers are ((stride, padding, dilation), the public function's name, the batch norm's eps, activation).
    """

    tensors = (
        "input", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias", "offset", "mask", "residual",
    )  # fmt: skip
    required = 2
    # Offsets and mask keep their type: places in fp32 stay so fine.
    casts = (0, 1, 2)

    def op(self, numbers: tuple[Any, ...]) -> str:
        return str(numbers[1])

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> DeformCall:
        given, op, eps, activation = numbers
        x, weight, *_, offset, mask, _ = tensors
        if offset is None:
            raise TypeError(f"{op}(): argument 'offset' must be Tensor, not NoneType")
        geometry = _geometry(x, offset, mask, weight, *given)
        check_deform(op, x, offset, mask, weight, _epilogue(tensors, eps, activation), geometry)
        return DeformCall(given, geometry, eps, activation)

    def why_unsupported(self, tensors: Any, parsed: DeformCall) -> str | None:  # noqa: ARG002
        x, residual = tensors[0], tensors[9]
        if residual is not None and residual.dtype != x.dtype:
            return f"a residual of {residual.dtype} under an input of {x.dtype} has no kernel"
        return None

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: DeformCall | None) -> str:
        return f"{self.op(numbers)} of {list(tensors[0].shape)}" if parsed is None else str(parsed.geometry)

    def run(self, tensors: Any, parsed: DeformCall) -> Tensor:
        numbers, _, eps, activation = parsed
        x, weight, bias, *norm, offset, mask, residual = tensors
        after = None
        if gradients_wanted(tensors):
            after = _epilogue(tensors, eps, activation)._replace(bias=None)
            norm, residual, eps, activation = [None] * 4, None, 0.0, None
        y: Tensor = DEFORM_CONV2D(
            x, weight, bias, *norm, offset, mask, residual, *map(ints, numbers), *epilogue_numbers(eps, activation)
        )
        return y if after is None else after.torch(y)

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        given, _, eps, activation = numbers
        x, weight, bias, *_, offset, mask, _ = tensors
        y = deform_on_torch(x, offset, mask, weight, bias, _geometry(x, offset, mask, weight, *given))
        return _epilogue(tensors, eps, activation).torch(y)

    def cost(self, tensors: Any, parsed: DeformCall) -> Cost:
        return Cost(parsed.geometry.bytes(tensors[0].element_size()), parsed.geometry.macs, parsed.geometry.conv)

    def observed(self, resolved: Any, tensors: Any, numbers: tuple[Any, ...], parsed: DeformCall) -> Any:
        # Without an example: no one measures it beside a convolution.
        after = _epilogue(tensors, parsed.eps, parsed.activation).describe()
        return replace(super().observed(resolved, tensors, numbers, parsed), conditions=after)

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        x, weight, bias, *norm, offset, mask, residual = tensors
        if any(t is not None for t in (*norm, residual)) or numbers[3] is not None:
            return super().face(tensors, numbers)
        return functional.deform_conv2d, (x, offset, weight, bias, *numbers[0], mask), {}


def _epilogue(tensors: Any, eps: float, activation: ActivationSpec | None) -> Epilogue:
    bias, mean, var, weight, shift = tensors[2:7]
    norm = None if mean is None or var is None else BatchNorm(mean, var, weight, shift, eps)
    return Epilogue(bias, norm, tensors[9], activation)


DEFORM = Deform("deform_conv2d")


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
    norm = epilogue.batch_norm
    tensors = (x, weight, epilogue.bias, *((None,) * 4 if norm is None else norm[:4]), offset, mask, epilogue.residual)
    eps = 0.0 if norm is None else norm.eps
    y: Tensor = DEFORM(tensors, (numbers, op, eps, epilogue.activation), backend)
    return y
