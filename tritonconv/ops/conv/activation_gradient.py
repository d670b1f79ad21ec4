"""Gradient of a convolution with an activation (and a residual) behind it, whose derivative shows in its result.

Forward, one kernel writes y = act(conv(x) + bias + residual), and y is saved. Backward, the gradient of what the activation
was applied to is dy * act'(y), computed as a batch norm's gradient is with a scale of one:

- without the data gradient the weight gradient computes it on its way in, and it is never written;
- where the residual needs it, or both gradients would compute it for every tap, one pass writes it.

The bias gradient comes with the weight gradient's pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.launch import input_gradient
from tritonconv.ops.conv.conv_norm import Needs, convolution_gradients, on_the_way
from tritonconv.ops.conv.gradients import NormGradient
from tritonconv.ops.conv.numbers import conv_geometry
from tritonconv.ops.core.activation import ActivationSpec, from_numbers
from tritonconv.ops.core.layout import as_format, empty_output, wide
from tritonconv.ops.core.operator import Operator, differentiate, is_traced

__all__ = ["activation_gradient", "differentiable_gradient", "shows_in_result"]

EXACT = 256
"""Integers up to it are numbers of every dtype: a limit that is rounded would no longer be reached."""


def shows_in_result(activation: ActivationSpec | None) -> bool:
    """Whether an activation's derivative can be told from its result."""
    if activation is None or activation.name in ("relu", "relu6"):
        return True
    if activation.name == "hardtanh":
        return all(limit.is_integer() and abs(limit) <= EXACT for limit in (activation.a, activation.b))
    return activation.name == "leaky_relu" and activation.a > 0


def _gradient(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, y: Tensor, table: Tensor, needs: Sequence[bool],
    input_shape: Sequence[int], weight_shape: Sequence[int], channels_last: Sequence[bool], stride: Sequence[int],
    padding: Sequence[int], padding_name: str, dilation: Sequence[int], groups: int, transposed: bool,
    output_padding: Sequence[int], kind: str, activation: str, a: float, b: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and residual of y = act(conv(x) + bias + residual); empty if not needed.

    `table` is a batch norm's, of `_identity`; `needs` and `channels_last` are as the results and (x, weight).
    """
    g = conv_geometry(
        input_shape, weight_shape, stride, padding, padding_name, dilation, groups, transposed, output_padding
    )
    spec = from_numbers(activation, a, b)
    wanted = Needs(needs[0], needs[1], needs[2], False, False, needs[3])
    between: NormGradient | None = NormGradient(y, table, spec, False)
    if wanted.residual or not (wanted.x or wanted.weight) or not on_the_way(g, y.dtype, wanted.x):
        dy, between = input_gradient(dy, y, table, spec, False), None
    # A depthwise convolution's gradients take either format.
    through = dy if between is not None or y.shape[1] == groups else as_format(dy, True)
    found = convolution_gradients(
        through, x, weight, g, (channels_last[0], channels_last[1]), wanted, between,
        "matmul" if kind == "matmul" else "conv",
    )  # fmt: skip
    return *found, dy if wanted.residual else None  # type: ignore[return-value]


def _outputs(
    dy: Tensor, _x: Any, _weight: Any, y: Tensor, _table: Any, needs: Sequence[bool], input_shape: Sequence[int],
    weight_shape: Sequence[int], channels_last: Sequence[bool], *_: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dx, dw = (
        empty_output(dy, tuple(shape), last, dy.dtype) if need else None
        for shape, last, need in zip((input_shape, weight_shape), channels_last, needs, strict=False)
    )
    return dx, dw, y.new_empty(y.shape[1]) if needs[2] else None, torch.empty_like(y) if needs[3] else None


def _flops(*arguments: Any) -> int:
    needs, geometry = arguments[5], conv_geometry(*arguments[6:8], *arguments[9:16])
    return 2 * (needs[0] + needs[1]) * geometry.macs


CONV_ACTIVATION_BACKWARD = Operator("conv_activation_backward", _gradient, _outputs, flops=_flops)


def activation_gradient(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, y: Tensor, needs: Sequence[bool], shapes: Sequence[Any],
    formats: Sequence[bool], numbers: Sequence[Any], kind: str, activation: ActivationSpec,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias and residual by the operator.

    Args:
        needs: which of them are needed.
        shapes, formats: of x and weight.
        numbers: (stride, padding, padding_name, dilation, groups, transposed, output_padding).
    """
    found: tuple[Tensor | None, ...] = CONV_ACTIVATION_BACKWARD(
        dy, x, weight, y, _table(y), tuple(needs), tuple(shapes[0]), tuple(shapes[1]), tuple(formats), *numbers, kind,
        *activation,
    )  # fmt: skip
    return found


def differentiable_gradient(dy: Tensor, y: Tensor, activation: ActivationSpec) -> Tensor:
    """dy * act'(y), to be differentiated by dy again: the second derivative of these activations is 0."""
    with torch.no_grad():
        (slope,) = differentiate(activation.torch, (y,), (True,), torch.ones_like(y))
    assert slope is not None
    return dy * slope


def _table(y: Tensor) -> Tensor:
    make = _identity.__wrapped__ if is_traced((y,)) else _identity
    return make(y.shape[1], wide(y.dtype), y.device)


@functools.lru_cache(maxsize=256)
def _identity(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table (kernels/statistics.py) of a batch norm that changes nothing: mean 0, scale 1, beta, slope and offset 0."""
    with torch.inference_mode(False):
        return torch.eye(5, dtype=dtype, device=device)[:, 1:2].expand(5, channels).contiguous()
