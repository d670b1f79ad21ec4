"""Dense convolution on the kernels for H100 and H200, where they are asked for."""

from __future__ import annotations

from typing import Any

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import Convolution, layer
from tritonconv.bench.operations.training import ConvolutionBatchNorm
from tritonconv.bench.registry import Specimen, register
from tritonconv.geometry import Pass
from tritonconv.ops.core.backend import Backend

__all__ = ["HopperBatchNorm", "HopperConvolution"]


@register
class HopperConvolution(Convolution):
    kind = "hopper"
    kernels = ("hopper.conv", "hopper.wgrad")
    backend: Backend = "hopper"

    def checks(self) -> list[Case]:
        """Sizes that no box and no tile divides, and every way that a stride, a group and an edge can go."""
        return [
            hopper("tma 3x3 of 136", (2, 136, 13, 11), (136, 136, 3, 3), padding=1, fused=True),
            hopper("tma 3x3 of 72", (3, 72, 9, 8), (40, 72, 3, 3), padding=1, fused=True),
            # Several tiles a program on the largest GPU, so that stores, residuals and the next tile's loads overlap.
            hopper("tma 3x3, many tiles", (9, 64, 61, 59), (256, 64, 3, 3), padding=1, fused=True),
            hopper("tma 1x1 of 72", (2, 72, 13, 11), (200, 72, 1, 1), fused=True),
            hopper("tma 1x1 stride 2", (2, 64, 13, 11), (128, 64, 1, 1), stride=2),
            hopper("tma 3x3 stride 2", (2, 128, 17, 15), (128, 128, 3, 3), padding=1, stride=2),
            hopper("tma 5x5 stride 2", (2, 64, 17, 16), (72, 64, 5, 5), padding=2, stride=2),
            hopper("tma 3x3, 3 groups of 72", (2, 216, 9, 8), (216, 72, 3, 3), padding=1, groups=3),
            hopper("tma 3x3 dilated", (1, 128, 21, 19), (64, 128, 3, 3), padding=4, dilation=4),
            hopper("tma 1-d of 64", (2, 64, 151), (64, 64, 5), padding=2),
            hopper("tma 3-d of 64", (1, 64, 5, 9, 7), (72, 64, 3, 3, 3), padding=1, stride=2),
        ]

    def specimens(self) -> list[Specimen]:
        large, strided = ((32, 256, 56, 56), (256, 256, 3, 3)), ((32, 256, 57, 57), (256, 256, 3, 3))

        def seen(kernel: str, name: str, *sizes: Any, configs: int | None = None, **more: Any) -> Specimen:
            return Specimen(kernel, hopper(name, *sizes, **more), configs, targets=("sm_90",))

        return [
            seen("hopper.conv", "tma 3x3", *large, padding=1, fused=True),
            seen("hopper.conv", "tma 3x3 fp16", *large, padding=1, dtype="fp16"),
            seen("hopper.conv", "tma 3x3 s2", *strided, stride=2, fused=True),
            seen("hopper.conv", "tma 3x3x3", (2, 256, 16, 28, 28), (256, 256, 3, 3, 3), padding=1, configs=2),
            seen("hopper.conv", "tma 3x3 grouped", (32, 1024, 28, 28), (1024, 256, 3, 3), padding=1, groups=4, configs=3),
            seen("hopper.conv", "tma 1x1", (32, 256, 56, 56), (256, 256, 1, 1), fused=True),
            # More than 2^31 elements, which are the copy engine's affair.
            seen("hopper.conv", "tma 3x3 s2 int64", (64, 128, 513, 513), (256, 128, 3, 3), stride=2, configs=2),
            seen("hopper.conv", "dgrad tma 3x3", *large, padding=1, pass_="dgrad"),
            seen("hopper.conv", "dgrad tma 3x3 s2", *strided, stride=2, padding=1, pass_="dgrad"),
            seen("hopper.wgrad", "wgrad tma 3x3", *large, padding=1, pass_="wgrad"),
            seen("hopper.wgrad", "wgrad tma 3x3 s2", *strided, stride=2, padding=1, pass_="wgrad"),
            # A single range writes the weight itself.
            seen("hopper.wgrad", "wgrad tma 3x3 few pixels", (1, 256, 14, 14), (256, 256, 3, 3), padding=1, pass_="wgrad"),
        ]


def hopper(name: str, *sizes: Any, **more: Any) -> Case:
    return layer(name, *sizes, kind="hopper", **more)


@register
class HopperBatchNorm(ConvolutionBatchNorm):
    """Forward in training: the convolution leaves the statistics that a batch norm needs."""

    kind = "hopper_bn"
    kernels = ("hopper.conv",)
    passes: tuple[Pass, ...] = ("fprop",)
    backend: Backend = "hopper"

    def checks(self) -> list[Case]:
        return [
            layer("tma 3x3 of 128 in training", (2, 128, 13, 11), (136, 128, 3, 3), padding=1, kind=self.kind),
            layer(
                "tma 3x3 of 64 stride 2 in training", (3, 64, 17, 15), (72, 64, 3, 3), padding=1, stride=2, kind=self.kind
            ),
        ]

    def specimens(self) -> list[Specimen]:
        case = layer("tma 3x3 statistics", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, kind=self.kind)
        return [Specimen("hopper.conv", case, targets=("sm_90",))]
