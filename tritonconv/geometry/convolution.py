"""Shape arithmetic of convolutions.

`ConvGeometry` is parsed once from user arguments. 1-d and 2-d convolutions are lifted to (D, H, W) with unit sizes,
so that everything behind it sees one form. Letters are the field's: N batch, C input channels, K output channels,
(D, H, W) input, (O, P, Q) output, (T, R, S) filter, G groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tritonconv.geometry.limits import INT32_MAX

__all__ = ["ConvGeometry", "Pass", "Triple", "expand"]

Triple = tuple[int, int, int]
Pass = Literal["fprop", "dgrad", "wgrad"]


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of one convolution, lifted to three spatial dimensions.

    For a transposed convolution C and K are still the channels of its input and of its output; it maps (D, H, W) to
    the larger (O, P, Q). Lifted dimensions have size 1, filter 1, stride 1, padding 0 and dilation 1.
    """

    nd: int
    batch: int
    in_channels: int
    out_channels: int
    input: Triple
    kernel: Triple
    stride: Triple
    padding: Triple
    """Zeros before the first element of each axis."""
    padding_after: Triple
    """Zeros behind the last element; differs from `padding` for "causal", "same" with an even filter extent, and where both
    are given."""
    dilation: Triple
    groups: int
    transposed: bool
    output_padding: Triple
    output: Triple

    @classmethod
    def parse(
        cls,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        *,
        nd: int,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> ConvGeometry:
        """Geometry of `torch.nn.functional.conv{nd}d` (or `conv_transpose{nd}d`) with these arguments.

        Args:
            input_shape: (N, C, *spatial) or (C, *spatial), `nd` spatial sizes.
            weight_shape: (K, C/groups, *filter), transposed: (C, K/groups, *filter).
            padding: zeros on both sides of each axis, or "same", "valid" or "causal" (not for transposed); "causal", which
                torch has not, is as many zeros as the filter reaches back, before the first element of each axis. torch
                has no 2 `nd` numbers either: zeros before each axis, then zeros behind each.
            output_padding: rows added behind a transposed convolution's output.

        Raises:
            RuntimeError, TypeError: where torch raises them; the message has got, expected and the geometry.

        >>> g = ConvGeometry.parse((2, 4, 8, 8), (6, 4, 3, 3), nd=2, padding="same")
        >>> g.output_shape, g.gemm("fprop"), g.macs
        ((2, 6, 8, 8), (128, 6, 36), 27648)
        """
        sizes = [*input_shape, *weight_shape, groups]
        for value in (stride, padding, dilation, output_padding):
            sizes += value if isinstance(value, (tuple, list)) else () if type(value) is str else (value,)
        # Symbolic sizes, under torch.compile with dynamic shapes, cannot be keys of a cache; nor can True, which equals 1.
        parse = _parse if all(type(size) is int for size in sizes) else _parse.__wrapped__
        return parse(
            tuple(input_shape), tuple(weight_shape), nd, _hashable(stride), _hashable(padding), _hashable(dilation),
            groups, transposed, _hashable(output_padding),
        )  # fmt: skip

    @property
    def is_padded(self) -> bool:
        """Whether an axis has zeros on either side."""
        return any(self.padding + self.padding_after)

    @property
    def filter_channels(self) -> int:
        """Second size of the weight: C/G, transposed: K/G."""
        return (self.out_channels if self.transposed else self.in_channels) // self.groups

    @property
    def taps(self) -> int:
        """Positions of the filter, T*R*S."""
        return math.prod(self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C, *spatial) as the user has it."""
        return (self.batch, self.in_channels, *self.input[3 - self.nd :])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(K, C/G, *filter), transposed: (C, K/G, *filter)."""
        rows = self.in_channels if self.transposed else self.out_channels
        return (rows, self.filter_channels, *self.kernel[3 - self.nd :])

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, K, *spatial) as the user gets it."""
        return (self.batch, self.out_channels, *self.output[3 - self.nd :])

    @property
    def mirrored(self) -> ConvGeometry:
        """The convolution whose data gradient this transposed convolution is: it maps (O, P, Q) to (D, H, W).

        >>> g = ConvGeometry.parse((1, 8, 5, 5), (8, 4, 3, 3), nd=2, stride=2, transposed=True, output_padding=1)
        >>> g.output_shape, g.mirrored.input_shape, g.mirrored.gemm("dgrad")
        ((1, 4, 12, 12), (1, 4, 12, 12), (144, 4, 72))
        """
        return replace(
            self, in_channels=self.out_channels, out_channels=self.in_channels, input=self.output, output=self.input,
            transposed=False, output_padding=(0, 0, 0),
        )  # fmt: skip

    def gemm(self, pass_: Pass = "fprop") -> tuple[int, int, int]:
        """(M, N, K) of one group's implicit matrix product.

        `fprop` maps the operation's input to its output, `dgrad` back, `wgrad` gives the filter. M runs over pixels
        for fprop and dgrad and over output channels for wgrad; the last size is the reduction.
        """
        pixels_in = self.batch * math.prod(self.input)
        pixels_out = self.batch * math.prod(self.output)
        c, k = self.in_channels // self.groups, self.out_channels // self.groups
        if pass_ == "fprop":
            return pixels_out, k, c * self.taps
        if pass_ == "dgrad":
            return pixels_in, c, k * self.taps
        return (c, k * self.taps, pixels_in) if self.transposed else (k, c * self.taps, pixels_out)

    @property
    def macs(self) -> int:
        """Multiply-adds of one pass, counting padded positions as every library does (torch counts two flops each)."""
        pixels = math.prod(self.input if self.transposed else self.output)
        return self.batch * pixels * (self.in_channels // self.groups) * self.out_channels * self.taps

    def elements(self) -> tuple[int, int, int]:
        """Number of elements of the input, the weight and the output."""
        return math.prod(self.input_shape), math.prod(self.weight_shape), math.prod(self.output_shape)

    def touched_input(self) -> int:
        """Input elements that some output depends on: fewer than all where the stride skips rows."""
        if self.transposed:
            return self.elements()[0]
        axes = zip(self.input, self.output, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return self.batch * self.in_channels * math.prod(_touched(*axis) for axis in axes)

    def bytes(self, itemsize: int, pass_: Pass = "fprop", *, residual: bool = False) -> int:
        """Least memory traffic of a pass in bytes: every element it needs read once, its result written once.

        Args:
            itemsize: bytes of an element of the input, weight and output.
            residual: whether a tensor of the output's size is added in the epilogue (fprop alone).
        """
        full_x, w, y = self.elements()
        x = full_x if pass_ == "dgrad" else self.touched_input()
        return (x + w + y + (y if residual else 0)) * itemsize

    @property
    def needs_int64(self) -> bool:
        """Whether an element of some tensor lies more than 2^31 - 1 elements behind its first one."""
        # The halo counts too: a padded row's address is formed before its mask is applied.
        halo = self.in_channels * math.prod(
            n + a + b for n, a, b in zip(self.input, self.padding, self.padding_after, strict=True)
        )
        return max(*self.elements(), halo * self.batch) > INT32_MAX

    def tuning_key(self, dtype: str, pass_: Pass = "fprop") -> tuple[object, ...]:
        """All that tells a pass of this layer from others: sizes, options, element type and the width of offsets.

        Tables of measurements leave batch and image size out, and find the nearest layer (tuning.tables.layer_key).
        """
        return (
            pass_, dtype, self.nd, self.batch, self.in_channels, self.out_channels, self.input, self.kernel,
            self.stride, self.padding, self.padding_after, self.dilation, self.groups, self.transposed,
            self.output_padding, self.needs_int64,
        )  # fmt: skip

    def __str__(self) -> str:
        name = f"conv{'_transpose' if self.transposed else ''}{self.nd}d"

        def sizes(values: Sequence[int]) -> str:
            return "x".join(map(str, values))

        first = 3 - self.nd
        behind = "" if self.padding == self.padding_after else f" and {sizes(self.padding_after[first:])} behind"
        return (
            f"{name} {sizes(self.input_shape)} -> {sizes(self.output_shape)}, weight {sizes(self.weight_shape)}, "
            f"stride {sizes(self.stride[first:])}, padding {sizes(self.padding[first:])}{behind}, "
            f"dilation {sizes(self.dilation[first:])}, groups {self.groups}"
            + (f", output padding {sizes(self.output_padding[first:])}" if any(self.output_padding) else "")
        )


@functools.lru_cache(maxsize=4096)
def _touched(size: int, out: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """How many positions of an axis some output depends on."""
    seen = np.zeros(size, dtype=bool)
    starts = np.arange(out) * stride - padding
    for tap in range(taps):
        at = starts + tap * dilation
        seen[at[(at >= 0) & (at < size)]] = True
    return int(seen.sum())


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def expand(value: object, nd: int, name: str, op: str) -> tuple[int, ...]:
    """`nd` integers from an int or a sequence of 1 or `nd` ints, as torch reads its int lists."""
    if isinstance(value, bool) or not isinstance(value, (int, tuple, list)):
        raise TypeError(f"{op}(): argument '{name}' must be int or tuple of ints, not {type(value).__name__}: {value!r}")
    values = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{op}(): argument '{name}' must be tuple of ints, got {value!r}")
    if len(values) == 1:
        values *= nd
    if len(values) != nd:
        raise RuntimeError(
            f"{op}: expected {name} to be a single integer value or a list of {nd} values to match the convolution "
            f"dimensions, but got {name}={list(values)}"
        )
    return values


def _expand_padding(
    padding: object, filter_: Sequence[int], stride: Sequence[int], dilation: Sequence[int], op: str, transposed: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and behind each axis."""
    nd = len(filter_)
    if isinstance(padding, (tuple, list)) and len(padding) == 2 * nd and not transposed:
        both = expand(padding, 2 * nd, "padding", op)
        return both[:nd], both[nd:]
    if not isinstance(padding, str) or transposed:
        before = expand(padding, nd, "padding", op)
        return before, before
    if padding == "valid":
        return (0,) * nd, (0,) * nd
    if padding == "causal":
        return tuple(d * (k - 1) for d, k in zip(dilation, filter_, strict=True)), (0,) * nd
    if padding != "same":
        raise RuntimeError(f"{op}: invalid padding string {padding!r}, expected 'same' or 'valid'")
    if any(s != 1 for s in stride):
        raise RuntimeError(f"{op}: padding='same' is not supported for strided convolutions, got stride={list(stride)}")
    total = tuple(d * (k - 1) for d, k in zip(dilation, filter_, strict=True))
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


