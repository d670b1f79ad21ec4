"""Short causal depthwise convolution: operators, and who runs a call; its step, which writes its state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.causal.launch import (
    LONGEST,
    causal_backward,
    causal_forward,
    causal_geometry,
    causal_update,
    check_causal,
    check_update,
    time_last,
)
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.core.activation import ActivationSpec, from_numbers, to_numbers
from tritonconv.ops.core.backend import Backend, needs_gradients
from tritonconv.ops.core.family import Cost, Family
from tritonconv.ops.core.layout import dense_strides
from tritonconv.ops.core.operator import Operator, differentiate, mutated

__all__ = ["CAUSAL_CONV1D", "CAUSAL_CONV1D_UPDATE", "causal_convolution", "causal_step", "last_steps", "with_state"]

OP, UPDATE = "causal_conv1d", "causal_conv1d_update"


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str, a: float, b: float
) -> Tensor:
    """act(bias + causal depthwise convolution) for x (B, D, T) and weight (D, K), on Triton alone.

    `activation` is a name or "".
    """
    check_causal("tritonconv::causal_conv1d", x, weight, bias, state)
    _check_taps(weight)
    return causal_forward(x, weight, bias, state, from_numbers(activation, a, b))


def _check_taps(weight: Tensor) -> None:
    if weight.shape[1] > LONGEST:
        raise RuntimeError(
            f"tritonconv::causal_conv1d: expected a filter of at most {LONGEST} taps, but got weight of size "
            f"{list(weight.shape)}"
        )


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, dense_strides(tuple(x.shape), not time_last(x)))


def _outputs(x: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    _check_taps(weight)
    return _empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, activation, a, b = inputs
    ctx.numbers = activation, a, b
    # z is computed again from these, which costs no memory.
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        activation = from_numbers(*ctx.numbers)
        return differentiate(functools.partial(_on_torch, activation=activation), ctx.saved_tensors, ctx.needs, dy)
    found: Sequence[Tensor | None] = CAUSAL_CONV1D_BACKWARD(dy, *ctx.saved_tensors, *ctx.numbers)
    return found


def _flops(x: Sequence[int], weight: Sequence[int], *_rest: Any) -> int:
    return 2 * causal_geometry(tuple(x), weight[1]).macs


CAUSAL_CONV1D = Operator(
    "causal_conv1d", _forward, _outputs, save=_save, backward=_backward, flops=_flops, cast=("x", "weight", "bias", "state")
)


def _gradient(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str, a: float, b: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tritonconv::causal_conv1d's tensors, empty where there is no bias or state, on Triton alone."""
    return tuple(causal_backward(dy, x, weight, bias, state, from_numbers(activation, a, b)))  # type: ignore[return-value]


def _gradient_outputs(
    _dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *_numbers: Any
) -> tuple[Tensor | None, ...]:
    others = (None if t is None else x.new_empty(t.shape) for t in (bias, state))
    return _empty_like(x), x.new_empty(weight.shape), *others


CAUSAL_CONV1D_BACKWARD = Operator(
    "causal_conv1d_backward", _gradient, _gradient_outputs,
    # Of input and weight, as torch counts a convolution's; computing z again is no work that anyone asked for.
    flops=lambda _dy, *rest: 2 * _flops(*rest),
)  # fmt: skip


def _step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str, a: float, b: float) -> Tensor:
    """The results of x's steps (B, D, S), with the state (B, D, L) moved on, on Triton alone."""
    check_update("tritonconv::causal_conv1d_update", x, state, weight, bias)
    y = causal_update(x, state, weight, bias, from_numbers(activation, a, b))
    mutated(state)
    return y


CAUSAL_CONV1D_UPDATE = Operator(
    "causal_conv1d_update", _step, lambda x, *_rest: x.new_empty(x.shape), mutates=("state",),
    flops=lambda x, _state, weight, *_rest: 2 * x[0] * x[1] * x[2] * weight[1],
)  # fmt: skip


# Calls.


class CausalCall(NamedTuple):
    """A call that parsed."""

    geometry: ConvGeometry | None
    activation: ActivationSpec | None


def _as_matrix(weight: Tensor) -> Tensor:
    """(D, K) of (D, 1, K)."""
    return weight.squeeze(1) if weight.dim() == 3 and weight.shape[1] == 1 else weight


class Causal(Family[CausalCall]):
    """act(bias + causal depthwise convolution); a call's numbers are ((), activation)."""

    tensors = ("input", "weight", "bias", "initial_state")
    required = 2
    casts = (0, 1, 2, 3)

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> CausalCall:
        x, weight, bias, state = tensors
        return CausalCall(check_causal(OP, x, _as_matrix(weight), bias, state), numbers[1])

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: CausalCall | None) -> str:  # noqa: ARG002
        return f"{OP} of {list(tensors[0].shape) if parsed is None else parsed.geometry}"

    def run(self, tensors: Any, parsed: CausalCall) -> Tensor:
        x, weight, bias, state = tensors
        y: Tensor = CAUSAL_CONV1D(x, _as_matrix(weight), bias, state, *to_numbers(parsed.activation))
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        x, weight, bias, state = tensors
        return _on_torch(x, _as_matrix(weight), bias, state, numbers[1])

    def cost(self, tensors: Any, parsed: CausalCall) -> Cost:
        g = parsed.geometry
        assert g is not None
        return Cost(g.bytes(tensors[0].element_size()), g.macs, g)

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        x, weight, bias, state = tensors
        activation = None if numbers[1] is None else numbers[1].given()
        return functional.causal_conv1d, (x, weight, bias, activation), dict(initial_state=state)


