"""Batch norm, with the function of torch.nn.functional."""

from __future__ import annotations

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.batch_norm.call import BATCH_NORM

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Batch norm, as `torch.nn.functional.batch_norm` (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Statistics are computed in fp32 (fp64 for fp64), and never as a difference of sums of squares.

    Args:
        input: (N, C) or (N, C, *spatial), fp16, bf16, fp32 or fp64.
        running_mean, running_var: (C,); they are updated in place in training, where both may be None.
        weight, bias: (C,) or None; of the input's dtype or, for fp16 and bf16, all four in fp32.
        training: normalize with the batch's own statistics.
        momentum: weight of the batch in the running statistics; eps: added to the variance.

    Returns:
        A tensor of the input's size and dtype; channels-last if the input is, else contiguous.

    Raises:
        ValueError: a single value per channel in training; an eps that is not positive in training, or negative.
        RuntimeError: sizes, dtypes or devices that do not fit; running statistics missing in eval mode.

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=1e-12).tolist()
    [[-1.0], [1.0]]
    """
    tensors = (input, running_mean, running_var, weight, bias, None)
    y: Tensor = BATCH_NORM(tensors, ((training, momentum, eps), None, ""))
    return y
