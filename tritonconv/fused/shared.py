"""Two or more calls that share a launch if they can, and run one by one otherwise: what a fused graph calls.

Tensors, numbers and backend of a convolution are as in ops/conv/call.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from tritonconv.fused.join import Join
from tritonconv.ops.conv.extended import AVERAGED, GATED, averaged_convolution, convolution_into, gated_convolution
from tritonconv.ops.conv.separable_call import SEPARABLE_LAUNCH, separable_convolution
from tritonconv.ops.core.backend import Backend, needs_gradients
from tritonconv.ops.core.family import call_family, family_named
from tritonconv.ops.core.layout import suggests_channels_last
from tritonconv.ops.core.observe import Share, is_observed, is_watched, sharing
from tritonconv.ops.squeeze_excite.operator import EXCITE, scale_channels

__all__ = ["averaged", "convolved_into", "excited", "gated", "pooled_into", "separable", "synchronized"]

Tensors = tuple[Any, ...]
Numbers = tuple[Any, ...]


def separable(first: tuple[Tensors, Numbers], second: tuple[Tensors, Numbers], backend: Backend | None) -> Tensor:
    """second(first(x)), a depthwise and a 1x1 convolution: in eval mode one kernel computes both if that is faster.

    Args:
        first, second: (tensors, numbers) of either; the input of the second is not given.
    """
    (tensors, (given1, _, eps1, act1)), (after, (given2, _, eps2, act2)) = first, second
    both, numbers = (*tensors[:7], *after[1:]), ((given1, given2), eps1, act1, eps2, act2)
    y = separable_convolution(both, numbers, backend)
    if y is not None:
        return y
    joined = is_observed() and SEPARABLE_LAUNCH.resolve(both, numbers, backend) is not None
    with sharing(Share("separable, its first part", unwritten=True)) if joined else nullcontext():
        between = call_family("conv", tensors, first[1], backend)
    with sharing(Share("separable, its second part", unread=True)) if joined else nullcontext():
        result: Tensor = call_family("conv", (between, *after[1:]), second[1], backend)
    return result


def averaged(
    tensors: Tensors, numbers: Numbers, backend: Backend | None, keep: bool, average: tuple[str, Numbers]
) -> tuple[Tensor | None, Tensor]:
    """(y, y's average over pixels) with y of a convolution; one pass in eval mode.

    Args:
        keep: whether other code reads y; if not, y may be None.
        average: family and numbers of the call that averages over all pixels.
    """
    found = averaged_convolution(tensors, numbers, backend, keep)
    if found is not None:
        y, mean = found
        if average[0] == "global_average":
            # With the strides of torch's mean.
            rows = mean.flatten(1)
            mean = rows.view(mean.shape) if average[1][1] else rows
        return y, mean
    shares = is_observed() and AVERAGED.resolve(tensors, (*numbers, keep), backend) is not None
    if shares:
        with sharing(Share("{}, with its global average", unwritten=not keep, members=("mean",))):
            y = call_family("conv", tensors, numbers, backend)
        return y, family_named(average[0]).on_torch((y,), average[1])
    y = call_family("conv", tensors, numbers, backend)
    return y, call_family(average[0], (y,), average[1], backend)


def gated(tensors: Tensors, gate: Tensor, numbers: Numbers, backend: Backend | None) -> Tensor:
    """A 1x1 convolution of input * gate, gate (N, C, 1, ...); in eval mode the product is never written to memory."""
    y = gated_convolution(tensors, gate, numbers, backend)
    if y is None and is_observed() and GATED.resolve((*tensors, gate), numbers, backend) is not None:
        with sharing(Share("{}, gated on its way in", members=("mul",))):
            y = call_family("conv", (tensors[0] * gate, *tensors[1:]), numbers, backend)
    if y is None:
        y = call_family("conv", (scale_channels(tensors[0], gate), *tensors[1:]), numbers, backend)
    return y


def synchronized(family: str, tensors: Tensors, numbers: Numbers, backend: Backend | None) -> Tensor:
    """A convolution and a batch norm over a process group's pixels, in one call if our kernels take it on this process.

    Args:
        family: "conv_bn" or "conv_transpose_bn", whose tensors and numbers these are.
    """
    if not family_named(family).refuses(tensors, numbers, backend):
        y: Tensor = call_family(family, tensors, numbers, backend)
        return y
    given, op, eps, activation, momentum, group = numbers
    x, weight, bias, *norm, residual = tensors
    z = call_family(family.removesuffix("_bn"), (x, weight, bias, *(None,) * 5), (given, op, 0.0, None), backend)
    y = call_family("batch_norm", (z, *norm, residual), ((True, momentum, eps), activation, group), backend)
    return y


def excited(
    family: str, mean: Tensor, first: tuple[Tensors, Numbers], second: tuple[Tensors, Numbers], backend: Backend | None
) -> Tensor:
    """second(first(mean)), both products of vectors with an activation, in one launch in eval mode.

    Args:
        family: of both calls.
        mean: (N, C, 1, ...), or (N, C) for linear layers.
        first, second: (tensors after the input, numbers) of either.
    """
    whole = mean if mean.dim() > 2 else mean[..., None]
    tensors, numbers = (whole, *first[0][:2], *second[0][:2]), ((), first[1][3], second[1][3])
    found = EXCITE.find(tensors, numbers, backend)
    if found is not None:
        result: Tensor = found.run(*tensors).view(mean.shape)
        return result
    joined = is_observed() and EXCITE.resolve(tensors, numbers, backend) is not None
    with sharing(Share("excite, its first product", unwritten=True)) if joined else nullcontext():
        hidden = call_family(family, (mean, *first[0]), first[1], backend)
    with sharing(Share("excite, its second product", unread=True)) if joined else nullcontext():
        result = call_family(family, (hidden, *second[0]), second[1], backend)
    return result


def convolved_into(join: Join, place: int, tensors: Tensors, numbers: Numbers, backend: Backend | None) -> Tensor:
    """A convolution whose result is a part of a concatenation, written to its place if it can be."""
    y = convolution_into(tensors, numbers, backend, join.pitch, join.starts[place], join.memory_of(place))
    return call_family("conv", tensors, numbers, backend) if y is None else y


def pooled_into(
    join: Join, place: int, family: str, tensors: Tensors, numbers: Numbers, size: tuple[int, ...], backend: Backend | None
) -> Tensor:
    """A pooling whose result, of this size, is a part of a concatenation, written to its place if it can be."""
    x, out = tensors[0], None
    if not needs_gradients((x,)) and not is_watched() and suggests_channels_last(x):
        out = join.memory(place, size, x.dtype, x.device)
    y: Tensor = call_family(family, (x, out), numbers, backend)
    return y
