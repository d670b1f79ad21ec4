"""Norms, with the functions of torch.nn.functional, and what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.batch_norm.call import BATCH_NORM
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.group_norm.call import GROUP_NORM_FAMILY, INSTANCE_NORM, LAYER_NORM, LAYER_NORM_CHANNELS

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "layer_norm_channels"]


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


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, activation: Any = None,
) -> Tensor:  # fmt: skip
    """Group norm, as `torch.nn.functional.group_norm` (Wu and He 2018, arXiv:1803.08494), and what follows it.

    Computes `act(group_norm(input) * (1 + scale) + shift + residual)`. Statistics are computed in fp32 (fp64 for fp64), and
    never as a difference of sums of squares: a mean far from zero costs no precision.

    Args:
        input: (N, C) or (N, C, *spatial), fp16, bf16, fp32 or fp64.
        num_groups: divides C.
        weight, bias: (C,) or None; of the input's dtype or, for fp16 and bf16, both in fp32.
        eps: added to the variance.
        scale, shift: (N, C), also with unit axes for the pixels, or None; of the dtypes that weight and bias may have.
        residual: of the input's size and dtype, or None.
        activation: None, a name such as "silu", (name, numbers...) or a module of torch.nn.

    Returns:
        A tensor of the input's size and dtype; channels-last if the input is, else contiguous. On GPUs torch's autocast
        makes it fp32, as in torch.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit, as torch raises it.
        ValueError: an unknown activation.

    >>> group_norm(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2, eps=1e-12, activation="relu").tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    tensors = (input, weight, bias, scale, shift, residual)
    y: Tensor = GROUP_NORM_FAMILY(tensors, ((num_groups, eps), parse_activation(activation)))
    return y


def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *,
    scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, activation: Any = None,
) -> Tensor:  # fmt: skip
    """Instance norm, as `torch.nn.functional.instance_norm` (Ulyanov et al. 2016, arXiv:1607.08022), and what follows it.

    Args:
        input: (N, C, *spatial), fp16, bf16, fp32 or fp64.
        running_mean, running_var: (C,) or None; updated in place if `use_input_stats`, else normalized by.
        weight, bias: (C,) or None; of the input's dtype or, for fp16 and bf16, all four in fp32.
        use_input_stats: normalize each channel of an image by its own statistics.
        momentum: weight of the input in the running statistics; eps: added to the variance.
        scale, shift, residual, activation: as for `group_norm`; scale and shift need `use_input_stats`.

    Returns:
        A contiguous tensor of the input's size and dtype, as torch's is also for channels-last inputs.

    Raises:
        ValueError: a single pixel an image, scale or shift with running statistics, an unknown activation.
        RuntimeError: sizes, dtypes or devices that do not fit; running statistics missing where they are used.

    >>> instance_norm(torch.tensor([[[1.0, 3.0]]]), eps=1e-12, activation="relu").tolist()
    [[[0.0, 1.0]]]
    """
    tensors = (input, running_mean, running_var, weight, bias, scale, shift, residual)
    y: Tensor = INSTANCE_NORM(tensors, ((use_input_stats, momentum, eps), parse_activation(activation), False))
    return y


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    activation: Any = None,
) -> Tensor:  # fmt: skip
    """Layer norm over the last axis, as `torch.nn.functional.layer_norm` (Ba et al. 2016, arXiv:1607.06450).

    What follows is computed with it, as by `group_norm`.

    Args:
        input: (*, C), fp16, bf16, fp32 or fp64; up to 16384 channels (8192 in fp64).
        normalized_shape: (C,); norms over several axes run on torch.
        weight, bias: (C,) or None; of the input's dtype or, for fp16 and bf16, both in fp32.
        eps: added to the variance.
        scale, shift: (N, C) for the input's first axis, also with unit axes between, or None.
        residual, activation: as for `group_norm`.

    Returns:
        A contiguous tensor of the input's size and dtype. On GPUs torch's autocast makes it fp32, as in torch.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit, as torch raises it.
        ValueError: an unknown activation.

    >>> layer_norm(torch.tensor([[[1.0, 3.0], [9.0, 5.0]]]), (2,), eps=1e-12).tolist()
    [[[-1.0, 1.0], [1.0, -1.0]]]
    """
    tensors = (input, weight, bias, scale, shift, residual)
    y: Tensor = LAYER_NORM(tensors, ((normalized_shape, eps), parse_activation(activation)))
    return y


def layer_norm_channels(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, activation: Any = None,
) -> Tensor:  # fmt: skip
    """Layer norm over the channels of each pixel of (N, C, *spatial) images, as `LayerNorm2d` of ConvNeXt computes it.

    Args:
        input: (N, C) or (N, C, *spatial), fp16, bf16, fp32 or fp64; up to 16384 channels (8192 in fp64).
        weight, bias: (C,) or None; of the input's dtype or, for fp16 and bf16, both in fp32.
        eps: added to the variance.
        scale, shift, residual, activation: as for `group_norm`.

    Returns:
        A tensor of the input's size and dtype; channels-last if the input is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        ValueError: an unknown activation.

    >>> layer_norm_channels(torch.tensor([[[1.0, 9.0], [3.0, 5.0]]]), eps=1e-12).tolist()
    [[[-1.0, 1.0], [1.0, -1.0]]]
    """
    tensors = (input, weight, bias, scale, shift, residual)
    y: Tensor = LAYER_NORM_CHANNELS(tensors, ((eps,), parse_activation(activation)))
    return y
