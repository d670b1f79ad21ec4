"""Pixel and channel shuffles: operators, which are one another's gradients, and who runs a call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonconv.geometry import INT32_MAX
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.layout import empty_output
from tritonconv.ops.core.operator import Operator, is_traced
from tritonconv.ops.shuffle.launch import BITS, ShuffleKind, follows_channels_last, result_shape, shuffle

__all__ = ["OPERATORS", "SHUFFLES", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"]


def _fits(kind: ShuffleKind, shape: Any, factor: int) -> bool:
    if len(shape) < 3 or factor < 1:
        return False
    if kind == "channel_shuffle":
        return bool(shape[1] % factor == 0)
    if kind == "pixel_shuffle":
        return bool(shape[-3] % (factor * factor) == 0)
    return bool(shape[-2] % factor == 0 and shape[-1] % factor == 0)


def _operator(kind: ShuffleKind, back: Callable[[Any, Tensor], Tensor], doc: str) -> Operator:
    """The operator of a kind; `back` gives the gradient from what was saved."""

    def outputs(x: Tensor, factor: int) -> Tensor:
        if not _fits(kind, x.shape, factor) or x.element_size() not in BITS:
            raise RuntimeError(f"tritonconv::{kind}: {factor} does not divide what it must of {list(x.shape)}, {x.dtype}")
        shape = result_shape(kind, tuple(x.shape), factor)
        return empty_output(x, shape, follows_channels_last(kind, x), x.dtype)

    def forward(x: Tensor, factor: int) -> Tensor:
        y = outputs(x, factor)
        return shuffle(kind, x, factor) if x.numel() else y

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        x, ctx.factor = inputs
        ctx.channels = x.shape[1]

    forward.__doc__ = doc
    return Operator(kind, forward, outputs, save=save, backward=lambda ctx, dy: [back(ctx, dy)])


OPERATORS: dict[ShuffleKind, Operator] = {
    "pixel_shuffle": _operator(
        "pixel_shuffle", lambda ctx, dy: OPERATORS["pixel_unshuffle"](dy, ctx.factor),
        "(*, C r^2, H, W) as (*, C, H r, W r), on Triton alone.",
    ),
    "pixel_unshuffle": _operator(
        "pixel_unshuffle", lambda ctx, dy: OPERATORS["pixel_shuffle"](dy, ctx.factor),
        "(*, C, H r, W r) as (*, C r^2, H, W), on Triton alone.",
    ),
    "channel_shuffle": _operator(
        "channel_shuffle", lambda ctx, dy: OPERATORS["channel_shuffle"](dy, ctx.channels // ctx.factor),
        "(N, C, *) with a channel of each group in turn, on Triton alone.",
    ),
}  # fmt: skip


class Shuffle(Family[Any]):
    """torch's function of a kind; a call's numbers are ((factor,),)."""

    dtypes = None

    torch_checks_types = True

    def __init__(self, kind: ShuffleKind) -> None:
        self.kind = kind
        super().__init__(kind)

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> Any:
        x, factor = tensors[0], _number(numbers[0][0])
        # Torch says best what is wrong, and where there is no element there is nothing to move.
        if factor is None or not _fits(self.kind, x.shape, factor):
            return Unsupported()
        return factor if is_traced(tensors) or x.numel() > 0 else Unsupported()

    def why_unsupported(self, tensors: Any, parsed: Any) -> str | None:  # noqa: ARG002
        """Why these numbers cannot be moved as they are; of their type only the size counts."""
        x = tensors[0]
        if x.is_quantized:
            return "a tensor is not plain strided memory"
        if x.element_size() not in BITS:
            return f"{x.dtype} has no kernel"
        if torch.compiler.is_compiling():
            return None
        if x.is_conj() or x.is_neg():
            return "a tensor is a conjugated or negated view (torch.resolve_conj and resolve_neg make it plain)"
        if x.dtype.is_complex and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return "forward-mode derivatives are needed, and have no kernel"
        # Sizes of what is traced may be symbols.
        if not is_traced(tensors) and math.prod(x.shape[1:]) > INT32_MAX:
            return "images of 2^31 elements have no kernel"
        return None

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: Any) -> str:  # noqa: ARG002
        x = tensors[0]
        return f"{self.kind} of {list(x.shape)}, {x.dtype}, by {numbers[0][0]}"

    def run(self, tensors: Any, parsed: Any) -> Tensor:
        y: Tensor = OPERATORS[self.kind](tensors[0], parsed)
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        y: Tensor = getattr(torch.nn.functional, self.kind)(tensors[0], numbers[0][0])
        return y

    def cost(self, tensors: Any, parsed: Any) -> Cost:  # noqa: ARG002
        return Cost(2 * tensors[0].numel() * tensors[0].element_size())

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        return getattr(functional, self.kind), (*tensors, *numbers[0]), {}


SHUFFLES: dict[ShuffleKind, Shuffle] = {kind: Shuffle(kind) for kind in OPERATORS}


def _number(factor: Any) -> Any:
    """An integer as torch takes it; None for others."""
    if isinstance(factor, torch.SymInt):
        return factor
    if isinstance(factor, bool) or not hasattr(factor, "__index__"):
        return None
    return operator.index(factor)


def pixel_shuffle(x: Tensor, factor: Any, backend: Backend | None = None) -> Tensor:
    """torch.nn.functional.pixel_shuffle; `backend` is the layer's own choice."""
    y: Tensor = SHUFFLES["pixel_shuffle"]((x,), ((factor,),), backend)
    return y


def pixel_unshuffle(x: Tensor, factor: Any, backend: Backend | None = None) -> Tensor:
    """torch.nn.functional.pixel_unshuffle; `backend` is the layer's own choice."""
    y: Tensor = SHUFFLES["pixel_unshuffle"]((x,), ((factor,),), backend)
    return y


def channel_shuffle(x: Tensor, groups: Any, backend: Backend | None = None) -> Tensor:
    """torch.nn.functional.channel_shuffle; `backend` is the layer's own choice."""
    y: Tensor = SHUFFLES["channel_shuffle"]((x,), ((groups,),), backend)
    return y
