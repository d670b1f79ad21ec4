"""Deformable convolution, with the name and signature of torchvision.ops."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.deform.operator import deform_convolution

__all__ = ["deform_conv2d"]


def deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`torchvision.ops.deform_conv2d`: a convolution whose taps have learned offsets and a learned mask.

    Without a mask this is version 1 (Dai et al. 2017), with a mask version 2 (Zhu et al. 2019). No samples are written to
    memory, forward or backward. Under autocast the computation stays in half precision.

    Args:
        input: (N, C, H, W), fp16, bf16, fp32 or fp64.
        offset: (N, 2 * offset_groups * R * S, P, Q), pairs of (y, x) in pixels; of the input's dtype, or fp32 for an input
            of half precision.
        weight: (K, C / groups, R, S), of the input's dtype; the number of groups follows from its second size.
        bias: (K,), of the input's dtype.
        stride, padding, dilation: an int or a pair.
        mask: (N, offset_groups * R * S, P, Q), of any dtype that the offset may have.

    Returns:
        (N, K, P, Q), of the input's dtype; channels-last if the input or the weight is.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; ValueError for an input that does not have four axes.
        TypeError: arguments of a wrong type.

    >>> image, weight = torch.arange(9.0).view(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    >>> half_a_pixel_right = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    >>> deform_conv2d(image, half_a_pixel_right, weight)[0, 0, 0].tolist()
    [0.5, 1.5, 1.0]
    """
    numbers = (stride, padding, dilation)
    return deform_convolution("deform_conv2d", input, offset, mask, weight, Epilogue(bias), numbers)
