"""Tensors as Hopper's kernels see them: five axes, boxes, and the phases of strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import Triple, phase_size
from tritonconv.ops.conv.hopper.supports import MOST_PHASES
from tritonconv.ops.core.launch import Box, aligned
from tritonconv.ops.core.layout import empty_output, is_dense

__all__ = ["BoxView", "Image", "as_boxes", "of_phases"]


def as_boxes(t: Tensor) -> Tensor:
    """`t` itself if it is dense, channels-last and starts on 16 bytes, else a copy that is and does."""
    if is_dense(t, True) and aligned(t):
        return t
    return empty_output(t, tuple(t.shape), True, t.dtype).copy_(t)


class BoxView(Box):
    """A TMA descriptor to be made of a tensor: sizes and strides in elements, the last 1, and the box moved at once."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype, offset: int = 0
    ) -> None:  # fmt: skip
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        self.kind = TensorDescriptor
        layout = gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype)[6:]))
        self.arguments = (list(shape), list(strides), list(block), layout)
        self.offset = offset
        self.checked = None

    def descriptor(self, t: Tensor) -> Any:
        return super().descriptor(t.as_strided((1,), (1,), t.storage_offset() + self.offset) if self.offset else t)


def of_phases(views: tuple[BoxView, ...], t: Tensor | None) -> tuple[Any, ...]:
    """The arguments for a tensor's phases: their descriptors, and None for those that it has not."""
    made = () if t is None else tuple(view.of(t) for view in views)
    return (*made, *(None,) * (MOST_PHASES - len(made)))


@dataclass(frozen=True)
class Image:
    """A tensor (N, C, D, H, W) whose channels lie side by side."""

    batch: int
    sizes: Triple
    channels: int
    """Of a group."""
    groups: int
    strides: tuple[int, int, int, int]
    """Elements between neighbors along N, D, H, W."""
    depth_is_groups: bool
    """Whether groups are the axis that the depth would be."""

    @classmethod
    def of(
        cls, batch: int, sizes: Triple, channels: int, groups: int, nd: int,
        strides: tuple[int, int, int, int] | None = None,
    ) -> Image:  # fmt: skip
        """With these strides, of which those of unit axes do not matter, or dense ones."""
        row = channels * groups
        dense = [row * sizes[0] * sizes[1] * sizes[2], row * sizes[1] * sizes[2], row * sizes[2], row]
        given = strides or dense
        # TMA wants strides of unit axes to be possible ones too.
        kept = [s if n > 1 else max(row, d) for s, d, n in zip(given, dense, (batch, *sizes), strict=True)]
        return cls(batch, sizes, channels, groups, (kept[0], kept[1], kept[2], kept[3]), groups > 1 and nd < 3)

    def view(
        self, box: tuple[int, ...], width: int, dtype: torch.dtype, pixel: Triple = (0, 0, 0), step: Triple = (1, 1, 1)
    ) -> BoxView:  # fmt: skip
        """Boxes of `box` pixels x `width` channels of every step-th pixel from `pixel` on."""
        n, d, h, w = self.strides
        sizes = [phase_size(size, first, every) for size, first, every in zip(self.sizes, pixel, step, strict=True)]
        strides = [stride * every for stride, every in zip((d, h, w), step, strict=True)]
        channels = self.channels * self.groups
        if self.depth_is_groups:
            sizes[0], strides[0], channels = self.groups, self.channels, self.channels
        offset = sum(stride * first for stride, first in zip((d, h, w), pixel, strict=True))
        return BoxView((self.batch, *sizes, channels), (n, *strides, 1), (*box, width), dtype, offset)
