"""Launches of squeeze-excite's kernels: the gate of each image's channels, the product with it, and its gradients."""

from __future__ import annotations

import math

from torch import Tensor

from tritonconv.geometry import power, power_of_two_divisor
from tritonconv.ops.batch_norm.launch import NormView
from tritonconv.ops.conv.target import Sums, pixel_means
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.launch import Launch, activation_constants, device_of, launch
from tritonconv.ops.core.layout import as_format, empty_output, is_dense, suggests_channels_last, wide
from tritonconv.tuning.rules.normalization import excite_block

__all__ = ["MOST_HIDDEN", "excite", "scale", "scale_gradients"]

# Channels between the two products that a program holds at once.
MOST_HIDDEN = 1024


def excite(
    mean: Tensor, w1: Tensor, b1: Tensor | None, act: ActivationSpec | None, w2: Tensor, b2: Tensor | None,
    gate_act: ActivationSpec | None,
) -> Tensor:  # fmt: skip
    """gate_act(w2 @ act(w1 @ mean + b1) + b2), (N, C, 1, ...), in one launch.

    Args:
        mean: (N, C, 1, ...).
        w1, b1: (R, C, 1, ...) or (R, C), and (R,); R at most MOST_HIDDEN.
        w2, b2: (C, R, 1, ...) or (C, R), and (C,).
    """
    from tritonconv.kernels.squeeze_excite import excite_kernel

    n, c, hidden = *mean.shape[:2], w1.shape[0]
    gate = empty_output(mean, tuple(mean.shape), False, mean.dtype)
    if gate.numel() == 0:
        return gate
    block_r = power(hidden, MOST_HIDDEN, 16)
    block_c = excite_block(c, block_r, device_of(mean.device))
    gating = {f"GATE{name[3:]}": value for name, value in activation_constants(gate_act).items()}
    arguments = dict(
        mean_ptr=mean.contiguous(), gate_ptr=gate, w1_ptr=w1.reshape(hidden, c), b1_ptr=_contiguous(b1),
        w2_ptr=w2.reshape(c, hidden), b2_ptr=_contiguous(b2), C=c, R=hidden, VEC_C=power_of_two_divisor(c),
        VEC_R=power_of_two_divisor(hidden), BLOCK_C=block_c, BLOCK_R=block_r, **activation_constants(act), **gating,
    )  # fmt: skip
    launch(Launch(excite_kernel, n, arguments, None, None), mean.device)
    return gate


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _view(x: Tensor) -> NormView:
    """A dense x as runs of one image each, for the gate changes from image to image."""
    n, c, *spatial = x.shape
    channels_last = c > 1 and not is_dense(x, False)
    return NormView(n, math.prod(spatial), c, channels_last, device_of(x.device))


def _dense(x: Tensor) -> Tensor:
    return as_format(x, suggests_channels_last(x))


def scale(x: Tensor, gate: Tensor, residual: Tensor | None = None, activation: ActivationSpec | None = None) -> Tensor:
    """act(x * gate + residual), of x's type and format.

    Args:
        x: (N, C, *spatial).
        gate: (N, C, 1, ...).
        residual: of x's size.
    """
    from tritonconv.kernels.squeeze_excite import scale_kernel

    x = _dense(x)
    y = empty_output(x, tuple(x.shape), suggests_channels_last(x), x.dtype)
    if y.numel() == 0:
        return y
    view = _view(x)
    config = view.config(walks=False)
    arguments = dict(
        x_ptr=x, gate_ptr=gate.contiguous(), y_ptr=y,
        residual_ptr=None if residual is None else as_format(residual, view.channels_last),
        **activation_constants(activation), **view.sizes(config),
    )  # fmt: skip
    launch(Launch(scale_kernel, view.blocks(config) * view.tiles(config), arguments, None, config), x.device)
    return y


def scale_gradients(
    dy: Tensor, x: Tensor, gate: Tensor, needs_x: bool, needs_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x * gate: dx of x's type and format, dgate (N, C, 1, ...) of the gate's type; None where not needed."""
    from tritonconv.kernels.squeeze_excite import scale_backward_kernel

    x = _dense(x)
    dx = empty_output(x, tuple(x.shape), suggests_channels_last(x), x.dtype) if needs_x else None
    if x.numel() == 0:
        return dx, gate.new_zeros(gate.shape) if needs_gate else None
    view = _view(x)
    config = view.config(walks=False)
    blocks = view.blocks(config)
    sums = empty_output(x, (blocks, 1, view.channels), False, wide(x.dtype)) if needs_gate else None
    arguments = dict(
        dy_ptr=as_format(dy, view.channels_last), x_ptr=x, gate_ptr=gate.contiguous(), dx_ptr=dx, sums_ptr=sums,
        **view.sizes(config),
    )  # fmt: skip
    launch(Launch(scale_backward_kernel, blocks * view.tiles(config), arguments, None, config), x.device)
    dgate = None
    if sums is not None:
        dgate = pixel_means(Sums(sums, 1, blocks // view.runs), tuple(gate.shape), gate.dtype)
    return dx, dgate
