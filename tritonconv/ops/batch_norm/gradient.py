"""The gradient of a batch norm and of what follows it, alone or after a convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tritonconv.ops.batch_norm import launch
from tritonconv.ops.batch_norm.launch import Statistics
from tritonconv.ops.batch_norm.ranks import add_over_ranks, combine_over_ranks
from tritonconv.ops.core.activation import ActivationSpec

__all__ = ["Norm", "combined", "norm_gradient"]


class Norm(NamedTuple):
    """A batch norm of z, behind a convolution or alone, and what follows it."""

    mean: Tensor
    """(K,): what z was normalized with."""
    var: Tensor
    """(K,), biased."""
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None
    activation: ActivationSpec | None
    pixels: Tensor | None
    """[1], how many the statistics were taken of; None where they are constants."""


def combined(parts: Statistics, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [K], biased variance [K], count [1]) of all slots, and of all processes of the group if it has a name."""
    mean, var, count = launch.combine(parts)
    return combine_over_ranks(mean, var, count, group) if group else (mean, var, count)


def norm_gradient(
    dy: Tensor, z: Tensor, norm: Norm, group: str, *, before: bool, parameters: bool, write: bool
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(g, table, gradients of the batch norm's weight and bias), by as few launches as give what is needed.

    g = dy * act' is None where it is not written; the table is that of `launch.gradient_table`.

    Args:
        dy: gradient of act(bn(z) + residual), of any strides.
        norm: without its residual where that has no part in the activation's gradient.
        group: the process group that shared its statistics; "" for none.
        before: whether something before z needs a gradient. Every process must say the same.
        parameters: whether the batch norm's weight or bias needs one.
        write: whether g is to be written.
    """
    batch_statistics = norm.pixels is not None
    vectors = norm.mean, norm.var, norm.weight, norm.bias, norm.eps
    sums = g = None
    if write or parameters or (before and batch_statistics):
        sums, g = launch.reduce_gradients(dy, z, *vectors, norm.residual, norm.activation, write)
    # Whatever is before z depends on everyone's pixels. Weight and bias take the sums over this process's alone, for
    # whoever joins gradients joins these too.
    everyone = add_over_ranks(sums, group) if group and before and batch_statistics and sums is not None else sums
    return g, *launch.gradient_table(everyone, norm.pixels, *vectors, batch_statistics, sums)
