"""Deformable convolution, with and without a mask."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import layer
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import DeformGeometry, Pass
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import as_format, suggests_channels_last
from tritonconv.ops.deform.gradients import Wanted, deform_dgrad, deform_wgrad
from tritonconv.ops.deform.launch import deform_forward
from tritonconv.ops.deform.torch_form import deform_on_torch

__all__ = ["Deform", "deform_layer"]


def deform_layer(
    name: str, shape: tuple[int, ...], weight: tuple[int, ...], *, offset_groups: int = 1, mask: bool = True, **more: Any
) -> Case:  # fmt: skip
    """A layer over (N, C, H, W) with a weight (K, C / groups, R, S)."""
    plain = layer(name, shape, weight, kind="deform", **more)
    return replace(plain, deform_groups=offset_groups, mask=mask)


@register
class Deform(Operation):
    """The pass "dgrad" is the gradient of input, offsets and mask, which share one product."""

    kind = "deform"
    kernels = ("deform_conv", "deform_conv_wgrad", "deform_conv_dgrad")
    passes = ("fprop", "dgrad", "wgrad")

    def geometry(self, case: Case) -> DeformGeometry:
        (n, _), r, s = case.input_shape[:2], *case.kernel
        assert not isinstance(case.padding, str)
        stride, padding, dilation = (
            value * 2 if len(value) == 1 else value for value in (case.stride, case.padding, case.dilation)
        )
        axes = zip(case.size, case.kernel, stride, padding, dilation, strict=True)
        p, q = ((size + 2 * pad - step * (taps - 1) - 1) // hop + 1 for size, taps, hop, pad, step in axes)
        taps = case.deform_groups * r * s
        return DeformGeometry.parse(
            case.input_shape, (n, 2 * taps, p, q), (case.filters, case.channels // case.groups, r, s),
            (n, taps, p, q) if case.mask else None, stride=stride, padding=padding, dilation=dilation,
        )  # fmt: skip

    def count(self, case: Case) -> tuple[int, int]:
        """Products and four multiply-adds a sample; of "dgrad" eight, one half to scatter and one to derive."""
        g, size = self.geometry(case), dtype_of(case).itemsize
        more = 4 * g.samples if case.pass_ == "dgrad" else 0
        return g.macs + more, g.bytes(size, case.pass_)

    def depth(self, case: Case) -> int:
        g = self.geometry(case).conv
        return {"dgrad": g.out_channels * g.taps, "wgrad": g.gemm("wgrad")[2]}.get(case.pass_, g.gemm()[2])

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        g = self.geometry(case)

        def random(shape: tuple[int, ...]) -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.randn(shape, device=device, dtype=dtype), channels_last)

        weight = random(g.conv.weight_shape).mul_((g.conv.filter_channels * g.conv.taps) ** -0.5)
        # Without one, an empty mask.
        mask = random(g.mask_shape).sigmoid_() if case.mask else torch.empty(0, device=device, dtype=dtype)
        found = random(case.input_shape), random(g.offset_shape), mask, weight
        return found if case.pass_ == "fprop" else (*found, random(g.conv.output_shape))

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        x, offset, mask, weight, *dy = tensors
        learned, g = (mask if case.mask else None), self.geometry(case)
        if case.pass_ == "fprop":
            return deform_forward(x, offset, learned, weight, Epilogue(), g)
        if case.pass_ == "wgrad":
            return deform_wgrad(dy[0], x, offset, learned, g, suggests_channels_last(weight))
        channels_last = suggests_channels_last(x)
        dx = deform_dgrad(dy[0], x, offset, learned, weight, g, Wanted(), channels_last, "deterministic")[0]
        assert dx is not None
        return dx

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """Torchvision's kernels where it is installed, in fp32 as it computes halves under autocast."""
        if importlib.util.find_spec("torchvision") is None:
            return self.reference(case, *tensors)
        import torchvision  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401

        fine = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        x, offset, mask, weight, *dy = (t.to(fine) for t in tensors)
        g, bias = self.geometry(case), weight.new_zeros(len(weight))
        mask = mask if case.mask else x.new_zeros(x.shape[0], 0)
        numbers = (*g.conv.stride[1:], *g.conv.padding[1:], *g.conv.dilation[1:], g.conv.groups, g.offset_groups, case.mask)
        ops = torch.ops.torchvision
        if case.pass_ == "fprop":
            return ops.deform_conv2d(x, weight, offset, mask, bias, *numbers).to(tensors[0].dtype)
        found = ops._deform_conv2d_backward(dy[0], x, weight, offset, mask, bias, *numbers)
        return found[1 if case.pass_ == "wgrad" else 0].to(tensors[0].dtype)

    def reference(self, case: Case, *tensors: Tensor) -> Tensor:
        x, offset, mask, weight, *dy = tensors
        learned, g = (mask if case.mask else None), self.geometry(case)
        if case.pass_ == "fprop":
            return deform_on_torch(x, offset, learned, weight, None, g)
        with torch.enable_grad():
            wanted = (weight if case.pass_ == "wgrad" else x).detach().requires_grad_()
            x, weight = (x, wanted) if case.pass_ == "wgrad" else (wanted, weight)
            return torch.autograd.grad(deform_on_torch(x, offset, learned, weight, None, g), wanted, dy[0])[0]

    def checks(self) -> list[Case]:
        return [
            deform_layer("deform", (1, 64, 9, 10), (64, 64, 3, 3), padding=1),
            deform_layer("deform of 20", (2, 20, 7, 6), (30, 20, 3, 3), padding=1, stride=2, mask=False),
            deform_layer("deform of 16 offset groups", (1, 128, 6, 5), (64, 128, 3, 3), padding=1, offset_groups=16),
            deform_layer("deform grouped", (1, 96, 6, 7), (64, 48, 2, 3), padding=1, dilation=2, offset_groups=4),
        ]

    def specimens(self) -> list[Specimen]:
        kernels: dict[Pass, str] = dict(fprop="deform_conv", wgrad="deform_conv_wgrad", dgrad="deform_conv_dgrad")

        def seen(name: str, c: int, k: int, configs: int | None = None, **more: Any) -> list[Specimen]:
            found = []
            for p in kernels:
                case = deform_layer(name, (2, c, 50, 84), (k, c, 3, 3), padding=1, pass_=p, **more)
                found.append(Specimen(kernels[p], case, configs))
            return found

        return [
            *seen("deform", 256, 256),
            *seen("deform of 64", 64, 64, 1),
            *seen("deform of 16 offset groups", 128, 64, 1, offset_groups=16),
            *seen("deform of 20 odd", 20, 30, 1),
            *seen("deform tf32", 256, 256, dtype="fp32", tf32=True),
            *seen("deform ieee", 128, 128, dtype="fp32"),
            *seen("deform fp64", 128, 128, dtype="fp64"),
        ]
