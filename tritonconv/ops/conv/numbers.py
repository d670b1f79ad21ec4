"""What convolutions are called with beside tensors, and the geometry that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tritonconv.geometry import ConvGeometry

__all__ = ["ConvNumbers", "conv_geometry", "ints"]


class ConvNumbers(NamedTuple):
    """What a convolution is called with beside tensors, as torch.nn.functional takes it."""

    nd: int
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: Any = 1
    output_padding: Any = 0
    """Of a transposed one."""

    def geometry(self, x: Sequence[int], weight: Sequence[int], transposed: bool = False) -> ConvGeometry:
        """Of these sizes; raises what torch raises."""
        nd, stride, padding, dilation, groups, output_padding = self
        return ConvGeometry.parse(
            x, weight, nd=nd, stride=stride, padding=padding, dilation=dilation, groups=groups, transposed=transposed,
            output_padding=output_padding,
        )  # fmt: skip

    def for_operators(self) -> tuple[tuple[int, ...], tuple[int, ...], str, tuple[int, ...], Any]:
        """(stride, padding, padding_name, dilation, groups) as operators take them."""
        named = isinstance(self.padding, str)
        padding = () if named else ints(self.padding)
        return ints(self.stride), padding, self.padding if named else "", ints(self.dilation), self.groups


def ints(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def conv_geometry(
    x_shape: Sequence[int], w_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], padding_name: str,
    dilation: Sequence[int], groups: int, transposed: bool = False, output_padding: Sequence[int] = (),
) -> ConvGeometry:  # fmt: skip
    """The geometry of an operator's sizes and numbers."""
    return ConvGeometry.parse(
        x_shape, w_shape, nd=len(x_shape) - 2, stride=list(stride), padding=padding_name or list(padding),
        dilation=list(dilation), groups=groups, transposed=transposed,
        output_padding=list(output_padding) if transposed else 0,
    )  # fmt: skip
