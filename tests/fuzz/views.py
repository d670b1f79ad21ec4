"""Tensors in memory of their own: dense in both formats, and views of every kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

__all__ = ["DTYPES", "LAYOUTS", "Input", "channels_last_order"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
LAYOUTS = (
    "contiguous", "channels_last", "step", "channels_last step", "slice", "channels_last slice", "expand", "permute",
    "odd ones",
)  # fmt: skip
VALUES = ("normal", "integers", "positive", "sixteenths")


def channels_last_order(rank: int) -> list[int]:
    """Axes from the outermost to the innermost."""
    return [0, *range(2, rank), 1] if rank > 2 else list(range(rank))


@dataclass
class Input:
    """A tensor argument: how it is drawn and, once `make` was called, the view and the memory that it looks at."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype | None = None
    """None: that of the call."""
    values: str | Tensor = "normal"
    differentiable: bool = True
    written: bool = False
    """Whether the call writes it in place."""
    axes: tuple[int, ...] | None = None
    """Where the layout is more than dense; None: at random."""
    memory: Tensor = field(init=False)
    view: Tensor = field(init=False)

    def make(self, r: Random, dtype: torch.dtype) -> None:
        """Fill memory with NaN (of floating types), and the view with values."""
        values = self.values if isinstance(self.values, Tensor) else _draw(self.values, self.shape)
        values = values.to(self.dtype or dtype)
        size, stride, offset, total = self._place(r)
        outside = math.nan if values.is_floating_point() else 77
        self.memory = torch.full((total,), outside, dtype=values.dtype)
        self.view = self.memory.as_strided(size, stride, offset)
        if values.numel():
            self.memory.as_strided(*self._once(size, stride), offset).copy_(values[tuple(
                slice(0, 1) if s == 0 else slice(None) for s in stride)])  # fmt: skip

    def dense(self) -> Tensor:
        """The same values in contiguous memory, in fp64 where they are floating."""
        return self.view.detach().clone(memory_format=torch.contiguous_format).to(self._type(torch.float64))

    def copied(self, dtype: torch.dtype) -> Tensor:
        """A view of the same strides of a copy of the memory, in this type where it is a floating one."""
        memory = self.memory.to(self._type(dtype), copy=True)
        return memory.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.view.is_floating_point() else self.view.dtype

    def _place(self, r: Random) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
        """(size, strides, offset, elements of memory)."""
        rank = len(self.shape)
        order = channels_last_order(rank) if self.layout.startswith("channels_last") else list(range(rank))
        steps, before, behind = [1] * rank, [0] * rank, [0] * rank
        expanded: set[int] = set()
        kind = self.layout.removeprefix("channels_last").strip()
        chosen = list(self.axes) if self.axes is not None else r.sample(range(rank), r.randint(1, rank)) if rank else []
        if kind == "permute":
            r.shuffle(order)
        elif kind == "step":
            for axis in chosen:
                steps[axis] = r.choice((2, 2, 3))
        elif kind == "slice":
            for axis in chosen:
                before[axis], behind[axis] = r.choice(((1, 0), (0, 1), (1, 2), (3, 1)))
        elif kind == "odd ones":
            for axis in (a for a in range(rank) if self.shape[a] == 1):
                before[axis], behind[axis] = r.choice(((0, 1), (1, 1), (2, 3)))
        elif kind == "expand" and not self.written:
            expanded = set(chosen)
        strides, total = [0] * rank, 1
        for axis in reversed(order):
            strides[axis] = 0 if axis in expanded else total * steps[axis]
            total *= 1 if axis in expanded else before[axis] + max(self.shape[axis], 1) * steps[axis] + behind[axis]
        offset = sum(b * (s // step) for b, s, step in zip(before, strides, steps, strict=True))
        # Storage that does not start where the allocator put it.
        odd = r.choice((1, 3)) if kind and r.random() < 0.3 else 0
        return self.shape, tuple(strides), offset + odd, total + odd

    def _once(self, size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The view without its repetitions."""
        return tuple(1 if s == 0 else n for n, s in zip(size, stride, strict=True)), stride


def _draw(values: str, shape: tuple[int, ...]) -> Tensor:
    if values == "integers":
        return torch.randint(-3, 4, shape).double()
    if values == "positive":
        return torch.rand(shape, dtype=torch.float64) + 0.5
    if values == "sixteenths":
        # Exact in every type, and never a whole number.
        return torch.randint(-20, 20, shape).double() / 8 + 1 / 16
    return torch.randn(shape, dtype=torch.float64)
