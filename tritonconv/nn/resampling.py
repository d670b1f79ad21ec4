"""torch.nn's resampling and shuffle modules on our kernels: same constructors and attributes."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.ops.core.backend import Backend
from tritonconv.ops.resample.operator import interpolate
from tritonconv.ops.shuffle.operator import channel_shuffle, pixel_shuffle, pixel_unshuffle

__all__ = [
    "ChannelShuffle", "PixelShuffle", "PixelUnshuffle", "Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d",
]  # fmt: skip


class Upsample(torch.nn.Upsample):
    """`torch.nn.Upsample` on our kernels: (N, C, *spatial) of one to three spatial axes, fp16, bf16, fp32 or fp64.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> Upsample(scale_factor=2, mode="bilinear")(torch.randn(1, 3, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor,
            backend=self.backend,
        )  # fmt: skip


class UpsamplingNearest2d(torch.nn.UpsamplingNearest2d):
    """`torch.nn.UpsamplingNearest2d` on our kernels: (N, C, H, W), fp16, bf16, fp32 or fp64.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> UpsamplingNearest2d(scale_factor=2)(torch.randn(1, 3, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    backend: Backend | None = None
    forward = Upsample.forward


class UpsamplingBilinear2d(torch.nn.UpsamplingBilinear2d):
    """`torch.nn.UpsamplingBilinear2d` on our kernels: (N, C, H, W), fp16, bf16, fp32 or fp64; corners are aligned.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> UpsamplingBilinear2d(scale_factor=2)(torch.randn(1, 3, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    backend: Backend | None = None
    forward = Upsample.forward


class PixelShuffle(torch.nn.PixelShuffle):
    """`torch.nn.PixelShuffle` on our kernels: (*, C r^2, H, W) of types of 1, 2, 4 or 8 bytes becomes (*, C, H r, W r).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> PixelShuffle(2)(torch.randn(1, 12, 4, 4)).shape
    torch.Size([1, 3, 8, 8])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return pixel_shuffle(input, self.upscale_factor, self.backend)


class PixelUnshuffle(torch.nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle` on our kernels: (*, C, H r, W r) of types of 1, 2, 4 or 8 bytes becomes (*, C r^2, H, W).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> PixelUnshuffle(2)(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 12, 4, 4])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return pixel_unshuffle(input, self.downscale_factor, self.backend)


class ChannelShuffle(torch.nn.ChannelShuffle):
    """`torch.nn.ChannelShuffle` on our kernels: (N, C, *) of types of 1, 2, 4 or 8 bytes.

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> ChannelShuffle(2)(torch.randn(1, 4, 2, 2)).shape
    torch.Size([1, 4, 2, 2])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        return channel_shuffle(input, self.groups, self.backend)
