"""Stochastic pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.stochastic import stochastic_pool

__all__ = ["stochastic_pool2d"]


def stochastic_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Pooling that draws one element of each window (Zeiler and Fergus 2013, arXiv:1301.3557).

    In training an element x_i is drawn with probability x_i / sum(x), where what is negative counts as zero; a window
    without any positive element gives zero. The gradient goes to the drawn element alone. In eval mode the result is the
    mean with these probabilities, sum(x_i^2) / sum(x), and has that formula's gradient. A window whose sum is not finite
    gives NaN.

    One uniform number a result comes from torch's generator, so that `torch.manual_seed` or `generator` settles the choice,
    on any backend. The element is the first, row by row, at which the sum up to it exceeds that share of the whole sum;
    sums are in fp32 (fp64 for fp64). The numbers lie as the result does: a channels-last input draws others.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64; meant to follow an activation such as ReLU.
        kernel_size: an int or two; stride: likewise, None for `kernel_size`.
        padding: an int or two, zeros that are never drawn, at most half of `kernel_size`.
        ceil_mode: let the last windows reach beyond the image, as `torch.nn.functional.max_pool2d` does.
        training: draw; else the weighted mean.
        generator: where the numbers come from; None: torch's default generator of the input's device.

    Returns:
        (N, C, P, Q) or (C, P, Q), of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: sizes or dtypes that do not fit.
        TypeError: arguments of a wrong type.

    >>> x = torch.tensor([[[0.0, 3.0], [-1.0, 0.0]]])
    >>> stochastic_pool2d(x, 2).item()
    3.0
    >>> stochastic_pool2d(torch.tensor([[[1.0, 3.0]]]), (1, 2), training=False).item()
    2.5
    """
    return stochastic_pool(input, kernel_size, stride, padding, ceil_mode, training, generator)
