"""Short causal depthwise convolution over time with SiLU behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.geometry import ConvGeometry, Pass
from tritonconv.ops.causal.launch import causal_backward, causal_forward, causal_geometry
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.layout import as_format

__all__ = ["Causal", "causal_layer"]


def causal_layer(
    name: str, size: tuple[int, int, int], taps: int, *, dtype: str = "bf16", pass_: Pass = "fprop",
    channels_last: bool = True,
) -> Case:  # fmt: skip
    """A layer over (B, D, T)."""
    b, d, t = size
    return Case(
        name, "causal", b, d, (t,), d, (taps,), padding="causal", groups=d, dtype=dtype, pass_=pass_,
        channels_last=channels_last,
    )  # fmt: skip


@register
class Causal(Operation):
    """The pass "dgrad" is the whole of backward: gradients of input, weight and bias in one pass over x and dy."""

    kind = "causal"
    kernels = ("causal_conv1d",)
    passes = ("fprop", "dgrad")
    products = False

    def geometry(self, case: Case) -> ConvGeometry:
        return causal_geometry(case.input_shape, case.kernel[0])

    def count(self, case: Case) -> tuple[int, int]:
        """x once in and y once out; backward x and dy once in and dx once out, for two convolutions' products."""
        x, weight, y = self.geometry(case).elements()
        macs, vectors = self.geometry(case).macs, weight + case.channels
        if case.pass_ == "fprop":
            return macs, (x + y + vectors) * dtype_of(case).itemsize
        return 2 * macs, (x + 2 * y + 2 * vectors) * dtype_of(case).itemsize

    def depth(self, case: Case) -> int:
        return case.kernel[0]

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        def random() -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.randn(case.input_shape, device=device, dtype=dtype), channels_last)

        x = random()
        weight = torch.randn(case.channels, case.kernel[0], device=device, dtype=dtype).mul_(case.kernel[0] ** -0.5)
        bias = torch.randn(case.channels, device=device, dtype=dtype)
        if case.pass_ == "fprop":
            return x, weight, bias
        # What torch's autograd would have kept; ours computes it again.
        padded = self._padded(case, x)
        return x, weight, bias, random(), padded, self._convolved(padded, weight, bias)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        x, weight, bias, *rest = tensors
        act = parse_activation("silu")
        if case.pass_ == "fprop":
            return causal_forward(x, weight, bias, None, act)
        return causal_backward(rest[0], x, weight, bias, None, act).x

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The gradient by torch's own kernels, which take no time for the graph around them."""
        x, weight, bias, *rest = tensors
        if case.pass_ == "fprop":
            return torch.nn.functional.silu(self._convolved(self._padded(case, x), weight, bias))
        dy, padded, z = rest
        dz = torch.ops.aten.silu_backward(dy, z)
        found: list[Tensor] = torch.ops.aten.convolution_backward(
            dz, padded, weight.unsqueeze(1), [case.channels], [1], [0], [1], False, [0], case.channels, [True, True, True]
        )
        return found[0][:, :, case.kernel[0] - 1 :]

    def reference(self, case: Case, *tensors: Tensor) -> Tensor:
        if case.pass_ == "fprop":
            return self.torch(case, *tensors)
        # z is computed from x, not taken as it was rounded.
        x, weight, bias, dy, *_ = tensors
        padded = self._padded(case, x)
        return self.torch(case, x, weight, bias, dy, padded, self._convolved(padded, weight, bias))

    def _padded(self, case: Case, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (case.kernel[0] - 1, 0))

    def _convolved(self, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))

    def checks(self) -> list[Case]:
        return [
            causal_layer("causal of 4", (2, 72, 150), 4),
            causal_layer("causal of 4 contiguous", (2, 20, 150), 4, channels_last=False),
            causal_layer("causal of 8", (1, 24, 75), 8),
            causal_layer("causal of 3 contiguous", (3, 5, 61), 3, channels_last=False),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, size: tuple[int, int, int], *, configs: int | None = None, **more: Any) -> list[Specimen]:
            functions: dict[Pass, str] = dict(fprop="causal_forward_kernel", dgrad="causal_backward_kernel")
            # What the name ends in says how its code is judged.
            *words, last = name.split(" ")
            found = []
            for p, function in functions.items():
                full = " ".join([*words, *(["backward"] if p == "dgrad" else []), last])
                found.append(Specimen("causal_conv1d", causal_layer(full, size, 4, pass_=p, **more), configs, function))
            return found

        long, batch = (1, 12288, 16384), (8, 5120, 2048)
        return [
            *seen("long k4", long),
            *seen("long contiguous k4", long, channels_last=False),
            *seen("batch k4", batch, configs=1),
            *seen("batch contiguous k4", batch, configs=1, channels_last=False),
            *seen("long k4 fp32", long, dtype="fp32", configs=1),
        ]
