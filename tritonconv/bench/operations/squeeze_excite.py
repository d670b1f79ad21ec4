"""Around squeeze-excite: the average behind a convolution, the gate, the product with it, and that in a convolution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import layer
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.conv.extended import averaged_convolution, gated_convolution
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.layout import as_format
from tritonconv.ops.squeeze_excite.launch import scale, scale_gradients
from tritonconv.ops.squeeze_excite.operator import EXCITE

__all__ = ["Averaged", "AveragedDepthwise", "Excite", "Gated", "Scale"]

# Of the product: name, channels, whether channels-last, configs.
LAYERS: list[tuple[str, int, bool, int | None]] = [
    ("", 256, True, 3),
    (" contiguous", 64, False, None),
    (" of 24", 24, True, 1),
]
Sizes = tuple[int, ...]
SILU, SIGMOID = ActivationSpec("silu"), ActivationSpec("sigmoid")


def _random(case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> Tensor:
    # The same numbers in both layouts.
    return as_format(torch.randn(case.input_shape, device=device, dtype=dtype), channels_last)


def _gate(case: Case, device: str, dtype: torch.dtype) -> Tensor:
    return torch.rand(case.batch, case.channels, *(1,) * case.nd, device=device, dtype=dtype)


@register
class Scale(Operation):
    """The pass "dgrad" is the whole of backward: gradients of input and gate."""

    kind = "scale"
    kernels = ("squeeze_excite", "average")
    passes: tuple[Pass, ...] = ("fprop", "dgrad")
    products = False

    def count(self, case: Case) -> tuple[int, int]:
        elements = math.prod(case.input_shape)
        tensors = 2 if case.pass_ == "fprop" else 3
        return elements, (tensors * elements + case.batch * case.channels) * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:  # noqa: ARG002
        return 1

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        x = _random(case, device, dtype, channels_last)
        dy = (_random(case, device, dtype, channels_last),) if case.pass_ == "dgrad" else ()
        return x, _gate(case, device, dtype), *dy

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        x, gate, *rest = tensors
        if case.pass_ == "fprop":
            return scale(x, gate)
        (dy,) = rest
        dx, dgate = scale_gradients(dy, x, gate, True, True)
        assert dx is not None and dgate is not None
        return dx

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        x, gate, *rest = tensors
        if case.pass_ == "fprop":
            return x * gate
        (rest[0] * x).sum(tuple(range(2, x.dim())), keepdim=True)
        return rest[0] * gate

    def checks(self) -> list[Case]:
        return [
            layer("scale of 24", (2, 24, 9, 8), (24, 24, 1, 1), kind=self.kind),
            layer("scale of 70 odd", (3, 70, 7, 7), (70, 70, 1, 1), kind=self.kind),
        ]

    def specimens(self) -> list[Specimen]:
        found = []
        for function, pass_ in (("scale_kernel", "fprop"), ("scale_backward_kernel", "dgrad")):
            for name, channels, last, configs in (
                ("", 256, True, 3),
                (" contiguous", 64, False, None),
                (" of 24", 24, True, 1),
            ):
                case = layer(
                    f"{function[:-7]}{name}", (64, channels, 56, 56), (channels, channels, 1, 1), kind=self.kind,
                    pass_=pass_, channels_last=last,
                )  # fmt: skip
                found.append(Specimen("squeeze_excite", case, configs, function))
        return [*found, Specimen("average", replace(found[-2].case, id="average"), None, "average_kernel")]


@register
class Excite(Operation):
    """A case's filters are the channels between the two products."""

    kind = "excite"
    kernels = ("squeeze_excite",)
    passes: tuple[Pass, ...] = ("fprop",)
    products = False

    def count(self, case: Case) -> tuple[int, int]:
        n, c, r = case.batch, case.channels, case.filters
        return 2 * n * c * r, (2 * n * c + 2 * c * r) * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:
        return case.channels + case.filters

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:  # noqa: ARG002
        c, r = case.channels, case.filters
        mean = torch.randn(case.batch, c, 1, 1, device=device, dtype=dtype)
        w1, w2 = (torch.randn(*s, 1, 1, device=device, dtype=dtype).mul_(s[1] ** -0.5) for s in ((r, c), (c, r)))
        return mean, w1, torch.randn(r, device=device, dtype=dtype), w2, torch.randn(c, device=device, dtype=dtype)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:  # noqa: ARG002
        mean, w1, b1, w2, b2 = tensors
        found = EXCITE.find((mean, w1, b1, w2, b2), ((), SILU, SIGMOID), None)
        assert found is not None
        gate: Tensor = found.run(mean, w1, b1, w2, b2)
        return gate

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:  # noqa: ARG002
        mean, w1, b1, w2, b2 = tensors
        hidden = torch.nn.functional.silu(torch.nn.functional.conv2d(mean, w1, b1))
        return torch.nn.functional.conv2d(hidden, w2, b2).sigmoid()

    def checks(self) -> list[Case]:
        return [
            layer("excite 96-4", (3, 96, 1, 1), (4, 96, 1, 1), kind=self.kind),
            layer("excite 50-33", (2, 50, 1, 1), (33, 50, 1, 1), kind=self.kind),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, c: int, r: int, **more: Any) -> Specimen:
            case = layer(name, (256, c, 1, 1), (r, c, 1, 1), kind=self.kind, **more)
            return Specimen("squeeze_excite", case, None, "excite_kernel")

        return [
            seen("excite 1152-48", 1152, 48), seen("excite 2048-128", 2048, 128),
            seen("excite 1152-48 fp32", 1152, 48, dtype="fp32"), seen("excite 2048-1024", 2048, 1024),
        ]  # fmt: skip


