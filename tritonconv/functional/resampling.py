"""Resampling and shuffles, with the functions of torch.nn.functional."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.resample import operator as library_resample
from tritonconv.ops.shuffle import operator as shuffles

__all__ = ["channel_shuffle", "interpolate", "pixel_shuffle", "pixel_unshuffle"]


def interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Tensor:  # fmt: skip
    """Resamples images up or down, as `torch.nn.functional.interpolate`.

    Arithmetic is in fp32 (fp64 for fp64). Gradients are gathered, so that every run gives the same bits. Mode "area" runs
    on the kernels of adaptive pooling; "bicubic", "lanczos", `antialias` and integer inputs run on torch.

    Args:
        input: (N, C, *spatial) of one to three spatial axes, fp16, bf16, fp32 or fp64.
        size: the result's spatial sizes, an int or one for each axis.
        scale_factor: instead of `size`: the result's sizes divided by the input's, a number or one for each axis.
        mode: "nearest", "nearest-exact", "linear" (3-d inputs), "bilinear" (4-d), "trilinear" (5-d), "area", "bicubic" or
            "lanczos".
        align_corners: in linear modes, whether the first and last results have the positions of the first and last
            elements.
        recompute_scale_factor: whether the scale follows from the sizes if `scale_factor` is given.
        antialias: whether each result is a mean over the elements that it covers.

    Returns:
        A tensor of the input's dtype; channels-last if the input is, else contiguous.

    Raises:
        ValueError: a combination of arguments that torch does not accept.
        NotImplementedError: a mode that does not support inputs with this number of axes.
        RuntimeError: an input or a result without pixels.

    >>> interpolate(torch.tensor([[[1.0, 3.0]]]), scale_factor=2, mode="linear").tolist()
    [[[1.0, 1.5, 2.5, 3.0]]]
    """
    return library_resample.interpolate(
        input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    )  # fmt: skip


def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Moves channels to pixels, as `torch.nn.functional.pixel_shuffle`: r^2 channels become a square of r pixels.

    Args:
        input: (*, C r^2, H, W), of any dtype of 1, 2, 4 or 8 bytes.
        upscale_factor: r.

    Returns:
        (*, C, H r, W r); channels-last if a 4-d input is, else contiguous.

    Raises:
        RuntimeError: a factor that is not positive or whose square does not divide the channels, or fewer than 3 axes.

    >>> pixel_shuffle(torch.arange(8).reshape(4, 1, 2), 2).tolist()
    [[[0, 2, 1, 3], [4, 6, 5, 7]]]
    """
    return shuffles.pixel_shuffle(input, upscale_factor)


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """Moves pixels to channels, as `torch.nn.functional.pixel_unshuffle`: the reverse of `pixel_shuffle`.

    Args:
        input: (*, C, H r, W r), of any dtype of 1, 2, 4 or 8 bytes.
        downscale_factor: r.

    Returns:
        (*, C r^2, H, W); channels-last if a 4-d input is, else contiguous.

    Raises:
        RuntimeError: a factor that is not positive or does not divide the image, or fewer than 3 axes.

    >>> pixel_unshuffle(torch.tensor([[[0, 2, 1, 3], [4, 6, 5, 7]]]), 2).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return shuffles.pixel_unshuffle(input, downscale_factor)


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Takes channels from each group in turn, as `torch.nn.functional.channel_shuffle`.

    Args:
        input: (N, C, *), of any dtype of 1, 2, 4 or 8 bytes.
        groups: the number of groups into which the channels are divided.

    Returns:
        A tensor of the input's size; channels-last if a 4-d or 5-d input is, else contiguous.

    Raises:
        RuntimeError: a number of groups that is not positive or does not divide the channels, or fewer than 3 axes.

    >>> channel_shuffle(torch.arange(6).reshape(1, 6, 1), 2).flatten().tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return shuffles.channel_shuffle(input, groups)
