"""Adaptive and global pooling: operators, and who runs a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import AdaptiveGeometry
from tritonconv.ops.adaptive.launch import (
    adaptive_average,
    adaptive_average_gradient,
    adaptive_maximum,
    adaptive_maximum_gradient,
    geometry_of,
)
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.operator import Operator, gradients_wanted

__all__ = ["ADAPTIVE_POOLS", "GLOBAL_AVERAGE", "AdaptiveKind", "adaptive_pool", "global_average"]

AdaptiveKind = Literal["avg", "max"]


def _check(x: Tensor, output_size: Sequence[int]) -> None:
    """Raise RuntimeError for what the kernels cannot be given."""
    fits = x.dim() - 2 == len(output_size) and x.dim() in (3, 4, 5) and all(n > 0 for n in (*x.shape, *output_size))
    if not fits:
        raise RuntimeError(
            f"tritonconv adaptive pooling: expected input (N, C, *spatial) and a positive output size for each spatial "
            f"axis, but got input {list(x.shape)} and output_size {list(output_size)}"
        )


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    # A mean's gradient does not look at the input.
    ctx.sizes, ctx.channels_last = tuple(inputs[0].shape), suggests_channels_last(inputs[0])


# Means.


def _average(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Means over bins for x (N, C, *spatial), on Triton alone."""
    _check(x, output_size)
    return adaptive_average(x, geometry_of(x.shape, output_size))


def _average_outputs(x: Tensor, output_size: Sequence[int]) -> Tensor:
    _check(x, output_size)
    return empty_output(x, (*x.shape[:2], *output_size), suggests_channels_last(x), x.dtype)


def _average_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    dy = dy.reshape(*dy.shape[:2], *(1,) * (len(ctx.sizes) - 2)) if dy.dim() == 2 else dy
    return [ADAPTIVE_AVG_POOL_BACKWARD(dy, ctx.sizes, ctx.channels_last)]


ADAPTIVE_AVG_POOL = Operator("adaptive_avg_pool", _average, _average_outputs, save=_save_sizes, backward=_average_backward)


def _average_gradient(dy: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """The gradient of an input of these sizes, in that format, on Triton alone."""
    _check(dy, sizes[2:])
    return adaptive_average_gradient(dy, geometry_of(sizes, dy.shape[2:]), channels_last)


def _gradient_outputs(dy: Tensor, *rest: Any) -> Tensor:
    sizes, channels_last = rest[-2:]
    return empty_output(dy, tuple(sizes), channels_last, dy.dtype)


def _average_gradient_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.output = tuple(inputs[0].shape[2:])


ADAPTIVE_AVG_POOL_BACKWARD = Operator(
    "adaptive_avg_pool_backward", _average_gradient, _gradient_outputs, save=_average_gradient_save,
    backward=lambda ctx, ddx: [ADAPTIVE_AVG_POOL(ddx, ctx.output)],
)  # fmt: skip


def _global(x: Tensor, keepdim: bool) -> Tensor:
    """Means over all pixels for x (N, C, *spatial), on Triton alone."""
    y = _average(x, (1,) * (x.dim() - 2))
    # One number an image and channel lies in this order in either format; the strides are those of torch's mean.
    ones = (1,) * (x.dim() - 2) if keepdim else ()
    return y.as_strided((*x.shape[:2], *ones), (x.shape[1], 1, *ones))


def _global_outputs(x: Tensor, keepdim: bool) -> Tensor:
    _check(x, (1,) * (x.dim() - 2))
    ones = (1,) * (x.dim() - 2) if keepdim else ()
    return x.new_empty((*x.shape[:2], *ones))


GLOBAL = Operator("global_average", _global, _global_outputs, save=_save_sizes, backward=_average_backward)


# Maxima.


def _maximum(x: Tensor, output_size: Sequence[int], long_indices: bool, indices: bool = True) -> tuple[Tensor, Tensor]:
    """Maxima over bins and, with `indices`, their places, int64 or int32, for x (N, C, *spatial), on Triton alone."""
    _check(x, output_size)
    dtype = (torch.int64 if long_indices else torch.int32) if indices else None
    return adaptive_maximum(x, geometry_of(x.shape, output_size), dtype)  # type: ignore[return-value]


def _maximum_outputs(
    x: Tensor, output_size: Sequence[int], long_indices: bool, indices: bool = True
) -> tuple[Tensor, Tensor | None]:
    _check(x, output_size)
    shape, channels_last = (*x.shape[:2], *output_size), suggests_channels_last(x)
    index = empty_output(x, shape, channels_last, torch.int64 if long_indices else torch.int32) if indices else None
    return empty_output(x, shape, channels_last, x.dtype), index


def _maximum_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save_sizes(ctx, inputs, output)
    ctx.save_for_backward(output[1])


def _maximum_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    (index,) = ctx.saved_tensors
    return [ADAPTIVE_MAX_POOL_BACKWARD(dy, index, ctx.sizes, ctx.channels_last)]


ADAPTIVE_MAX_POOL = Operator(
    "adaptive_max_pool", _maximum, _maximum_outputs, save=_maximum_save, backward=_maximum_backward
)


def _maximum_gradient(dy: Tensor, index: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """The gradient of an input of these sizes, in that format, on Triton alone."""
    _check(dy, sizes[2:])
    return adaptive_maximum_gradient(dy, index, geometry_of(sizes, dy.shape[2:]), channels_last)


def _maximum_gradient_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1])


