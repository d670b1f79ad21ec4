"""Draws of norms, and of what follows them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tritonconv.functional as TF

from .call import Call
from .convolutions import activated, activation_of
from .draw import Draw
from .views import Input

__all__ = ["OPERATORS"]

F = torch.nn.functional


def tracked_inputs(
    d: Draw, shape: tuple[int, ...], own: bool, tracked: float, affine: float
) -> dict[str, Input | None]:  # fmt: skip
    """A norm's input of this shape, running statistics (needed without statistics of its own), weight and bias."""
    wide = torch.float32 if d.half and d.chance(0.6) else d.dtype
    has_running, has_affine = not own or d.chance(tracked), d.chance(affine)

    def vector(values: str, there: bool, written: bool = False) -> Input | None:
        size = (shape[1],)
        return d.input(size, dtype=wide, values=values, written=written, differentiable=not written) if there else None

    return dict(
        input=d.input(shape), running_mean=vector("normal", has_running, True),
        running_var=vector("positive", has_running, True), weight=vector("normal", has_affine),
        bias=vector("normal", has_affine),
    )  # fmt: skip


def batch_norm(d: Draw) -> Call:
    nd, c = d.one((0, 1, 2, 2, 3)), d.channels()
    training = d.chance(0.5)
    spatial = d.spatial(nd, 6) if nd else ()
    shape = (d.one((5, 8) if training else (1, 2, 3, 0)), c, *spatial)
    inputs = tracked_inputs(d, shape, training, 0.7, 0.7)
    arguments = dict(training=training, momentum=d.one((0.1, 0.3, 1.0)), eps=d.one((1e-5, 1e-3)))
    return Call(TF.batch_norm, F.batch_norm, inputs, arguments, nd, slack=4.0)


def cancelled(members: int) -> float:
    """How much of a gradient's terms cancels: of two elements all but what eps leaves."""
    return 8.0 if members > 3 else 4096.0


def norm_inputs(d: Draw, n: int, c: int, shape: tuple[int, ...]) -> tuple[dict[str, Input | None], Any]:
    """What follows a norm, for half of the calls, and their activation."""
    wide = torch.float32 if d.half and d.chance(0.6) else d.dtype
    following = d.chance(0.5)

    def rows() -> Input | None:
        return d.input((n, c), dtype=wide) if following and d.chance(0.6) else None

    inputs = dict(scale=rows(), shift=rows(), residual=d.input(shape) if following and d.chance(0.6) else None)
    return inputs, activation_of(d) if following else None


def group_norm(d: Draw, channels: bool) -> Call:
    """Group norm, or a layer norm over the channels of each pixel."""
    nd, groups, n = d.one((0, 1, 2, 2, 3)), d.one((1, 2, 3, 5)), d.one((1, 2, 3) if channels else (1, 2, 3, 0))
    c = groups * d.one((1, 2, 4, 10))
    shape = (n, c, *(d.spatial(nd, 6) if nd else ()))
    wide = torch.float32 if d.half and d.chance(0.6) else d.dtype
    weight = d.maybe(0.6, (c,))
    if weight is not None:
        weight.dtype = wide
    bias = d.input((c,), dtype=wide) if weight is not None and d.chance(0.7) else None
    following, activation = norm_inputs(d, n, c, shape)
    cancels = cancelled(c * (1 if channels else math.prod(shape[2:])) // (1 if channels else groups))
    inputs = dict(input=d.input(shape), weight=weight, bias=bias, **following)
    arguments: dict[str, Any] = dict(eps=d.one((1e-5, 1e-3)))
    arguments |= {} if channels else dict(num_groups=groups)
    exact = not channels and activation is None and all(t is None for t in following.values())
    if exact:
        for name in following:
            inputs.pop(name)
        return Call(TF.group_norm, plain_group_norm, inputs, arguments, nd, slack=4.0, cancels=cancels)
    arguments |= dict(activation=activation)
    ours = TF.layer_norm_channels if channels else TF.group_norm
    return Call(ours, partial(followed_norm, channels), inputs, arguments, nd, exact=False, slack=8.0, cancels=cancels)


def plain_group_norm(input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Tensor:
    if weight is None and isinstance(bias, Tensor):
        # Torch's gradient fails for a bias without a weight.
        weight = torch.ones_like(bias)
    return F.group_norm(input, num_groups, weight, bias, eps)


def followed_norm(
    channels: bool, input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, eps: float, activation: Any, num_groups: int = 1,
) -> Tensor:  # fmt: skip
    ones = (1,) * (input.dim() - 2)
    if channels:
        y = F.layer_norm(input.movedim(1, -1), (input.shape[1],), weight, bias, eps).movedim(-1, 1)
    else:
        y = F.group_norm(input, num_groups, weight, bias, eps)
    y = y if scale is None else y * (1 + scale.view(*scale.shape, *ones))
    y = y if shift is None else y + shift.view(*shift.shape, *ones)
    return activated(y if residual is None else y + residual, activation)


def instance_norm(d: Draw) -> Call:
    nd, c, batch = d.one((1, 2, 2, 3)), d.channels(), d.chance(0.7)
    shape = (d.one((1, 2, 3)), c, *(n + 1 for n in d.spatial(nd, 5)))
    inputs = tracked_inputs(d, shape, batch, 0.5, 0.6)
    arguments = dict(use_input_stats=batch, momentum=d.one((0.1, 0.3, 1.0)), eps=d.one((1e-5, 1e-3)))
    return Call(
        TF.instance_norm, F.instance_norm, inputs, arguments, nd, slack=4.0, cancels=cancelled(math.prod(shape[2:]))
    )


def layer_norm(d: Draw) -> Call:
    c = d.one((1, 3, 4, 5, 8, 12, 17))
    shape = (*d.each(d.one((0, 1, 2, 3)), (1, 2, 3, 5)), c)
    inputs = dict(input=d.input(shape), weight=d.maybe(0.6, (c,)), bias=d.maybe(0.5, (c,)))
    return Call(TF.layer_norm, F.layer_norm, inputs, dict(normalized_shape=(c,)), slack=4.0, cancels=cancelled(c))


OPERATORS = {
    "batch_norm": batch_norm, "group_norm": partial(group_norm, channels=False),
    "layer_norm_channels": partial(group_norm, channels=True), "instance_norm": instance_norm, "layer_norm": layer_norm,
}  # fmt: skip
