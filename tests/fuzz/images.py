"""Draws of poolings, of resampling and of shuffles."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonconv.functional as TF
from tritonconv.ops.adaptive.operator import global_average

from .call import Call
from .draw import Draw
from .views import Input

__all__ = ["OPERATORS"]

F = torch.nn.functional
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def windows(d: Draw, nd: int, dilated: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(spatial sizes, arguments) of a pooling whose windows fit."""
    # The interpreter's time goes by taps.
    kernel = d.each(nd, (1, 2, 2, 3) if nd == 3 else (1, 2, 3, 3, 4, 5))
    stride = d.each(nd, (1, 2, 2, 3, 5))
    dilation = d.each(nd, (1, 1, 1, 2, 3) if nd < 3 else (1, 1, 2)) if dilated else (1,) * nd
    padding = tuple(d.one(range(k // 2 + 1)) for k in kernel)
    spread = [(k - 1) * s + 1 for k, s in zip(kernel, dilation, strict=True)]
    most = {1: 12, 2: 5, 3: 2}[nd]
    spatial = tuple(max(1, w - 2 * p) + d.one(range(most)) for w, p in zip(spread, padding, strict=True))
    arguments: dict[str, Any] = dict(kernel_size=d.spelled(kernel), ceil_mode=d.chance(0.4))
    if d.chance(0.8):
        arguments |= dict(stride=d.spelled(stride))
    if d.chance(0.7):
        arguments |= dict(padding=d.spelled(padding))
    elif any(n < w for n, w in zip(spatial, spread, strict=True)):
        spatial = tuple(max(n, w) for n, w in zip(spatial, spread, strict=True))
    if dilated:
        arguments |= dict(dilation=d.spelled(dilation))
    return spatial, arguments


def in_padding_alone(nd: int, spatial: tuple[int, ...], arguments: dict[str, Any]) -> bool:
    """Whether a window sees no element: torch's CPU code sends its gradient to a place that may lie in no image."""
    ones = torch.ones(1, 1, *spatial)
    return bool(torch.isinf(getattr(F, f"max_pool{nd}d")(ones, **arguments)).any())


def maximum(d: Draw, nd: int, indices: bool) -> Call:
    spatial, arguments = windows(d, nd, dilated=True)
    name = f"max_pool{nd}d" + ("_with_indices" if indices else "")
    empty = in_padding_alone(nd, spatial, arguments)
    values = d.one(("normal", "integers"))
    inputs = dict(input=d.image(d.channels(), spatial, values=values, differentiable=not empty))
    return Call(getattr(TF, name), getattr(F, name), inputs, arguments, nd)


def negated(nd: int, input: Tensor, return_indices: bool, **numbers: Any) -> Any:
    found = getattr(F, f"max_pool{nd}d")(-input, return_indices=return_indices, **numbers)
    return (-found[0], found[1]) if return_indices else -found


def minimum(d: Draw, nd: int) -> Call:
    spatial, arguments = windows(d, nd, dilated=True)
    empty = in_padding_alone(nd, spatial, arguments)
    inputs = dict(input=d.image(d.channels(), spatial, differentiable=not empty))
    arguments |= dict(return_indices=d.chance(0.3))
    # Not exact: the negative of a view lies otherwise than the view.
    return Call(getattr(TF, f"min_pool{nd}d"), partial(negated, nd), inputs, arguments, nd, exact=False)


def average(d: Draw, nd: int) -> Call:
    spatial, arguments = windows(d, nd, dilated=False)
    if d.chance(0.5):
        arguments |= dict(count_include_pad=d.chance(0.5))
    if nd > 1 and d.chance(0.3):
        arguments |= dict(divisor_override=d.one((1, 3, -2)))
    name = f"avg_pool{nd}d"
    return Call(getattr(TF, name), getattr(F, name), dict(input=d.image(d.channels(), spatial)), arguments, nd)


def summed(
    nd: int, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False
) -> Tensor:
    if nd > 1:
        return getattr(F, f"avg_pool{nd}d")(input, kernel_size, stride, padding, ceil_mode, divisor_override=1)

    def row(value: Any, unit: int) -> Any:
        return None if value is None else (unit, *(value if isinstance(value, (tuple, list)) else (value,)))

    numbers = (row(kernel_size, 1), row(stride, 1), row(padding, 0))
    return F.avg_pool2d(input.unsqueeze(-2), *numbers, ceil_mode, divisor_override=1).squeeze(-2)


def total(d: Draw, nd: int) -> Call:
    spatial, arguments = windows(d, nd, dilated=False)
    inputs = dict(input=d.image(d.channels(), spatial))
    return Call(getattr(TF, f"sum_pool{nd}d"), partial(summed, nd), inputs, arguments, nd, exact=nd > 1)


def powers(d: Draw, nd: int) -> Call:
    spatial, arguments = windows(d, nd, dilated=False)
    kernel = arguments["kernel_size"]
    # torch takes a number for it in one dimension, and numbers or a tuple elsewhere.
    arguments["kernel_size"] = kernel if isinstance(kernel, int) or nd > 1 else kernel[0]
    if isinstance(arguments["kernel_size"], list):
        arguments["kernel_size"] = tuple(kernel)
    arguments.pop("padding", None)
    sizes = arguments["kernel_size"] if isinstance(arguments["kernel_size"], tuple) else (arguments["kernel_size"],) * nd
    spatial = tuple(max(n, k) for n, k in zip(spatial, sizes, strict=True))
    # Of positive numbers: elsewhere a sum near zero has any root.
    inputs = dict(input=d.image(d.channels(), spatial, values="positive"))
    arguments |= dict(norm_type=d.one((1, 2, 2.0, 3, 1.5, math.inf, 4)))
    name = f"lp_pool{nd}d"
    return Call(getattr(TF, name), getattr(F, name), inputs, arguments, nd, slack=4.0)


def adaptive(d: Draw, kind: str, nd: int, indices: bool) -> Call:
    spatial = d.spatial(nd)
    # The interpreter's time goes by bins.
    output = tuple(d.one((1, 1, 2, n) if nd == 3 else (1, 1, 2, 3, n, n + 2)) for n in spatial)
    size: Any = d.spelled(output)
    if nd > 1 and d.chance(0.2):
        size = tuple(None if d.chance(0.5) else n for n in output)
    name = f"adaptive_{kind}_pool{nd}d" + ("_with_indices" if indices else "")
    inputs = dict(input=d.image(d.channels(), spatial))
    return Call(getattr(TF, name), getattr(F, name), inputs, dict(output_size=size), nd)


def whole_average(d: Draw) -> Call:
    nd = d.one((1, 2, 2, 3))
    x = d.image(d.channels(), d.spatial(nd), batches=False)
    return Call(global_average, _mean, dict(x=x), dict(keepdim=d.chance(0.5)), exact=False, slack=8.0)


def _mean(x: Tensor, keepdim: bool) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim)


def unpooling(d: Draw, nd: int) -> Call:
    kernel = d.each(nd, (2, 3))
    small = tuple(d.r.randint(1, 3 if nd == 3 else 5) for _ in kernel)
    large = tuple(n * k + d.one(range(k)) for n, k in zip(small, kernel, strict=True))
    c, unbatched = d.channels(), d.chance(0.1)
    torch.manual_seed(d.r.getrandbits(32))
    source = torch.rand(d.one((1, 2)), c, *large)
    source = source[0] if unbatched else source
    _, places = getattr(F, f"max_pool{nd}d_with_indices")(source, kernel)
    inputs = dict(input=d.input(places.shape), indices=d.input(places.shape, values=places))
    arguments = dict(kernel_size=kernel, output_size=large if d.chance(0.5) else [*source.shape[:-nd], *large])
    name = f"max_unpool{nd}d"
    return Call(getattr(TF, name), getattr(F, name), inputs, arguments, nd)


def resampled(d: Draw) -> Call:
    nd = d.one((1, 2, 2, 2, 3))
    spatial = d.spatial(nd, 7)
    mode = d.one(
        ("nearest", "nearest", "nearest-exact", LINEAR[nd], LINEAR[nd], "area", *(("bicubic",) if nd == 2 else ()))
    )
    arguments: dict[str, Any] = dict(mode=mode)
    if mode in ("bicubic", LINEAR[nd]):
        arguments |= dict(align_corners=d.one((None, False, True)))
    if d.chance(0.5):
        arguments |= dict(size=d.spelled(tuple(d.one((1, n, 2 * n, 3 * n + 1, max(1, n // 2))) for n in spatial)))
    else:
        factors = tuple(d.one((2, 2.0, 1.5, 3, 0.5, 0.7, 2.05, 1)) for _ in spatial)
        factors = tuple(f if int(n * f) > 0 else 2 for n, f in zip(spatial, factors, strict=True))
        arguments |= dict(scale_factor=d.spelled(factors), recompute_scale_factor=d.one((None, True, False)))
    kernel = mode != "bicubic"
    if not kernel:
        d.dtype = torch.float32 if d.half else d.dtype
    inputs = dict(input=d.image(d.channels(), spatial, batches=False))
    return Call(TF.interpolate, resampled_reference, inputs, arguments, nd, kernel=kernel)


def resampled_reference(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None,
    recompute_scale_factor: Any = None,
) -> Tensor:  # fmt: skip
    y = F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor)
    if mode not in ("nearest", "nearest-exact") or input.device.type != "cpu" or type(input) is not Tensor:
        return y
    # As torch's CUDA kernels find it, also where its CPU kernels have a shortcut for twice the size.
    nd = input.dim() - 2
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * nd
    out = input
    for axis, factor in enumerate(factors, 2):
        n, m = input.shape[axis], y.shape[axis]
        scale = torch.tensor(n / m if factor is None or recompute_scale_factor else 1 / factor, dtype=torch.float32)
        places = torch.arange(m, dtype=torch.float32) + (0.5 if mode == "nearest-exact" else 0.0)
        out = out.index_select(axis, (places * scale).floor().long().clamp(max=n - 1))
    return torch.empty_like(y).copy_(out)


def shuffled(d: Draw, kind: str) -> Call:
    factor = d.one((1, 2, 2, 3, 4))
    c, (h, w) = d.one((1, 2, 3, 5)), d.spatial(2, 5)
    if kind == "channel_shuffle":
        shape = (d.one((1, 2, 3)), c * factor, *d.spatial(d.one((1, 2, 2, 3)), 5))
    elif kind == "pixel_shuffle":
        shape = (c * factor * factor, h, w)
    else:
        shape = (c, h * factor, w * factor)
    if kind != "channel_shuffle":
        shape = (*d.each(d.one((0, 1, 1, 1, 2)), (1, 2, 3)), *shape)
    arguments = {dict(channel_shuffle="groups", pixel_shuffle="upscale_factor").get(kind, "downscale_factor"): factor}
    return Call(
        getattr(TF, kind),
        getattr(F, kind),
        dict(input=d.input(shape)),
        arguments,
        nd=len(shape) - 2 if kind == "channel_shuffle" else 2,
    )


def stochastic(d: Draw) -> Call:
    spatial, arguments = windows(d, 2, dilated=False)
    x = d.image(d.channels(), spatial, batches=False, values="integers")
    arguments |= dict(training=d.chance(0.6))
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    return Call(TF.stochastic_pool2d, partial(stochastic_reference, x, wide), dict(input=x), arguments, exact=False)


def stochastic_reference(
    given: Input, wide: torch.dtype, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, training: bool = True,
) -> Tensor:  # fmt: skip
    """Zeiler and Fergus' definition; the numbers are drawn as torch's pooling would lay its result."""
    like = F.max_pool2d(given.copied(torch.float32), kernel_size, stride, padding, 1, ceil_mode)
    n, c, p, q = like.shape
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    u = torch.rand((n, p, q, c), dtype=wide).permute(0, 3, 1, 2) if last else torch.rand((n, c, p, q), dtype=wide)
    (r, s), (sh, sw), (ph, pw) = map(_pair, (kernel_size, kernel_size if stride is None else stride, padding))
    # Zeros for the padding and for what overhangs it; where the last window ends before the image does, it is cut.
    behind = ((p - 1) * sh + r - input.shape[2] - ph, (q - 1) * sw + s - input.shape[3] - pw)
    x = F.pad(input, (pw, behind[1], ph, behind[0])).unfold(2, r, sh).unfold(3, s, sw).flatten(4)
    weight = x.relu()
    whole = weight.sum(-1)
    none = whole == 0
    if not training:
        return torch.where(none, 0, weight.square().sum(-1) / torch.where(none, 1, whole))
    drawn = (weight.cumsum(-1) > (u.double() * whole).unsqueeze(-1)).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(none, 0, x.gather(-1, drawn).squeeze(-1))


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)  # type: ignore[return-value]


OPERATORS = {
    **{f"max_pool{nd}d": partial(maximum, nd=nd, indices=False) for nd in (1, 2, 3)},
    **{f"max_pool{nd}d_with_indices": partial(maximum, nd=nd, indices=True) for nd in (1, 2, 3)},
    **{f"min_pool{nd}d": partial(minimum, nd=nd) for nd in (1, 2, 3)},
    **{f"avg_pool{nd}d": partial(average, nd=nd) for nd in (1, 2, 3)},
    **{f"sum_pool{nd}d": partial(total, nd=nd) for nd in (1, 2, 3)},
    **{f"lp_pool{nd}d": partial(powers, nd=nd) for nd in (1, 2, 3)},
    **{f"adaptive_avg_pool{nd}d": partial(adaptive, kind="avg", nd=nd, indices=False) for nd in (1, 2, 3)},
    **{f"adaptive_max_pool{nd}d": partial(adaptive, kind="max", nd=nd, indices=False) for nd in (1, 2, 3)},
    **{f"adaptive_max_pool{nd}d_with_indices": partial(adaptive, kind="max", nd=nd, indices=True) for nd in (1, 2, 3)},
    **{f"max_unpool{nd}d": partial(unpooling, nd=nd) for nd in (1, 2, 3)},
    **{kind: partial(shuffled, kind=kind) for kind in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")},
    "global_average": whole_average, "interpolate": resampled, "stochastic_pool2d": stochastic,
}  # fmt: skip
