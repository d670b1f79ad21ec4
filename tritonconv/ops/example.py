"""A call of our operators as a value without memory, to be made again: measured, captured, compiled ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.epilogue import Epilogue

__all__ = ["Example"]


class Example(NamedTuple):
    """What a convolution or linear layer was called with."""

    kind: Literal["conv", "matmul"]
    x: Tensor
    weight: Tensor
    epilogue: Epilogue
    numbers: tuple[Any, ...]
    """(nd, stride, padding, dilation, groups) of a convolution, () of a linear layer."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Example:
        """The same with every tensor mapped."""
        return self._replace(x=function(self.x), weight=function(self.weight), epilogue=self.epilogue.map(function))

    def on_meta(self) -> Example:
        """The same sizes, strides and dtypes without memory."""
        return self.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))

    def key(self) -> tuple[Any, ...]:
        """Equal for calls that do the same on tensors that lie alike."""
        tensors = tuple((t.shape, t.stride(), t.dtype) for t in self.tensors())
        return self.kind, self.numbers, self.epilogue.describe(), self.epilogue.activation, tensors

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.weight, *self.epilogue.tensors())
