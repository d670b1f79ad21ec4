"""Short causal depthwise convolution for callers: who runs it, and the operators that compilers and autograd see.

torch.ops.tritonconv.causal_conv1d has gradients, torch.ops.tritonconv.causal_conv1d_update writes its state. Calls that
need no gradient and that no one traces go past both, straight to the launches (ops/causal/launch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.ops.causal.launch import (
    LONGEST,
    Gradients,
    causal_backward,
    causal_forward,
    causal_geometry,
    causal_update,
    check_causal,
    check_update,
    needs_copy,
    time_last,
)
from tritonconv.ops.conv.dispatch import autocast, convolution
from tritonconv.ops.conv.library import register_autocast
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.activation import ActivationSpec, from_numbers, to_numbers
from tritonconv.ops.core.backend import Backend, decide, needs_gradients
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import dense_strides
from tritonconv.ops.core.observe import Call, Decision, notify

__all__ = ["causal_convolution", "causal_step", "last_steps", "with_state"]

OP, UPDATE = "causal_conv1d", "causal_conv1d_update"


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
    check_tensors(OP, input=x, weight=weight, bias=bias, initial_state=state)
    x, weight, bias, state = _autocast(x, weight, bias, state)
    weight = as_matrix(weight)
    tensors = tuple(t for t in (x, weight, bias, state) if t is not None)
    geometry = check_causal(OP, x, weight, bias, state)
    if weight.shape[1] > LONGEST:
        x, padding = with_state(x, state)
        epilogue = Epilogue(bias, activation=activation)
        return convolution(OP, x, weight.unsqueeze(1), epilogue, 1, 1, padding, 1, x.shape[1], backend)
    refused = decide(tensors, backend, lambda: f"{OP} of {geometry}")

    def seen() -> Call:
        copies = int(needs_copy(x)) if refused is None else 0
        decision = Decision("torch", refused.reason) if refused else Decision("triton", OP, copies)
        # Without an example: no one measures it beside a convolution.
        size = geometry.bytes(x.element_size())
        return Call(OP, decision, geometry, geometry.macs, size, x.dtype, x.device, None, "")

    if notify(seen) or refused is not None:
        return _on_torch(x, weight, bias, activation, state)
    if is_traced(tensors) or needs_gradients(tensors):
        result: Tensor = torch.ops.tritonconv.causal_conv1d(x, weight, bias, state, **to_numbers(activation))
        return result
    return causal_forward(x, weight, bias, state, activation)


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
    check_tensors(UPDATE, input=x, conv_state=state, weight=weight, bias=bias)
    # The state is written and keeps its type, and x and the weights take it.
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = x.to(state.dtype), weight.to(state.dtype), None if bias is None else bias.to(state.dtype)
    weight = as_matrix(weight)
    check_update(UPDATE, x, state, weight, bias)
    tensors = tuple(t for t in (x, weight, bias, state) if t is not None)
    if needs_gradients(tensors):
        raise RuntimeError(
            f"{UPDATE}: its state is written in place, and there are no gradients: call it under torch.no_grad(), or "
            f"detach what requires grad (input {list(x.shape)}, conv_state {list(state.shape)}, weight "
            f"{list(weight.shape)})"
        )
    what = f"{UPDATE} of {list(x.shape)}, weight {list(weight.shape)}"
    refused = decide(tensors, backend, lambda: what)

    def seen() -> Call:
        decision = Decision("torch", refused.reason) if refused else Decision("triton", UPDATE)
        # x and the state are read and written.
        elements = 2 * x.numel() + 2 * state.numel() + weight.numel() + (0 if bias is None else bias.numel())
        macs = x.numel() * weight.shape[1]
        return Call(UPDATE, decision, None, macs, elements * x.element_size(), x.dtype, x.device, None, "")

    if notify(seen) or refused is not None:
        return _update_on_torch(x, state, weight, bias, activation)
    if is_traced(tensors):
        result: Tensor = torch.ops.tritonconv.causal_conv1d_update(x, state, weight, bias, **to_numbers(activation))
        return result
    y = causal_update(x, state, weight, bias, activation)
    # As an operator of torch would: what was saved for a backward pass before must notice.
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return y


def check_tensors(op: str, **tensors: object) -> None:
    """Raise TypeError for arguments that are no tensors; the optional ones may be None."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("bias", "initial_state")):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def as_matrix(weight: Tensor) -> Tensor:
    """(D, K) of (D, 1, K)."""
    return weight.squeeze(1) if weight.dim() == 3 and weight.shape[1] == 1 else weight


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, weight, epilogue = autocast(x, weight, Epilogue(bias))
    if state is not None:
        state, _, _ = autocast(state, weight, Epilogue())
    return x, weight, epilogue.bias, state


