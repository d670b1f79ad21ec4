"""Batch norm as registered operators: what torch.compile, export, fake tensors and autograd see.

Training is two operators, tritonconv::batch_norm_train and tritonconv::update_running_stats, because torch.library takes no
gradient for an operator that writes into its arguments. Calls without gradients go past them (ops/batch_norm/dispatch.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.launch import check_sizes, input_gradient, normalize, statistics, update_running
from tritonconv.ops.conv.conv_norm import Norm, combined, norm_gradient
from tritonconv.ops.core.activation import ActivationSpec, from_numbers
from tritonconv.ops.core.layout import as_format, empty_output, keeps_channels_last, pitch_of, wide

__all__ = [
    "as_dense",
    "as_readable",
    "batch_norm_eval",
    "batch_norm_train",
    "batch_statistics",
    "gradients",
    "update_running_stats",
]


def as_dense(x: Tensor) -> Tensor:
    """`x`, or a dense copy in the format that torch would give a result of it."""
    return as_format(x, keeps_channels_last(x))


def as_readable(x: Tensor) -> Tensor:
    """`x` itself where `normalize` reads it in place, also some channels of a wider tensor; else a dense copy."""
    return x if pitch_of(x) is not None else as_dense(x)


def batch_statistics(x: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [C], biased variance [C], count [1]) of a dense x, over all processes of the group if it has a name."""
    return combined(statistics(x), group)


def _empty_like(x: Tensor) -> Tensor:
    return empty_output(x, tuple(x.shape), keeps_channels_last(x), x.dtype)


@torch.library.custom_op("tritonconv::batch_norm_train", mutates_args=())
def batch_norm_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *, eps: float, activation: str,
    a: float, b: float, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y = act(bn(x) + residual) by the batch's own statistics, and these: mean, biased variance, count.

    `activation` is a name or ""; `group` names the process group whose pixels are normalized together, "" for none.
    """
    check_sizes(x, residual, weight=weight, bias=bias)
    x = as_dense(x)
    mean, var, count = batch_statistics(x, group)
    y = normalize(x, mean, var, weight, bias, eps, residual, from_numbers(activation, a, b))
    return y, mean, var, count


@batch_norm_train.register_fake
def _(x: Tensor, *_tensors: Any, **_numbers: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, channels = wide(x.dtype), x.shape[1]
    vectors = (x.new_empty(size, dtype=dtype) for size in (channels, channels, 1))
    return _empty_like(x), *vectors  # type: ignore[return-value]


@torch.library.custom_op("tritonconv::batch_norm_eval", mutates_args=())
def batch_norm_eval(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *,
    eps: float, activation: str, a: float, b: float,
) -> Tensor:  # fmt: skip
    """act(bn(x) + residual) by given statistics, which are constants."""
    check_sizes(x, residual, running_mean=mean, running_var=var, weight=weight, bias=bias)
    return normalize(as_readable(x), mean, var, weight, bias, eps, residual, from_numbers(activation, a, b))


@batch_norm_eval.register_fake
def _(x: Tensor, *_tensors: Any, **_numbers: Any) -> Tensor:
    return _empty_like(x)


@torch.library.custom_op("tritonconv::update_running_stats", mutates_args=("running_mean", "running_var"))
def update_running_stats(
    mean: Tensor, var: Tensor, count: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """Move running statistics towards the batch's, with the unbiased variance."""
    check_sizes(mean[None], None, running_mean=running_mean, running_var=running_var)
    update_running(mean, var, count, running_mean, running_var, momentum)


@update_running_stats.register_fake
def _(*_arguments: Any) -> None:
    return None


