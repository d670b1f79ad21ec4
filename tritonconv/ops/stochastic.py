"""Stochastic pooling (M. D. Zeiler and R. Fergus, "Stochastic Pooling for Regularization of Deep CNNs", 2013).

The numbers that elements are drawn by are torch's, one for each result, so that a seed gives the same choice on any
backend; they lie in memory as the result does. Operators are registered here, and calls without gradients go past them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import PoolGeometry, needs_int64, power_of_two_divisor
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.backend import Backend, OnTorch, decide, needs_gradients
from tritonconv.ops.core.launch import Launch, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, readable, reads_in_place, suggests_channels_last, wide
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.tuning import Device
from tritonconv.tuning.rules.pooling import stochastic_pool_config

__all__ = ["on_torch", "stochastic_backward", "stochastic_forward", "stochastic_pool"]

OP = "stochastic_pool2d"
# Places in a window are saved in a byte where one suffices; 255 stands for none.
BYTE = 255


def stochastic_pool(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, training: bool,
    generator: torch.Generator | None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Drawn elements in training, else weighted means, on the backend that is chosen for it.

    Args:
        x: (N, C, H, W) or (C, H, W).
        backend: the layer's own choice.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}(): argument 'input' must be Tensor, not {type(x).__name__}")
    if x.dim() not in (3, 4):
        raise RuntimeError(f"{OP}: expected 3D or 4D input, but got input of size {list(x.shape)}")
    if not x.is_floating_point():
        raise RuntimeError(f"{OP}: expected a floating-point input, but got {x.dtype} (input {list(x.shape)})")
    if x.dim() == 3:
        batch = x.unsqueeze(0)
        return stochastic_pool(batch, kernel_size, stride, padding, ceil_mode, training, generator, backend).squeeze(0)
    g = PoolGeometry.parse(x.shape, kernel_size, stride, padding, 1, ceil_mode, nd=2, name="stochastic_pool")
    u = _uniform(x, g, generator) if training else None
    if x.numel() == 0:
        return on_torch(x, u, g)
    refused = decide((x,), backend, lambda: str(g))
    observed = notify(lambda: _as_call(x, g, refused))
    if observed or refused is not None:
        return on_torch(x, u, g)
    if is_traced((x,)) or needs_gradients((x,)):
        y: Tensor = torch.ops.tritonconv.stochastic_pool(x, u, g.kernel[1:], g.stride[1:], g.padding[1:], g.ceil_mode)[0]
        return y
    return stochastic_forward(x, u, g, False)[0]


def _uniform(x: Tensor, g: PoolGeometry, generator: torch.Generator | None) -> Tensor:
    n, c, p, q = g.output_shape
    if suggests_channels_last(x):
        return torch.rand((n, p, q, c), generator=generator, dtype=wide(x.dtype), device=x.device).permute(0, 3, 1, 2)
    return torch.rand((n, c, p, q), generator=generator, dtype=wide(x.dtype), device=x.device)


def _as_call(x: Tensor, g: PoolGeometry, refused: OnTorch | None) -> Call:
    size = (x.numel() + math.prod(g.output_shape)) * x.element_size()
    copies = int(not reads_in_place(x, suggests_channels_last(x)))
    decision = Decision("torch", refused.reason) if refused else Decision("triton", "stochastic", copies)
    return Call(OP, decision, None, 0, size, x.dtype, x.device, None, "")


def on_torch(x: Tensor, u: Tensor | None, g: PoolGeometry) -> Tensor:
    """The definition, with sums in the kernel's order: the same element for the same number."""
    (_, p, q), (_, sh, sw), (_, r, s), (_, ph, pw) = g.output, g.stride, g.kernel, g.padding
    behind = [(n - 1) * step + k - size - pad for n, step, k, size, pad in (
        (p, sh, r, g.input[1], ph), (q, sw, s, g.input[2], pw))]  # fmt: skip
    # Where the last windows end before the image does, it is cut.
    padded = torch.nn.functional.pad(x.to(wide(x.dtype)), (pw, behind[1], ph, behind[0]))
    windows = [
        padded[..., i : i + (p - 1) * sh + 1 : sh, j : j + (q - 1) * sw + 1 : sw] for i in range(r) for j in range(s)
    ]
    weights = [torch.where(t <= 0, 0, t) for t in windows]
    total = functools.reduce(torch.add, weights)
    if u is None:
        squares = functools.reduce(torch.add, (t * t for t in weights))
        nothing = total == 0
        return torch.where(nothing, 0, squares / torch.where(nothing, 1, total)).to(x.dtype)
    share, running = u * total, torch.zeros_like(total)
    drawn = torch.zeros_like(total, dtype=torch.int64)
    for tap, weight in enumerate(weights):
        drawn = torch.where((running <= share) & (weight > 0), tap, drawn)
        running = running + weight
    y = torch.stack(windows).gather(0, drawn.unsqueeze(0)).squeeze(0)
    y = torch.where((total > 0) & total.isfinite(), y, torch.where(total == 0, 0, math.nan))
    return y.to(x.dtype)


