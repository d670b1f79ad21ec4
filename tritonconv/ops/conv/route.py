"""Which kernel runs a batched convolution, in each direction: the only place that decides."""

from __future__ import annotations

from torch import Tensor

from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.adaptive.launch import pixel_sums
from tritonconv.ops.conv.banded import bands_dgrad, bands_wgrad, convolve_banded, prefers_bands
from tritonconv.ops.conv.dense import convolve_dense, output_format, plan_for
from tritonconv.ops.conv.depthwise import DepthwiseView, convolve_depthwise, depthwise_dgrad, depthwise_wgrad, is_depthwise
from tritonconv.ops.conv.gradients import NormGradient, conv_dgrad, conv_wgrad
from tritonconv.ops.conv.hopper import hopper_convolution, hopper_dgrad, hopper_wgrad, why_no_gradient
from tritonconv.ops.conv.target import WHOLE, Result, Target
from tritonconv.ops.conv.transposed import convolve_transposed
from tritonconv.ops.core.backend import capture, hopper_asked, interpreting
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import ConvKind, device_of, note, precision
from tritonconv.ops.core.layout import as_format, dense_strides, is_dense

__all__ = ["can_gate", "can_redirect", "convolve", "data_gradient", "weight_gradient"]


def convolve(
    x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, kind: ConvKind, target: Target = WHOLE,
    gate: Tensor | None = None,
) -> Result:  # fmt: skip
    """A batched convolution of tensors that `check_convolution` accepts.

    Args:
        kind: "matmul" takes the TF32 switch of matrix products.
        target: where results go; `out` and `average` only where `can_redirect` says so.
        gate: [N, C], what x is multiplied by on the way in; only where `can_gate` says so.
    """
    if hopper_asked():
        result: Result | str = "a gated input comes through registers"
        if gate is None:
            result = hopper_convolution(x, weight, epilogue, geometry, target) if _runs_gluon() else NO_GLUON
        if isinstance(result, Result):
            return result
        note(f"not hopper: {result}")
    if is_depthwise(geometry):
        conv = geometry.mirrored if geometry.transposed else geometry
        banded = _prefers_bands(conv, x, output_format(x, weight), "dgrad" if geometry.transposed else "fprop")
        return (convolve_banded if banded else convolve_depthwise)(x, weight, epilogue, geometry, target)
    if kind == "conv_transpose":
        return convolve_transposed(x, weight, epilogue, geometry, target)
    return convolve_dense(x, weight, epilogue, geometry, kind, target, gate)


NO_GLUON = "the interpreter runs no Gluon"


def _runs_gluon() -> bool:
    """Triton's interpreter does not; launches that are captured do not run."""
    return capture.active or not interpreting()


def can_gate(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a call's kernel can multiply x by a gate on the way in: a convolution of single pixels, read in place."""
    g = geometry
    single = g.taps == max(g.stride) == g.groups == 1 and not g.is_padded
    if g.transposed or not single:
        return False
    plan = plan_for(x, weight, g)
    return plan.kernel == "matmul" and not plan.copy_input


def can_redirect(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a call's kernel can send its results elsewhere than to memory of their own."""
    if geometry.transposed:
        return False
    return not is_depthwise(geometry) or not _prefers_bands(geometry, x, output_format(x, weight), "fprop")


def _prefers_bands(conv: ConvGeometry, source: Tensor, channels_last: bool, pass_: Pass) -> bool:
    """Whether a depthwise convolution's pass over images of this format goes to tensor cores."""
    view = DepthwiseView(conv, pass_ == "dgrad", channels_last, device_of(source.device), source.element_size())
    return prefers_bands(view, source.dtype, pass_, precision(source.dtype, "conv") == "tf32")


def data_gradient(
    dy: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    channels_last: bool,
    kind: ConvKind,
    norm: NormGradient | None = None,
) -> Tensor:
    """Gradient of a batched convolution's input; arguments as `conv_dgrad` takes them.

    Args:
        norm: for other than depthwise convolutions alone.
    """
    if hopper_asked() and _runs_gluon():
        contiguous = dense_strides(geometry.input_shape, channels_last)[1] != 1 < geometry.in_channels
        if why_no_gradient(geometry, dy.dtype, device_of(dy.device), "dgrad", contiguous, norm is not None) is None:
            return hopper_dgrad(dy, weight, geometry, channels_last)
    if norm is None and is_depthwise(geometry):
        if _prefers_bands(geometry, dy, channels_last, "dgrad"):
            return as_format(bands_dgrad(dy, weight, geometry), channels_last)
        return depthwise_dgrad(dy, weight, geometry, channels_last)
    return conv_dgrad(dy, weight, geometry, channels_last, kind, norm)


def weight_gradient(
    dy: Tensor, x: Tensor, geometry: ConvGeometry, channels_last: bool, bias: bool, kind: ConvKind,
    norm: NormGradient | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of a batched convolution's weight and bias; arguments as `conv_wgrad` takes them.

    Args:
        norm: for other than depthwise convolutions alone.
    """
    hopper = hopper_asked() and _runs_gluon()
    if hopper and why_no_gradient(geometry, dy.dtype, device_of(dy.device), "wgrad", False, norm is not None) is None:
        dw = hopper_wgrad(dy, x, geometry, channels_last)
        return dw, pixel_sums(as_format(dy, True)) if bias else None
    if norm is None and is_depthwise(geometry):
        # A contiguous one may be both.
        banded = _prefers_bands(geometry, dy, not is_dense(dy, False), "wgrad")
        return (bands_wgrad if banded else depthwise_wgrad)(dy, x, geometry, channels_last, bias)
    return conv_wgrad(dy, x, geometry, channels_last, bias, kind, norm)