# A model has at most a few hundred distinct layers; the bound only stops a service with endless input sizes from growing.
@functools.lru_cache(maxsize=4096)
def _parse(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], nd: int, stride: object, padding: object,
    dilation: object, groups: int, transposed: bool, output_padding: object,
) -> ConvGeometry:  # fmt: skip
    op = f"conv{'_transpose' if transposed else ''}{nd}d"
    if len(input_shape) not in (nd + 1, nd + 2):
        raise RuntimeError(
            f"Expected {nd + 1}D (unbatched) or {nd + 2}D (batched) input to {op}, but got input of size: "
            f"{list(input_shape)} (weight of size {list(weight_shape)})"
        )
    if len(weight_shape) != nd + 2:
        raise RuntimeError(
            f"{op}: expected a {nd + 2}D weight for input of size {list(input_shape)}, but got weight of size "
            f"{list(weight_shape)}"
        )
    # A symbol of torch's is a number too.
    if isinstance(groups, bool) or not (isinstance(groups, int) or hasattr(groups, "node")):
        raise TypeError(f"{op}(): argument 'groups' must be int, not {type(groups).__name__}")

    filter_ = weight_shape[2:]
    strides = expand(stride, nd, "stride", op)
    dilations = expand(dilation, nd, "dilation", op)
    extra = expand(output_padding, nd, "output_padding", op)
    before, after = _expand_padding(padding, filter_, strides, dilations, op, transposed)
    zeros = before if before == after else before + after
    # Dynamo joins no strings that hold symbolic sizes: one literal.
    behind = f", output_padding={list(extra)}" if transposed else ""
    arguments = (
        f"input {list(input_shape)}, weight {list(weight_shape)}, stride={list(strides)}, padding={list(zeros)}, "
        f"dilation={list(dilations)}, groups={groups}{behind}"
    )
    if groups < 1:
        raise RuntimeError(f"{op}: non-positive groups is not supported, got groups={groups} ({arguments})")
    for name, values, least in (("stride", strides, 1), ("dilation", dilations, 1), ("padding", zeros, 0),
                                ("output_padding", extra, 0)):  # fmt: skip
        if min(values) < least:
            word = "non-positive" if least else "negative"
            raise RuntimeError(f"{op}: {word} {name} is not supported, got {name}={list(values)} ({arguments})")

    batched = input_shape if len(input_shape) == nd + 2 else (1, *input_shape)
    n, c, *spatial = batched
    rows, columns = weight_shape[:2]
    if rows < 1 or min(filter_) < 1:
        raise RuntimeError(f"{op}: expected weight sizes to be at least 1, but got weight of size {list(weight_shape)}")
    if rows % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, but got weight of size "
            f"{list(weight_shape)} instead ({op}: {arguments})"
        )
    expected_c = rows if transposed else columns * groups
    if c != expected_c:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight_shape)}, expected input{list(batched)} to have "
            f"{expected_c} channels, but got {c} channels instead ({op}: {arguments})"
        )
    k = columns * groups if transposed else rows
    if transposed and any(e >= s and e >= d for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise RuntimeError(
            f"{op}: output padding must be smaller than either stride or dilation, but got output_padding={list(extra)} "
            f"({arguments})"
        )
    out = []
    for size, taps, s, p0, p1, d, e in zip(spatial, filter_, strides, before, after, dilations, extra, strict=True):
        reach = d * (taps - 1)
        out.append((size - 1) * s - p0 - p1 + reach + e + 1 if transposed else (size + p0 + p1 - reach - 1) // s + 1)
    # Of an empty batch torch's transposed convolutions give results without pixels too.
    least = 0 if transposed and n == 0 else 1
    if min(out) < least or (min(spatial) < 1 and n > 0):
        padded = [x + a + b for x, a, b in zip(spatial, before, after, strict=True)]
        reach = [d * (t - 1) + 1 for t, d in zip(filter_, dilations, strict=True)]
        raise RuntimeError(
            f"{op}: kernel size can't be greater than actual input size and every output size must be at least 1: padded "
            f"input {padded}, dilated kernel {reach}, output {out} ({arguments})"
        )

    def lift(values: Sequence[int], unit: int) -> Triple:
        d, h, w = (*(unit,) * (3 - nd), *values)
        return d, h, w

    return ConvGeometry(
        nd=nd, batch=n, in_channels=c, out_channels=k, input=lift(spatial, 1), kernel=lift(filter_, 1),
        stride=lift(strides, 1), padding=lift(before, 0), padding_after=lift(after, 0), dilation=lift(dilations, 1),
        groups=groups, transposed=transposed, output_padding=lift(extra, 0), output=lift(out, 1),
    )  # fmt: skip