def stochastic_forward(x: Tensor, u: Tensor | None, g: PoolGeometry, save: bool) -> tuple[Tensor, Tensor | None]:
    """Results and, with `save`, what the gradient needs: drawn places, or sums of weights."""
    from tritonconv.kernels.stochastic_pool import stochastic_kernel

    channels_last, device = suggests_channels_last(x), device_of(x.device)
    x = readable(x, channels_last)
    y = empty_output(x, g.output_shape, channels_last, x.dtype)
    saved = empty_output(x, g.output_shape, channels_last, _saved_type(x, g, u is None)) if save else None
    u = None if u is None else as_format(u, channels_last)
    (n, c, h, w), (_, p, q) = x.stride(), g.output
    config = _config(g.channels, q, channels_last, device)
    tiles = config.kwargs
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    arguments = dict(
        x_ptr=x, stride_n=n, stride_c=c, stride_h=h, stride_w=w, u_ptr=u, y_ptr=y, tap_ptr=saved, C=g.channels,
        H=g.input[1], W=g.input[2], P=p, Q=q, **_constants(g), CHANNELS_LAST=channels_last,
        VEC=power_of_two_divisor(g.channels, n, h, w) if channels_last else power_of_two_divisor(n, c, h),
        VEC_Q=power_of_two_divisor(g.channels if channels_last else q), INDEX_64=needs_int64(max(extent, y.numel())),
        **tiles,
    )  # fmt: skip
    programs = g.batch * p * math.ceil(q / tiles["BLOCK_P"]) * math.ceil(g.channels / tiles["BLOCK_C"])
    launch(Launch(stochastic_kernel, programs, arguments, None, config), x.device)
    return y, saved


def stochastic_backward(
    dy: Tensor, saved: Tensor, x: Tensor | None, y: Tensor | None, g: PoolGeometry, channels_last: bool
) -> Tensor:
    """The input's gradient, dense in that format.

    Args:
        saved: by `stochastic_forward`.
        x, y: of `stochastic_forward` in eval mode, else None.
    """
    from tritonconv.kernels.stochastic_pool import stochastic_backward_kernel

    dx = empty_output(dy, g.input_shape, channels_last, dy.dtype)
    dy, saved = as_format(dy, channels_last), as_format(saved, channels_last)
    x, y = (None if t is None else as_format(t, channels_last) for t in (x, y))
    (_, h, w), (_, p, q) = g.input, g.output
    config = _config(g.channels, w, channels_last, device_of(dy.device))
    tiles = config.kwargs
    arguments = dict(
        dy_ptr=dy, tap_ptr=saved, x_ptr=x, y_ptr=y, dx_ptr=dx, C=g.channels, H=h, W=w, P=p, Q=q, **_constants(g),
        COVER_H=math.ceil(g.kernel[1] / g.stride[1]), COVER_W=math.ceil(g.kernel[2] / g.stride[2]),
        CHANNELS_LAST=channels_last, VEC=power_of_two_divisor(g.channels if channels_last else w),
        INDEX_64=needs_int64(max(dx.numel(), dy.numel())), **tiles,
    )  # fmt: skip
    programs = g.batch * h * math.ceil(w / tiles["BLOCK_P"]) * math.ceil(g.channels / tiles["BLOCK_C"])
    launch(Launch(stochastic_backward_kernel, programs, arguments, None, config), dy.device)
    return dx


