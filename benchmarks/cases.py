"""The launches whose code is inspected: for each kernel, the layers that show what it must be good at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.offline import TARGETS
from tritonconv.geometry import ConvGeometry
from tritonconv.ops.activation import make_spec
from tritonconv.ops.convolution import build_launch, plan_for
from tritonconv.ops.epilogue import BatchNorm, Epilogue
from tritonconv.ops.launch import Launch, forced
from tritonconv.ops.layout import dense_strides

__all__ = ["CASES", "CodegenCase", "launches"]


@dataclass(frozen=True)
class CodegenCase:
    """One layer. `configs` names what of the candidates is compiled: all that fit, or the first few of them."""

    kernel: str
    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    channels_last: bool = True
    configs: int | None = None

    @property
    def nd(self) -> int:
        return len(self.input) - 2


CASES = [
    # The layer that decides for ResNets, with the largest epilogue: batch norm, residual, activation.
    CodegenCase("conv_fprop", "3x3", (32, 256, 56, 56), (256, 256, 3, 3), padding=1),
    CodegenCase("conv_fprop", "3x3 fp16", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype=torch.float16, configs=2),
    CodegenCase("conv_fprop", "3x3 tf32", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype=torch.float32, tf32=True),
    CodegenCase("conv_fprop", "3x3 ieee", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype=torch.float32, configs=2),
    CodegenCase("conv_fprop", "3x3 fp64", (32, 256, 56, 56), (256, 256, 3, 3), padding=1, dtype=torch.float64, configs=1),
    # 64-bit words of mask bits, three axes.
    CodegenCase("conv_fprop", "4x3x3", (2, 64, 16, 56, 56), (128, 64, 4, 3, 3), padding=1, configs=3),
    # More than 2^31 elements: 64-bit offsets.
    CodegenCase("conv_fprop", "3x3 s2 int64", (64, 128, 513, 513), (128, 128, 3, 3), stride=2, configs=3),
    CodegenCase("conv_fprop", "3x3 grouped", (32, 256, 56, 56), (256, 128, 3, 3), padding=1, groups=2, configs=3),
    # A contiguous NCHW image, read in place by single elements.
    CodegenCase("conv_flat", "stem 7x7", (32, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, channels_last=False),
    # Blocks across taps, for few channels and for counts that no block divides: 128-bit loads all the same.
    CodegenCase("conv_flat", "3x3 of 64", (32, 64, 56, 56), (64, 64, 3, 3), padding=1, configs=4),
    CodegenCase("conv_flat", "3x3 of 24", (32, 24, 56, 56), (96, 24, 3, 3), padding=1),
    # Patches of a contiguous image: rows of 16 neighbors.
    CodegenCase("conv_flat", "patch 16x16", (32, 3, 224, 224), (768, 3, 16, 16), stride=16, channels_last=False),
    CodegenCase("matmul", "1x1", (32, 256, 56, 56), (256, 256, 1, 1)),
    # Rows of 48 bytes, which descriptors take too.
    CodegenCase("matmul", "1x1 of 24", (32, 24, 56, 56), (144, 24, 1, 1), configs=3),
    CodegenCase("matmul", "1x1 tf32", (32, 256, 56, 56), (256, 256, 1, 1), dtype=torch.float32, tf32=True, configs=2),
]


def launches(case: CodegenCase, target: str) -> Iterator[tuple[Any, Launch]]:
    """(config, launch) of each candidate that fits the case on the target, built from meta tensors."""
    from tritonconv.kernels import conv_flat, conv_fprop, matmul
    from tritonconv.kernels.tiles import fitting

    module = dict(conv_fprop=conv_fprop, conv_flat=conv_flat, matmul=matmul)[case.kernel]
    limits = TARGETS[target].limits
    geometry = ConvGeometry.parse(
        case.input, case.weight, nd=case.nd, stride=case.stride, padding=case.padding, groups=case.groups
    )

    def tensor(shape: tuple[int, ...], channels_last: bool) -> torch.Tensor:
        return torch.empty_strided(shape, dense_strides(shape, channels_last), dtype=case.dtype, device="meta")

    x, w, y = tensor(case.input, case.channels_last), tensor(case.weight, True), tensor(geometry.output_shape, True)
    if case.name.startswith("patch"):
        w = tensor(case.weight, False)
    k = torch.empty(geometry.out_channels, device="meta")
    epilogue = Epilogue(None, BatchNorm(k, k, k, k, 1e-5), y, make_spec("relu"))
    plan = plan_for(x, w, geometry)
    if plan.kernel != case.kernel or plan.copies:
        raise ValueError(f"{case.name} runs {plan.kernel} with {plan.copies} copies, expected {case.kernel} and none")
    m, n, depth = plan.geometry.gemm()
    run = depth if case.kernel == "conv_flat" else plan.geometry.in_channels // plan.geometry.groups
    fitting_configs = fitting(
        module.configs(), m=m, n=n, k=run, itemsize=x.element_size(), tensor_cores=x.element_size() == 2 or case.tf32,
        shared=limits.shared_memory, even=case.kernel == "conv_fprop", vectors=plan.vector > 1,
    )  # fmt: skip
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    previous, switch.fp32_precision = switch.fp32_precision, "tf32" if case.tf32 else "ieee"
    try:
        for config in fitting_configs[: case.configs]:
            with forced(config=config, limits=limits):
                yield config, build_launch(x, w, y, epilogue, plan, True, "conv")
    finally:
        switch.fp32_precision = previous
