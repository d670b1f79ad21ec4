"""Shuffles for callers: who runs them, and the operators that compilers and autograd see.

Calls that need no gradient and that no one traces go past the operators, straight to the launches (ops/shuffle/launch.py).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonconv.geometry import INT32_MAX
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.backend import Backend, OnTorch, decide, needs_gradients, unusual
from tritonconv.ops.core.layout import empty_output
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.ops.shuffle.launch import BITS, Kind, follows_channels_last, needs_copy, result_shape, shuffle

__all__ = ["channel_shuffle", "pixel_shuffle", "pixel_unshuffle"]

KNOWN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pixel_shuffle(x: Tensor, factor: Any, backend: Backend | None = None) -> Tensor:
    """torch.nn.functional.pixel_shuffle; `backend` is the layer's own choice."""
    return _shuffled("pixel_shuffle", x, factor, backend)


def pixel_unshuffle(x: Tensor, factor: Any, backend: Backend | None = None) -> Tensor:
    """torch.nn.functional.pixel_unshuffle; `backend` is the layer's own choice."""
    return _shuffled("pixel_unshuffle", x, factor, backend)


def channel_shuffle(x: Tensor, groups: Any, backend: Backend | None = None) -> Tensor:
    """torch.nn.functional.channel_shuffle; `backend` is the layer's own choice."""
    return _shuffled("channel_shuffle", x, groups, backend)


def _shuffled(kind: Kind, x: Tensor, factor: Any, backend: Backend | None) -> Tensor:
    number = _number(factor)
    compiling = torch.compiler.is_compiling()
    # Torch says best what is wrong, and where there is no element there is nothing to move.
    if number is None or not isinstance(x, Tensor) or not _fits(kind, x.shape, number):
        return _on_torch(kind, x, factor)
    if not compiling and x.numel() == 0:
        return _on_torch(kind, x, factor)
    refused = _decide(kind, x, number, backend)
    observed = notify(lambda: _as_call(kind, x, refused and refused.reason))
    if refused is not None or observed:
        return _on_torch(kind, x, factor)
    if is_traced((x,)) or needs_gradients((x,)):
        y: Tensor = getattr(torch.ops.tritonconv, kind)(x, number)
        return y
    return shuffle(kind, x, number)


def _number(factor: Any) -> Any:
    """An integer as torch takes it; None for others."""
    if isinstance(factor, torch.SymInt):
        return factor
    if isinstance(factor, bool) or not hasattr(factor, "__index__"):
        return None
    return operator.index(factor)


def _fits(kind: Kind, shape: Any, factor: int) -> bool:
    if len(shape) < 3 or factor < 1:
        return False
    if kind == "channel_shuffle":
        return bool(shape[1] % factor == 0)
    if kind == "pixel_shuffle":
        return bool(shape[-3] % (factor * factor) == 0)
    return bool(shape[-2] % factor == 0 and shape[-1] % factor == 0)


def _decide(kind: Kind, x: Tensor, factor: int, backend: Backend | None) -> OnTorch | None:
    """As `decide`, for types of which only the size counts."""

    def describe() -> str:
        return f"{kind} of {list(x.shape)}, {x.dtype}, by {factor}"

    missing = _missing(x)
    if x.dtype in KNOWN:
        return decide((x,), backend, describe, missing)
    # Elsewhere `decide` sees an image of a type that has kernels.
    return decide((torch.empty(0, device=x.device),), backend, describe, missing or unusual((x,)))


def _missing(x: Tensor) -> str | None:
    """Why these numbers cannot be moved as they are; None where they can."""
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        return "a tensor is not plain strided memory"
    if x.element_size() not in BITS:
        return f"{x.dtype} has no kernel"
    if torch.compiler.is_compiling():
        return None
    if x.is_conj() or x.is_neg():
        return "a tensor is a conjugated or negated view (torch.resolve_conj and resolve_neg make it plain)"
    if x.dtype.is_complex and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return "forward-mode derivatives are needed, and have no kernel"
    if math.prod(x.shape[1:]) > INT32_MAX:
        return "images of 2^31 elements have no kernel"
    return None


def _on_torch(kind: Kind, x: Tensor, factor: Any) -> Tensor:
    y: Tensor = getattr(torch.nn.functional, kind)(x, factor)
    return y


def _as_call(kind: Kind, x: Tensor, refused: str | None) -> Call:
    decision = Decision("triton", "shuffle", int(needs_copy(kind, x))) if refused is None else Decision("torch", refused)
    return Call(kind, decision, None, 0, 2 * x.numel() * x.element_size(), x.dtype, x.device, None, "")


def _check(kind: Kind, x: Tensor, factor: int) -> None:
    """Raise RuntimeError for what the kernel cannot be given."""
    if not _fits(kind, x.shape, factor) or x.element_size() not in BITS:
        raise RuntimeError(f"tritonconv::{kind}: {factor} does not divide what it must of {list(x.shape)}, {x.dtype}")


def _like(kind: Kind, x: Tensor, factor: int) -> Tensor:
    _check(kind, x, factor)
    shape = result_shape(kind, tuple(x.shape), factor)
    return empty_output(x, shape, follows_channels_last(kind, x), x.dtype)


def _run(kind: Kind, x: Tensor, factor: int) -> Tensor:
    _check(kind, x, factor)
    return shuffle(kind, x, factor) if x.numel() else _like(kind, x, factor)


@torch.library.custom_op("tritonconv::pixel_shuffle", mutates_args=())
def pixel_shuffle_operator(x: Tensor, factor: int) -> Tensor:
    """(*, C r^2, H, W) as (*, C, H r, W r), on Triton alone."""
    return _run("pixel_shuffle", x, factor)


@torch.library.custom_op("tritonconv::pixel_unshuffle", mutates_args=())
def pixel_unshuffle_operator(x: Tensor, factor: int) -> Tensor:
    """(*, C, H r, W r) as (*, C r^2, H, W), on Triton alone."""
    return _run("pixel_unshuffle", x, factor)


@torch.library.custom_op("tritonconv::channel_shuffle", mutates_args=())
def channel_shuffle_operator(x: Tensor, groups: int) -> Tensor:
    """(N, C, *) with a channel of each group in turn, on Triton alone."""
    return _run("channel_shuffle", x, groups)


@pixel_shuffle_operator.register_fake
def _(x: Tensor, factor: int) -> Tensor:
    return _like("pixel_shuffle", x, factor)


@pixel_unshuffle_operator.register_fake
def _(x: Tensor, factor: int) -> Tensor:
    return _like("pixel_unshuffle", x, factor)


@channel_shuffle_operator.register_fake
def _(x: Tensor, groups: int) -> Tensor:
    return _like("channel_shuffle", x, groups)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, ctx.factor = inputs
    ctx.channels = x.shape[1]


def _backward_shuffle(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.tritonconv.pixel_unshuffle(dy, ctx.factor), None


def _backward_unshuffle(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.tritonconv.pixel_shuffle(dy, ctx.factor), None


def _backward_channels(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.tritonconv.channel_shuffle(dy, ctx.channels // ctx.factor), None


pixel_shuffle_operator.register_autograd(_backward_shuffle, setup_context=_save)
pixel_unshuffle_operator.register_autograd(_backward_unshuffle, setup_context=_save)
channel_shuffle_operator.register_autograd(_backward_channels, setup_context=_save)
