"""Group norm's operators. Running statistics have one of their own: torch.library takes no gradient beside a write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.core.activation import ActivationSpec, from_numbers
from tritonconv.ops.core.layout import as_dense, empty_like, wide
from tritonconv.ops.core.operator import Operator, differentiate, mutated
from tritonconv.ops.group_norm import launch
from tritonconv.ops.group_norm.launch import Affine, Needs
from tritonconv.ops.group_norm.torch_form import followed, normalized

__all__ = ["GROUP_NORM", "GROUP_NORM_BACKWARD", "UPDATE_INSTANCE_STATS"]


def check(x: Tensor, affine: Affine, groups: int, like: Tensor | None) -> None:
    """Raise RuntimeError for tensors that kernels would read beyond their ends."""
    if x.dim() < 2 or groups < 0 or (groups and x.shape[1] % groups):
        raise RuntimeError(f"tritonconv::group_norm: {groups} groups do not divide the channels of {list(x.shape)}")
    if not launch.fits(x.shape[1], x, groups):
        raise RuntimeError(f"tritonconv::group_norm: {x.shape[1]} channels of a pixel are too many for {x.dtype}")
    rows = tuple(x.shape[:2])
    for (name, t), shape in zip(affine._asdict().items(), (rows[1:], rows[1:], rows, rows), strict=True):
        if t is not None and (tuple(t.shape) != shape or t.device != x.device):
            raise RuntimeError(
                f"tritonconv::group_norm: expected {name} of size {list(shape)} on {x.device}, got {list(t.shape)} on "
                f"{t.device} (input {list(x.shape)})"
            )
    if like is not None and like.shape != x.shape:
        raise RuntimeError(
            f"tritonconv::group_norm: expected a tensor of the input's size {list(x.shape)}, but got {list(like.shape)}"
        )


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, groups: int, eps: float, activation: str, a: float, b: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """act((norm(x) * weight + bias) * (1 + scale) + shift + residual), and the statistics [3, groups of all images].

    `groups` is how many an image has, or 0 if each pixel is a group of all channels; `activation` is a name or "".
    """
    affine = Affine(weight, bias, scale, shift)
    check(x, affine, groups, residual)
    if x.numel() == 0:
        return _outputs(x, weight, bias, scale, shift, residual, groups)
    return launch.normalize(as_dense(x), affine, groups, eps, residual, from_numbers(activation, a, b))


def _outputs(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    count = launch.statistics_count(x, rest[5])
    return empty_like(x), x.new_empty((3, count), dtype=wide(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, residual, ctx.groups, ctx.eps, activation, a, b = inputs
    ctx.activation = (activation, a, b)
    # Without an activation a residual has no part in the other gradients.
    ctx.save_for_backward(*tensors, residual if activation else None, output[1])


def _backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    *tensors, statistics = ctx.saved_tensors
    needs = list(ctx.needs)
    passed = needs[5] and not ctx.activation[0]
    needs[5] = needs[5] and not passed
    found: list[Tensor | None] = [None] * 6
    if torch.is_grad_enabled() and any(needs):
        found = differentiate(_form(ctx.groups, ctx.eps, from_numbers(*ctx.activation)), tensors, needs, dy)
    elif any(needs):
        results = GROUP_NORM_BACKWARD(dy, *tensors, statistics, ctx.groups, ctx.eps, *ctx.activation, *needs)
        found = [t if need else None for t, need in zip(results, needs, strict=True)]
    if passed:
        found[5] = dy
    return found


def _form(groups: int, eps: float, activation: ActivationSpec | None) -> Any:
    """The computation by torch, for second derivatives."""

    def form(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return followed(normalized(x, weight, bias, groups, eps), scale, shift, residual, activation)

    return form


GROUP_NORM = Operator("group_norm", _forward, _outputs, save=_save, backward=_backward)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, statistics: Tensor, groups: int, eps: float, activation: str, a: float, b: float,
    needs_x: bool, needs_weight: bool, needs_bias: bool, needs_scale: bool, needs_shift: bool, needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, scale, shift and residual, each empty where it is not needed."""
    affine = Affine(weight, bias, scale, shift)
    check(x, affine, groups, residual)
    check(x, affine, groups, dy)
    needs = Needs(needs_x, needs_weight, needs_bias, needs_scale, needs_shift, needs_residual)
    spec = from_numbers(activation, a, b)
    return launch.gradients(dy, as_dense(x), statistics, affine, groups, eps, residual, spec, needs)  # type: ignore[return-value]


def _gradients_outputs(_dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    needs_x, *needs_vectors, needs_residual = rest[11:]
    vectors = [
        t.new_empty(t.shape) if need and t is not None else None for t, need in zip(rest[:4], needs_vectors, strict=True)
    ]
    return empty_like(x) if needs_x else None, *vectors, empty_like(x) if needs_residual and rest[8] else None


GROUP_NORM_BACKWARD = Operator("group_norm_backward", _gradients, _gradients_outputs)


def _update(
    statistics: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, pixels: int
) -> None:
    """Move an instance norm's running statistics towards the mean of its images', with the unbiased variance."""
    for t in (running_mean, running_var):
        if t is not None and (t.dim() != 1 or statistics.shape[1] % t.shape[0]):
            raise RuntimeError(
                f"tritonconv::update_instance_stats: {list(statistics.shape)} are no statistics of {list(t.shape)} channels"
            )
    launch.update_running(statistics, pixels, running_mean, running_var, momentum)
    for t in (running_mean, running_var):
        if t is not None:
            mutated(t)


UPDATE_INSTANCE_STATS = Operator(
    "update_instance_stats", _update, lambda *_arguments: None, mutates=("running_mean", "running_var")
)