def _on_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: ActivationSpec | None, state: Tensor | None
) -> Tensor:
    before = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0)) if state is None else torch.cat((state, x), 2)
    y = torch.nn.functional.conv1d(before, weight.unsqueeze(1), bias, groups=x.shape[1])
    return y if activation is None else activation.torch(y)


def _update_on_torch(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: ActivationSpec | None
) -> Tensor:
    known = torch.cat((state, x), 2)
    y = _on_torch(x, weight, bias, activation, known[:, :, state.shape[2] - weight.shape[1] + 1 : state.shape[2]])
    state.copy_(known[:, :, x.shape[2] :])
    return y


@torch.library.custom_op("tritonconv::causal_conv1d", mutates_args=())
def causal(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *, activation: str, a: float, b: float
) -> Tensor:
    """act(bias + causal depthwise convolution) for x (B, D, T) and weight (D, K), on Triton alone.

    `activation` is a name or "".
    """
    check_causal("tritonconv::causal_conv1d", x, weight, bias, state)
    check_taps(weight)
    return causal_forward(x, weight, bias, state, from_numbers(activation, a, b))


def check_taps(weight: Tensor) -> None:
    if weight.shape[1] > LONGEST:
        raise RuntimeError(
            f"tritonconv::causal_conv1d: expected a filter of at most {LONGEST} taps, but got weight of size "
            f"{list(weight.shape)}"
        )


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, dense_strides(tuple(x.shape), not time_last(x)))


@causal.register_fake
def _(x: Tensor, weight: Tensor, *_tensors: Any, **_numbers: Any) -> Tensor:
    check_taps(weight)
    return _empty_like(x)


@torch.library.custom_op("tritonconv::causal_conv1d_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *, activation: str, a: float, b: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tritonconv::causal_conv1d's tensors, empty where there is no bias or state, on Triton alone."""
    found = causal_backward(dy, x, weight, bias, state, from_numbers(activation, a, b))
    return tuple(x.new_empty(0) if t is None else t for t in found)  # type: ignore[return-value]


@backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, **_numbers: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _empty_like(x), x.new_empty(weight.shape), x.new_empty(0 if bias is None else bias.shape),
        x.new_empty(0 if state is None else state.shape),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG001
    ctx.numbers = dict(keyword_only_inputs)
    # z is computed again from these, which costs no memory.
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    found = Gradients(*torch.ops.tritonconv.causal_conv1d_backward(dy, *ctx.saved_tensors, **ctx.numbers))
    return tuple(t if need else None for t, need in zip(found, ctx.needs_input_grad, strict=True))


causal.register_autograd(_backward, setup_context=_save)
register_autocast(torch.ops.tritonconv.causal_conv1d)


@torch.library.custom_op("tritonconv::causal_conv1d_update", mutates_args=("state",))
def update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str, a: float, b: float) -> Tensor:
    """The results of x's steps (B, D, S), with the state (B, D, L) moved on, on Triton alone."""
    check_update("tritonconv::causal_conv1d_update", x, state, weight, bias)
    return causal_update(x, state, weight, bias, from_numbers(activation, a, b))


@update.register_fake
def _(x: Tensor, *_tensors: Any, **_numbers: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula([torch.ops.tritonconv.causal_conv1d])
def _flops(x_shape: Sequence[int], w_shape: Sequence[int], *_shapes: Any, **_numbers: Any) -> int:
    return 2 * causal_geometry(tuple(x_shape), w_shape[1]).macs


@register_flop_formula([torch.ops.tritonconv.causal_conv1d_backward])
def _backward_flops(
    _dy: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *_shapes: Any, **_numbers: Any
) -> int:
    # Of input and weight, as torch counts a convolution's; computing z again is no work that anyone asked for.
    return 4 * causal_geometry(tuple(x_shape), w_shape[1]).macs


@register_flop_formula([torch.ops.tritonconv.causal_conv1d_update])
def _update_flops(
    x_shape: Sequence[int], _state: Sequence[int], w_shape: Sequence[int], *_shapes: Any, **_numbers: Any
) -> int:
    return 2 * x_shape[0] * x_shape[1] * x_shape[2] * w_shape[1]
