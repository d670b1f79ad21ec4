"""Which kernel runs a batched call, in each direction."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.adaptive.launch import pixel_sums
from tritonconv.ops.conv.banded import bands_dgrad, bands_wgrad, prefers_bands, prepare_bands
from tritonconv.ops.conv.dense import output_format, plan_for, prepare
from tritonconv.ops.conv.depthwise import View, depthwise_dgrad, depthwise_wgrad, is_depthwise, prepare_depthwise
from tritonconv.ops.conv.gradients import NormGradient, conv_dgrad, conv_wgrad
from tritonconv.ops.conv.hopper import hopper_dgrad, hopper_wgrad, prepare_hopper, unsupported_gradient
from tritonconv.ops.conv.target import WHOLE, Sink
from tritonconv.ops.conv.transposed import prepare_transposed
from tritonconv.ops.core.backend import capture, hopper_asked, interpreting
from tritonconv.ops.core.cache import Prepared
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Kind, device_of, precision
from tritonconv.ops.core.layout import as_format, dense_strides, is_dense

__all__ = ["data_gradient", "prepare_call", "takes_gate", "takes_sink", "weight_gradient"]


def prepare_call(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: Kind, statistics: bool = False,
    sink: Sink = WHOLE, gated: bool = False,
) -> Prepared:  # fmt: skip
    """Everything of a batched call but its tensors, which are what `check_convolution` wants; touches no memory.

    Args:
        kind: "matmul" takes the TF32 switch of matrix products.
        statistics: whether it is to be run with room for them.
        sink: where results go; other than `WHOLE` only where `takes_sink` says so.
        gated: whether x is to be multiplied by a gate on the way in; only where `takes_gate` says so.
    """
    note = ""
    if hopper_asked():
        call = prepare_hopper(x, weight, epilogue, geometry, statistics, sink, gated)
        if isinstance(call, Prepared) and _runs_gluon():
            return call
        note = f"not hopper: {call if isinstance(call, str) else 'the interpreter runs no Gluon'}"
    call = _prepare_portable(x, weight, epilogue, geometry, kind, statistics, sink, gated)
    return replace(call, note=note) if note else call


def _runs_gluon() -> bool:
    """Triton's interpreter does not; launches that are captured do not run."""
    return capture.active or not interpreting()


def _prepare_portable(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: Kind, statistics: bool, sink: Sink,
    gated: bool,
) -> Prepared:  # fmt: skip
    if is_depthwise(geometry):
        conv = geometry.mirrored if geometry.transposed else geometry
        if _prefers_bands(conv, x, output_format(x, weight), "dgrad" if geometry.transposed else "fprop"):
            return prepare_bands(x, weight, epilogue, geometry, statistics)
        return prepare_depthwise(x, weight, epilogue, geometry, statistics, sink)
    if kind == "conv_transpose":
        return prepare_transposed(x, weight, epilogue, geometry, statistics)
    return prepare(x, weight, epilogue, geometry, kind, statistics, sink, gated)


def takes_gate(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a call's kernel can multiply x by a gate on the way in: a convolution of single pixels, read in place."""
    g = geometry
    single = g.taps == max(g.stride) == g.groups == 1 and not any(g.padding + g.padding_after)
    if g.transposed or not single:
        return False
    plan = plan_for(x, weight, g)
    return plan.kernel == "matmul" and not plan.copy_input


def takes_sink(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the kernel of a call can send its results elsewhere than to memory of their own."""
    if geometry.transposed:
        return False
    return not is_depthwise(geometry) or not _prefers_bands(geometry, x, output_format(x, weight), "fprop")


def _prefers_bands(conv: ConvGeometry, source: Tensor, channels_last: bool, pass_: Pass) -> bool:
    """Whether a depthwise convolution's pass over images of this format goes to tensor cores."""
    view = View(conv, pass_ == "dgrad", channels_last, device_of(source.device), source.element_size())
    return prefers_bands(view, source.dtype, pass_, precision(source.dtype, "conv") == "tf32")


def data_gradient(
    dy: Tensor, weight: Tensor, geometry: ConvGeometry, channels_last: bool, kind: Kind, norm: NormGradient | None = None
) -> Tensor:
    """Gradient of a batched convolution's input; arguments as `conv_dgrad` takes them.

    Args:
        norm: for other than depthwise convolutions alone.
    """
    if hopper_asked() and _runs_gluon():
        contiguous = dense_strides(geometry.input_shape, channels_last)[1] != 1 < geometry.in_channels
        device = device_of(dy.device)
        if unsupported_gradient(geometry, dy.dtype, device, "dgrad", contiguous, norm is not None) is None:
            return hopper_dgrad(dy, weight, geometry, channels_last)
    if norm is None and is_depthwise(geometry):
        if _prefers_bands(geometry, dy, channels_last, "dgrad"):
            return as_format(bands_dgrad(dy, weight, geometry), channels_last)
        return depthwise_dgrad(dy, weight, geometry, channels_last)
    return conv_dgrad(dy, weight, geometry, channels_last, kind, norm)


def weight_gradient(
    dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool, bias: bool, kind: Kind,
    norm: NormGradient | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of a batched convolution's weight and bias; arguments as `conv_wgrad` takes them.

    Args:
        norm: for other than depthwise convolutions alone.
    """
    if hopper_asked() and _runs_gluon():
        device = device_of(dy.device)
        if unsupported_gradient(geometry, dy.dtype, device, "wgrad", False, norm is not None) is None:
            dw = hopper_wgrad(dy, x, geometry, channels_last)
            return dw, pixel_sums(as_format(dy, True)) if bias else None
    if norm is None and is_depthwise(geometry):
        # A contiguous one may be both.
        banded = _prefers_bands(geometry, dy, not is_dense(dy, False), "wgrad")
        return (bands_wgrad if banded else depthwise_wgrad)(dy, x, geometry, channels_last, bias)
    return conv_wgrad(dy, x, geometry, channels_last, bias, kind, norm)