class CausalStep(Family[CausalCall]):
    """The next steps' results, with the state moved on in place; a call's numbers are ((), activation)."""

    tensors = ("input", "conv_state", "weight", "bias")
    required = 3

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> CausalCall:
        x, state, weight, bias = tensors
        weight = _as_matrix(weight)
        check_update(UPDATE, x, state, weight, bias)
        if needs_gradients(tensors):
            raise RuntimeError(
                f"{UPDATE}: its state is written in place, and there are no gradients: call it under torch.no_grad(), or "
                f"detach what requires grad (input {list(x.shape)}, conv_state {list(state.shape)}, weight "
                f"{list(weight.shape)})"
            )
        return CausalCall(None, numbers[1])

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: CausalCall | None) -> str:  # noqa: ARG002
        return f"{UPDATE} of {list(tensors[0].shape)}, weight {list(_as_matrix(tensors[2]).shape)}"

    def run(self, tensors: Any, parsed: CausalCall) -> Tensor:
        x, state, weight, bias = tensors
        y: Tensor = CAUSAL_CONV1D_UPDATE(x, state, _as_matrix(weight), bias, *to_numbers(parsed.activation))
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        x, state, weight, bias = tensors
        weight = _as_matrix(weight)
        known = torch.cat((state, x), 2)
        before = known[:, :, state.shape[2] - weight.shape[1] + 1 : state.shape[2]]
        y = _on_torch(x, weight, bias, before, numbers[1])
        state.copy_(known[:, :, x.shape[2] :])
        return y

    def cost(self, tensors: Any, parsed: CausalCall) -> Cost:  # noqa: ARG002
        x, state, weight, bias = tensors
        # x and the state are read and written.
        elements = 2 * x.numel() + 2 * state.numel() + weight.numel() + (0 if bias is None else bias.numel())
        return Cost(elements * x.element_size(), x.numel() * weight.shape[-1])


CAUSAL, CAUSAL_STEP = Causal(OP), CausalStep(UPDATE)


def last_steps(x: Tensor, state: Tensor | None, steps: int) -> Tensor:
    """The last steps of the state followed by x, in memory of their own; zeros before where there is no state."""
    if x.shape[2] >= steps:
        return x[:, :, x.shape[2] - steps :].clone()
    if state is None:
        return torch.nn.functional.pad(x, (steps - x.shape[2], 0))
    return torch.cat((state[:, :, state.shape[2] - (steps - x.shape[2]) :], x), 2)


def with_state(x: Tensor, state: Tensor | None) -> tuple[Tensor, str | int]:
    """What a convolution is given, and its padding: zeros come before it where there is no state."""
    return (x, "causal") if state is None else (torch.cat((state, x), 2), 0)


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: ActivationSpec | None, state: Tensor | None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """act(bias + causal depthwise convolution) on the backend that is chosen for it.

    Args:
        x: (B, D, T).
        weight: (D, K) or (D, 1, K).
        state: (B, D, K - 1), what came before x; None: zeros.
        backend: the layer's own choice.
    """
    if isinstance(weight, Tensor) and isinstance(x, Tensor) and weight.dim() > 1 and weight.shape[-1] > LONGEST:
        matrix = _as_matrix(weight)
        check_causal(OP, x, matrix, bias, state)
        x, padding = with_state(x, state)
        numbers = ((1, 1, padding, 1, x.shape[1]), OP, 0.0, activation)
        tensors = (x, matrix.unsqueeze(1), bias, None, None, None, None, None)
        y: Tensor = CONVOLUTIONS["conv"](tensors, numbers, backend)
        return y
    y = CAUSAL((x, weight, bias, state), ((), activation), backend)
    return y


def causal_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: ActivationSpec | None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """The next steps' results, with the state moved on in place; without gradients.

    Args:
        x: (B, D, S).
        state: (B, D, L), L >= K - 1.
        weight: (D, K) or (D, 1, K).
        backend: the layer's own choice.
    """
    # The state is written and keeps its type, and x and the weights take it.
    if torch._C._is_any_autocast_enabled() and x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = x.to(state.dtype), weight.to(state.dtype), None if bias is None else bias.to(state.dtype)
    y: Tensor = CAUSAL_STEP((x, state, weight, bias), ((), activation), backend)
    return y


def _on_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: ActivationSpec | None
) -> Tensor:
    before = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0)) if state is None else torch.cat((state, x), 2)
    y = torch.nn.functional.conv1d(before, weight.unsqueeze(1), bias, groups=int(weight.shape[0]))
    return y if activation is None else activation.torch(y)
