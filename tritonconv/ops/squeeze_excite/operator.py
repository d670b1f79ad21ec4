"""Squeeze-excite for callers: who computes a gate and the product with it, and the operators that autograd sees.

torch.ops.tritonconv.scale_channels has gradients. The gate has none of its own: where they are needed its two layers run as
layers. Calls that need no gradient and that no one traces go past the operator, straight to the launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.backend import Backend, current_backend, decide, needs_gradients, unsupported
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import empty_output, suggests_channels_last
from tritonconv.ops.core.observe import Call, Decision, notify, wants_parts
from tritonconv.ops.squeeze_excite.launch import MOST_HIDDEN, excite, scale, scale_gradients

__all__ = ["excited", "scale_channels", "would_excite"]


def would_excite(
    mean: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, backend: Backend | None
) -> bool:
    """Whether one launch gives the gate: no gradients, one type, few enough hidden channels."""
    tensors = tuple(t for t in (mean, w1, b1, w2, b2) if t is not None)
    if current_backend(backend) == "torch" or needs_gradients(tensors) or len({(t.dtype, t.device) for t in tensors}) > 1:
        return False
    if torch._C._is_any_autocast_enabled() or is_traced(tensors) or unsupported(tensors) or mean.dim() < 3:
        return False
    c, r = mean.shape[1], w1.shape[0]
    sizes = w1.numel() == w2.numel() == c * r and w1.shape[1] == c and w2.shape[:2] == (c, r)
    vectors = all(b is None or b.shape == (n,) for b, n in ((b1, r), (b2, c)))
    return sizes and vectors and 0 < r <= MOST_HIDDEN and mean.numel() == mean.shape[0] * c


def excited(
    mean: Tensor, w1: Tensor, b1: Tensor | None, act: ActivationSpec | None, w2: Tensor, b2: Tensor | None,
    gate_act: ActivationSpec | None, backend: Backend | None = None,
) -> Tensor | None:  # fmt: skip
    """The gate (N, C, 1, ...) in one launch; None where its layers are to run on their own.

    Args:
        mean: (N, C, 1, ...).
        w1, b1: (R, C, 1, ...) or (R, C), and (R,).
        w2, b2: (C, R, 1, ...) or (C, R), and (C,).
        backend: the layers' own choice.
    """
    if wants_parts() or not would_excite(mean, w1, b1, w2, b2, backend):
        return None
    return excite(mean, w1, b1, act, w2, b2, gate_act)


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
    behind = Epilogue(residual=residual, activation=activation)
    tensors = (x, gate, *behind.tensors())
    # Torch broadcasts and promotes, or says what is wrong.
    if not _is_plain(x, gate, residual) or torch._C._is_any_autocast_enabled():
        return behind.torch(x * gate)

    refused = decide(tensors, backend, lambda: f"scale_channels of {list(x.shape)}")

    def seen() -> Call:
        size = (sum(t.numel() for t in tensors) + x.numel()) * x.element_size()
        decision = Decision("torch", refused.reason) if refused is not None else Decision("triton", "scale")
        return Call("scale_channels", decision, None, 0, size, x.dtype, x.device, None, "")

    observed = notify(seen)
    if observed or refused is not None:
        return behind.torch(x * gate)
    if is_traced(tensors) or needs_gradients(tensors):
        return behind.torch(torch.ops.tritonconv.scale_channels(x, gate))
    return scale(x, gate, residual, activation)


def _is_plain(x: Tensor, gate: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernel computes this: one type, a gate of an image's channels, a residual of x's size."""
    if x.dim() not in (3, 4, 5) or gate.shape != (*x.shape[:2], *(1,) * (x.dim() - 2)) or x.numel() == 0:
        return False
    if (gate.dtype, gate.device) != (x.dtype, x.device):
        return False
    return residual is None or (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)


def _empty_like(x: Tensor) -> Tensor:
    return empty_output(x, tuple(x.shape), suggests_channels_last(x), x.dtype)


def _check(x: Tensor, gate: Tensor) -> None:
    if not _is_plain(x, gate, None) and x.numel():
        raise RuntimeError(
            f"tritonconv::scale_channels: expected a gate of size {[*x.shape[:2], *(1,) * (x.dim() - 2)]}, {x.dtype} on "
            f"{x.device}, but got {list(gate.shape)}, {gate.dtype} on {gate.device} (input {list(x.shape)})"
        )


@torch.library.custom_op("tritonconv::scale_channels", mutates_args=())
def _scale_channels(x: Tensor, gate: Tensor) -> Tensor:
    """x (N, C, *spatial) times gate (N, C, 1, ...), on Triton alone."""
    _check(x, gate)
    return scale(x, gate)


@_scale_channels.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    _check(x, gate)
    return _empty_like(x)


@torch.library.custom_op("tritonconv::scale_channels_backward", mutates_args=())
def _scale_channels_backward(dy: Tensor, x: Tensor, gate: Tensor, needs_x: bool, needs_gate: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate, each empty where it is not needed, on Triton alone."""
    dx, dgate = scale_gradients(dy, x, gate, needs_x, needs_gate)
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dgate is None else dgate


@_scale_channels_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor, needs_x: bool, needs_gate: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty_like(x) if needs_x else x.new_empty(0), gate.new_empty(gate.shape if needs_gate else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = torch.ops.tritonconv.scale_channels_backward(dy, *ctx.saved_tensors, *needs)
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


_scale_channels.register_autograd(_backward, setup_context=_save)
