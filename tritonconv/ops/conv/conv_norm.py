"""Convolution, batch norm, activation and residual for training: what is launched, forward and backward.

Forward, z = conv(x) + bias is written once, and the convolution takes its statistics from its accumulators; one pass reads
z (and the residual) and writes y. Saved for backward are x, the weight, z, the statistics and, where an activation follows
the sum, the residual; y is not. torch keeps x, the weight, z, and y or the sum.

Backward, with P the bytes of z (a residual that is added before an activation is read once more, and its gradient g is
written, which then stands for dy): one pass reads dy and z for the sums of the batch norm's gradient. The gradient dz of z
is dy's and z's combination by five numbers a channel:

- without the data gradient it is never written: the weight gradient computes it on its way in (2 P), but for depthwise;
- a filter of one tap under few input channels, of 16-bit numbers, computes it in the data gradient, and leaves it for the
  weight gradient (2 P read, P written, P read: P less than a pass of its own would cost);
- elsewhere a pass of its own writes it (2 P read, P written), and both gradients read it (2 P). A filter of several taps
  would compute every element again for each of them, in a kernel whose time is not memory's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm import launch as batch_norm
from tritonconv.ops.batch_norm.gradient import Norm, combined, norm_gradient
from tritonconv.ops.conv.dense import bias_gradient
from tritonconv.ops.conv.depthwise import is_depthwise
from tritonconv.ops.conv.gradients import NormGradient
from tritonconv.ops.conv.route import convolve, data_gradient, weight_gradient
from tritonconv.ops.conv.target import Target
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import ConvKind
from tritonconv.ops.core.layout import as_format, empty_output

__all__ = ["ON_THE_WAY_CHANNELS", "Gradients", "Needs", "backward", "convolution_gradients", "forward", "on_the_way"]

# So many input channels fit a tile or two of columns, each of which computes the gradient again.
ON_THE_WAY_CHANNELS = 256


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool
    bias: bool
    norm_weight: bool
    norm_bias: bool
    residual: bool


class Gradients(NamedTuple):
    """Those that are needed. Without an activation the residual's is dy, and not computed."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    residual: Tensor | None


def forward(
    kind: ConvKind, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry,
    fixed: tuple[Tensor, Tensor] | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: ActivationSpec | None, group: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(y, z, mean, var, count); statistics that are fixed are not given back.

    Args:
        kind: "conv" or "conv_transpose".
        group: name of the process group that shares statistics; "" for none.
    """
    result = convolve(x, weight, Epilogue(bias), geometry, kind, Target(statistics=fixed is None))
    z = result.y
    assert z is not None
    mean = var = count = None
    if fixed is None:
        if result.statistics is None:
            raise ValueError("there are no statistics of a result without elements")
        mean, var, count = combined(result.statistics, group)
        fixed_or_own = mean, var
    else:
        fixed_or_own = fixed
    y = batch_norm.normalize(z, *fixed_or_own, norm_weight, norm_bias, eps, residual, activation)
    return y, z, mean, var, count


def on_the_way(g: ConvGeometry, dtype: torch.dtype, data: bool = True) -> bool:
    """Whether a gradient computes dz itself: the data gradient where that saves bytes and costs little else.

    Of wider types a thread could not hold two tiles beside its products. Depthwise kernels have no such form: they compute
    little else, and read each element for every tap.

    Args:
        data: whether the data gradient is needed; else the weight gradient computes it.
    """
    if g.transposed or is_depthwise(g):
        return False
    if not data:
        return True
    few = g.in_channels // g.groups <= ON_THE_WAY_CHANNELS
    return dtype.itemsize == 2 and g.taps == 1 and not g.is_padded and few


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, z: Tensor, norm: Norm, geometry: ConvGeometry,
    channels_last: tuple[bool, bool], needs: Needs, group: str,
) -> Gradients:  # fmt: skip
    """Every gradient that is needed.

    Args:
        dy: gradient of y, of any strides.
        x: None where the weight's gradient is not needed.
        weight: None where the input's gradient is not needed.
        channels_last: formats of x and of the weight.
        group: the process group that shared its statistics; "" for none.
    """
    batch_statistics = norm.pixels is not None
    # A bias that the batch's own mean takes away again has no gradient; torch computes its rounding errors.
    db = z.new_zeros(z.shape[1]) if needs.bias and batch_statistics else None
    through_bias = needs.bias and not batch_statistics
    through_convolution = needs.x or needs.weight or through_bias
    act = norm.activation
    g, table, d_norm_weight, d_norm_bias = norm_gradient(
        dy, z, norm, group,
        # A process that runs the parts one by one joins its sums for a bias too.
        before=through_convolution or (needs.bias and bool(group)),
        parameters=needs.norm_weight or needs.norm_bias,
        # Behind a residual the activation's gradient is the residual's, and is written once.
        write=norm.residual is not None and act is not None,
    )  # fmt: skip
    if g is not None:
        dy, act = g, None
    between: NormGradient | None = NormGradient(z, table, act, batch_statistics) if through_convolution else None
    if between is not None and not ((needs.x or needs.weight) and on_the_way(geometry, z.dtype, needs.x)):
        dy, between = batch_norm.input_gradient(dy, z, table, act, batch_statistics), None
        if not is_depthwise(geometry):
            # In the format that both gradients read.
            dy = as_format(dy, True)
    wanted = needs._replace(bias=through_bias)
    dx, dw, own = convolution_gradients(dy, x, weight, geometry, channels_last, wanted, between)
    return Gradients(
        dx, dw, own if through_bias else db, d_norm_weight if needs.norm_weight else None,
        d_norm_bias if needs.norm_bias else None, g if needs.residual else None,
    )  # fmt: skip


Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def convolution_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, g: ConvGeometry, channels_last: tuple[bool, bool], needs: Needs,
    between: NormGradient | None, kind: ConvKind = "conv",
) -> Three:  # fmt: skip
    """Gradients of x, weight and bias; with something between, dy is what lies behind it."""
    if g.transposed:
        assert between is None
        return _transposed(dy, x, weight, g, channels_last, needs)
    dx = dw = db = None
    if needs.x and weight is not None:
        if between is not None and (needs.weight or needs.bias):
            between = between._replace(dz=empty_output(dy, g.output_shape, True, dy.dtype))
        dx = data_gradient(dy, weight, g, channels_last[0], kind, between)
        if between is not None and between.dz is not None:
            dy, between = between.dz, None
    if needs.weight and x is not None:
        dw, db = weight_gradient(dy, x, g, channels_last[1], needs.bias, kind, between)
    elif needs.bias:
        db = bias_gradient(dy)
    return dx, dw, db


def _transposed(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, g: ConvGeometry, channels_last: tuple[bool, bool], needs: Needs
) -> Three:
    """The same of a transposed convolution: a convolution of dy, and that one's weight gradient with dy as its image."""
    dx = dw = None
    if needs.x and weight is not None:
        dx = convolve(dy, weight, Epilogue(), g.mirrored, "conv").y
        assert dx is not None
        dx = as_format(dx, channels_last[0])
    if needs.weight and x is not None:
        dw, _ = weight_gradient(x, dy, g.mirrored, channels_last[1], False, "conv")
    return dx, dw, bias_gradient(dy) if needs.bias else None
