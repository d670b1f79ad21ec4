"""Convolutions, transposed convolutions and linear layers, with what follows them: who runs a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, expand
from tritonconv.ops.conv.activation_gradient import shows_in_result
from tritonconv.ops.conv.dense import check_convolution
from tritonconv.ops.conv.norm_operator import conv_batch_norm
from tritonconv.ops.conv.numbers import ConvNumbers, ints
from tritonconv.ops.conv.operator import CONV, CONV_TRANSPOSE, EPILOGUE, epilogue_numbers
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.backend import OnTorch
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue, ResidualError
from tritonconv.ops.core.family import Cost, Family, Resolved
from tritonconv.ops.core.launch import ConvKind
from tritonconv.ops.core.observe import Call, Decision, Example, shared
from tritonconv.ops.core.operator import gradients_wanted, is_traced
from tritonconv.ops.core.recording import Recording
from tritonconv.tuning import judge

__all__ = [
    "CONVOLUTIONS",
    "LINEAR",
    "PADDED",
    "ConvCall",
    "Convolution",
    "ResidualError",
    "conv_numbers",
    "convolution_on_torch",
    "epilogue_of",
    "why_no_convolution",
]  # fmt: skip

NO_EPILOGUE = (None,) * 6
PADDED = "padded_"
"""How the names of calls begin whose padding is zeros before each axis and zeros behind each."""


class ConvCall(NamedTuple):
    """A call that parsed."""

    numbers: ConvNumbers
    geometry: ConvGeometry | None
    """None where someone traces the call, whose sizes may be symbols."""
    eps: float
    activation: ActivationSpec | None


def epilogue_of(tensors: Any, eps: float, activation: ActivationSpec | None) -> Epilogue:
    """What follows the convolution of a call's tensors."""
    bias, mean, var, weight, shift, residual = tensors[2:8]
    norm = None if mean is None or var is None else BatchNorm(mean, var, weight, shift, eps)
    return Epilogue(bias, norm, residual, activation)


def conv_numbers(kind: ConvKind, numbers: tuple[Any, ...]) -> ConvNumbers:
    """A call's numbers, which are in torch's order; as torch does, numpy's integers count as Python's."""
    if kind == "matmul":
        return ConvNumbers(1)
    nd, *given = map(_plain, numbers)
    if kind == "conv":
        return ConvNumbers(nd, *given)
    stride, padding, output_padding, groups, dilation = given
    return ConvNumbers(nd, stride, padding, dilation, groups, output_padding)


def _plain(value: Any) -> Any:
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, np.integer) else value


