"""Depthwise convolution with a large filter, as banded products on tensor cores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.operations.convolution import Convolution, layer
from tritonconv.bench.registry import Specimen, dtype_of, register
from tritonconv.ops.conv.banded import bands_dgrad, bands_wgrad, convolve_banded, supports_bands
from tritonconv.ops.conv.depthwise import DepthwiseView
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import device_of, forced_config

__all__ = ["Bands"]


@register
class Bands(Convolution):
    """The layers of cases.csv run as convolutions; checks and code are this one's."""

    kind = "bands"
    kernels = ("depthwise_bands", "depthwise_bands_wgrad")

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        geometry = self.geometry(case)
        view = DepthwiseView(geometry, case.pass_ == "dgrad", False, device_of(tensors[0].device), dtype_of(case).itemsize)
        if forced_config("BLOCK_M") is None and not supports_bands(view, dtype_of(case), case.pass_, case.tf32):
            # Products of plain fp32 are the direct kernel's.
            return super().ours(case, *tensors)
        if case.pass_ == "fprop":
            x, w, *_ = tensors
            y = convolve_banded(x, w, Epilogue(), geometry).y
            assert y is not None
            return y
        dy, other = tensors
        if case.pass_ == "dgrad":
            return bands_dgrad(dy, other, geometry)
        return bands_wgrad(dy, other, geometry, False, False)[0]

    def checks(self) -> list[Case]:
        def small(name: str, *sizes: Any, **more: Any) -> Case:
            return layer(name, *sizes, groups=sizes[0][1], kind=self.kind, **more)

        return [
            small("bands 7x7", (64, 3, 14, 14), (3, 1, 7, 7), padding=3),
            small("bands 13x13", (1, 2, 40, 33), (2, 1, 13, 13), padding=6),
            small("bands 7x7 stride 2", (1, 4, 29, 30), (4, 1, 7, 7), padding=3, stride=2),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(name: str, c: int, size: int, taps: int, *, configs: int | None = None, **more: Any) -> list[Specimen]:
            kernels = dict(fprop="depthwise_bands", dgrad="depthwise_bands", wgrad="depthwise_bands_wgrad")
            more |= dict(padding=taps // 2, groups=c, kind=self.kind, channels_last=False)
            sizes = (64, c, size, size), (c, 1, taps, taps)
            *words, last = name.split(" ")
            names = {p: " ".join([*words, *([p] if p != "fprop" else []), last]) for p in kernels}
            return [
                Specimen(kernel, layer(names[p], *sizes, pass_=p, **more), configs) for p, kernel in kernels.items()
                if p != "dgrad" or more.get("stride", 1) > 1
            ]  # fmt: skip

        return [
            *seen("31x31 bands", 128, 56, 31),
            *seen("7x7 of rows of 14 odd", 384, 14, 7),
            *seen("7x7 s2 odd", 96, 56, 7, stride=2, configs=1),
            *seen("31x31 bands tf32", 128, 56, 31, dtype="fp32", tf32=True, configs=1),
        ]
