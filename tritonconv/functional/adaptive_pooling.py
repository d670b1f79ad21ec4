"""Adaptive pooling, with the functions of torch.nn.functional."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.adaptive.operator import adaptive_pool

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
]  # fmt: skip


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each bin, where the bins cover the image evenly, as `torch.nn.functional.adaptive_avg_pool1d`.

    Sums are in fp32 (fp64 for fp64). Gradients are gathered, so that every run gives the same bits.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        output_size: an int.

    Returns:
        A tensor of the input's dtype with spatial axes of `output_size`; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> adaptive_avg_pool1d(torch.tensor([[[1.0, 2.0, 3.0]]]), 2).tolist()
    [[[1.5, 2.5]]]
    """
    result: Tensor = adaptive_pool("avg", input, output_size, 1)
    return result


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each bin, where the bins cover the image evenly, as `torch.nn.functional.adaptive_avg_pool2d`.

    Sums are in fp32 (fp64 for fp64). Gradients are gathered, so that every run gives the same bits.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 2 of them; None keeps the size of an axis.

    Returns:
        A tensor of the input's dtype with spatial axes of `output_size`; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> adaptive_avg_pool2d(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 2)).tolist()
    [[[[1.5, 2.5]]]]
    """
    result: Tensor = adaptive_pool("avg", input, output_size, 2)
    return result


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each bin, where the bins cover the image evenly, as `torch.nn.functional.adaptive_avg_pool3d`.

    Sums are in fp32 (fp64 for fp64). Gradients are gathered, so that every run gives the same bits.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 3 of them; None keeps the size of an axis.

    Returns:
        A tensor of the input's dtype with spatial axes of `output_size`; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> adaptive_avg_pool3d(torch.tensor([[[[[1.0, 2.0, 3.0]]]]]), (None, 1, 2)).tolist()
    [[[[[1.5, 2.5]]]]]
    """
    result: Tensor = adaptive_pool("avg", input, output_size, 3)
    return result


def adaptive_max_pool1d_with_indices(
    input: Tensor,
    output_size: Any,
    return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Maximum of each bin, with its position, as `torch.nn.functional.adaptive_max_pool1d_with_indices`.

    Args:
        input, output_size: as for `adaptive_max_pool1d`.
        return_indices: has no effect, as in torch.

    Returns:
        (maxima, positions), both in the format of the result of `adaptive_max_pool1d`; positions are int64 and count the
        elements of each image row by row.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> [t.tolist() for t in adaptive_max_pool1d_with_indices(torch.tensor([[[5.0, 7.0, 7.0]]]), 1)]
    [[[[7.0]]], [[[1]]]]
    """
    result: tuple[Tensor, Tensor] = adaptive_pool("max", input, output_size, 1, True)
    return result


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maximum of each bin, where the bins cover the image evenly, as `torch.nn.functional.adaptive_max_pool1d`.

    If several elements are equal, the first one is the maximum. NaN is greater than all numbers; if there are several NaNs,
    the last one is the maximum. Gradients are gathered, so that every run gives the same bits.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        output_size: an int.
        return_indices: return the positions too, as `adaptive_max_pool1d_with_indices` does.

    Returns:
        A tensor of the input's dtype with spatial axes of `output_size`; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> adaptive_max_pool1d(torch.tensor([[[5.0, 7.0, 7.0]]]), 1).tolist()
    [[[7.0]]]
    """
    return adaptive_pool("max", input, output_size, 1, return_indices)


def adaptive_max_pool2d_with_indices(
    input: Tensor,
    output_size: Any,
    return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Maximum of each bin, with its position, as `torch.nn.functional.adaptive_max_pool2d_with_indices`.

    Args:
        input, output_size: as for `adaptive_max_pool2d`.
        return_indices: has no effect, as in torch.

    Returns:
        (maxima, positions), both in the format of the result of `adaptive_max_pool2d`; positions are int64 and count the
        elements of each image row by row.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> [t.tolist() for t in adaptive_max_pool2d_with_indices(torch.tensor([[[[5.0, 7.0, 7.0]]]]), 1)]
    [[[[[7.0]]]], [[[[1]]]]]
    """
    result: tuple[Tensor, Tensor] = adaptive_pool("max", input, output_size, 2, True)
    return result


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maximum of each bin, where the bins cover the image evenly, as `torch.nn.functional.adaptive_max_pool2d`.

    If several elements are equal, the first one is the maximum. NaN is greater than all numbers; if there are several NaNs,
    the last one is the maximum. Gradients are gathered, so that every run gives the same bits.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 2 of them; None keeps the size of an axis.
        return_indices: return the positions too, as `adaptive_max_pool2d_with_indices` does.

    Returns:
        A tensor of the input's dtype with spatial axes of `output_size`; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> adaptive_max_pool2d(torch.tensor([[[[5.0, 7.0, 7.0]]]]), 1).tolist()
    [[[[7.0]]]]
    """
    return adaptive_pool("max", input, output_size, 2, return_indices)


def adaptive_max_pool3d_with_indices(
    input: Tensor,
    output_size: Any,
    return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Maximum of each bin, with its position, as `torch.nn.functional.adaptive_max_pool3d_with_indices`.

    Args:
        input, output_size: as for `adaptive_max_pool3d`.
        return_indices: has no effect, as in torch.

    Returns:
        (maxima, positions), both in the format of the result of `adaptive_max_pool3d`; positions are int64 and count the
        elements of each image row by row.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> [t.tolist() for t in adaptive_max_pool3d_with_indices(torch.tensor([[[[[5.0, 7.0, 7.0]]]]]), 1)]
    [[[[[[7.0]]]]], [[[[[1]]]]]]
    """
    result: tuple[Tensor, Tensor] = adaptive_pool("max", input, output_size, 3, True)
    return result


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maximum of each bin, where the bins cover the image evenly, as `torch.nn.functional.adaptive_max_pool3d`.

    If several elements are equal, the first one is the maximum. NaN is greater than all numbers; if there are several NaNs,
    the last one is the maximum. Gradients are gathered, so that every run gives the same bits.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 3 of them; None keeps the size of an axis.
        return_indices: return the positions too, as `adaptive_max_pool3d_with_indices` does.

    Returns:
        A tensor of the input's dtype with spatial axes of `output_size`; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not accept.
        TypeError: an output size of a wrong type.

    >>> adaptive_max_pool3d(torch.tensor([[[[[5.0, 7.0, 7.0]]]]]), 1).tolist()
    [[[[[7.0]]]]]
    """
    return adaptive_pool("max", input, output_size, 3, return_indices)
