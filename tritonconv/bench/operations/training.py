"""Convolution, batch norm, ReLU and residual in training: the kernels' fused forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import Convolution, layer
from tritonconv.bench.operations.transposed import TransposedConvolution, up_layer
from tritonconv.bench.registry import Specimen, dtype_of, register
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm.launch import input_gradient
from tritonconv.ops.conv.conv_norm import forward, on_the_way
from tritonconv.ops.conv.gradients import NormGradient, conv_dgrad, conv_wgrad
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.layout import empty_output, suggests_channels_last

__all__ = ["ConvolutionBatchNorm", "TransposedBatchNorm"]

EPS = 1e-5
RELU = ActivationSpec("relu")


@register
class ConvolutionBatchNorm(Convolution):
    """Forward with the batch's statistics; either gradient with the batch norm's computed on the way in."""

    kind = "conv_bn"
    kernels = (*Convolution.kernels, "batch_norm")

    def count(self, case: Case) -> tuple[int, int]:
        """z is written and read once more than a convolution alone would; a gradient reads it beside dy."""
        macs, size = super().count(case)
        z = self.geometry(case).elements()[2] * dtype_of(case).itemsize
        return macs, size + (2 * z if case.pass_ == "fprop" else z)

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        first, other, *_ = super().tensors(case, device, dtype, channels_last)
        if case.pass_ == "fprop":
            gamma, beta = torch.rand(case.filters, device=device) + 0.5, torch.randn(case.filters, device=device)
            shape, format_ = (
                self.geometry(case).output_shape,
                suggests_channels_last(first) or suggests_channels_last(other),
            )
            residual = (empty_output(first, shape, format_, dtype).normal_(),) if case.fused else ()
            return first, other, gamma, beta, *residual
        # The table of a backward pass is written in fp32.
        return first, other, torch.randn_like(first), torch.randn(5, case.filters, device=device)

    def forward(
        self, g: ConvGeometry, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None
    ) -> Tensor:
        return forward("conv", x, weight, None, g, None, gamma, beta, EPS, residual, RELU, "")[0]

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        geometry = self.geometry(case)
        if case.pass_ == "fprop":
            x, w, gamma, beta, *rest = tensors
            return self.forward(geometry, x, w, gamma, beta, rest[0] if rest else None)
        dy, other, z, table = tensors
        table = table.double() if dy.dtype == torch.float64 else table
        norm = NormGradient(z, table, RELU, True)
        if case.pass_ == "wgrad":
            return conv_wgrad(dy, other, geometry, suggests_channels_last(other), False, "conv", norm)[0]
        if on_the_way(geometry, z.dtype):
            dz = empty_output(z, geometry.output_shape, True, z.dtype)
            return conv_dgrad(dy, other, geometry, suggests_channels_last(other), "conv", norm._replace(dz=dz))
        dz = input_gradient(dy, z, table, RELU, True)
        return conv_dgrad(dz, other, geometry, suggests_channels_last(other), "conv")

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        functional = torch.nn.functional
        if case.pass_ == "fprop":
            x, w, gamma, beta, *rest = tensors
            x, arguments = self.arguments(case, x)
            z: Tensor = getattr(functional, f"{self.function}{case.nd}d")(x, w, None, **arguments)
            y = functional.batch_norm(z, None, None, gamma, beta, training=True, eps=EPS)
            return torch.relu(y + rest[0] if rest else y)
        dy, other, z, table = tensors
        # In the table's type, as torch's batch norm computes its gradients.
        mean, scale, beta, slope, offset = (row.view(-1, *(1,) * case.nd) for row in table)
        centered = z.to(table.dtype) - mean
        g = torch.where(scale * centered + beta > 0, dy.to(table.dtype), 0.0)
        return super().torch(case, (scale * g + slope * centered + offset).to(dy.dtype), other)

    def checks(self) -> list[Case]:
        return [
            layer("1x1 of 72 in training", (1, 72, 13, 11), (72, 72, 1, 1), fused=True, kind=self.kind),
            layer("3x3 of 128 in training", (1, 128, 9, 8), (40, 128, 3, 3), padding=1, kind=self.kind),
            layer("3x3 of 24 stride 2 in training", (2, 24, 9, 8), (40, 24, 3, 3), padding=1, stride=2, kind=self.kind),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(kernel: str, name: str, *sizes: Any, configs: int | None = None, **more: Any) -> Specimen:
            return Specimen(kernel, layer(name, *sizes, kind=self.kind, **more), configs)

        large, reduce, expand = ((32, 256, 56, 56), (256, 256, 3, 3)), (256, 64), (64, 256)
        stem = ((32, 3, 224, 224), (64, 3, 7, 7))

        def pointwise(c: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
            return (32, c, 56, 56), (k, c, 1, 1)

        return [
            # Statistics from the accumulators.
            seen("conv_fprop", "3x3 statistics", *large, padding=1),
            seen("conv_flat", "3x3 of 64 statistics", (32, 64, 56, 56), (64, 64, 3, 3), padding=1, configs=4),
            seen("conv_flat", "stem 7x7 statistics", *stem, stride=2, padding=3, configs=4),
            seen("matmul", "1x1 statistics", *pointwise(*expand)),
            # The batch norm's gradient on the way in: of 1x1 layers, and where no data gradient is needed.
            seen("conv_dgrad", "1x1 reduce computed", *pointwise(*reduce), pass_="dgrad"),
            seen("conv_dgrad", "1x1 expand computed", *pointwise(*expand), pass_="dgrad"),
            seen("conv_dgrad", "1x1 computed fp16", *pointwise(*expand), pass_="dgrad", dtype="fp16", configs=1),
            seen("conv_dgrad", "1x1 s2 of 24 computed", (32, 24, 57, 57), (40, 24, 1, 1), stride=2, pass_="dgrad"),
            seen("conv_wgrad", "3x3 computed", *large, padding=1, pass_="wgrad"),
            seen("conv_wgrad", "stem 7x7 computed odd", *stem, stride=2, padding=3, pass_="wgrad"),
            seen("conv_wgrad", "1x1 computed tf32", *pointwise(*reduce), dtype="fp32", tf32=True, pass_="wgrad"),
            seen("conv_wgrad", "1x1 computed ieee", *pointwise(*reduce), dtype="fp32", pass_="wgrad"),
            seen("conv_wgrad", "1x1 computed fp64", *pointwise(*reduce), dtype="fp64", pass_="wgrad"),
        ]  # fmt: skip


@register
class TransposedBatchNorm(ConvolutionBatchNorm, TransposedConvolution):
    """Forward of a transposed convolution with the batch's statistics; backward is that of its parts."""

    kind = "convT_bn"
    kernels = (*TransposedConvolution.kernels, "batch_norm")
    passes = ("fprop",)

    def forward(
        self, g: ConvGeometry, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None
    ) -> Tensor:
        return forward("conv_transpose", x, weight, None, g, None, gamma, beta, EPS, residual, RELU, "")[0]

    def checks(self) -> list[Case]:
        return [
            up_layer("up 2x2 in training", (2, 24, 9, 8), (24, 20, 2, 2), stride=2, kind=self.kind),
            up_layer("up 3x3 in training", (1, 128, 5, 7), (128, 40, 3, 3), stride=2, padding=1, kind=self.kind),
        ]

    def specimens(self) -> list[Specimen]:
        up, decoder = ((8, 128, 256, 256), (128, 64, 2, 2)), ((8, 256, 64, 64), (256, 128, 3, 3))
        return [
            Specimen("conv_up", up_layer("up 2x2 statistics", *up, stride=2, kind=self.kind), 6),
            Specimen("conv_dgrad", up_layer("up 3x3 s2 statistics", *decoder, stride=2, padding=1, kind=self.kind), 6),
        ]
