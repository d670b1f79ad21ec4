"""Depthwise convolution, whose kernels multiply no matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import Convolution, layer
from tritonconv.bench.registry import Specimen, register
from tritonconv.ops.conv.depthwise import convolve_depthwise, depthwise_dgrad, depthwise_wgrad
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.layout import suggests_channels_last

__all__ = ["Depthwise"]


@register
class Depthwise(Convolution):
    """The layers of cases.csv run as convolutions; checks and code are this one's."""

    kind = "depthwise"
    kernels = ("depthwise", "depthwise_wgrad")
    products = False

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        """By these kernels, also where others are chosen for it."""
        geometry = self.geometry(case)
        if case.pass_ == "fprop":
            x, w, *rest = tensors
            norm = BatchNorm(rest[0], rest[1], rest[2], rest[3], 1e-5) if rest else None
            epilogue = Epilogue(None, norm, rest[4], ActivationSpec("relu")) if rest else Epilogue()
            y = convolve_depthwise(x, w, epilogue, geometry).y
            assert y is not None
            return y
        dy, other = tensors
        if case.pass_ == "dgrad":
            return depthwise_dgrad(dy, other, geometry, suggests_channels_last(dy))
        return depthwise_wgrad(dy, other, geometry, False, False)[0]

    def checks(self) -> list[Case]:
        def small(name: str, *sizes: Any, **more: Any) -> Case:
            return layer(f"dw {name}", *sizes, groups=sizes[0][1], kind=self.kind, **more)

        return [
            small("3x3", (2, 40, 15, 13), (40, 1, 3, 3), padding=1),
            small("5x5 stride 2", (2, 24, 15, 13), (24, 1, 5, 5), padding=2, stride=2),
            small("7x7", (1, 72, 15, 13), (72, 1, 7, 7), padding=3),
            small("11x11 multiplied", (1, 9, 15, 13), (18, 1, 11, 11), padding=5),
            small("1-d", (2, 40, 130), (40, 1, 4), padding=3),
            small("3-d", (1, 24, 5, 6, 7), (24, 1, 3, 3, 3), padding=1, stride=2),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, size: tuple[int, ...], taps: int, *, configs: int | None = None, **more: Any) -> list[Specimen]:
            weight = (size[1], 1, *(taps,) * (len(size) - 2))
            kernels = dict(fprop="depthwise", dgrad="depthwise", wgrad="depthwise_wgrad")
            shared: dict[str, Any] = dict(groups=size[1], kind=self.kind, **more)
            # What the name ends in says how its code is judged.
            *words, last = name.split(" ")
            names = {p: " ".join([*words, *([p] if p != "fprop" else []), last]) for p in kernels}
            return [
                Specimen(kernel, layer(names[p], size, weight, pass_=p, **shared), configs) for p, kernel in kernels.items()
            ]

        return [
            *seen("3x3", (32, 96, 56, 56), 3, padding=1),
            *seen("3x3 s2", (32, 96, 57, 57), 3, padding=1, stride=2, configs=2),
            *seen("5x5", (32, 672, 14, 14), 5, padding=2, configs=3),
            *seen("7x7", (32, 384, 14, 14), 7, padding=3, configs=2),
            *seen("31x31", (8, 128, 56, 56), 31, padding=15, configs=1),
            *seen("1-d", (1, 12288, 2048), 4, padding=3, configs=2),
            *seen("3-d", (8, 72, 16, 56, 56), 3, padding=1, configs=1),
            *seen("3x3 contiguous odd", (32, 96, 56, 56), 3, padding=1, channels_last=False),
            *seen("3x3 fp32", (32, 96, 56, 56), 3, padding=1, dtype="fp32", configs=1),
            *seen("3x3 fp64", (32, 96, 56, 56), 3, padding=1, dtype="fp64", configs=1),
            *seen("3x3 of 33 odd", (32, 33, 56, 56), 3, padding=1, configs=1),
            Specimen(
                "depthwise",
                layer("3x3 fused", (32, 96, 56, 56), (96, 1, 3, 3), padding=1, groups=96, kind=self.kind, fused=True), 2,
            ),
        ]  # fmt: skip
