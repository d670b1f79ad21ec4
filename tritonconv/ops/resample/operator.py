"""Resampling for callers: who runs it, and the operators that compilers and autograd see.

Calls that need no gradient and that no one traces go past the operators, straight to the launches (ops/resample/launch.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from tritonconv.geometry.resampling import ResampleGeometry, Resampling
from tritonconv.ops.adaptive.operator import adaptive_pool
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.backend import Backend, decide, needs_gradients
from tritonconv.ops.core.layout import empty_output, reads_in_place, suggests_channels_last
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.ops.resample.launch import resample_forward, resample_gradient

__all__ = ["interpolate"]

# Linear ones by the axes that they are for.
LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}
MODES = ("nearest", "nearest-exact", "area", *LINEAR)


def interpolate(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: Any = "nearest", align_corners: Any = None,
    recompute_scale_factor: Any = None, antialias: Any = False, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.interpolate; `backend` is the layer's own choice."""
    arguments = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if not isinstance(x, Tensor) or x.dim() not in (3, 4, 5):
        return _on_torch(x, arguments)
    compiling = torch.compiler.is_compiling()
    found = _sizes(x, size, scale_factor, recompute_scale_factor)
    missing = _missing(x, found, mode, align_corners, antialias)
    geometry = None
    if missing is None:
        assert found is not None
        if mode == "area":
            # The very function that torch calls.
            means: Tensor = adaptive_pool("avg", x, found[0], x.dim() - 2, backend=backend)
            return means
        if not compiling:
            # Torch says best what is wrong, and where there is no element there is nothing to compute.
            try:
                geometry = _geometry(tuple(x.shape), *found, _mode(mode, align_corners))
            except (TypeError, ValueError):
                return _on_torch(x, arguments)
            missing = geometry.limit
    result = None
    if missing is not None and geometry is None:
        # Torch judges arguments first, and where it finds nothing wrong, its result is no silent one.
        result = _on_torch(x, arguments)
    refused = decide((x,), backend, lambda: f"interpolate: {geometry or f'{mode} of {list(x.shape)}'}", missing)
    observed = notify(lambda: _as_call(x, geometry, mode, refused and refused.reason))
    if refused is not None or observed:
        return _on_torch(x, arguments) if result is None else result

    assert found is not None
    output, factors = found
    if is_traced((x,)) or needs_gradients((x,)):
        y: Tensor = torch.ops.tritonconv.resample(x, output, factors or (), _mode(mode, align_corners))
        return y
    assert geometry is not None
    return resample_forward(x, geometry)


def _on_torch(x: Any, arguments: tuple[Any, ...]) -> Tensor:
    y: Tensor = torch.nn.functional.interpolate(x, *arguments)
    return y


def _mode(mode: str, align_corners: Any) -> Resampling:
    if mode in LINEAR:
        return "linear-corners" if align_corners else "linear"
    return mode  # type: ignore[return-value]


def _missing(x: Tensor, found: Any, mode: Any, align_corners: Any, antialias: Any) -> str | None:
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


@functools.lru_cache(maxsize=4096)
def _geometry(
    shape: tuple[int, ...], output: tuple[int, ...], factors: tuple[float, ...] | None, mode: Resampling
) -> ResampleGeometry:
    return ResampleGeometry.parse(shape, output, factors, mode)


def _as_call(x: Tensor, geometry: ResampleGeometry | None, mode: str, refused: str | None) -> Call:
    size = 0 if geometry is None else (geometry.elements + geometry.results) * x.element_size()
    if refused is not None or geometry is None:
        decision = Decision("torch", refused or "")
    else:
        decision = Decision("triton", "resample", int(not reads_in_place(x, suggests_channels_last(x))))
    return Call(f"interpolate {mode}", decision, None, 0, size, x.dtype, x.device, None, "")


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


@torch.library.custom_op("tritonconv::resample", mutates_args=())
def resample(x: Tensor, output_size: Sequence[int], factors: Sequence[float], mode: str) -> Tensor:
    """x (N, C, *spatial) at `output_size` results, on Triton alone; factors: those of the scale, or none."""
    return resample_forward(x, _of_operator(x.shape, output_size, factors, mode))


@resample.register_fake
def _(x: Tensor, output_size: Sequence[int], factors: Sequence[float], mode: str) -> Tensor:
    _check(x.shape, output_size, factors, mode)
    return empty_output(x, (*x.shape[:2], *output_size), suggests_channels_last(x), x.dtype)


@torch.library.custom_op("tritonconv::resample_backward", mutates_args=())
def resample_backward(dy: Tensor, sizes: Sequence[int], factors: Sequence[float], mode: str, channels_last: bool) -> Tensor:
    """The gradient of an input of these sizes, in that format, on Triton alone."""
    return resample_gradient(dy, _of_operator(sizes, dy.shape[2:], factors, mode), channels_last)


@resample_backward.register_fake
def _(dy: Tensor, sizes: Sequence[int], factors: Sequence[float], mode: str, channels_last: bool) -> Tensor:  # noqa: ARG001
    return empty_output(dy, tuple(sizes), channels_last, dy.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    # The gradient does not look at the input.
    x, _, ctx.factors, ctx.mode = inputs
    ctx.sizes, ctx.channels_last = tuple(x.shape), suggests_channels_last(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    dx = torch.ops.tritonconv.resample_backward(dy, ctx.sizes, ctx.factors, ctx.mode, ctx.channels_last)
    return dx, None, None, None


resample.register_autograd(_backward, setup_context=_save)