class _Extended(Operation):
    """A convolution with batch norm left out, and SiLU behind it."""

    passes: tuple[Pass, ...] = ("fprop",)

    def geometry(self, case: Case) -> ConvGeometry:
        return ConvGeometry.parse(
            case.input_shape, (case.filters, case.channels // case.groups, *case.kernel), nd=case.nd, stride=case.stride,
            padding=case.padding, groups=case.groups,
        )  # fmt: skip

    def numbers(self, case: Case) -> tuple[object, ...]:
        return (case.nd, case.stride, case.padding, case.dilation, case.groups), "conv2d", 0.0, SILU

    def depth(self, case: Case) -> int:
        return self.geometry(case).gemm()[2]

    def weight(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> Tensor:
        w = torch.randn(self.geometry(case).weight_shape, device=device, dtype=dtype).mul_(self.depth(case) ** -0.5)
        return as_format(w, channels_last)


@register
class Gated(_Extended):
    """y = silu(conv(x * gate)): x once in, y once out."""

    kind = "gated"
    kernels = ("matmul",)

    def count(self, case: Case) -> tuple[int, int]:
        g = self.geometry(case)
        return g.macs, g.bytes(dtype_of(case).itemsize) + case.batch * case.channels * dtype_of(case).itemsize

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        # It reads channels-last images alone.
        x, w = _random(case, device, dtype, True), self.weight(case, device, dtype, channels_last)
        return x, _gate(case, device, dtype), w

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        x, gate, w = tensors
        y = gated_convolution((x, w, *(None,) * 6), gate, self.numbers(case), None)
        assert y is not None
        return y

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        x, gate, w = tensors
        return torch.nn.functional.silu(torch.nn.functional.conv2d((x * gate).to(dtype_of(case)).to(x.dtype), w))

    def checks(self) -> list[Case]:
        return [layer("gated 96-40", (3, 96, 8, 9), (40, 96, 1, 1), kind=self.kind)]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, c: int, k: int, configs: int | None = None, **more: Any) -> Specimen:
            case = layer(name, (256, c, 14, 14), (k, c, 1, 1), kind=self.kind, **more)
            return Specimen("matmul", case, configs)

        return [
            seen("gated 672-112", 672, 112), seen("gated 240-40", 240, 40, 2), seen("gated 1152-320", 1152, 320, 2),
            seen("gated 672-112 tf32", 672, 112, 1, dtype="fp32", tf32=True),
            seen("gated 672-112 ieee", 672, 112, 1, dtype="fp32"),
        ]  # fmt: skip


@register
class Averaged(_Extended):
    """The mean of silu(conv(x)) over each image, and nothing else of it: x once in."""

    kind = "averaged"
    kernels: tuple[str, ...] = ("matmul", "conv_fprop", "conv_flat")

    def count(self, case: Case) -> tuple[int, int]:
        g = self.geometry(case)
        x, w, _ = g.elements()
        return g.macs, (x + w + case.batch * case.filters) * dtype_of(case).itemsize

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        return _random(case, device, dtype, channels_last), self.weight(case, device, dtype, channels_last)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        x, w = tensors
        found = averaged_convolution((x, w, *(None,) * 6), self.numbers(case), None, False)
        assert found is not None
        return found[1]

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(*tensors, None, case.stride, case.padding, 1, case.groups)  # type: ignore[call-overload]
        return torch.nn.functional.silu(y).mean((2, 3), keepdim=True)

    def checks(self) -> list[Case]:
        return [layer("averaged 1x1", (3, 40, 16, 16), (72, 40, 1, 1), kind=self.kind)]

    def specimens(self) -> list[Specimen]:
        def seen(
            kernel: str, name: str, image: tuple[int, ...], weight: tuple[int, ...], configs: int, **more: int
        ) -> Specimen:
            return Specimen(kernel, layer(name, image, weight, kind=self.kind, **more), configs)

        return [
            seen("matmul", "averaged 1x1 of 7x7", (256, 320, 7, 7), (1280, 320, 1, 1), 4),
            seen("conv_fprop", "averaged 3x3 of 14x14", (256, 256, 14, 14), (256, 256, 3, 3), 3, padding=1),
        ]


@register
class AveragedDepthwise(Averaged):
    kind = "averaged depthwise"
    kernels = ("depthwise",)
    products = False

    def checks(self) -> list[Case]:
        return [layer("averaged depthwise", (2, 24, 16, 15), (24, 1, 3, 3), padding=1, groups=24, kind=self.kind)]

    def specimens(self) -> list[Specimen]:
        case = layer("averaged depthwise", (64, 240, 28, 28), (240, 1, 3, 3), padding=1, groups=240, kind=self.kind)
        return [Specimen("depthwise", case, 2)]