def _maximum_gradient_backward(ctx: Any, ddx: Tensor) -> list[Tensor | None]:
    (index,) = ctx.saved_tensors
    return [ddx.flatten(2).gather(2, index.flatten(2).long()).view(index.shape)]


ADAPTIVE_MAX_POOL_BACKWARD = Operator(
    "adaptive_max_pool_backward", _maximum_gradient, _gradient_outputs, save=_maximum_gradient_save,
    backward=_maximum_gradient_backward,
)  # fmt: skip


# Calls.


class AdaptiveCall(NamedTuple):
    """A call that parsed."""

    geometry: AdaptiveGeometry
    keep: bool
    """Whether indices are asked for, or, of a mean over all pixels, whether its axes are kept."""
    wide: bool
    """Whether it is computed in fp32 for 16-bit numbers, as torch has it in autocast."""


class AdaptivePool(Family[AdaptiveCall]):
    """torch's function of a kind; a call's numbers are ((output_size, nd), return_indices)."""

    torch_checks_types = True

    def __init__(self, kind: AdaptiveKind) -> None:
        self.kind = kind
        super().__init__(f"adaptive_{kind}_pool")

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> AdaptiveCall | Unsupported:
        (output_size, nd), indices = numbers
        x = tensors[0]
        geometry = _geometry(x, output_size, nd)
        # Torch says best what is wrong, and where there is no element there is nothing to compute.
        if geometry is None:
            return Unsupported()
        # As torch has it in autocast: on CPUs the 3-d ones are computed in fp32.
        wide = nd == 3 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.element_size() == 2
        return AdaptiveCall(geometry, indices, wide)

    def why_unsupported(self, tensors: Any, parsed: AdaptiveCall) -> str | None:  # noqa: ARG002
        return parsed.geometry.limit

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: AdaptiveCall | None) -> str:
        return f"{self.op(numbers)} of {list(tensors[0].shape) if parsed is None else parsed.geometry}"

    def op(self, numbers: tuple[Any, ...]) -> str:
        return f"{self.name}{numbers[0][1]}d"

    def run(self, tensors: Any, parsed: AdaptiveCall) -> Any:
        x, g = tensors[0], parsed.geometry
        x = x.float() if parsed.wide else x
        batch = x.unsqueeze(0) if x.dim() == g.nd + 1 else x
        found = self._operate(batch, g.output[3 - g.nd :], parsed.keep)
        if batch is x:
            return found
        return tuple(t.squeeze(0) for t in found) if parsed.keep else found.squeeze(0)

    def _operate(self, x: Tensor, sizes: tuple[int, ...], indices: bool) -> Any:
        if self.kind == "avg":
            return ADAPTIVE_AVG_POOL(x, sizes)
        y, index = ADAPTIVE_MAX_POOL(x, sizes, indices, indices or gradients_wanted((x,)))
        return (y, index) if indices else y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Any:
        (output_size, _), indices = numbers
        return getattr(torch.nn.functional, self.op(numbers) + "_with_indices" * indices)(tensors[0], output_size)

    def cost(self, tensors: Any, parsed: AdaptiveCall) -> Cost:
        return Cost((parsed.geometry.elements + parsed.geometry.results) * tensors[0].element_size())

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        (output_size, _), indices = numbers
        more = dict(return_indices=True) if indices else {}
        return getattr(functional, self.op(numbers)), (*tensors, output_size), more


