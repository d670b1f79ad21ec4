"""Transposed convolution, 1-d to 3-d."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

import tritonconv.functional as ours
from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import Convolution
from tritonconv.bench.registry import Specimen, register
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.route import weight_gradient
from tritonconv.ops.core.layout import suggests_channels_last

__all__ = ["TransposedConvolution", "up_layer"]


@register
class TransposedConvolution(Convolution):
    """As a convolution, whose forward pass and data gradient change places."""

    kind = "convT"
    kernels = (*Convolution.kernels, "conv_up")
    function = "conv_transpose"

    def geometry(self, case: Case) -> ConvGeometry:
        return ConvGeometry.parse(
            case.input_shape, self.weight_shape(case), nd=case.nd, stride=case.stride, padding=case.padding,
            dilation=case.dilation, groups=case.groups, transposed=True, output_padding=case.output_padding,
        )  # fmt: skip

    def weight_shape(self, case: Case) -> tuple[int, ...]:
        return (case.channels, case.filters // case.groups, *case.kernel)

    def arguments(self, case: Case, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x, arguments = super().arguments(case, x)
        return x, arguments | dict(output_padding=case.output_padding)

    def gradient(self, case: Case, dy: Tensor, other: Tensor) -> Tensor:
        if case.pass_ == "wgrad":
            return weight_gradient(other, dy, self.geometry(case).mirrored, suggests_channels_last(other), False, "conv")[0]
        _, arguments = super().arguments(case, dy)
        dx: Tensor = getattr(ours, f"conv{case.nd}d")(dy, other, None, **arguments)
        return dx

    def checks(self) -> list[Case]:
        """Sizes that no tile divides, for each of the two kernels."""
        return [
            up_layer("up 3x3 stride 2", (1, 128, 5, 7), (128, 40, 3, 3), stride=2, padding=1, output_padding=1, fused=True),
            up_layer("up 2x2", (2, 128, 9, 8), (128, 36, 2, 2), stride=2, fused=True),
            up_layer("up 2x2 of 24", (1, 24, 9, 8), (24, 5, 2, 2), stride=2, fused=True),
            up_layer("up 4x4 of one pixel", (5, 100, 1, 1), (100, 24, 4, 4)),
            up_layer("up 3x3 stride 3, groups of 24", (1, 48, 5, 4), (48, 17, 3, 3), stride=3, groups=2),
            up_layer("up 3x3 dilated", (1, 24, 5, 7), (24, 20, 3, 3), stride=2, dilation=2, output_padding=1),
            up_layer("up 1-d 16/8", (2, 64, 9), (64, 24, 16), stride=8, padding=4),
            up_layer("up 3-d 2x2x2", (1, 40, 3, 4, 5), (40, 24, 2, 2, 2), stride=2, fused=True),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(kernel: str, name: str, *layer: Any, configs: int | None = None, **more: Any) -> Specimen:
            return Specimen(kernel, up_layer(name, *layer, fused=True, **more), configs)

        up = ((8, 128, 256, 256), (128, 64, 2, 2))
        return [
            # A decoder's step, its batch norm and activation behind it.
            seen("conv_dgrad", "up 3x3 s2", (8, 256, 64, 64), (256, 128, 3, 3), stride=2, padding=1, output_padding=1),
            seen("conv_dgrad", "up 1-d 16/8", (16, 512, 32), (512, 256, 16), stride=8, padding=4, configs=3),
            # An image out of 64 channels: its weights are read by single elements.
            seen("conv_dgrad", "up 4x4 s2 odd", (128, 64, 32, 32), (64, 3, 4, 4), stride=2, padding=1, configs=3),
            # U-Net's step up.
            seen("conv_up", "up 2x2", *up, stride=2),
            seen("conv_up", "up 2x2 tf32", *up, stride=2, dtype="fp32", tf32=True, configs=3),
            seen("conv_up", "up 2x2 ieee", *up, stride=2, dtype="fp32", configs=1),
            seen("conv_up", "up 2x2 fp64", *up, stride=2, dtype="fp64", configs=1),
            # Taps of 24 channels, which no block has; and 3, which no vector has.
            seen("conv_up", "up 2x2 of 24", (8, 40, 256, 256), (40, 24, 2, 2), stride=2, configs=3),
            seen("conv_up", "up 2x2 odd", (8, 32, 256, 256), (32, 3, 2, 2), stride=2, configs=2),
            seen("conv_up", "up 2x2x2 int64", (8, 64, 128, 256, 256), (64, 32, 2, 2, 2), stride=2, configs=2),
        ]


def up_layer(
    name: str, input: tuple[int, ...], weight: tuple[int, ...], *, stride: int = 1, padding: int = 0, dilation: int = 1,
    groups: int = 1, output_padding: int = 0, kind: str = "convT", **more: Any,
) -> Case:  # fmt: skip
    """As `layer` makes one, with the weight (C, K/groups, *filter)."""
    nd = len(input) - 2
    case = Case(name, kind, input[0], input[1], input[2:], weight[1] * groups, weight[2:], **more)
    return replace(
        case, stride=(stride,) * nd, padding=(padding,) * nd, dilation=(dilation,) * nd, groups=groups,
        output_padding=(output_padding,) * nd,
    )  # fmt: skip
