"""A depthwise convolution and the 1x1 convolution behind it, each with batch norm and ReLU6, in eval mode."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import layer
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.conv.separable import is_separable, one_by_one, pointwise_geometry, separable
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import device_of
from tritonconv.ops.core.layout import as_format

__all__ = ["Separable"]

EPS = 1e-5
RELU6 = ActivationSpec("relu6")


@register
class Separable(Operation):
    """A case's filter is the depthwise one's, its filters are the 1x1 convolution's."""

    kind = "separable"
    kernels = ("separable",)
    passes: tuple[Pass, ...] = ("fprop",)

    def geometry(self, case: Case) -> ConvGeometry:
        """Of the depthwise part."""
        return ConvGeometry.parse(
            case.input_shape, (case.channels, 1, *case.kernel), nd=2, stride=case.stride, padding=case.padding,
            dilation=case.dilation, groups=case.channels,
        )  # fmt: skip

    def count(self, case: Case) -> tuple[int, int]:
        g = self.geometry(case)
        behind = pointwise_geometry(g, case.filters)
        between = g.elements()[2]
        size = g.bytes(1) + behind.bytes(1) - 2 * between
        return g.macs + behind.macs, size * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:
        return case.channels * (case.kernel[0] * case.kernel[1] + 1)

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        def norm(channels: int) -> list[Tensor]:
            mean, var, gamma, beta = (torch.randn(channels, device=device) for _ in range(4))
            return [mean, var.square().add_(0.5), gamma, beta]

        c, k = case.channels, case.filters
        x = as_format(torch.randn(case.input_shape, device=device, dtype=dtype), channels_last)
        w1 = torch.randn(c, 1, *case.kernel, device=device, dtype=dtype).mul_((case.kernel[0] * case.kernel[1]) ** -0.5)
        return x, w1, torch.randn(k, c, 1, 1, device=device, dtype=dtype).mul_(c**-0.5), *norm(c), *norm(k)

    def epilogues(self, norms: tuple[Tensor, ...]) -> tuple[Epilogue, Epilogue]:
        mean1, var1, gamma1, beta1, mean, var, gamma, beta = norms
        first = Epilogue(None, BatchNorm(mean1, var1, gamma1, beta1, EPS), None, RELU6)
        return first, Epilogue(None, BatchNorm(mean, var, gamma, beta, EPS), None, RELU6)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        x, w1, w2, *norms = tensors
        first, second = self.epilogues(tuple(norms))
        geometry, dtype = self.geometry(case), dtype_of(case)
        # Products of plain fp32 run as two.
        one = is_separable(geometry, dtype, case.tf32, device_of(x.device))
        return (separable if one else one_by_one)(x, w1, first, w2, second, geometry)

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        x, w1, w2, *norms = tensors
        first, second = self.epilogues(tuple(norms))
        numbers = (case.stride, case.padding, case.dilation, case.channels)
        between = first.torch(torch.nn.functional.conv2d(x, w1, None, *numbers))  # type: ignore[arg-type]
        return second.torch(torch.nn.functional.conv2d(between, w2))

    def checks(self) -> list[Case]:
        return [
            layer("separable 3x3", (2, 72, 15, 13), (72, 1, 3, 3), padding=1, kind=self.kind),
            layer("separable 3x3 stride 2", (1, 128, 15, 13), (40, 1, 3, 3), padding=1, stride=2, kind=self.kind),
            layer("separable 5x5", (1, 24, 15, 13), (136, 1, 5, 5), padding=2, kind=self.kind),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, c: int, k: int, taps: int, configs: int | None = None, **more: object) -> Specimen:
            case = layer(name, (32, c, 56, 56), (k, 1, taps, taps), padding=taps // 2, kind=self.kind, **more)  # type: ignore[arg-type]
            return Specimen("separable", case, configs)

        return [
            seen("separable 3x3", 128, 256, 3),
            seen("separable 3x3 s2", 128, 256, 3, 2, stride=2),
            seen("separable 5x5", 192, 64, 5, 3),
            seen("separable 3x3 of 24 odd", 24, 40, 3, 2),
        ]
