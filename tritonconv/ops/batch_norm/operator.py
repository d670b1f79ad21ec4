"""Batch norm's operators. Training is two, since torch.library takes no gradient for one that writes into its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.gradient import Norm, combined, norm_gradient
from tritonconv.ops.batch_norm.launch import check_sizes, input_gradient, normalize, statistics, update_running
from tritonconv.ops.core.activation import ActivationSpec, from_numbers
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import as_dense, empty_like, pitch_of, wide
from tritonconv.ops.core.operator import Operator, differentiate, mutated
from tritonconv.ops.core.torch_norm import batch_norm_on_torch

__all__ = ["BATCH_NORM_BACKWARD", "BATCH_NORM_EVAL", "BATCH_NORM_TRAIN", "UPDATE_RUNNING_STATS", "gradients", "norm_form"]


def as_readable(x: Tensor) -> Tensor:
    """`x` itself where `normalize` reads it in place, also some channels of a wider tensor; else a dense copy."""
    return x if pitch_of(x) is not None else as_dense(x)


# By the batch's own statistics.


def _train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, activation: str, a: float,
    b: float, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y = act(bn(x) + residual) by the batch's own statistics, and these: mean, biased variance, count.

    `activation` is a name or ""; `group` names the process group whose pixels are normalized together, "" for none.
    """
    check_sizes(x, residual, weight=weight, bias=bias)
    x = as_dense(x)
    mean, var, count = combined(statistics(x), group)
    y = normalize(x, mean, var, weight, bias, eps, residual, from_numbers(activation, a, b))
    return y, mean, var, count


def _train_outputs(x: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    dtype, channels = wide(x.dtype), x.shape[1]
    return empty_like(x), *(x.new_empty(size, dtype=dtype) for size in (channels, channels, 1))


def _train_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, residual, *ctx.numbers = inputs
    ctx.is_training = True
    _, mean, var, count = output
    # Without an activation a residual has no part in the other gradients.
    ctx.save_for_backward(x, mean, var, count, weight, bias, residual if ctx.numbers[1] else None)


def _train_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    return _gradients(ctx, dy, ctx.needs)


BATCH_NORM_TRAIN = Operator(
    "batch_norm_train", _train, _train_outputs, save=_train_save, backward=_train_backward,
    collective=lambda *arguments: bool(arguments[8]),
)  # fmt: skip


# By given statistics.


def _eval(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float,
    activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(x) + residual) by given statistics, which are constants."""
    check_sizes(x, residual, running_mean=mean, running_var=var, weight=weight, bias=bias)
    return normalize(as_readable(x), mean, var, weight, bias, eps, residual, from_numbers(activation, a, b))


def _eval_outputs(x: Tensor, *_rest: Any) -> Tensor:
    return empty_like(x)


def _eval_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, mean, var, weight, bias, residual, *numbers = inputs
    ctx.is_training, ctx.numbers = False, [*numbers, ""]
    ctx.save_for_backward(x, mean, var, None, weight, bias, residual if numbers[1] else None)


def _eval_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    if ctx.needs[1] or ctx.needs[2]:
        raise NotImplementedError("tritonconv::batch_norm_eval: given statistics are constants, and have no gradient")
    dx, *rest = _gradients(ctx, dy, (ctx.needs[0], *ctx.needs[3:6]))
    return [dx, None, None, *rest]


BATCH_NORM_EVAL = Operator("batch_norm_eval", _eval, _eval_outputs, save=_eval_save, backward=_eval_backward)


# Running statistics.


def _update(
    mean: Tensor, var: Tensor, count: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """Move running statistics towards the batch's, with the unbiased variance."""
    check_sizes(mean[None], None, running_mean=running_mean, running_var=running_var)
    update_running(mean, var, count, running_mean, running_var, momentum)
    for t in (running_mean, running_var):
        if t is not None:
            mutated(t)


UPDATE_RUNNING_STATS = Operator(
    "update_running_stats", _update, lambda *_arguments: None, mutates=("running_mean", "running_var")
)


# Gradients.


def gradients(
    dy: Tensor, x: Tensor, norm: Norm, group: str, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, each None where it is not needed.

    Args:
        x: dense.
        norm: its residual is None where that has no part in the activation's gradient.
        group: the process group whose pixels were normalized together; "" for none.
    """
    needs_x, needs_weight, needs_bias, needs_residual = needs
    # What the input's gradient cannot compute from dy and x again must be written.
    write = norm.activation is not None and (needs_residual or norm.residual is not None)
    g, table, dweight, dbias = norm_gradient(
        dy, x, norm, group, before=needs_x, parameters=needs_weight or needs_bias, write=write
    )
    dx = None
    if needs_x:
        own = norm.pixels is not None
        dx = input_gradient(dy if g is None else g, x, table, norm.activation if g is None else None, own)
    return dx, dweight if needs_weight else None, dbias if needs_bias else None, g if needs_residual else None


def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, eps: float, activation: str, a: float, b: float, group: str, needs_x: bool,
    needs_weight: bool, needs_bias: bool, needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and residual, each empty where it is not needed."""
    check_sizes(x, dy, mean=mean, var=var, weight=weight, bias=bias)
    norm = Norm(mean, var, weight, bias, eps, residual, from_numbers(activation, a, b), count)
    needs = (needs_x, needs_weight, needs_bias, needs_residual)
    return gradients(dy, as_dense(x), norm, group, needs)  # type: ignore[return-value]


def _backward_outputs(_dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    weight, bias, activation = rest[3], rest[4], rest[7]
    needs_x, needs_weight, needs_bias, needs_residual = rest[11:]
    return (
        empty_like(x) if needs_x else None, torch.empty_like(weight) if needs_weight and weight is not None else None,
        torch.empty_like(bias) if needs_bias and bias is not None else None,
        empty_like(x) if needs_residual and activation else None,
    )  # fmt: skip


BATCH_NORM_BACKWARD = Operator(
    "batch_norm_backward", _backward, _backward_outputs, collective=lambda *arguments: bool(arguments[12])
)


def _gradients(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Of x, weight, bias and residual."""
    eps, activation, a, b, group = ctx.numbers
    passed = bool(needs[3]) and not activation
    wanted = (*needs[:3], needs[3] and not passed)
    found: list[Tensor | None] = [None] * 4
    if torch.is_grad_enabled() and any(wanted):
        found = _differentiable(ctx, dy, wanted)
    elif any(wanted):
        results = BATCH_NORM_BACKWARD(dy, *ctx.saved_tensors, eps, activation, a, b, group, *wanted)
        found = [t if need else None for t, need in zip(results, wanted, strict=True)]
    if passed:
        found[3] = dy
    return found


def _differentiable(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    x, mean, var, _, *others = ctx.saved_tensors
    eps, activation, a, b, group = ctx.numbers
    if group:
        raise NotImplementedError("batch_norm: there is no second derivative over the processes of a group")
    fixed = None if ctx.is_training else (mean, var)
    return differentiate(norm_form(fixed, eps, from_numbers(activation, a, b)), (x, *others), needs, dy)


def norm_form(fixed: tuple[Tensor, Tensor] | None, eps: float, activation: ActivationSpec | None) -> Any:
    """act(bn(x) + residual) as torch computes it from x, weight, bias and residual.

    Args:
        fixed: mean and variance; None: the batch's own.
    """

    def form(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        mean, var = fixed or (None, None)
        y = batch_norm_on_torch(x, mean, var, weight, bias, training=fixed is None, eps=eps)
        return Epilogue(residual=residual, activation=activation).torch(y)

    return form
