"""Adaptive pooling, as torch.nn.functional has it."""

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
    """Means over bins that cover the image evenly, as `torch.nn.functional.adaptive_avg_pool1d`.

    Sums are in fp32 (fp64 for fp64). Gradients are gathered: the same bits on every run.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        output_size: an int.

    Returns:
        Of the input's dtype, with `output_size` for its spatial axes; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> adaptive_avg_pool1d(torch.tensor([[[1.0, 2.0, 3.0]]]), 2).tolist()
    [[[1.5, 2.5]]]
    """
    result: Tensor = adaptive_pool("avg", input, output_size, 1)
    return result


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Means over bins that cover the image evenly, as `torch.nn.functional.adaptive_avg_pool2d`.

    Sums are in fp32 (fp64 for fp64). Gradients are gathered: the same bits on every run.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 2 of them; None leaves an axis as it is.

    Returns:
        Of the input's dtype, with `output_size` for its spatial axes; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> adaptive_avg_pool2d(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 2)).tolist()
    [[[[1.5, 2.5]]]]
    """
    result: Tensor = adaptive_pool("avg", input, output_size, 2)
    return result


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Means over bins that cover the image evenly, as `torch.nn.functional.adaptive_avg_pool3d`.

    Sums are in fp32 (fp64 for fp64). Gradients are gathered: the same bits on every run.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 3 of them; None leaves an axis as it is.

    Returns:
        Of the input's dtype, with `output_size` for its spatial axes; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

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
    """Maxima over bins and where they were, as `torch.nn.functional.adaptive_max_pool1d_with_indices`.

    Args:
        input, output_size: as `adaptive_max_pool1d` takes them.
        return_indices: has no effect, as in torch.

    Returns:
        (maxima, places), both as `adaptive_max_pool1d` gives its result; places are int64, counted row by row through each
        image.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> [t.tolist() for t in adaptive_max_pool1d_with_indices(torch.tensor([[[5.0, 7.0, 7.0]]]), 1)]
    [[[[7.0]]], [[[1]]]]
    """
    result: tuple[Tensor, Tensor] = adaptive_pool("max", input, output_size, 1, True)
    return result


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima over bins that cover the image evenly, as `torch.nn.functional.adaptive_max_pool1d`.

    Of equal elements the first counts, of NaNs, which are greater than all else, the last. Gradients are gathered: the same
    bits on every run.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        output_size: an int.
        return_indices: return the places too, as `adaptive_max_pool1d_with_indices` does.

    Returns:
        Of the input's dtype, with `output_size` for its spatial axes; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> adaptive_max_pool1d(torch.tensor([[[5.0, 7.0, 7.0]]]), 1).tolist()
    [[[7.0]]]
    """
    return adaptive_pool("max", input, output_size, 1, return_indices)


def adaptive_max_pool2d_with_indices(
    input: Tensor,
    output_size: Any,
    return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Maxima over bins and where they were, as `torch.nn.functional.adaptive_max_pool2d_with_indices`.

    Args:
        input, output_size: as `adaptive_max_pool2d` takes them.
        return_indices: has no effect, as in torch.

    Returns:
        (maxima, places), both as `adaptive_max_pool2d` gives its result; places are int64, counted row by row through each
        image.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> [t.tolist() for t in adaptive_max_pool2d_with_indices(torch.tensor([[[[5.0, 7.0, 7.0]]]]), 1)]
    [[[[[7.0]]]], [[[[1]]]]]
    """
    result: tuple[Tensor, Tensor] = adaptive_pool("max", input, output_size, 2, True)
    return result


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima over bins that cover the image evenly, as `torch.nn.functional.adaptive_max_pool2d`.

    Of equal elements the first counts, of NaNs, which are greater than all else, the last. Gradients are gathered: the same
    bits on every run.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 2 of them; None leaves an axis as it is.
        return_indices: return the places too, as `adaptive_max_pool2d_with_indices` does.

    Returns:
        Of the input's dtype, with `output_size` for its spatial axes; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> adaptive_max_pool2d(torch.tensor([[[[5.0, 7.0, 7.0]]]]), 1).tolist()
    [[[[7.0]]]]
    """
    return adaptive_pool("max", input, output_size, 2, return_indices)


def adaptive_max_pool3d_with_indices(
    input: Tensor,
    output_size: Any,
    return_indices: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Maxima over bins and where they were, as `torch.nn.functional.adaptive_max_pool3d_with_indices`.

    Args:
        input, output_size: as `adaptive_max_pool3d` takes them.
        return_indices: has no effect, as in torch.

    Returns:
        (maxima, places), both as `adaptive_max_pool3d` gives its result; places are int64, counted row by row through each
        image.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> [t.tolist() for t in adaptive_max_pool3d_with_indices(torch.tensor([[[[[5.0, 7.0, 7.0]]]]]), 1)]
    [[[[[[7.0]]]]], [[[[[1]]]]]]
    """
    result: tuple[Tensor, Tensor] = adaptive_pool("max", input, output_size, 3, True)
    return result


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima over bins that cover the image evenly, as `torch.nn.functional.adaptive_max_pool3d`.

    Of equal elements the first counts, of NaNs, which are greater than all else, the last. Gradients are gathered: the same
    bits on every run.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        output_size: an int or 3 of them; None leaves an axis as it is.
        return_indices: return the places too, as `adaptive_max_pool3d_with_indices` does.

    Returns:
        Of the input's dtype, with `output_size` for its spatial axes; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: an input or an output size that torch does not take.
        TypeError: an output size that is none.

    >>> adaptive_max_pool3d(torch.tensor([[[[[5.0, 7.0, 7.0]]]]]), 1).tolist()
    [[[[[7.0]]]]]
    """
    return adaptive_pool("max", input, output_size, 3, return_indices)
