"""What the draws of all operators share."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

import torch

from .views import LAYOUTS, Input

__all__ = ["Draw"]

# At least as likely as all views together are the two dense formats.
WEIGHTS = [4, 4] + [1] * (len(LAYOUTS) - 2)


class Draw:
    """Random numbers of one call, whose tensors have one type."""

    def __init__(self, r: Random, dtype: torch.dtype) -> None:
        self.r, self.dtype = r, dtype

    @property
    def half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    def chance(self, share: float) -> bool:
        return self.r.random() < share

    def one(self, values: Iterable[Any]) -> Any:
        return self.r.choice(list(values))

    def each(self, nd: int, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(self.one(values) for _ in range(nd))

    def spelled(self, numbers: tuple[Any, ...]) -> Any:
        """The same numbers as someone may write them: one for all axes where they are equal, a tuple or a list."""
        if len(set(numbers)) == 1 and self.chance(0.5):
            return numbers[0]
        return list(numbers) if self.chance(0.3) else numbers

    def input(self, shape: Iterable[int], **how: Any) -> Input:
        return Input(tuple(shape), self.r.choices(LAYOUTS, WEIGHTS)[0], **how)

    def maybe(self, share: float, shape: Iterable[int], **how: Any) -> Input | None:
        return self.input(shape, **how) if self.chance(share) else None

    def image(self, channels: int, spatial: tuple[int, ...], batches: bool = True, **how: Any) -> Input:
        """(N, C, *spatial); where `batches` allows it now and then without N, or with N = 0."""
        n = self.one((1, 1, 2, 2, 3))
        if batches and self.chance(0.12):
            return self.input((channels, *spatial), **how)
        if batches and self.chance(0.03):
            n = 0
        return self.input((n, channels, *spatial), **how)

    def spatial(self, nd: int, most: int = 8) -> tuple[int, ...]:
        most = {1: 3 * most, 2: most, 3: 3}[nd]
        return tuple(1 if self.chance(0.1) else self.r.randint(2, most) for _ in range(nd))

    def channels(self) -> int:
        return self.one((1, 2, 3, 4, 5, 8, 12, 17))
