"""Squeeze-excite: the gate of each image's channels in one launch, and the product with it, which has gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.backend import Backend, why_unsupported
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.operator import Operator, differentiate, gradients_wanted, is_traced
from tritonconv.ops.core.shared_launch import SharedLaunch
from tritonconv.ops.squeeze_excite.launch import MOST_HIDDEN, excite, scale, scale_gradients

__all__ = ["EXCITE", "SCALE", "SCALE_CHANNELS", "scale_channels"]


def _plan_excite(
    tensors: Any, numbers: tuple[Any, ...], _backend: Backend | None
) -> tuple[Callable[..., Tensor], Any] | None:
    """One launch gives the gate where there are few enough hidden channels, of one type."""
    mean, w1, b1, w2, b2 = tensors
    present = tuple(t for t in tensors if t is not None)
    if len({(t.dtype, t.device) for t in present}) > 1 or torch._C._is_any_autocast_enabled():
        return None
    if is_traced(tensors) or why_unsupported(present) or mean.dim() < 3:
        return None
    c, r = mean.shape[1], w1.shape[0]
    sizes = w1.numel() == w2.numel() == c * r and w1.shape[1] == c and w2.shape[:2] == (c, r)
    vectors = all(b is None or b.shape == (n,) for b, n in ((b1, r), (b2, c)))
    if not (sizes and vectors and 0 < r <= MOST_HIDDEN and mean.numel() == mean.shape[0] * c):
        return None
    _, act, gate_act = numbers
    return lambda mean, w1, b1, w2, b2: excite(mean, w1, b1, act, w2, b2, gate_act), tensors


EXCITE = SharedLaunch("excite", 5, _plan_excite)
"""gate_act(w2 @ act(w1 @ mean + b1) + b2), (N, C, 1, ...), of (mean, w1, b1, w2, b2); numbers are ((), act, gate_act)."""


def is_plain(x: Tensor, gate: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernel computes this: one type, a gate of an image's channels, a residual of x's size."""
    if x.dim() not in (3, 4, 5) or gate.shape != (*x.shape[:2], *(1,) * (x.dim() - 2)) or x.numel() == 0:
        return False
    if (gate.dtype, gate.device) != (x.dtype, x.device):
        return False
    return residual is None or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)


def _empty_like(x: Tensor) -> Tensor:
    return empty_output(x, tuple(x.shape), suggests_channels_last(x), x.dtype)


def _check(x: Tensor, gate: Tensor) -> None:
    if not is_plain(x, gate, None) and x.numel():
        raise RuntimeError(
            f"tritonconv::scale_channels: expected a gate of size {[*x.shape[:2], *(1,) * (x.dim() - 2)]}, {x.dtype} on "
            f"{x.device}, but got {list(gate.shape)}, {gate.dtype} on {gate.device} (input {list(x.shape)})"
        )


def _forward(x: Tensor, gate: Tensor) -> Tensor:
    """x (N, C, *spatial) times gate (N, C, 1, ...), on Triton alone."""
    _check(x, gate)
    return scale(x, gate)


def _outputs(x: Tensor, gate: Tensor) -> Tensor:
    _check(x, gate)
    return _empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    x, gate = ctx.saved_tensors
    if torch.is_grad_enabled():
        return differentiate(torch.mul, (x, gate), ctx.needs, dy)
    return list(SCALE_CHANNELS_BACKWARD(dy, x, gate, *ctx.needs))


SCALE_CHANNELS = Operator("scale_channels", _forward, _outputs, save=_save, backward=_backward)


def _gradient(dy: Tensor, x: Tensor, gate: Tensor, needs_x: bool, needs_gate: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate, each empty where it is not needed, on Triton alone."""
    return scale_gradients(dy, x, gate, needs_x, needs_gate)  # type: ignore[return-value]


def _gradient_outputs(
    _dy: Tensor, x: Tensor, gate: Tensor, needs_x: bool, needs_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    return _empty_like(x) if needs_x else None, gate.new_empty(gate.shape) if needs_gate else None


SCALE_CHANNELS_BACKWARD = Operator("scale_channels_backward", _gradient, _gradient_outputs)


class Scale(Family[ActivationSpec | None]):
    """act(x * gate + residual); a call's numbers are ((), activation)."""

    tensors = ("input", "gate", "residual")
    required = 2

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> ActivationSpec | Unsupported | None:
        # Torch broadcasts and promotes, or says what is wrong.
        if not is_plain(*tensors) or torch._C._is_any_autocast_enabled():
            return Unsupported()
        activation: ActivationSpec | None = numbers[1]
        return activation

    def run(self, tensors: Any, parsed: ActivationSpec | None) -> Tensor:
        x, gate, residual = tensors
        if is_traced(tensors) or gradients_wanted(tensors):
            return Epilogue(residual=residual, activation=parsed).torch(SCALE_CHANNELS(x, gate))
        return scale(x, gate, residual, parsed)

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        x, gate, residual = tensors
        return Epilogue(residual=residual, activation=numbers[1]).torch(x * gate)

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: Any) -> str:  # noqa: ARG002
        return f"scale_channels of {list(tensors[0].shape)}"

    def cost(self, tensors: Any, parsed: Any) -> Cost:  # noqa: ARG002
        x = tensors[0]
        return Cost((sum(t.numel() for t in tensors if t is not None) + x.numel()) * x.element_size())


SCALE = Scale("scale_channels")


def scale_channels(
    x: Tensor, gate: Tensor, residual: Tensor | None = None, activation: ActivationSpec | None = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """act(x * gate + residual) on the backend that is chosen for it.

    Args:
        x: (N, C, *spatial).
        gate: (N, C, 1, ...).
        residual: what x can be added to.
        backend: the layer's own choice.
    """
    y: Tensor = SCALE((x, gate, residual), ((), activation), backend)
    return y
