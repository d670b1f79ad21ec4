"""A call of our operators as a value without memory, to be made again: measured, captured, compiled ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Kind

__all__ = ["Example"]


class Example(NamedTuple):
    """What a convolution, a transposed one or a linear layer was called with."""

    kind: Kind
    x: Tensor
    weight: Tensor
    epilogue: Epilogue
    numbers: tuple[Any, ...]
    """What the geometry is parsed from beside the sizes, as ops/conv/dispatch.py has it."""

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
