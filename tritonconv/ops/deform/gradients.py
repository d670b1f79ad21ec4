"""Gradients of a deformable convolution on Triton, and how the input's is added up."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import DeformGeometry, power, power_of_two_divisor
from tritonconv.ops.conv.gradients import add_ranges
from tritonconv.ops.core.launch import Launch, config_constants, config_for, launch
from tritonconv.ops.core.layout import as_format, empty_output, readable, suggests_channels_last, wide
from tritonconv.ops.deform.launch import problem_of, reading
from tritonconv.tuning.ranges import ranges

__all__ = ["Wanted", "current_scatter", "deform_dgrad", "deform_wgrad", "scale_of", "set_deform_scatter"]

Scatter = Literal["deterministic", "fast"]
SCATTERS = ("deterministic", "fast")
# A sum stays below so many bits, and one more is left for what rounding adds to its bound.
SUM_BITS = 62
# Pixels and channels of a program that writes the sums as the gradient lies.
WRITTEN_PIXELS, WRITTEN_CHANNELS = 32, 64

_scatter: Scatter = "deterministic"


class set_deform_scatter:  # noqa: N801 - a context manager that reads as a function, like torch.set_grad_enabled
    """Choose how gradients of deformable convolutions' inputs are added up, for the process, or for a `with` block.

    Args:
        scatter: "deterministic" (64-bit integers: the same bits on every run, 8 bytes an element, 16 for fp64) or "fast"
            (float atomics: 4 bytes, 8 for fp64, and bits that differ from run to run).
            `torch.use_deterministic_algorithms(True)` asks for the former whatever was chosen here.

    >>> with set_deform_scatter("fast"):
    ...     current_scatter()
    'fast'
    """

    def __init__(self, scatter: Scatter) -> None:
        global _scatter
        if scatter not in SCATTERS:
            raise ValueError(f"scatter must be one of {', '.join(SCATTERS)}, got {scatter!r}")
        self._previous = _scatter
        _scatter = scatter

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _scatter
        _scatter = self._previous


def current_scatter() -> Scatter:
    """How the next gradient of an input is added up."""
    return "deterministic" if torch.are_deterministic_algorithms_enabled() else _scatter


class Wanted(NamedTuple):
    """Which gradients to compute."""

    input: bool = True
    offset: bool = True
    mask: bool = True


def deform_wgrad(
    dy: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, g: DeformGeometry, channels_last: bool
) -> Tensor:  # fmt: skip
    """Gradient of the weight, dense in this format.

    Sums of ranges of the pixels go through a workspace in fp32 (fp64 for fp64) of at most `tuning.ranges.WORKSPACE` bytes.

    Args:
        dy: gradient of the output, (N, K, P, Q).
        x, offset, mask: as the forward had them.
    """
    from tritonconv.kernels.deform_conv_wgrad import deform_conv_wgrad_kernel

    dw = empty_output(dy, g.conv.weight_shape, channels_last, dy.dtype)
    if dy.numel() == 0:
        return dw.zero_()
    dy, x = as_format(dy, True), readable(x, True)
    problem = problem_of("deform_conv_wgrad", g, x, "wgrad")
    config = config_for(problem)
    tiles = config_constants(config)
    arguments = reading(g, x, offset, mask, tiles["BLOCK_N"])
    filters, _, _ = problem.gemm
    count, size = ranges(problem, tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"])
    direct = count == 1
    sums = dw
    if not direct:
        sums = torch.empty_strided((count, dw.numel()), (dw.numel(), 1), dtype=wide(dy.dtype), device=dy.device)
    units = -(-arguments["CG"] // g.run // arguments["GROUPS_K"])
    columns = arguments["TAPS"] * units * arguments["BLOCKS"]
    programs = count * g.conv.groups * columns * -(-filters // tiles["BLOCK_M"])
    arguments |= dict(
        dy_ptr=dy, dw_ptr=sums, RANGE=size, VEC_K=power_of_two_divisor(filters), DIRECT=direct,
        W_CHANNELS_LAST=channels_last, **tiles,
    )  # fmt: skip
    launch(Launch(deform_conv_wgrad_kernel, programs, arguments, problem, config), dy.device)
    if not direct:
        add_ranges(sums, dw, arguments["CG"], g.conv.taps, channels_last)
    return dw


def scale_of(dy: Tensor, mask: Tensor | None, weight: Tensor, g: DeformGeometry) -> Tensor:
    """The power of two that a sum of dx may be multiplied by without leaving 63 bits, () on the device; 0 if there is none.

    Each sample's gradient is at most max|dy| * max over taps and channels of sum |w| over filters * max|mask|, and a pixel
    of the input gets at most one from each tap of each output pixel of its image.
    """
    double = torch.float64
    # Over one group's filters each; no temporary of dy's size.
    sums = weight.abs().to(double).unflatten(0, (g.conv.groups, -1)).sum(1).amax()
    bound = torch.linalg.vector_norm(dy, math.inf).to(double) * sums * (math.prod(g.conv.output) * g.conv.taps)
    if mask is not None:
        bound = bound * torch.linalg.vector_norm(mask, math.inf).to(double)
    exponent = torch.frexp(bound)[1]
    # Powers of two that fp32 has.
    scale = torch.ldexp(torch.ones_like(bound), (SUM_BITS - exponent).clamp(-126, 126))
    return torch.where(bound.isfinite(), scale, torch.zeros_like(scale))


def deform_dgrad(
    dy: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, g: DeformGeometry, wanted: Wanted,
    channels_last: bool, scatter: Scatter,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input, offsets and mask, as far as they are wanted.

    Args:
        dy: gradient of the output, (N, K, P, Q).
        x, offset, mask, weight: as the forward had them; without `wanted.offset` and `wanted.mask` x may be any tensor of
            its size and type.
        channels_last: the format of the input's gradient; those of offsets and mask lie as these do.
        scatter: how it is added up.
    """
    from tritonconv.kernels.deform_conv_dgrad import deform_conv_dgrad_kernel

    dx = empty_output(dy, g.conv.input_shape, channels_last, dy.dtype) if wanted.input else None
    d_offset = _like(offset) if wanted.offset else None
    d_mask = _like(mask) if wanted.mask and mask is not None else None
    if dy.numel() == 0:
        return tuple(t if t is None else t.zero_() for t in (dx, d_offset, d_mask))  # type: ignore[return-value]
    dy, weight = as_format(dy, True), as_format(weight, True)
    if d_offset is not None or d_mask is not None:
        x = readable(x, True)
    problem = problem_of("deform_conv_dgrad", g, x, "dgrad")
    config = config_for(problem)
    tiles = config_constants(config)
    arguments = reading(g, x, offset, mask, tiles["BLOCK_N"])
    filters, whole = g.conv.out_channels // g.conv.groups, g.run == arguments["CD"]
    if not whole:
        # Runs of an offset group one after the other, each in tiles of its own.
        arguments |= dict(GROUPS_K=1, BLOCK_C=tiles["BLOCK_N"], BLOCKS=-(-g.run // tiles["BLOCK_N"]))
    owners = g.offset_groups
    if whole:
        owners = g.conv.groups * -(-arguments["CG"] // g.run // arguments["GROUPS_K"])
    fixed = scatter == "deterministic"
    sums = scale = None
    if dx is not None:
        n, c, h, w = g.conv.input_shape
        low = fixed and dy.dtype == torch.float64
        dtype = torch.int64 if fixed else wide(dy.dtype)
        in_place = not fixed and channels_last and dy.dtype == dtype
        # Zeros, which are zeros of any type.
        sums = dx.zero_() if in_place else torch.zeros((1 + low, n, h, w, c), dtype=dtype, device=dy.device)
        scale = scale_of(dy, mask, weight, g) if fixed else None
        scale = scale if scale is None else scale.to(wide(dy.dtype))
    programs = -(-arguments["M"] // tiles["BLOCK_M"]) * g.conv.taps * owners
    arguments |= dict(
        dy_ptr=dy, w=weight, sums_ptr=sums, scale_ptr=scale,
        SIZE=math.prod(g.conv.input_shape) if sums is not None and sums.shape[0] == 2 and sums.dim() == 5 else None,
        doffset_ptr=d_offset, **_strides("d", d_offset), dmask_ptr=d_mask, **_strides("e", d_mask), OWNERS=owners,
        STEPS=arguments["CD"] // g.run * arguments["BLOCKS"] if not whole else arguments["BLOCKS"],
        VEC_K=power_of_two_divisor(filters), EVEN_K=filters % tiles["BLOCK_K"] == 0, FIXED=fixed, **tiles,
    )  # fmt: skip
    launch(Launch(deform_conv_dgrad_kernel, programs, arguments, problem, config), dy.device)
    if dx is not None and sums is not None and sums is not dx:
        _write(sums, scale, dx, channels_last)
    return dx, d_offset, d_mask


def _like(t: Tensor) -> Tensor:
    return empty_output(t, tuple(t.shape), suggests_channels_last(t), t.dtype)


def _strides(letter: str, t: Tensor | None) -> dict[str, int]:
    return dict(zip((f"stride_{letter}{axis}" for axis in "ncpq"), (0,) * 4 if t is None else t.stride(), strict=True))


def _write(sums: Tensor, scale: Tensor | None, dx: Tensor, channels_last: bool) -> None:
    from tritonconv.kernels.deform_scatter import deform_scatter_kernel

    n, c, h, w = dx.shape
    block_c = power(c, WRITTEN_CHANNELS)
    block_p = WRITTEN_PIXELS * WRITTEN_CHANNELS // block_c
    arguments: dict[str, Any] = dict(
        sums_ptr=sums, scale_ptr=scale, dx_ptr=dx, PIXELS=n * h * w, IMAGE=h * w, C=c, LOW=sums.shape[0] == 2,
        CHANNELS_LAST=channels_last, BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    programs = -(-n * h * w // block_p) * -(-c // block_c)
    launch(Launch(deform_scatter_kernel, programs, arguments, None, None), dx.device)