def gradients(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, eps: float, activation: ActivationSpec | None, group: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias and residual, each None where it is not needed.

    Args:
        x: dense.
        count: None where mean and variance were given.
        residual: None where it has no part in the activation's gradient.
        group: the process group whose pixels were normalized together; "" for none.
    """
    needs_x, needs_weight, needs_bias, needs_residual = needs
    # What the input's gradient cannot compute from dy and x again must be written.
    write = activation is not None and (needs_residual or residual is not None)
    norm = Norm(mean, var, weight, bias, eps, residual, activation, count)
    g, table, dweight, dbias = norm_gradient(
        dy, x, norm, group, before=needs_x, parameters=needs_weight or needs_bias, write=write
    )
    dx = None
    if needs_x:
        dx = input_gradient(dy if g is None else g, x, table, activation if g is None else None, count is not None)
    return dx, dweight if needs_weight else None, dbias if needs_bias else None, g if needs_residual else None


@torch.library.custom_op("tritonconv::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, *, eps: float, activation: str, a: float, b: float, group: str, needs_x: bool,
    needs_weight: bool, needs_bias: bool, needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and residual, each empty where it is not needed; see `gradients`."""
    check_sizes(x, dy, mean=mean, var=var, weight=weight, bias=bias)
    needs = (needs_x, needs_weight, needs_bias, needs_residual)
    act = from_numbers(activation, a, b)
    found = gradients(dy, as_dense(x), mean, var, count, weight, bias, residual, eps, act, group, needs)
    return tuple(x.new_empty(0) if t is None else t for t in found)  # type: ignore[return-value]


@batch_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, weight: Tensor | None, bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None, *, activation: str, needs_x: bool, needs_weight: bool, needs_bias: bool, needs_residual: bool,  # noqa: ARG001
    **_numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _empty_like(x) if needs_x else x.new_empty(0),
        torch.empty_like(weight) if needs_weight and weight is not None else x.new_empty(0),
        torch.empty_like(bias) if needs_bias and bias is not None else x.new_empty(0),
        _empty_like(x) if needs_residual and activation else x.new_empty(0),
    )


def _save_train(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual = inputs
    _, mean, var, count = output
    ctx.mark_non_differentiable(mean, var, count)
    _save(ctx, x, mean, var, count, weight, bias, residual, keyword_only_inputs)


def _save_eval(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG001
    x, mean, var, weight, bias, residual = inputs
    _save(ctx, x, mean, var, None, weight, bias, residual, keyword_only_inputs | dict(group=""))


def _save(
    ctx: Any, x: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, numbers: dict[str, Any],
) -> None:  # fmt: skip
    ctx.numbers, ctx.is_training = numbers, count is not None
    # Without an activation a residual has no part in the other gradients.
    ctx.save_for_backward(x, mean, var, count, weight, bias, residual if numbers["activation"] else None)


def _gradients(ctx: Any, dy: Tensor, needs: tuple[bool, bool, bool, bool]) -> list[Tensor | None]:
    """Of x, weight, bias and residual."""
    passed = bool(needs[3]) and not ctx.numbers["activation"]
    names = ("needs_x", "needs_weight", "needs_bias", "needs_residual")
    wanted = dict(zip(names, (*needs[:3], needs[3] and not passed), strict=True))
    found: list[Tensor | None] = [None] * 4
    if any(wanted.values()):
        results = torch.ops.tritonconv.batch_norm_backward(dy, *ctx.saved_tensors, **ctx.numbers, **wanted)
        found = [t if need else None for t, need in zip(results, wanted.values(), strict=True)]
    if passed:
        found[3] = dy
    return found


def _backward_train(ctx: Any, dy: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(_gradients(ctx, dy, ctx.needs_input_grad[:4]))


def _backward_eval(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if needs[1] or needs[2]:
        raise NotImplementedError("tritonconv::batch_norm_eval: given statistics are constants, and have no gradient")
    dx, *rest = _gradients(ctx, dy, (needs[0], *needs[3:6]))
    return dx, None, None, *rest


batch_norm_train.register_autograd(_backward_train, setup_context=_save_train)
batch_norm_eval.register_autograd(_backward_eval, setup_context=_save_eval)