def _saved_type(x: Tensor, g: PoolGeometry, mean: bool) -> torch.dtype:
    if mean:
        return wide(x.dtype)
    return torch.uint8 if g.taps <= BYTE else torch.int32


def _constants(g: PoolGeometry) -> dict[str, int]:
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")
    return dict(zip(names, g.kernel[1:] + g.stride[1:] + g.padding[1:], strict=True))


def _config(channels: int, pixels: int, channels_last: bool, device: Device) -> Any:
    """The forced config, or the chosen one."""
    return forced_config("BLOCK_P") or stochastic_pool_config(channels, pixels, channels_last, device)


def _parsed(
    x_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> PoolGeometry:
    return PoolGeometry.parse(
        tuple(x_shape), tuple(kernel), tuple(stride), tuple(padding), 1, ceil_mode, nd=2, name="stochastic_pool"
    )


@torch.library.custom_op("tritonconv::stochastic_pool", mutates_args=())
def pool(
    x: Tensor, u: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Elements drawn by u, (N, C, P, Q) wide, or weighted means where it is None, and what the gradient needs."""
    g = _parsed(x.shape, kernel, stride, padding, ceil_mode)
    if u is not None and (tuple(u.shape) != g.output_shape or u.dtype != wide(x.dtype)):
        raise RuntimeError(
            f"tritonconv::stochastic_pool: expected u of size {list(g.output_shape)} and {wide(x.dtype)}, but got "
            f"{list(u.shape)} and {u.dtype} ({g})"
        )
    y, saved = stochastic_forward(x, u, g, True)
    assert saved is not None
    return y, saved


@pool.register_fake
def _(
    x: Tensor, u: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    g, channels_last = _parsed(x.shape, kernel, stride, padding, ceil_mode), suggests_channels_last(x)
    saved = _saved_type(x, g, u is None)
    return empty_output(x, g.output_shape, channels_last, x.dtype), empty_output(x, g.output_shape, channels_last, saved)


@torch.library.custom_op("tritonconv::stochastic_pool_backward", mutates_args=())
def pool_backward(
    dy: Tensor, saved: Tensor, x: Tensor | None, y: Tensor | None, sizes: Sequence[int], kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The gradient of an input of these sizes, in that format; x and y in eval mode alone."""
    return stochastic_backward(dy, saved, x, y, _parsed(sizes, kernel, stride, padding, ceil_mode), channels_last)


@pool_backward.register_fake
def _(
    dy: Tensor, saved: Tensor, x: Tensor | None, y: Tensor | None, sizes: Sequence[int], kernel: Sequence[int],  # noqa: ARG001
    stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, channels_last: bool,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return empty_output(dy, tuple(sizes), channels_last, dy.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, *numbers = inputs
    y, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.numbers = (tuple(x.shape), *numbers, suggests_channels_last(x))
    # A drawn element passes its gradient on whatever it was.
    ctx.save_for_backward(saved, *((None, None) if u is not None else (x, y)))


def _gradient(ctx: Any, dy: Tensor, _saved: Tensor | None) -> tuple[Tensor | None, ...]:
    return torch.ops.tritonconv.stochastic_pool_backward(dy, *ctx.saved_tensors, *ctx.numbers), *(None,) * 5


pool.register_autograd(_gradient, setup_context=_save)
