"""Who runs a depthwise convolution and the 1x1 convolution behind it: one kernel, or each its own."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.dispatch import autocast
from tritonconv.ops.conv.library_separable import call_separable
from tritonconv.ops.conv.registered import arguments_of, is_traced
from tritonconv.ops.conv.separable import pointwise_geometry, separable, takes
from tritonconv.ops.core.backend import Backend, current_backend, needs_gradients, unsupported
from tritonconv.ops.core.cache import Memo, signature
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.observe import is_watched

__all__ = ["Part", "separable_convolution", "would_join"]


class Part(NamedTuple):
    """One of the two convolutions."""

    weight: Tensor
    epilogue: Epilogue
    numbers: tuple[Any, ...]
    """As `dispatch.replay` takes them."""
    backend: Backend | None


_known: Memo[ConvGeometry | Literal["apart"]] = Memo()


def separable_convolution(x: Tensor, first: Part, second: Part) -> Tensor | None:
    """second(first(x)) in one kernel, in eval mode; None where each part is to run on its own, which says why.

    Args:
        x: (N, C, H, W).
        first: a convolution of C groups; its epilogue has no residual.
        second: a convolution with a filter of one tap.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and is_watched():
        return None
    try:
        x, first, second = _cast(x, first, second)
    except AttributeError:
        return None
    tensors = (x, first.weight, second.weight, *first.epilogue.tensors(), *second.epilogue.tensors())
    if compiling or is_traced(tensors):
        # The operator sees for itself whether one launch is worth it.
        if not _is_plain(x, first, second):
            return None
        given = arguments_of("conv", first.numbers)
        return call_separable(x, first.weight, first.epilogue, second.weight, second.epilogue, **given)
    key = (
        signature("conv", x, first.weight, first.epilogue, first.numbers, first.backend),
        signature("conv", second.weight, second.weight, second.epilogue, second.numbers, second.backend),
    )
    if None in key:
        return None
    geometry = _known.get(key)
    if geometry is None:
        geometry = _suits(x, first, second) or "apart"
        _known.put(key, geometry)
    if geometry == "apart":
        return None
    return separable(x, first.weight, first.epilogue, second.weight, second.epilogue, geometry)


def would_join(x: Tensor, first: Part, second: Part) -> bool:
    """Whether a call that someone observes would be one kernel's if no one did."""
    return _suits(*_cast(x, first, second)) is not None


def _cast(x: Tensor, first: Part, second: Part) -> tuple[Tensor, Part, Part]:
    """As torch's autocast does for either."""
    x, weight, epilogue = autocast(x, first.weight, first.epilogue)
    first = first._replace(weight=weight, epilogue=epilogue)
    _, weight, epilogue = autocast(x, second.weight, second.epilogue)
    return x, first, second._replace(weight=weight, epilogue=epilogue)


def _is_plain(x: Tensor, first: Part, second: Part) -> bool:
    """Whether our kernels take both parts, whatever their sizes."""
    tensors = (x, first.weight, second.weight, *first.epilogue.tensors(), *second.epilogue.tensors())
    if "torch" in (current_backend(first.backend), current_backend(second.backend)) or needs_gradients(tensors):
        return False
    if any(not isinstance(t, Tensor) for t in tensors) or unsupported(tensors):
        return False
    # A batch norm's tensors may be wider.
    plain = (first.weight, second.weight, first.epilogue.bias, second.epilogue.bias, second.epilogue.residual)
    return x.dim() == 4 and all(t is None or t.dtype == x.dtype for t in plain)


def _suits(x: Tensor, first: Part, second: Part) -> ConvGeometry | None:
    """The depthwise part's geometry if one launch takes both and is worth it; None where each part is to see to itself."""
    if not _is_plain(x, first, second) or x.device != first.weight.device:
        return None
    try:
        g = ConvGeometry.parse(x.shape, first.weight.shape, nd=2, **arguments_of("conv", first.numbers))
        behind = ConvGeometry.parse(g.output_shape, second.weight.shape, nd=2, **arguments_of("conv", second.numbers))
        first.epilogue.check("conv2d", g, x, g.out_channels, None)
        second.epilogue.check("conv2d", behind, second.weight, behind.out_channels, behind.output_shape)
    # The part that is wrong says so itself.
    except (RuntimeError, TypeError, ValueError):
        return None
    fits = behind == pointwise_geometry(g, behind.out_channels) and x.device == second.weight.device
    return g if fits and takes(x, g, behind.out_channels) else None
