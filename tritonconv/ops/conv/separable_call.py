"""A depthwise convolution and the 1x1 convolution after it, each with its epilogue: one launch, or each its own.

For inference alone: in training both run on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.call import conv_numbers, epilogue_of
from tritonconv.ops.conv.dense import output_format
from tritonconv.ops.conv.numbers import conv_geometry
from tritonconv.ops.conv.operator import epilogue_numbers, make_epilogue
from tritonconv.ops.conv.separable import is_faster, one_by_one, pointwise_geometry, separable
from tritonconv.ops.core.backend import (
    Backend,
    autocast_dtype,
    cast_for_autocast,
    current_backend,
    needs_gradients,
    why_unsupported,
)
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.observe import is_watched
from tritonconv.ops.core.operator import Operator, is_traced
from tritonconv.ops.core.shared_launch import SharedLaunch

__all__ = ["SEPARABLE", "SEPARABLE_LAUNCH", "separable_convolution"]

# Tensors of the first part: x, weight and the epilogue's but for the residual.
FIRST = 7


def separable_convolution(tensors: Any, numbers: tuple[Any, ...], backend: Backend | None) -> Tensor | None:
    """second(first(x)) in one launch, in eval mode; None where each part is to run on its own, which says why.

    Args:
        tensors: x (N, C, H, W), the first part's weight, bias and batch norm, the second part's weight and epilogue.
        numbers: ((the first part's, the second part's, as `Convolution` takes them), eps and activation of the first part,
            eps and activation of the second).
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and is_watched():
        return None
    if compiling or is_traced(tensors):
        tensors = _cast(tensors, autocast_dtype(tensors[0]))
        # The operator sees for itself whether one launch is worth it.
        if current_backend(backend) == "torch" or needs_gradients(tensors) or not _is_plain(tensors):
            return None
        conv = conv_numbers("conv", numbers[0][0])
        stride, padding, name, dilation, _ = conv.for_operators()
        after = (*epilogue_numbers(*numbers[1:3]), *epilogue_numbers(*numbers[3:5]))
        y: Tensor = SEPARABLE(*tensors, stride, padding, name, dilation, *after)
        return y
    found = SEPARABLE_LAUNCH.find(tensors, numbers, backend)
    return None if found is None else found.run(*tensors)


def _cast(tensors: Any, dtype: torch.dtype | None) -> Any:
    """As torch's autocast does for either."""
    if dtype is None:
        return tensors
    return tuple(cast_for_autocast(t, dtype) if i in (0, 1, 2, FIRST, FIRST + 1) else t for i, t in enumerate(tensors))


def _is_plain(tensors: Any) -> bool:
    """Whether our kernels take both parts, whatever their sizes."""
    present = [t for t in tensors if t is not None]
    if not all(isinstance(t, Tensor) for t in present) or why_unsupported(present):
        return False
    x = tensors[0]
    # A batch norm's tensors may be wider.
    plain = (tensors[1], tensors[2], tensors[FIRST], tensors[FIRST + 1], tensors[-1])
    return x.dim() == 4 and all(t is None or t.dtype == x.dtype for t in plain)


def _epilogues(tensors: Any, numbers: tuple[Any, ...]) -> tuple[Any, Any]:
    _, eps1, act1, eps2, act2 = numbers
    return epilogue_of((*tensors[:FIRST], None), eps1, act1), epilogue_of((None, *tensors[FIRST:]), eps2, act2)


def _plan(tensors: Any, numbers: tuple[Any, ...], backend: Backend | None) -> tuple[Callable[..., Tensor], Any] | None:  # noqa: ARG001
    dtype = autocast_dtype(tensors[0])
    cast = _cast(tensors, dtype)
    x, weight = cast[0], cast[FIRST]
    if not _is_plain(cast) or any(t.device != x.device for t in (cast[1], weight)):
        return None
    first, second = _epilogues(cast, numbers)
    try:
        g = conv_numbers("conv", numbers[0][0]).geometry(x.shape, cast[1].shape)
        after = conv_numbers("conv", numbers[0][1]).geometry(g.output_shape, weight.shape)
        first.check("conv2d", g, x, g.out_channels, None)
        second.check("conv2d", after, weight, after.out_channels, after.output_shape)
    # The part that is wrong says so itself.
    except (RuntimeError, TypeError, ValueError):
        return None
    if after != pointwise_geometry(g, after.out_channels) or not is_faster(x, g, after.out_channels):
        return None

    def run(*tensors: Any) -> Tensor:
        tensors = _cast(tensors, dtype)
        first, second = _epilogues(tensors, numbers)
        return separable(tensors[0], tensors[1], first, tensors[FIRST], second, g)

    return run, tensors


SEPARABLE_LAUNCH = SharedLaunch("separable convolution", FIRST + 7, _plan)


def _forward(
    x: Tensor, first_weight: Tensor, first_bias: Tensor | None, first_mean: Tensor | None, first_var: Tensor | None,
    first_gamma: Tensor | None, first_beta: Tensor | None, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], padding_name: str, dilation: Sequence[int], first_eps: float,
    first_activation: str, first_a: float, first_b: float, eps: float, activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(conv1x1(act(bn(depthwise(x)))))) + residual), on Triton alone, in one launch where that is worth it."""
    vectors = first_bias, first_mean, first_var, first_gamma, first_beta, None
    first = make_epilogue(vectors, first_eps, first_activation, first_a, first_b)
    after = bias, running_mean, running_var, bn_weight, bn_bias, residual
    epilogue = make_epilogue(after, eps, activation, a, b)
    g = _geometry(x.shape, first_weight.shape, (stride, padding, padding_name, dilation))
    run = separable if is_faster(x, g, weight.shape[0]) else one_by_one
    return run(x, first_weight, first, weight, epilogue, g)


def _geometry(x: Sequence[int], weight: Sequence[int], numbers: Sequence[Any]) -> ConvGeometry:
    stride, padding, padding_name, dilation = numbers
    return conv_geometry(x, weight, stride, padding, padding_name, dilation, x[1])


def _outputs(x: Tensor, first_weight: Tensor, *rest: Any) -> Tensor:
    g, weight = _geometry(x.shape, first_weight.shape, rest[12:16]), rest[FIRST - 2]
    shape = pointwise_geometry(g, weight.shape[0]).output_shape
    return empty_output(x, shape, output_format(x, first_weight) or suggests_channels_last(weight), x.dtype)


def _flops(x: Sequence[int], first_weight: Sequence[int], *rest: Any) -> int:
    g = _geometry(x, first_weight, rest[12:16])
    return 2 * (g.macs + pointwise_geometry(g, rest[FIRST - 2][0]).macs)


SEPARABLE = Operator("separable", _forward, _outputs, flops=_flops)
