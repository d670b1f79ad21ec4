"""Stochastic pooling (M. D. Zeiler and R. Fergus, "Stochastic Pooling for Regularization of Deep CNNs", 2013).

The numbers that elements are drawn by are torch's, one for each result, so that a seed gives the same choice on any
backend; they lie in memory as the result does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import PoolGeometry, needs_int64, power_of_two_divisor
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.launch import Launch, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, readable, suggests_channels_last, wide
from tritonconv.ops.core.operator import Operator, differentiate, gradients_wanted
from tritonconv.ops.pool.operator import gather_taps
from tritonconv.tuning import Device
from tritonconv.tuning.rules.pooling import stochastic_pool_config

__all__ = ["STOCHASTIC_POOL", "on_torch", "stochastic_backward", "stochastic_forward", "stochastic_pool"]

OP = "stochastic_pool2d"
# Places in a window are saved in a byte where one suffices; 255 stands for none, in 32 bits -1.
BYTE = 255


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


def _geometry(
    x_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> PoolGeometry:
    return PoolGeometry.parse(
        tuple(x_shape), tuple(kernel), tuple(stride), tuple(padding), 1, ceil_mode, nd=2, name="stochastic_pool"
    )


def _forward(
    x: Tensor, u: Tensor | None, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    gradients: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Elements drawn by u, (N, C, P, Q) wide, or weighted means where it is None, and what the gradient needs."""
    g = _geometry(x.shape, kernel, stride, padding, ceil_mode)
    if u is not None and (tuple(u.shape) != g.output_shape or u.dtype != wide(x.dtype)):
        raise RuntimeError(
            f"tritonconv::stochastic_pool: expected u of size {list(g.output_shape)} and {wide(x.dtype)}, but got "
            f"{list(u.shape)} and {u.dtype} ({g})"
        )
    return stochastic_forward(x, u, g, gradients)  # type: ignore[return-value]


def _outputs(x: Tensor, u: Tensor | None, *numbers: Any) -> tuple[Tensor, Tensor | None]:
    g, channels_last = _geometry(x.shape, *numbers[:4]), suggests_channels_last(x)
    saved = empty_output(x, g.output_shape, channels_last, _saved_type(x, g, u is None)) if numbers[4] else None
    return empty_output(x, g.output_shape, channels_last, x.dtype), saved


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, *numbers, _ = inputs
    y, saved = output
    ctx.numbers = (tuple(x.shape), *numbers, suggests_channels_last(x))
    # A drawn element passes its gradient on whatever it was.
    ctx.save_for_backward(saved, *((None, None) if u is not None else (x, y)))


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    _, x, _ = ctx.saved_tensors
    if x is not None and torch.is_grad_enabled():
        g = _geometry(*ctx.numbers[:-1])
        return [*differentiate(lambda x: on_torch(x, None, g), (x,), (True,), dy), None]
    return [STOCHASTIC_POOL_BACKWARD(dy, *ctx.saved_tensors, *ctx.numbers), None]


STOCHASTIC_POOL = Operator("stochastic_pool", _forward, _outputs, save=_save, backward=_backward)


def _gradient(
    dy: Tensor, saved: Tensor, x: Tensor | None, y: Tensor | None, sizes: Sequence[int], kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The gradient of an input of these sizes, in that format; x and y in eval mode alone."""
    return stochastic_backward(dy, saved, x, y, _geometry(sizes, kernel, stride, padding, ceil_mode), channels_last)


def _gradient_outputs(dy: Tensor, _saved: Any, _x: Any, _y: Any, sizes: Sequence[int], *numbers: Any) -> Tensor:
    return empty_output(dy, tuple(sizes), numbers[-1], dy.dtype)


def _gradient_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.numbers = inputs[4:-1]
    ctx.save_for_backward(inputs[1])


def _gradient_backward(ctx: Any, ddx: Tensor) -> list[Tensor | None]:
    (saved,) = ctx.saved_tensors
    return [gather_taps(ddx, saved, _geometry(*ctx.numbers), BYTE if saved.dtype == torch.uint8 else -1), None, None, None]


STOCHASTIC_POOL_BACKWARD = Operator(
    "stochastic_pool_backward", _gradient, _gradient_outputs, save=_gradient_save, backward=_gradient_backward
)


class StochasticCall(NamedTuple):
    """A call that parsed."""

    geometry: PoolGeometry


class Stochastic(Family[StochasticCall]):
    """Elements drawn by the second tensor, one number for each result, or weighted means without it.

    A call's numbers are ((kernel_size, stride, padding, ceil_mode),).
    """

    tensors = ("input", "u")

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> StochasticCall | Unsupported:
        x = tensors[0]
        if x.dim() != 4:
            raise RuntimeError(f"{OP}: expected 3D or 4D input, but got input of size {list(x.shape)}")
        kernel, stride, padding, ceil_mode = numbers[0]
        g = PoolGeometry.parse(x.shape, kernel, stride, padding, 1, ceil_mode, nd=2, name="stochastic_pool")
        return Unsupported() if x.numel() == 0 else StochasticCall(g)

    def run(self, tensors: Any, parsed: StochasticCall) -> Tensor:
        (x, u), g = tensors, parsed.geometry
        y: Tensor = STOCHASTIC_POOL(x, u, g.kernel[1:], g.stride[1:], g.padding[1:], g.ceil_mode, gradients_wanted((x,)))[0]
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        kernel, stride, padding, ceil_mode = numbers[0]
        x, u = tensors
        return on_torch(
            x, u, PoolGeometry.parse(x.shape, kernel, stride, padding, 1, ceil_mode, nd=2, name="stochastic_pool")
        )

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: StochasticCall | None) -> str:
        return super().describe(tensors, numbers, None) if parsed is None else str(parsed.geometry)

    def cost(self, tensors: Any, parsed: StochasticCall) -> Cost:
        x = tensors[0]
        return Cost((x.numel() + math.prod(parsed.geometry.output_shape)) * x.element_size())


STOCHASTIC = Stochastic(OP)


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
    if not x.is_floating_point():
        raise RuntimeError(f"{OP}: expected a floating-point input, but got {x.dtype} (input {list(x.shape)})")
    if x.dim() == 3:
        batch = x.unsqueeze(0)
        return stochastic_pool(batch, kernel_size, stride, padding, ceil_mode, training, generator, backend).squeeze(0)
    numbers = (kernel_size, stride, padding, ceil_mode)
    u = None
    if training and x.dim() == 4:
        g = PoolGeometry.parse(x.shape, kernel_size, stride, padding, 1, ceil_mode, nd=2, name="stochastic_pool")
        u = _uniform(x, g, generator)
    y: Tensor = STOCHASTIC((x, u), (numbers,), backend)
    return y


def _uniform(x: Tensor, g: PoolGeometry, generator: torch.Generator | None) -> Tensor:
    n, c, p, q = g.output_shape
    if suggests_channels_last(x):
        return torch.rand((n, p, q, c), generator=generator, dtype=wide(x.dtype), device=x.device).permute(0, 3, 1, 2)
    return torch.rand((n, c, p, q), generator=generator, dtype=wide(x.dtype), device=x.device)
