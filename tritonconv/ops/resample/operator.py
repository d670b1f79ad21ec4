"""Resampling: its operators, which are linear and one another's gradients, and who runs a call of `interpolate`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from tritonconv.geometry.resampling import ResampleGeometry, Resampling
from tritonconv.ops.adaptive.operator import adaptive_pool
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.operator import Operator, is_traced
from tritonconv.ops.resample.launch import resample_forward, resample_gradient

__all__ = ["INTERPOLATE", "RESAMPLE", "RESAMPLE_BACKWARD", "interpolate"]

# Linear ones by the axes that they are for.
LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}
MODES = ("nearest", "nearest-exact", "area", *LINEAR)


@functools.lru_cache(maxsize=4096)
def _geometry(
    shape: tuple[int, ...], output: tuple[int, ...], factors: tuple[float, ...] | None, mode: Resampling
) -> ResampleGeometry:
    return ResampleGeometry.parse(shape, output, factors, mode)


def _of_operator(sizes: Sequence[int], output: Sequence[int], factors: Sequence[float], mode: str) -> ResampleGeometry:
    _check(sizes, output, factors, mode)
    return _geometry(tuple(sizes), tuple(output), tuple(factors) or None, mode)


def _check(sizes: Sequence[int], output: Sequence[int], factors: Sequence[float], mode: str) -> None:
    """Raise RuntimeError for what the kernels cannot be given."""
    nd = len(sizes) - 2
    fits = nd in (1, 2, 3) and len(output) == nd and len(factors) in (0, nd) and mode in get_args(Resampling)
    if not fits or any(n < 1 for n in (*sizes, *output)):
        raise RuntimeError(
            f"tritonconv::resample: expected input (N, C, *spatial), a positive size and perhaps a factor for each spatial "
            f"axis, and a mode of {', '.join(get_args(Resampling))}, but got input {list(sizes)}, size {list(output)}, "
            f"factors {list(factors)} and mode {mode!r}"
        )


def _forward(x: Tensor, output_size: Sequence[int], factors: Sequence[float], mode: str) -> Tensor:
    """x (N, C, *spatial) at `output_size` results, on Triton alone; factors: those of the scale, or none."""
    return resample_forward(x, _of_operator(x.shape, output_size, factors, mode))


def _outputs(x: Tensor, output_size: Sequence[int], factors: Sequence[float], mode: str) -> Tensor:
    _check(x.shape, output_size, factors, mode)
    return empty_output(x, (*x.shape[:2], *output_size), suggests_channels_last(x), x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    # The gradient does not look at the input.
    x, _, ctx.factors, ctx.mode = inputs
    ctx.sizes, ctx.channels_last = tuple(x.shape), suggests_channels_last(x)


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    return [RESAMPLE_BACKWARD(dy, ctx.sizes, tuple(ctx.factors), ctx.mode, ctx.channels_last)]


RESAMPLE = Operator("resample", _forward, _outputs, save=_save, backward=_backward)


def _gradient(dy: Tensor, sizes: Sequence[int], factors: Sequence[float], mode: str, channels_last: bool) -> Tensor:
    """The gradient of an input of these sizes, in that format, on Triton alone."""
    return resample_gradient(dy, _of_operator(sizes, dy.shape[2:], factors, mode), channels_last)


def _gradient_outputs(dy: Tensor, sizes: Sequence[int], _factors: Any, _mode: str, channels_last: bool) -> Tensor:
    return empty_output(dy, tuple(sizes), channels_last, dy.dtype)


def _gradient_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    dy, _, ctx.factors, ctx.mode, _ = inputs
    ctx.output = tuple(dy.shape[2:])


def _gradient_backward(ctx: Any, ddx: Tensor) -> list[Tensor | None]:
    return [RESAMPLE(ddx, ctx.output, tuple(ctx.factors), ctx.mode)]


RESAMPLE_BACKWARD = Operator(
    "resample_backward", _gradient, _gradient_outputs, save=_gradient_save, backward=_gradient_backward
)


class ResampleCall(NamedTuple):
    """A call that parsed."""

    output: tuple[Any, ...]
    factors: tuple[float, ...]
    """Those that count for the scale."""
    mode: Resampling
    geometry: ResampleGeometry | None
    """None if the call is traced."""


class Interpolate(Family[ResampleCall]):
    """torch.nn.functional.interpolate; a call's numbers are its arguments after the input, in a tuple."""

    torch_checks_types = True

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> ResampleCall | Unsupported:
        (x,), (size, scale_factor, mode, align_corners, recompute, antialias) = tensors, numbers[0]
        if x.dim() not in (3, 4, 5):
            return Unsupported()
        found = _sizes(x, size, scale_factor, recompute)
        reason = _why_unsupported(x, found, mode, align_corners, antialias)
        if reason is not None or found is None:
            return Unsupported(reason or "")
        output, factors = found
        kind: Resampling = mode
        if mode in LINEAR:
            kind = "linear-corners" if align_corners else "linear"
        geometry = None
        if not is_traced(tensors):
            # Torch says best what is wrong, and where there is no element there is nothing to compute.
            try:
                geometry = _geometry(tuple(x.shape), output, factors, kind)
            except (TypeError, ValueError):
                return Unsupported()
        return ResampleCall(output, factors or (), kind, geometry)

    def why_unsupported(self, tensors: Any, parsed: ResampleCall) -> str | None:  # noqa: ARG002
        return None if parsed.geometry is None else parsed.geometry.limit

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: ResampleCall | None) -> str:
        known = None if parsed is None else parsed.geometry
        return f"interpolate: {known or f'{numbers[0][2]} of {list(tensors[0].shape)}'}"

    def op(self, numbers: tuple[Any, ...]) -> str:
        return f"interpolate {numbers[0][2]}"

    def run(self, tensors: Any, parsed: ResampleCall) -> Tensor:
        y: Tensor = RESAMPLE(tensors[0], parsed.output, parsed.factors, parsed.mode)
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        y: Tensor = torch.nn.functional.interpolate(tensors[0], *numbers[0])
        return y

    def cost(self, tensors: Any, parsed: ResampleCall) -> Cost:
        g = parsed.geometry
        return Cost(0 if g is None else (g.elements + g.results) * tensors[0].element_size())

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        return functional.interpolate, (*tensors, *numbers[0]), {}


