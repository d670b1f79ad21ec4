"""A pooling with an activation after or before it, and with its place in a concatenation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from tritonconv.fused.call import observed_group, unchanged
from tritonconv.fused.join import Join
from tritonconv.geometry import PoolGeometry
from tritonconv.nn.pooling import AvgPool1d, AvgPool2d, AvgPool3d, MaxPool1d, MaxPool2d, MaxPool3d
from tritonconv.ops.core.activation import from_module, parse_activation
from tritonconv.ops.core.backend import Backend, needs_gradients
from tritonconv.ops.core.layout import suggests_channels_last
from tritonconv.ops.core.observe import Share, is_watched, sharing
from tritonconv.ops.pool.call import PoolKind, pool

__all__ = ["Window", "fused_pool", "window_of"]

MAXIMA: dict[type[Module], int] = {MaxPool1d: 1, MaxPool2d: 2, MaxPool3d: 3}
AVERAGES: dict[type[Module], int] = {AvgPool1d: 1, AvgPool2d: 2, AvgPool3d: 3}


class Window(NamedTuple):
    """A pooling's numbers, in the form that `ops.pool.call.pool` expects."""

    kind: PoolKind
    nd: int
    kernel: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    divisor: int | None = None
    include_pad: bool = True
    backend: Backend | None = None

    def __call__(self, x: Tensor, activation: Any = None, out: Tensor | None = None) -> Tensor:
        kind, nd, *numbers, divisor, include_pad, backend = self
        return pool(
            kind, x, *numbers, nd=nd, divisor=divisor, include_pad=include_pad, backend=backend, activation=activation,
            out=out,
        )  # fmt: skip

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Size of the result; raises torch's exception for sizes that do not fit."""
        return PoolGeometry.parse(x.shape, *self[2:7], nd=self.nd, name=self.kind).output_shape


def window_of(layer: Any) -> Window | None:
    """The numbers of one of our poolings, or None if a call of the layer computes something else."""
    nd = MAXIMA.get(type(layer))
    if nd is not None:
        if layer.return_indices:
            return None
        numbers = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode
        return Window("max", nd, *numbers, backend=layer.backend)
    nd = AVERAGES.get(type(layer))
    if nd is None:
        return None
    numbers = layer.kernel_size, layer.stride, layer.padding, 1, layer.ceil_mode
    divisor = getattr(layer, "divisor_override", None)
    return Window("avg", nd, *numbers, divisor, layer.count_include_pad, layer.backend)


def fused_pool(
    layer: Module | Window, activation: Any, before: bool, input: Tensor, into: tuple[Join, int] | None = None
) -> Tensor:
    """activation(layer(input)), in one launch if no gradients are needed.

    Args:
        layer: our MaxPool or AvgPool, or the numbers of one.
        activation: a module of torch.nn, any other argument of `parse_activation`, or None.
        before: the activation comes first; then the layer is a maximum, and the activation never decreases.
        into: a concatenation that contains the result, and the index of the result in it.
    """
    window = layer if isinstance(layer, Window) else window_of(layer) if unchanged(layer) else None
    spec = from_module(activation) if isinstance(activation, Module) else parse_activation(activation)
    known = not isinstance(activation, Module) or (spec is not None and unchanged(activation))
    if window is None or not known or needs_gradients((input,)):
        for function in (activation, layer) if before else (layer, activation):
            if function is not None:
                input = function(input) if callable(function) else parse_activation(function).torch(input)  # type: ignore[union-attr]
        return input
    if torch.compiler.is_compiling() or is_watched():
        if spec is None or isinstance(layer, Module):
            y = window(input, spec)
            if isinstance(layer, Module):
                observed_group(y, layer, None, None, activation, input)
            return y
        with sharing(Share(f"{{}}, with {spec}")):
            return window(input, spec)
    out = None
    if into is not None and input.dim() == window.nd + 2 and suggests_channels_last(input):
        join, place = into
        out = join.memory(place, window.output_shape(input), input.dtype, input.device)
    return window(input, spec, out)
