"""A convolution and a batch norm with the batch's own statistics: who runs a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm.call import update_running, why_no_norm
from tritonconv.ops.conv.call import conv_numbers, convolution_on_torch, why_no_convolution
from tritonconv.ops.conv.dense import check_convolution
from tritonconv.ops.conv.norm_operator import conv_batch_norm
from tritonconv.ops.conv.numbers import ConvNumbers
from tritonconv.ops.conv.operator import EPILOGUE
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.family import Cost, Family, Resolved, Unsupported
from tritonconv.ops.core.launch import ConvKind
from tritonconv.ops.core.observe import Call
from tritonconv.ops.core.torch_norm import batch_norm_on_torch

__all__ = ["CONV_NORMS"]


class ConvNormCall(NamedTuple):
    """A call that parsed."""

    numbers: ConvNumbers
    geometry: ConvGeometry
    eps: float
    activation: ActivationSpec | None
    momentum: float
    group: str
    """Name of the process group whose pixels are normalized together; "" for none."""


class ConvNorm(Family[ConvNormCall]):
    """act(batch_norm(conv(x)) + residual) by the batch's own statistics; running ones are updated.

    A call's numbers are (torch's own, as `Convolution` has them), the public function's name, the batch norm's eps, the
    activation, the weight of the batch in the running statistics, and the process group's name.
    """

    tensors = ("input", "weight", *EPILOGUE)
    required = 2
    casts = (0, 1, 2)

    def __init__(self, kind: ConvKind) -> None:
        self.kind = kind
        super().__init__(f"{kind}_bn")

    def op(self, numbers: tuple[Any, ...]) -> str:
        return str(numbers[1])

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> ConvNormCall | Unsupported:
        given, op, eps, activation, momentum, group = numbers
        x, weight, bias, _, _, _, _, residual = tensors
        conv = conv_numbers(self.kind, given)
        # Of an unbatched image the channels would be the batch.
        if x.dim() != conv.nd + 2:
            return Unsupported()
        geometry = conv.geometry(x.shape, weight.shape, self.kind == "conv_transpose")
        if not _is_valid(geometry, tensors[3:7], eps):
            return Unsupported()
        check_convolution(op, x, weight, Epilogue(bias, None, residual), geometry)
        return ConvNormCall(conv, geometry, eps, activation, momentum, group)

    def why_unsupported(self, tensors: Any, parsed: ConvNormCall) -> str | None:  # noqa: ARG002
        return why_no_convolution(tensors[0], tensors[1], tensors[7]) or why_no_norm(tensors[0], *tensors[3:7])

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: ConvNormCall | None) -> str:
        what = list(tensors[0].shape) if parsed is None else parsed.geometry
        return f"{self.op(numbers)} in training of {what}"

    def run(self, tensors: Any, parsed: ConvNormCall) -> Tensor:
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual = tensors
        conv, _, eps, activation, momentum, group = parsed
        norm = None, None, bn_weight, bn_bias, eps
        y, mean, var, count = conv_batch_norm(self.kind, x, weight, bias, norm, residual, activation, conv, group)
        update_running(mean, var, count, running_mean, running_var, momentum)
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        given, _, eps, activation, momentum, _ = numbers
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual = tensors
        y = convolution_on_torch(self.kind, x, weight, bias, given)
        y = batch_norm_on_torch(y, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps)
        return Epilogue(residual=residual, activation=activation).torch(y)

    def cost(self, tensors: Any, parsed: ConvNormCall) -> Cost:
        g = parsed.geometry
        return Cost(g.bytes(tensors[0].element_size(), residual=tensors[7] is not None), g.macs, g)

    def observed(self, resolved: Resolved, tensors: Any, numbers: tuple[Any, ...], parsed: ConvNormCall) -> Call:
        call = super().observed(resolved, tensors, numbers, parsed)
        if resolved.refused is not None:
            return call
        return replace(call, decision=replace(call.decision, reason=f"{call.decision.reason} and batch norm in training"))

    def is_collective(self, parsed: ConvNormCall) -> bool:
        return bool(parsed.group)


CONV_NORMS = {"conv": ConvNorm("conv"), "conv_transpose": ConvNorm("conv_transpose")}


def _is_valid(geometry: ConvGeometry, norm: Any, eps: Any) -> bool:
    """Whether torch takes the batch norm; else it says best what is wrong. An empty batch has nothing to compute."""
    pixels = geometry.elements()[2] // geometry.out_channels
    shapes = all(tuple(t.shape) == (geometry.out_channels,) for t in norm if isinstance(t, Tensor))
    return pixels > 1 and isinstance(eps, (int, float)) and eps > 0 and shapes