class GlobalAverage(Family[AdaptiveCall]):
    """x.mean over all spatial axes; a call's numbers are ((number of axes,), keepdim)."""

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> AdaptiveCall | Unsupported:
        geometry = _geometry(tensors[0], 1, numbers[0][0])
        return Unsupported() if geometry is None else AdaptiveCall(geometry, numbers[1], False)

    def why_unsupported(self, tensors: Any, parsed: AdaptiveCall) -> str | None:  # noqa: ARG002
        return parsed.geometry.limit

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: AdaptiveCall | None) -> str:  # noqa: ARG002
        return f"global_average of {list(tensors[0].shape) if parsed is None else parsed.geometry}"

    def op(self, numbers: tuple[Any, ...]) -> str:
        return f"adaptive_avg_pool{numbers[0][0]}d"

    def run(self, tensors: Any, parsed: AdaptiveCall) -> Tensor:
        y: Tensor = GLOBAL(tensors[0], parsed.keep)
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        x: Tensor = tensors[0]
        return x.mean(tuple(range(2, x.dim())), numbers[1])

    def cost(self, tensors: Any, parsed: AdaptiveCall) -> Cost:
        return Cost((parsed.geometry.elements + parsed.geometry.results) * tensors[0].element_size())


ADAPTIVE_POOLS = {"avg": AdaptivePool("avg"), "max": AdaptivePool("max")}
GLOBAL_AVERAGE = GlobalAverage("global_average")


def adaptive_pool(
    kind: AdaptiveKind, x: Tensor, output_size: Any, nd: int, return_indices: bool = False, backend: Backend | None = None
) -> Any:
    """What torch's function of that kind and dimension gives, on the backend that is chosen for it.

    Args:
        return_indices: return (maxima, their places, int64).
        backend: the layer's own choice.
    """
    return ADAPTIVE_POOLS[kind]((x,), ((output_size, nd), bool(return_indices)), backend)


def global_average(x: Tensor, keepdim: bool, backend: Backend | None = None) -> Tensor:
    """x.mean over all spatial axes.

    Args:
        x: (N, C, *spatial), one to three axes.
        keepdim: whether the result is (N, C, 1, ...), in x's format, and not (N, C).
        backend: the layer's own choice.

    Raises:
        RuntimeError: an input of other dimensions.
    """
    if x.dim() not in (3, 4, 5):
        raise RuntimeError(f"global_average: expected input (N, C, *spatial) of 3 to 5 axes, but got size {list(x.shape)}")
    y: Tensor = GLOBAL_AVERAGE((x,), ((x.dim() - 2,), keepdim), backend)
    return y


def _geometry(x: Tensor, output_size: Any, nd: int) -> AdaptiveGeometry | None:
    """Of a call that torch would take and that has results; else None."""
    if x.dim() not in (nd + 1, nd + 2):
        return None
    # As in torch, other integers count as Python's in a tuple, and 1-d functions know no None.
    if isinstance(output_size, (tuple, list)):
        output_size = [_plain(o) for o in output_size]
    elif not isinstance(output_size, (int, torch.SymInt)):
        return None
    if nd == 1 and isinstance(output_size, list) and None in output_size:
        return None
    shape = (1, *x.shape) if x.dim() == nd + 1 else tuple(x.shape)
    try:
        return AdaptiveGeometry.parse(shape, output_size, nd)
    except (TypeError, ValueError):
        return None


def _plain(size: Any) -> Any:
    if size is None or isinstance(size, (int, torch.SymInt)) or not hasattr(size, "__index__"):
        return size
    return int(size)