class Convolution(Family[ConvCall]):
    """act(bn(conv(x, weight) + bias) + residual).

    A call's numbers are (torch's own, from nd on: (nd, stride, padding, dilation, groups), or for a transposed convolution
    (nd, stride, padding, output_padding, groups, dilation), or () for a linear layer), the public function's name, the
    batch norm's eps and the activation.
    """

    tensors = ("input", "weight", *EPILOGUE)
    required = 2
    casts = (0, 1, 2)

    def __init__(self, kind: ConvKind) -> None:
        self.kind = kind
        super().__init__(kind)

    def __reduce__(self) -> Any:
        return _family, (self.kind,)

    def op(self, numbers: tuple[Any, ...]) -> str:
        return str(numbers[1])

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> ConvCall:
        given, op, eps, activation = numbers
        parsed = ConvCall(conv_numbers(self.kind, given), None, eps, activation)
        padding, nd = parsed.numbers.padding, parsed.numbers.nd
        if padding == "causal" and not op.startswith("causal"):
            raise RuntimeError(f"{op}: invalid padding string 'causal', expected 'same' or 'valid'")
        if isinstance(padding, tuple) and len(padding) == 2 * nd and not op.startswith(PADDED):
            expand(padding, nd, "padding", op)
        if is_traced(tensors):
            return parsed
        x, weight = tensors[:2]
        epilogue = epilogue_of(tensors, eps, activation)
        if self.kind == "matmul":
            if x.dim() == 0 or weight.dim() != 2 or 0 in weight.shape:
                return parsed
            if x.shape[-1] != weight.shape[1]:
                raise RuntimeError(
                    f"linear: input and weight shapes cannot be multiplied: input {list(x.shape)} has {x.shape[-1]} "
                    f"features, but weight {list(weight.shape)} expects {weight.shape[1]}"
                )
        x, weight, epilogue = self._batched(x, weight, epilogue, parsed.numbers.nd)
        geometry = parsed.numbers.geometry(x.shape, weight.shape, self.kind == "conv_transpose")
        check_convolution(op, x, weight, epilogue, geometry)
        return parsed._replace(geometry=geometry)

    def why_unsupported(self, tensors: Any, parsed: ConvCall) -> str | None:  # noqa: ARG002
        x, weight = tensors[:2]
        if self.kind == "matmul" and (x.dim() == 0 or weight.dim() != 2 or 0 in weight.shape):
            return f"a weight of size {list(weight.shape)} has no kernel"
        return why_no_convolution(x, weight, tensors[7])

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: ConvCall | None) -> str:  # noqa: ARG002
        op = self.op(numbers)
        if parsed is None or parsed.geometry is None:
            return op
        text = str(parsed.geometry)
        return text if text.startswith(f"{op} ") else f"{op} of {text}"

    def run(self, tensors: Any, parsed: ConvCall) -> Tensor:
        numbers, _, eps, activation = parsed
        x, weight = tensors[:2]
        epilogue = epilogue_of(tensors, eps, activation)
        rows, filters, behind = self._batched(x, weight, epilogue, numbers.nd)
        y = self._operator(rows, filters, behind, numbers)
        if self.kind == "matmul":
            return y.reshape(*x.shape[:-1], weight.shape[0])
        return y if rows is x else y.squeeze(0)

    def _operator(self, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: ConvNumbers) -> Tensor:
        """For gradients a batch norm has an operator of its own. An activation whose derivative does not show in its result
        is torch's."""
        after = None
        if gradients_wanted((x, weight, *epilogue.tensors())):
            norm = epilogue.batch_norm
            if self.kind != "matmul" and norm is not None:
                bias, _, residual, act = epilogue
                return conv_batch_norm(self.kind, x, weight, bias, norm, residual, act, numbers)[0]
            if norm is not None or not shows_in_result(epilogue.activation):
                after, epilogue = epilogue, Epilogue(epilogue.bias)
        norm, eps = epilogue.batch_norm, 0.0 if epilogue.batch_norm is None else epilogue.batch_norm.eps
        tensors = (epilogue.bias, *((None,) * 4 if norm is None else norm[:4]), epilogue.residual)
        behind = epilogue_numbers(eps, epilogue.activation)
        stride, padding, name, dilation, groups = numbers.for_operators()
        if self.kind == "conv_transpose":
            extra = ints(numbers.output_padding)
            y = CONV_TRANSPOSE(x, weight, *tensors, stride, padding, extra, groups, dilation, *behind)
        else:
            y = CONV(x, weight, *tensors, stride, padding, name, dilation, groups, *behind, self.kind)
        result: Tensor = y if after is None else after.torch(y)
        return result

    def _batched(self, x: Tensor, weight: Tensor, epilogue: Epilogue, nd: int) -> tuple[Tensor, Tensor, Epilogue]:
        """A call's tensors as those of a batch: an unbatched image's, or a linear layer's as rows (R, C, 1)."""
        residual = epilogue.residual
        if self.kind == "matmul":
            if residual is not None:
                shape = (*x.shape[:-1], weight.shape[0])
                if residual.dim() > len(shape) or any(n not in (1, m) for n, m in zip(residual.shape[::-1], shape[::-1])):  # noqa: B905
                    raise ResidualError(
                        f"linear: a residual of size {list(residual.shape)} cannot be added to a result of {list(shape)}"
                    )
                residual = residual.expand(shape).reshape(-1, weight.shape[0], 1)
            return x.reshape(-1, x.shape[-1], 1), weight.unsqueeze(-1), epilogue._replace(residual=residual)
        if x.dim() != nd + 1:
            return x, weight, epilogue
        return x.unsqueeze(0), weight, epilogue._replace(residual=None if residual is None else residual.unsqueeze(0))

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        given, _, eps, activation = numbers
        x, weight, bias = tensors[:3]
        epilogue = epilogue_of(tensors, eps, activation)
        if self.kind == "matmul":
            return epilogue.torch(torch.nn.functional.linear(x, weight, bias))
        return epilogue.torch(convolution_on_torch(self.kind, x, weight, bias, given))

    def cost(self, tensors: Any, parsed: ConvCall) -> Cost:
        g, itemsize = parsed.geometry, tensors[0].element_size()
        assert g is not None
        return Cost(g.bytes(itemsize, residual=tensors[7] is not None), g.macs, g)

    def prefers_torch(self, recording: Recording, tensors: Any, parsed: ConvCall) -> OnTorch | None:
        problem = recording.problem
        if problem is None:
            return None
        conditions = recording.conditions(epilogue_of(tensors, parsed.eps, parsed.activation).describe())
        verdict = judge(problem, conditions)
        return OnTorch(verdict.reason, conditions=conditions) if verdict.torch else None

    def observed(self, resolved: Resolved, tensors: Any, numbers: tuple[Any, ...], parsed: ConvCall) -> Call:
        epilogue = epilogue_of(tensors, parsed.eps, parsed.activation)
        g, recording, refused = parsed.geometry, resolved.recording, resolved.refused
        assert g is not None
        x = tensors[0]
        if refused is not None or recording is None:
            reason, conditions = ("", None) if refused is None else (refused.reason, refused.conditions)
            decision = Decision("torch", reason)
        else:
            conditions, problem = recording.conditions(epilogue.describe()), recording.problem
            measured = judge(problem, conditions).reason if problem is not None else ""
            parts = (recording.kernel, recording.note, measured)
            decision = Decision("triton", ", ".join(filter(None, parts)), recording.copies)
        size = self.cost(tensors, parsed).bytes
        share = shared()
        if share is not None:
            # What lies between two parts never goes to memory.
            image, _, result = g.elements()
            size -= (image * share.unread + result * share.unwritten) * x.element_size()
        example = None if conditions is None or 0 in g.elements() else Example(self, tensors, numbers).on_meta()
        return Call(self.op(numbers), decision, g, g.macs, size, x.dtype, x.device, example, conditions or "")

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        given, _, eps, activation = numbers
        x, weight, bias, *norm, residual = tensors
        if self.kind == "matmul":
            if residual is None and activation is None:
                return functional.linear, (x, weight, bias), {}
            return super().face(tensors, numbers)
        nd, *rest = given
        if isinstance(rest[1], tuple) and len(rest[1]) == 2 * nd:
            return super().face(tensors, numbers)
        public: Any = functional
        if all(t is None for t in (*norm, residual)) and activation is None:
            return getattr(public, f"{self.kind}{nd}d"), (x, weight, bias, *rest), {}
        names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
        if self.kind == "conv_transpose":
            names = ("stride", "padding", "output_padding", "groups", "dilation")
        named = dict(zip(names, rest, strict=True), eps=eps, residual=residual)
        named["activation"] = None if activation is None else activation.given()
        return getattr(public, f"{self.kind}{nd}d_bn_act"), (x, weight, bias, *norm), named


