"""Which kernel a convolution takes, how it sees the image, and which hidden copies that costs.

Pure arithmetic on sizes and strides: a plan is known before any memory is touched, so that `explain` can tell it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tritonconv.geometry import INT32_MAX, ConvGeometry, power_of_two_divisor
from tritonconv.ops.core.layout import dense_strides

__all__ = [
    "ConvPlan", "Strides", "lift", "pack_constants", "packed", "plan_convolution", "row_stride",
]  # fmt: skip

Strides = tuple[int, int, int, int, int]
"""Elements between neighbors along N, C, D, H, W; 0 where there is only one."""

# A group with few channels is read where it lies, whatever its layout: its taps and channels share one reduction axis.
FEW_CHANNELS = 4
# conv_fprop takes blocks of one tap's channels, which must divide them: 64, and 128 where so few filters share a step that
# its own instructions weigh more than its products. conv_flat takes the rest, with blocks across taps.
CHANNEL_BLOCK = 64
FEW_FILTERS = 64
# Tiles have so many columns at least. Groups with fewer share one, up to so many together: 256 pixels x 32 columns take 26
# lane instructions an output in bf16 (3x3 of 4 or 8 channels) and 2 more to look for NaN, where an H200 has time for 27 in
# the 4 bytes that it moves. 16 columns take 32 (the same loop, for half the results); 64 take 31, with products twice as
# long. Groups of 4 that stay alone take 360, groups of 8 185.
LEAST_TILE, PACK_WIDTH = 16, 32


@dataclass(frozen=True)
class ConvPlan:
    """How a convolution will run."""

    kernel: str
    """conv_fprop, conv_flat or matmul."""
    geometry: ConvGeometry
    """The product that the kernel computes: patches may have become channels, and `pack` groups one."""
    strides: Strides
    """The image as the kernel reads it, behind the copy if there is one."""
    row_stride: int
    """For matmul: elements between consecutive pixels."""
    copy_input: bool
    copy_weight: bool
    weight_channels_last: bool
    """Order of the weight's memory as the kernel reads it."""
    pack: int = 1
    """How many of the layer's groups are one of the geometry's."""

    @property
    def index_64(self) -> bool:
        """Whether 32-bit offsets could overflow: a large tensor, or a small view that strides over a large one."""
        g = self.geometry
        reach = [
            (size + before + after) * stride
            for size, before, after, stride in zip(g.input, g.padding, g.padding_after, self.strides[2:], strict=True)
        ]
        span = g.batch * self.strides[0] + g.in_channels * self.strides[1] + sum(reach)
        return g.needs_int64 or span > INT32_MAX

    @property
    def vector(self) -> int:
        """Power of two up to 16 of elements that lie side by side along the kernel's reduction, wherever a pixel starts."""
        n, c, d, h, w = self.strides
        g = self.geometry
        if self.kernel == "matmul":
            return power_of_two_divisor(g.in_channels, self.row_stride)
        if self.weight_channels_last:
            return power_of_two_divisor(g.in_channels // g.groups, n, d, h, w) if c == 1 else 1
        # Filter rows of a contiguous image.
        return power_of_two_divisor(g.kernel[2], g.stride[2], n, c, d, h) if w == 1 and not g.is_padded else 1

    @property
    def copies(self) -> int:
        return self.copy_input + self.copy_weight


def plan_convolution(
    geometry: ConvGeometry, strides: tuple[int, ...], *, weight_contiguous: bool, weight_channels_last: bool
) -> ConvPlan:
    """Plan for an image (N, C, *spatial) with these strides and a weight that is dense in these formats, or neither."""
    channels = geometry.in_channels // geometry.groups
    x_channels_last = strides[1] == 1 or geometry.in_channels == 1
    patches = _is_patches(geometry)
    if not x_channels_last and (channels <= FEW_CHANNELS or patches):
        return _plan_in_place(geometry, strides, patches, weight_contiguous, weight_channels_last)
    copy_input = not x_channels_last
    lifted = _lift(geometry, dense_strides(geometry.input_shape, True) if copy_input else strides)
    seen, lifted = _fold_patches(geometry, lifted) if patches else (geometry, lifted)
    rows = row_stride(seen, lifted)
    kernel, pack = "matmul", packed(geometry)
    if pack > 1:
        seen = replace(seen, groups=seen.groups // pack)
    if rows is None:
        block = CHANNEL_BLOCK if seen.out_channels // seen.groups > FEW_FILTERS else 2 * CHANNEL_BLOCK
        kernel = "conv_flat" if seen.in_channels // seen.groups % block else "conv_fprop"
    return ConvPlan(kernel, seen, lifted, rows or 0, copy_input, not weight_channels_last, True, pack)


def _plan_in_place(
    geometry: ConvGeometry, strides: tuple[int, ...], patches: bool, w_contiguous: bool, w_channels_last: bool
) -> ConvPlan:
    """The image is read where it lies, in the order of the weight's memory."""
    if patches:
        # Patches want vector loads, so the weight follows the image; it is the smaller one.
        copy, channels_last = not w_contiguous, False
    else:
        copy, channels_last = not (w_contiguous or w_channels_last), w_channels_last and not w_contiguous
    pack = packed(geometry)
    seen = replace(geometry, groups=geometry.groups // pack) if pack > 1 else geometry
    return ConvPlan("conv_flat", seen, _lift(geometry, strides), 0, False, copy, channels_last, pack)


def packed(g: ConvGeometry) -> int:
    """How many neighboring groups a kernel takes as one, whose weights it gathers as a block diagonal; 1: none.

    As many as fit PACK_WIDTH channels and filters: the largest divisor of the groups that does. Groups that fill a tile by
    themselves stay alone, and so do those that no divisor helps: more columns would be zeros than are now. All passes ask
    the same, and depthwise layers are no exception.

    The products with zeros are computed: `packed` times as many as the layer has, on units that wait for memory anyway.
    What they could do to a result is undone: a NaN or an infinity times a neighbor's zero would be NaN, so that tiles with
    either are computed anew from each group's own channels (kernels/tiles.py).

    >>> [packed(ConvGeometry.parse((1, 128, 9, 9), (128, 128 // g, 3, 3), nd=2, groups=g)) for g in (1, 4, 8, 16, 32)]
    [1, 1, 1, 4, 8]
    """
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    if min(c, k) >= LEAST_TILE:
        return 1
    return max((p for p in range(1, PACK_WIDTH // max(c, k) + 1) if g.groups % p == 0), default=1)


def pack_constants(pack: int, c: int, k: int) -> dict[str, int]:
    """The kernels' arguments for groups that share a tile; `c` and `k`: channels and filters of all of them together."""
    return dict(PACK=pack, PACK_C=c // pack, PACK_K=k // pack) if pack > 1 else dict(PACK=1, PACK_C=1, PACK_K=1)


def _lift(geometry: ConvGeometry, strides: tuple[int, ...]) -> Strides:
    return lift(strides, (geometry.batch, geometry.in_channels, *geometry.input))


def lift(strides: tuple[int, ...], sizes: tuple[int, ...]) -> Strides:
    """Strides of (N, C, *spatial) with three spatial dimensions, 0 where the lifted size is one."""
    n, c, *spatial = strides
    lifted = (n, c, *(0,) * (3 - len(spatial)), *spatial)
    return tuple(s if size > 1 else 0 for s, size in zip(lifted, sizes, strict=True))  # type: ignore[return-value]


def _is_patches(g: ConvGeometry) -> bool:
    """Whether filters tile the image without overlap: kernel == stride, nothing padded, nothing skipped inside."""
    return (
        g.groups == 1
        and g.taps > 1
        and not g.is_padded
        and all(k == s and (d == 1 or k == 1) for k, s, d in zip(g.kernel, g.stride, g.dilation, strict=True))
    )


def _fold_patches(g: ConvGeometry, strides: Strides) -> tuple[ConvGeometry, Strides]:
    """The same product with the filter's innermost extents as channels, as far as they lie side by side.

    A patch's row of S pixels with C channels is one run of S * C elements, so the filter loses that axis; where a patch
    spans the image's width, its rows join likewise.
    """
    run, folded = g.in_channels, list(strides)
    kernel, stride, size = list(g.kernel), list(g.stride), list(g.input)
    for axis in (2, 1, 0):
        if kernel[axis] > 1 and strides[2 + axis] != run:
            break
        run *= kernel[axis]
        folded[2 + axis] *= kernel[axis]
        size[axis] = g.output[axis]
        kernel[axis] = stride[axis] = 1
        if g.output[axis] > 1:
            break
    n, c, d, h, w = folded
    seen = replace(
        g, in_channels=run, kernel=(kernel[0], kernel[1], kernel[2]), stride=(stride[0], stride[1], stride[2]),
        input=(size[0], size[1], size[2]), dilation=(1, 1, 1),
    )  # fmt: skip
    return seen, (n, 1 if run > 1 else c, d, h, w)


def row_stride(g: ConvGeometry, strides: Strides) -> int | None:
    """Elements between consecutive pixels if the convolution is a plain product over them, else None."""
    if g.groups != 1 or g.taps != 1 or g.is_padded or g.stride != (1, 1, 1):
        return None
    row = None
    rows = 1
    for stride, size in zip((strides[4], strides[3], strides[2], strides[0]), (*g.output[::-1], g.batch), strict=True):
        if size > 1:
            if row is None:
                # Axes inside this one have a single element, so that it is the innermost: rows is 1.
                row = stride
            if stride != row * rows:
                return None
            rows *= size
    return g.in_channels if row is None else row
