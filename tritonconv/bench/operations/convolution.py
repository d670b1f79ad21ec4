"""Convolution, 1-d to 3-d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tritonconv.functional as ours
from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.causal.launch import is_short
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.conv.route import data_gradient, weight_gradient
from tritonconv.ops.core.layout import as_format, suggests_channels_last

__all__ = ["Convolution", "layer"]


@register
class Convolution(Operation):
    kind = "conv"
    kernels: tuple[str, ...] = ("conv_fprop", "conv_flat", "matmul", "conv_dgrad", "conv_wgrad")
    passes: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")
    function = "conv"
    """Of torch.nn.functional and of ours, without the dimensions."""

    def geometry(self, case: Case) -> ConvGeometry:
        return ConvGeometry.parse(
            case.input_shape, self.weight_shape(case), nd=case.nd, stride=case.stride, padding=case.padding,
            dilation=case.dilation, groups=case.groups,
        )  # fmt: skip

    def halo(self, case: Case) -> int:
        """Zeros before the first sample of a causal convolution."""
        return case.dilation[0] * (case.kernel[0] - 1) if case.padding == "causal" else 0

    def weight_shape(self, case: Case) -> tuple[int, ...]:
        return (case.filters, case.channels // case.groups, *case.kernel)

    def count(self, case: Case) -> tuple[int, int]:
        geometry = self.geometry(case)
        size = geometry.bytes(dtype_of(case).itemsize, case.pass_, residual=case.residual and case.pass_ == "fprop")
        return geometry.macs, size

    def depth(self, case: Case) -> int:
        return self.geometry(case).gemm(case.pass_)[2]

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        geometry = self.geometry(case)
        scale = max(1, self.depth(case)) ** -0.5

        def random(shape: tuple[int, ...], channels_last: bool) -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.randn(shape, device=device, dtype=dtype), channels_last)

        if case.pass_ == "wgrad":
            return random(geometry.output_shape, channels_last).mul_(scale), random(geometry.input_shape, channels_last)
        x = random(geometry.output_shape if case.pass_ == "dgrad" else case.input_shape, channels_last)
        # A converted model's weights are channels-last, also under images that are not.
        w = random(geometry.weight_shape, channels_last or not case.channels_last).mul_(scale)
        if not case.fused or case.pass_ == "dgrad":
            return x, w
        norm = [torch.randn(4, case.filters, device=device)[i] for i in range(4)]
        residual = random(geometry.output_shape, suggests_channels_last(x) or suggests_channels_last(w))
        return x, w, norm[0], norm[1].square().add_(0.5), norm[2], norm[3], residual

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        if case.pass_ != "fprop":
            return self.gradient(case, *tensors)
        x, w, *rest = tensors
        if case.padding == "causal":
            if is_short(self.geometry(case)):
                y: Tensor = ours.causal_conv1d(x, w)
                return y
            numbers = case.nd, case.stride, "causal", case.dilation, case.groups
            causal: Tensor = CONVOLUTIONS["conv"]((x, w, *(None,) * 6), (numbers, "causal_conv1d", 0.0, None))
            return causal
        x, arguments = self.arguments(case, x)
        if not rest:
            return getattr(ours, f"{self.function}{case.nd}d")(x, w, None, **arguments)
        mean, var, gamma, beta, residual = rest
        function = getattr(ours, f"{self.function}{case.nd}d_bn_act")
        return function(x, w, None, mean, var, gamma, beta, **arguments, activation="relu", residual=residual)

    def gradient(self, case: Case, dy: Tensor, other: Tensor) -> Tensor:
        """The gradient of the input from the weight, or of the weight from the input."""
        geometry = self.geometry(case)
        if case.pass_ == "dgrad":
            # A filter of one channel has one order in memory, which does not say what the image has.
            return data_gradient(dy, other, geometry, suggests_channels_last(dy), "conv")
        return weight_gradient(dy, other, geometry, suggests_channels_last(other), False, "conv")[0]

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        if case.pass_ != "fprop":
            return self._torch_gradient(case, *tensors)
        x, w, *rest = tensors
        x, arguments = self.arguments(case, x)
        y: Tensor = getattr(torch.nn.functional, f"{self.function}{case.nd}d")(x, w, None, **arguments)
        if rest:
            mean, var, gamma, beta, residual = rest
            y = torch.nn.functional.batch_norm(y, mean, var, gamma, beta)
            y = torch.relu(y + residual)
        return y

    def _torch_gradient(self, case: Case, dy: Tensor, other: Tensor) -> Tensor:
        """The one gradient, by the operator that autograd calls."""
        g, wants_input, halo = self.geometry(case), case.pass_ == "dgrad", self.halo(case)
        shape, padding = g.input_shape if wants_input else g.weight_shape, g.padding
        if halo:
            # Torch has no padding before alone: the image gets its zeros, or its gradient loses theirs.
            padding = (0, 0, 0)
            if wants_input:
                shape = (*shape[:2], shape[2] + halo)
            else:
                other = torch.nn.functional.pad(other, (halo, 0))
        # Of the tensor that the gradient belongs to sizes, type and layout matter alone.
        unread = as_format(dy.new_empty(shape), suggests_channels_last(other))
        x, w = (unread, other) if wants_input else (other, unread)
        first = 3 - g.nd
        result: list[Tensor] = torch.ops.aten.convolution_backward(
            dy, x, w, None, g.stride[first:], padding[first:], g.dilation[first:], g.transposed, g.output_padding[first:],
            g.groups, [wants_input, not wants_input, False],
        )  # fmt: skip
        return result[0][:, :, halo:] if wants_input and halo else result[0 if wants_input else 1]

    def arguments(self, case: Case, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What a function of torch's is called with: the image, and its options."""
        padding = case.padding
        if padding == "causal":
            x, padding = torch.nn.functional.pad(x, (self.halo(case), 0)), (0,)
        return x, dict(stride=case.stride, padding=padding, dilation=case.dilation, groups=case.groups)

    def checks(self) -> list[Case]:
        """Sizes that no tile divides, so that every edge is crossed; 128 channels take every BLOCK_K of conv_fprop."""
        return [
            layer("3x3 of 128", (1, 128, 9, 8), (40, 128, 3, 3), padding=1, fused=True),
            layer("3x3 of 24", (1, 24, 9, 8), (40, 24, 3, 3), padding=1, fused=True),
            layer("1x1 of 72", (1, 72, 13, 11), (72, 72, 1, 1), fused=True),
            layer("stem 5x5 stride 2", (1, 3, 17, 15), (20, 3, 5, 5), padding=2, stride=2),
            layer("3x3 stride 2, groups of 128", (2, 256, 7, 9), (36, 128, 3, 3), padding=1, stride=2, groups=2),
            layer("3x3, 8 groups of 4", (2, 32, 9, 8), (32, 4, 3, 3), padding=1, groups=8, fused=True),
            layer("3x3 stride 2, 12 groups of 3", (2, 36, 9, 8), (60, 3, 3, 3), padding=1, stride=2, groups=12),
            layer("3x3 dilated", (1, 128, 11, 9), (17, 128, 3, 3), padding=2, dilation=2),
            layer("1-d of 128", (2, 128, 21), (17, 128, 5), padding=2),
            layer("3-d of 128", (1, 128, 4, 5, 3), (17, 128, 3, 2, 3), padding=1),
            layer("patches of a contiguous image", (2, 3, 16, 12), (40, 3, 4, 4), stride=4, channels_last=False),
            layer("sizes of one", (1, 1, 1, 1), (1, 1, 1, 1)),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(kernel: str, name: str, *sizes: Any, configs: int | None = None, **more: Any) -> Specimen:
            return Specimen(kernel, layer(name, *sizes, fused=True, **more), configs)

        large, strided = ((32, 256, 56, 56), (256, 256, 3, 3)), ((32, 256, 57, 57), (256, 256, 3, 3))
        # Counts that nothing divides: several taps a tile, rows of 48 bytes, single elements.
        narrow, odd = ((32, 24, 56, 56), (40, 24, 3, 3)), ((32, 3, 56, 56), (5, 3, 3, 3))
        # ResNeXt's groups of 4 and 8 channels, which share a tile, and of 16, which do not.
        grouped = [
            seen(kernel, f"{name}3x3 g32 of {few}", (32, 32 * few, 56, 56), (32 * few, few, 3, 3), padding=1, groups=32,
                 pass_=pass_, configs=configs)
            for kernel, pass_, name in (
                ("conv_flat", "fprop", ""), ("conv_dgrad", "dgrad", "dgrad "), ("conv_wgrad", "wgrad", "wgrad ")
            )
            for few, configs in ((4, None), (8, 3), (16, 5))
        ]  # fmt: skip
        gradients = [
            seen(f"conv_{pass_}", f"{pass_} {name}", *sizes, padding=1, pass_=pass_, **more)
            for pass_ in ("dgrad", "wgrad")
            for name, sizes, more in (
                ("3x3", large, {}), ("3x3 s2", strided, dict(stride=2, configs=3)), ("3x3 of 24", narrow, dict(configs=2)),
                ("3x3 odd", odd, {}), ("3x3 tf32", large, dict(dtype="fp32", tf32=True, configs=3)),
                ("3x3 few pixels", ((1, 256, 14, 14), (256, 256, 3, 3)), dict(configs=3)),
                ("3x3 ieee", large, dict(dtype="fp32", configs=1)), ("3x3 fp64", large, dict(dtype="fp64", configs=1)),
            )
        ]  # fmt: skip

        return [
            # The layer that decides for ResNets.
            seen("conv_fprop", "3x3", (32, 256, 56, 56), (256, 256, 3, 3), padding=1),
            seen("conv_fprop", "3x3 fp16", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype="fp16", configs=2),
            seen("conv_fprop", "3x3 tf32", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype="fp32", tf32=True),
            seen("conv_fprop", "3x3 ieee", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype="fp32", configs=2),
            seen("conv_fprop", "3x3 fp64", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype="fp64", configs=1),
            # Three axes of mask bits.
            seen("conv_fprop", "4x3x3", (2, 64, 16, 56, 56), (128, 64, 4, 3, 3), padding=1, configs=3),
            # More than 2^31 elements: 64-bit offsets.
            seen("conv_fprop", "3x3 s2 int64", (64, 128, 513, 513), (128, 128, 3, 3), stride=2, configs=3),
            seen("conv_fprop", "3x3 grouped", (32, 256, 56, 56), (256, 128, 3, 3), padding=1, groups=2, configs=3),
            # A contiguous NCHW image, read in place by single elements.
            seen("conv_flat", "stem 7x7", (32, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, channels_last=False),
            # Blocks across taps, for few channels and for counts that no block divides: 128-bit loads all the same.
            seen("conv_flat", "3x3 of 64", (32, 64, 56, 56), (64, 64, 3, 3), padding=1, configs=4),
            seen("conv_flat", "3x3 of 24", (32, 24, 56, 56), (96, 24, 3, 3), padding=1),
            # Patches of a contiguous image: rows of 16 neighbors.
            seen("conv_flat", "patch 16x16", (32, 3, 224, 224), (768, 3, 16, 16), stride=16, channels_last=False),
            seen("matmul", "1x1", (32, 256, 56, 56), (256, 256, 1, 1)),
            # Rows of 48 bytes, which descriptors take too.
            seen("matmul", "1x1 of 24", (32, 24, 56, 56), (144, 24, 1, 1), configs=3),
            seen("matmul", "1x1 tf32", (32, 256, 56, 56), (256, 256, 1, 1), dtype="fp32", tf32=True, configs=2),
            *gradients,
            *grouped,
        ]


def layer(
    name: str, input: tuple[int, ...], weight: tuple[int, ...], *, stride: int = 1, padding: int = 0, dilation: int = 1,
    groups: int = 1, kind: str = "conv", **more: Any,
) -> Case:  # fmt: skip
    """A layer by the sizes of its input and its weight, and one number for all axes."""
    nd = len(input) - 2
    return Case(
        name, kind, input[0], input[1], input[2:], weight[0], weight[2:], (stride,) * nd, (padding,) * nd,
        (dilation,) * nd, groups, **more,
    )  # fmt: skip
