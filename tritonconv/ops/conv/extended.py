"""Convolutions in eval mode with more in their launch: an average after, channels of a wider tensor, a gate before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.call import conv_numbers, epilogue_of, why_no_convolution
from tritonconv.ops.conv.dense import check_convolution, output_format
from tritonconv.ops.conv.operator import EPILOGUE
from tritonconv.ops.conv.route import can_gate, can_redirect, convolve
from tritonconv.ops.conv.target import MOST_IMAGES, Target, pixel_means
from tritonconv.ops.core.backend import Backend, autocast_dtype, cast_for_autocast, current_backend, why_unsupported
from tritonconv.ops.core.layout import dense_strides
from tritonconv.ops.core.operator import is_traced
from tritonconv.ops.core.recording import record
from tritonconv.ops.core.shared_launch import SharedLaunch
from tritonconv.tuning import judge

__all__ = ["AVERAGED", "GATED", "averaged_convolution", "convolution_into", "gated_convolution"]

COUNT = 2 + len(EPILOGUE)
Memory = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor | None]
Planned = tuple[Callable[..., Any], Any]


def averaged_convolution(
    tensors: Any, numbers: tuple[Any, ...], backend: Backend | None, keep: bool
) -> tuple[Tensor | None, Tensor] | None:
    """(y, y's mean over each image's pixels), both in one pass; None where convolution and average run on their own.

    Args:
        tensors, numbers: as `Convolution` takes them.
        keep: whether someone else reads y; else it is not written, and None here.

    Returns:
        y, and its mean (N, K, 1, ...) in its dtype and format.
    """
    found = AVERAGED.find(tensors, (*numbers, keep), backend)
    return None if found is None else found.run(*tensors)


def convolution_into(
    tensors: Any, numbers: tuple[Any, ...], backend: Backend | None, pitch: int, first: int, memory: Memory
) -> Tensor | None:
    """The convolution's result as some channels of a wider channels-last tensor; None where it must run on its own.

    Args:
        tensors, numbers: as `Convolution` takes them.
        pitch: channels of the wider tensor; first: the first of ours.
        memory: gives these channels for (size, dtype, device), or None where they do not fit.
    """
    found = INTO.find(tensors, (*numbers, pitch, first), backend)
    if found is None:
        return None
    out = memory(tuple(found.result.shape), found.result.dtype, tensors[0].device)
    if out is None:
        return None
    found.run(*tensors, out)
    return out


def gated_convolution(tensors: Any, gate: Tensor, numbers: tuple[Any, ...], backend: Backend | None) -> Tensor | None:
    """act(bn(conv(x * gate) + bias) + residual) without a pass for the product; None where there must be one.

    Args:
        tensors, numbers: as `Convolution` takes them.
        gate: (N, C, 1, ...), of x's dtype.
    """
    found = GATED.find((*tensors, gate), numbers, backend)
    return None if found is None else found.run(*tensors, gate)


def _cast(tensors: Any, dtype: torch.dtype | None) -> Any:
    return tensors if dtype is None else (*(cast_for_autocast(t, dtype) for t in tensors[:3]), *tensors[3:])


def _parse(tensors: Any, numbers: tuple[Any, ...]) -> ConvGeometry | None:
    """The geometry of a call that our kernels take, batched and in eval mode; None for others."""
    given, _, eps, activation = numbers[:4]
    conv, x, weight = conv_numbers("conv", given), tensors[0], tensors[1]
    present = tuple(t for t in tensors if t is not None)
    if x.dim() != conv.nd + 2 or is_traced(tensors) or why_unsupported(present):
        return None
    if why_no_convolution(x, weight, tensors[7]):
        return None
    try:
        g = conv.geometry(x.shape, weight.shape)
        check_convolution("conv", x, weight, epilogue_of(tensors, eps, activation), g)
    # The call on its own says what is wrong.
    except (RuntimeError, TypeError, ValueError):
        return None
    return None if 0 in g.output_shape or 0 in g.input_shape else g


def _planned(tensors: Any, numbers: tuple[Any, ...], backend: Backend | None, run: Any, given: Any) -> Planned | None:
    """The launch, unless torch was measured faster for the convolution."""
    if current_backend(backend) != "auto":
        return run, given
    recording = record(run, given, tensors[0].device)
    epilogue = epilogue_of(tensors, *numbers[2:4])
    problem = recording.problem
    return None if problem is not None and judge(problem, recording.conditions(epilogue.describe())).torch else (run, given)


def _plan_average(tensors: Any, numbers: tuple[Any, ...], backend: Backend | None) -> Planned | None:
    dtype = autocast_dtype(tensors[0])
    cast = _cast(tensors, dtype)
    g, keep = _parse(cast, numbers), numbers[4]
    if g is None or not can_redirect(cast[0], cast[1], g):
        return None
    target = Target(average="also" if keep else "alone")

    def run(*tensors: Any) -> tuple[Tensor | None, Tensor]:
        tensors = _cast(tensors, dtype)
        x, weight = tensors[:2]
        result = convolve(x, weight, epilogue_of(tensors, *numbers[2:4]), g, "conv", target)
        assert result.sums is not None
        mean = pixel_means(result.sums, g.output_shape, x.dtype)
        if output_format(x, weight):
            mean = mean.as_strided(mean.shape, dense_strides(tuple(mean.shape), True))
        return result.y, mean

    recording = record(run, tensors, tensors[0].device)
    # [tiles, images, C]: the sums of a tile that touches too many images take too long.
    images = next(one.arguments["moments_ptr"].shape[1] for one in recording.launches)
    return _planned(tensors, numbers, backend, run, tensors) if images <= MOST_IMAGES else None


def _plan_into(tensors: Any, numbers: tuple[Any, ...], backend: Backend | None) -> Planned | None:
    dtype = autocast_dtype(tensors[0])
    cast = _cast(tensors, dtype)
    g = _parse(cast, numbers)
    if g is None or cast[7] is not None or not can_redirect(cast[0], cast[1], g) or not output_format(*cast[:2]):
        return None
    pitch, first = numbers[4:]
    size = (g.batch, pitch, *g.output_shape[2:])
    whole = torch.empty_strided(size, dense_strides(size, True), dtype=cast[0].dtype, device="meta")

    def run(*tensors: Any) -> Tensor:
        *given, out = tensors
        x, weight, *rest = _cast(given, dtype)
        convolve(x, weight, epilogue_of((x, weight, *rest), *numbers[2:4]), g, "conv", Target(out))
        return out

    return _planned(tensors, numbers, backend, run, (*tensors, whole.narrow(1, first, g.out_channels)))


def _plan_gate(tensors: Any, numbers: tuple[Any, ...], backend: Backend | None) -> Planned | None:
    *tensors, gate = tensors
    dtype = autocast_dtype(tensors[0])
    cast = _cast(tensors, dtype)
    x = cast[0]
    if (gate.dtype, gate.device) != (x.dtype, x.device) or gate.shape != (*x.shape[:2], *(1,) * (x.dim() - 2)):
        return None
    g = _parse(cast, numbers)
    if g is None or not can_gate(x, cast[1], g):
        return None

    def run(*tensors: Any) -> Tensor:
        *given, gate = tensors
        x, weight, *rest = _cast(given, dtype)
        epilogue = epilogue_of((x, weight, *rest), *numbers[2:4])
        y = convolve(x, weight, epilogue, g, "conv", gate=gate.contiguous()).y
        assert y is not None
        return y

    return _planned(tensors, numbers, backend, run, (*tensors, gate))


AVERAGED = SharedLaunch("averaged convolution", COUNT, _plan_average)
INTO = SharedLaunch("convolution into channels", COUNT, _plan_into)
GATED = SharedLaunch("gated convolution", COUNT + 1, _plan_gate)