INTERPOLATE = Interpolate("interpolate")


def interpolate(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: Any = "nearest", align_corners: Any = None,
    recompute_scale_factor: Any = None, antialias: Any = False, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.interpolate; `backend` is the layer's own choice."""
    if mode == "area" and isinstance(x, Tensor) and x.dim() in (3, 4, 5) and not antialias and align_corners is None:
        found = _sizes(x, size, scale_factor, recompute_scale_factor)
        if found is not None:
            # The very function that torch calls.
            means: Tensor = adaptive_pool("avg", x, found[0], x.dim() - 2, backend=backend)
            return means
    numbers = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    y: Tensor = INTERPOLATE((x,), (numbers,), backend)
    return y


def _why_unsupported(x: Tensor, found: Any, mode: Any, align_corners: Any, antialias: Any) -> str | None:
    """Why no kernel takes these arguments; what is no argument of torch's is for it to say."""
    if mode == "bicubic" or mode == "lanczos":
        return f"mode {mode!r} has no kernel"
    if antialias:
        return "antialias has no kernel"
    wrong = (
        found is None or not isinstance(mode, str) or mode not in MODES or LINEAR.get(mode, x.dim() - 2) != x.dim() - 2
        or (align_corners is not None and mode not in LINEAR)
    )  # fmt: skip
    return "these arguments have no kernel" if wrong else None


def _sizes(x: Tensor, size: Any, factor: Any, recompute: Any) -> tuple[tuple[Any, ...], tuple[float, ...] | None] | None:
    """(the result's spatial sizes, the factors that count for its scale) as torch finds them; None where it must judge."""
    nd, integers = x.dim() - 2, (int, torch.SymInt)
    if (size is None) == (factor is None) or (recompute and size is not None):
        return None
    value = size if factor is None else factor
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,) * nd
    if len(given) != nd or any(isinstance(v, bool) for v in given):
        return None
    if factor is None:
        # As torch has it, numpy's integers count as Python's.
        given = tuple(v if isinstance(v, integers) or not hasattr(v, "__index__") else int(v) for v in given)
        return (given, None) if all(isinstance(v, integers) for v in given) else None
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in given):
        return None
    sizes = tuple(torch.sym_int(n * f) for n, f in zip(x.shape[2:], map(float, given), strict=True))
    return sizes, None if recompute else tuple(map(float, given))
