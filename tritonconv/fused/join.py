"""A concatenation of channels whose parts are written directly to their place in the result, without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tritonconv.ops.core.layout import dense_strides

__all__ = ["Join", "joined"]


class Join:
    """The memory of one concatenation in one run of a model: channels-last, allocated when the first part needs its place.

    Args:
        channels: for every part, in order: a number of channels, or a tensor that has as many channels.
    """

    def __init__(self, channels: tuple[int | Tensor, ...]) -> None:
        sizes = [known.shape[1] if isinstance(known, Tensor) else known for known in channels]
        self.starts = tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))
        self.pitch = self.starts[-1]
        self.whole: Tensor | None = None
        self.copied: dict[int, Tensor] = {}

    def memory(self, place: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The memory for a part of this size; None if the size does not fit the parts before it."""
        first, last = self.starts[place : place + 2]
        size = (shape[0], self.pitch, *shape[2:])
        if shape[1] != last - first or (self.whole is not None and self.whole.shape != size):
            return None
        if self.whole is None:
            self.whole = torch.empty_strided(size, dense_strides(size, True), dtype=dtype, device=device)
        if (self.whole.dtype, self.whole.device) != (dtype, device):
            return None
        return self.whole.narrow(1, first, last - first)

    def memory_of(self, place: int) -> Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor | None]:
        """`memory` for one part."""
        return functools.partial(self.memory, place)

    def fill(self, place: int, value: Tensor) -> bool:
        """Copy the part to its place if necessary; whether it is there now."""
        if self.copied.get(place) is value:
            return True
        out = self.memory(place, tuple(value.shape), value.dtype, value.device)
        if out is None:
            return False
        if out.data_ptr() != value.data_ptr() or out.stride() != value.stride():
            out.copy_(value)
            self.copied[place] = value
        return True


def joined(join: Join, values: Sequence[Tensor]) -> Tensor:
    """torch.cat(values, 1), of the first parts of a join; parts that were written to their place are not copied."""
    whole = None if torch.compiler.is_compiling() else join.whole
    if whole is None or (torch.is_grad_enabled() and any(value.requires_grad for value in values)):
        return torch.cat(values, 1)  # type: ignore[arg-type]
    if not all(join.fill(place, value) for place, value in enumerate(values)):
        return torch.cat(values, 1)  # type: ignore[arg-type]
    return whole.narrow(1, 0, join.starts[len(values)])