def why_no_convolution(x: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    """Why there is no kernel for a convolution, beside what holds for all families."""
    if weight.shape[1] == 0:
        return f"a weight of size {list(weight.shape)} has no kernel"
    if residual is not None and residual.dtype != x.dtype:
        return f"a residual of {residual.dtype} under an input of {x.dtype} has no kernel"
    return None


def convolution_on_torch(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[Any, ...]) -> Tensor:
    """A convolution by torch; zeros that differ before and behind an axis, which torch has not, come first."""
    nd, *given = numbers
    padding, taps = given[1], weight.shape[2:]
    if kind == "conv" and padding == "causal":
        steps = expand(given[2], nd, "dilation", "causal padding")
        padding = (*(d * (n - 1) for d, n in zip(steps, taps, strict=True)), *(0,) * nd)
    if kind == "conv" and isinstance(padding, (tuple, list)) and len(padding) == 2 * nd:
        x = torch.nn.functional.pad(x, [zeros for axis in reversed(range(nd)) for zeros in padding[axis::nd]])
        given[1] = 0
    functional: Any = getattr(torch.nn.functional, f"{kind}{nd}d")
    y: Tensor = functional(x, weight, bias, *given)
    return y


CONVOLUTIONS = {"conv": Convolution("conv"), "conv_transpose": Convolution("conv_transpose")}
LINEAR = Convolution("matmul")


def _family(kind: ConvKind) -> Convolution:
    return LINEAR if kind == "matmul" else CONVOLUTIONS[kind]
