"""The layers that every convolution test walks through, and how to make their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.layout import as_format

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@dataclass(frozen=True)
class ConvCase:
    """One layer; `why` says what it shows."""

    why: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    kernel: str
    """Kernel that a channels-last input and weight run on."""
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        n = 1
        for size in self.weight[1:]:
            n *= size
        return n

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = [
    # conv_fprop: channels that a block divides
    ConvCase("3x3 padded", (2, 64, 9, 7), (72, 64, 3, 3), "conv_fprop", dict(padding=1)),
    ConvCase("3x3 strided", (2, 128, 9, 8), (32, 128, 3, 3), "conv_fprop", dict(padding=1, stride=2)),
    ConvCase("1x1 strided", (2, 128, 7, 8), (20, 128, 1, 1), "conv_fprop", dict(stride=2)),
    ConvCase("1x1 padded", (1, 128, 3, 4), (8, 128, 1, 1), "conv_fprop", dict(padding=1)),
    ConvCase("3x3 dilated unpadded", (1, 128, 11, 9), (16, 128, 3, 3), "conv_fprop", dict(dilation=(2, 3))),
    ConvCase("even filter same", (1, 128, 6, 7), (16, 128, 2, 4), "conv_fprop", dict(padding="same")),
    ConvCase("mixed strides", (1, 128, 9, 12), (16, 128, 3, 2), "conv_fprop", dict(stride=(2, 3), padding=(2, 0))),
    ConvCase("grouped of 128", (2, 256, 6, 5), (64, 128, 3, 3), "conv_fprop", dict(padding=1, groups=2)),
    ConvCase("1-d", (2, 128, 19), (16, 128, 5), "conv_fprop", dict(padding=2, dilation=2)),
    ConvCase("1-d filter of 33, no word of bits", (1, 128, 40), (16, 128, 33), "conv_fprop", dict(padding=16)),
    ConvCase("3-d", (1, 128, 4, 5, 3), (16, 128, 3, 2, 3), "conv_fprop", dict(padding=(1, 0, 1), stride=(1, 2, 1))),
    # conv_flat: channels that none divides
    ConvCase("stem 7x7", (2, 3, 15, 17), (10, 3, 7, 7), "conv_flat", dict(padding=3, stride=2)),
    ConvCase("one channel", (2, 1, 9, 9), (6, 1, 5, 5), "conv_flat", dict(padding=2)),
    ConvCase("24 channels", (2, 24, 7, 6), (40, 24, 3, 3), "conv_flat", dict(padding=1)),
    ConvCase("32 channels, several taps a block", (2, 32, 7, 6), (24, 32, 3, 3), "conv_flat", dict(padding=1, stride=2)),
    ConvCase("7 channels, 5 filters", (1, 7, 6, 6), (5, 7, 3, 3), "conv_flat", dict(padding=1)),
    ConvCase("grouped of 4", (2, 16, 6, 6), (16, 4, 3, 3), "conv_flat", dict(padding=1, groups=4)),
    ConvCase("filter of 17x17, no word of bits", (1, 3, 7, 6), (4, 3, 17, 17), "conv_flat", dict(padding=8)),
    ConvCase("1-d stem", (2, 2, 33), (8, 2, 9), "conv_flat", dict(stride=3, padding=4)),
    ConvCase("3-d stem", (1, 3, 5, 8, 7), (8, 3, 3, 5, 5), "conv_flat", dict(padding=(1, 2, 2), stride=(1, 2, 2))),
    ConvCase("3-d unit depth padded", (1, 3, 1, 4, 4), (4, 3, 1, 3, 3), "conv_flat", dict(padding=(1, 1, 1))),
    # depthwise: one channel a group
    ConvCase("depthwise", (2, 9, 10, 10), (9, 1, 3, 3), "depthwise", dict(padding=1, groups=9)),
    ConvCase("depthwise with multiplier", (1, 6, 7, 7), (12, 1, 3, 3), "depthwise", dict(stride=2, groups=6)),
    ConvCase("depthwise 5x5 strided", (2, 24, 9, 11), (24, 1, 5, 5), "depthwise", dict(padding=2, stride=2, groups=24)),
    ConvCase(
        "depthwise 5x5 of mixed numbers",
        (1, 8, 13, 12),
        (16, 1, 5, 4),
        "depthwise",
        dict(padding=(4, 1), stride=(3, 2), dilation=(2, 3), groups=8),
    ),
    ConvCase("depthwise 7x7", (1, 12, 5, 6), (12, 1, 7, 7), "depthwise", dict(padding=3, groups=12)),
    ConvCase(
        "depthwise 3x13, columns walked too", (1, 2, 3, 5), (2, 1, 3, 13), "depthwise", dict(padding=(1, 6), groups=2)
    ),
    ConvCase("depthwise 4x12 strided", (1, 3, 9, 15), (3, 1, 4, 12), "depthwise", dict(stride=(4, 2), padding=3, groups=3)),
    ConvCase("depthwise even filter same", (1, 8, 6, 7), (8, 1, 2, 4), "depthwise", dict(padding="same", groups=8)),
    ConvCase("depthwise 1x1", (2, 8, 3, 3), (8, 1, 1, 1), "depthwise", dict(groups=8)),
    ConvCase("depthwise 1-d", (2, 40, 33), (40, 1, 4), "depthwise", dict(padding=3, groups=40)),
    ConvCase("depthwise 1-d of 31", (1, 8, 40), (8, 1, 31), "depthwise", dict(padding=15, groups=8)),
    ConvCase("depthwise 3-d", (1, 6, 4, 5, 6), (12, 1, 3, 3, 3), "depthwise", dict(padding=1, stride=(2, 1, 2), groups=6)),
    ConvCase("depthwise of one pixel", (1, 5, 1, 1), (5, 1, 3, 3), "depthwise", dict(padding=1, groups=5)),
    # matmul: 1x1, and patches as rows
    ConvCase("1x1", (2, 24, 5, 7), (18, 24, 1, 1), "matmul"),
    ConvCase("1x1 of 5", (2, 5, 3, 3), (7, 5, 1, 1), "matmul"),
    ConvCase("1-d 1x1", (2, 16, 9), (12, 16, 1), "matmul"),
    ConvCase("single pixel", (1, 16, 1, 1), (1, 16, 1, 1), "matmul"),
    ConvCase("image is one patch", (3, 3, 2, 4, 4), (20, 3, 2, 4, 4), "matmul", dict(stride=(2, 4, 4))),
    ConvCase("1-d patches", (2, 6, 20), (8, 6, 4), "matmul", dict(stride=4)),
    ConvCase("1-d patches and a rest", (2, 6, 21), (8, 6, 4), "conv_flat", dict(stride=4)),
    ConvCase("patches", (2, 32, 13, 12), (16, 32, 4, 4), "conv_fprop", dict(stride=4)),
    ConvCase("patches of an image", (1, 3, 16, 16), (16, 3, 8, 8), "conv_flat", dict(stride=8)),
    # edges
    ConvCase("empty batch", (0, 16, 4, 4), (8, 16, 3, 3), "", dict(padding=1)),
    ConvCase("filter larger than the image", (1, 128, 2, 2), (8, 128, 5, 5), "conv_fprop", dict(padding=2)),
    ConvCase("one output pixel", (2, 40, 3, 3), (8, 40, 3, 3), "conv_flat"),
]


def make_tensors(
    case: ConvCase, dtype: torch.dtype, device: str, *, x_cl: bool = True, w_cl: bool = True, integers: bool = False
) -> tuple[Tensor, Tensor]:
    """Random input and weight of a case; small integers where the result must be exact."""

    def values(shape: tuple[int, ...], channels_last: bool) -> Tensor:
        t = torch.randint(-2, 3, shape).double() if integers else torch.randn(shape, dtype=torch.float64)
        return as_format(t.to(device=device, dtype=dtype), channels_last)

    return values(case.input, x_cl), values(case.weight, w_cl)


def make_epilogue(
    channels: int, output: Tensor, dtype: torch.dtype, device: str, *, bias: bool = True, norm: bool = True,
    residual: bool = True, activation: Any = None,
) -> Epilogue:  # fmt: skip
    """A random epilogue; its batch norm is in fp32, as mixed-precision models have it."""

    def vector(low: float, high: float) -> Tensor:
        return torch.empty(channels, device=device).uniform_(low, high)

    return Epilogue(
        torch.randn(channels, device=device).to(dtype) if bias else None,
        BatchNorm(vector(-1, 1), vector(0.5, 2), vector(0.5, 1.5), vector(-1, 1), 1e-3) if norm else None,
        torch.randn_like(output) if residual else None,
        activation,
    )
