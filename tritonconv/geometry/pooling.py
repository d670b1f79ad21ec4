"""Shape arithmetic of pooling over windows.

`PoolGeometry` is parsed once from user arguments. 1-d and 2-d are lifted to (D, H, W) with unit sizes, as convolutions are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tritonconv.geometry.convolution import Triple
from tritonconv.geometry.limits import INT32_MAX

__all__ = ["PoolGeometry"]


@dataclass(frozen=True)
class PoolGeometry:
    """Sizes of one pooling, lifted to three spatial dimensions: lifted ones have size, window, stride and dilation 1."""

    nd: int
    batch: int
    channels: int
    input: Triple
    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    ceil_mode: bool
    output: Triple
    name: str
    """The function that it is of, without its dimensions."""

    @classmethod
    def parse(
        cls, input_shape: Sequence[int], kernel: int | Sequence[int], stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, ceil_mode: bool = False, *, nd: int,
        name: str = "max_pool",
    ) -> PoolGeometry:  # fmt: skip
        """Geometry of `torch.nn.functional.max_pool{nd}d` or its kin with these arguments.

        Args:
            input_shape: (N, C, *spatial) or (C, *spatial), `nd` spatial sizes.
            stride: None or empty: the window's size.
            name: of the function, for messages.

        Raises:
            RuntimeError, TypeError: where torch raises them; the message has got, expected and the geometry.

        >>> g = PoolGeometry.parse((2, 3, 8, 8), 3, 2, 1, nd=2)
        >>> g.output_shape, str(g)
        ((2, 3, 4, 4), 'max_pool2d 2x3x8x8 -> 2x3x4x4, window 3x3, stride 2x2, padding 1x1, dilation 1x1')
        """
        numbers = [*input_shape]
        for value in (kernel, stride, padding, dilation):
            numbers += value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        # Symbolic sizes, under torch.compile with dynamic shapes, cannot be keys of a cache; nor can True, which equals 1.
        parse = _parse if type(ceil_mode) is bool and all(type(n) is int for n in numbers) else _parse.__wrapped__
        lists = (tuple(v) if isinstance(v, list) else v for v in (kernel, stride, padding, dilation))
        return parse(tuple(input_shape), *lists, ceil_mode, nd, name)

    @property
    def taps(self) -> int:
        """Elements of a window."""
        return math.prod(self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C, *spatial), batched."""
        return (self.batch, self.channels, *self.input[3 - self.nd :])

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, C, *spatial), batched."""
        return (self.batch, self.channels, *self.output[3 - self.nd :])

    @property
    def overhangs(self) -> bool:
        """Whether a window reaches beyond the padding behind an axis, as those of `ceil_mode` may."""
        axes = zip(self.input, self.output, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return any((out - 1) * s + (k - 1) * d + 1 > n + 2 * pad for n, out, k, s, pad, d in axes)

    def elements(self) -> tuple[int, int]:
        """Number of elements of the input and the output."""
        return math.prod(self.input_shape), math.prod(self.output_shape)

    def bytes(self, itemsize: int, index: int = 0) -> int:
        """Least memory traffic of a forward pass: the input read once, the result written once.

        Args:
            itemsize: bytes of an element of either.
            index: bytes that are written for each result beside it, which say where it was found.
        """
        x, y = self.elements()
        return (x + y) * itemsize + y * index

    @property
    def needs_int64(self) -> bool:
        """Whether an element of either tensor, or of the padding, lies more than 2^31 - 1 elements behind the first one."""
        axes = zip(self.input, self.output, self.kernel, self.stride, self.dilation, strict=True)
        reach = math.prod(max(n, (out + 16) * s + k * d) for n, out, k, s, d in axes)
        return max(self.batch * self.channels * reach, self.elements()[1]) > INT32_MAX

    def __str__(self) -> str:
        def sizes(values: Sequence[int]) -> str:
            return "x".join(map(str, values))

        first = 3 - self.nd
        return (
            f"{self.name}{self.nd}d {sizes(self.input_shape)} -> {sizes(self.output_shape)}, "
            f"window {sizes(self.kernel[first:])}, stride {sizes(self.stride[first:])}, "
            f"padding {sizes(self.padding[first:])}, dilation {sizes(self.dilation[first:])}"
            + (", ceil mode" if self.ceil_mode else "")
        )


def _numbers(value: object, nd: int, name: str, op: str) -> tuple[int, ...]:
    """`nd` integers from an int or a sequence of 1 or `nd` ints, as torch reads them."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{op}(): argument '{name}' must be int or tuple of ints, got {value!r}")
    if len(values) not in (1, nd):
        numbers = "a single int" if nd == 1 else f"a single int or a tuple of {nd} ints"
        raise RuntimeError(f"{op}: {name} must be {numbers}, got {list(values)}")
    return values * nd if len(values) == 1 else values


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows an axis has: the last one must begin inside the input or the padding before it."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


# A model has at most a few hundred distinct layers; the bound only stops a service with endless input sizes from growing.
@functools.lru_cache(maxsize=4096)
def _parse(
    input_shape: tuple[int, ...], kernel: object, stride: object, padding: object, dilation: object, ceil_mode: object,
    nd: int, name: str,
) -> PoolGeometry:  # fmt: skip
    op = f"{name}{nd}d"
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"{op}(): argument 'ceil_mode' must be bool, not {type(ceil_mode).__name__}")
    if len(input_shape) not in (nd + 1, nd + 2):
        raise RuntimeError(
            f"{op}: expected {nd + 1}D (unbatched) or {nd + 2}D (batched) input, but got input of size {list(input_shape)}"
        )
    window = _numbers(kernel, nd, "kernel_size", op)
    strides = window if stride is None or stride == () else _numbers(stride, nd, "stride", op)
    pads, dilations = _numbers(padding, nd, "padding", op), _numbers(dilation, nd, "dilation", op)
    arguments = (
        f"input {list(input_shape)}, kernel_size={list(window)}, stride={list(strides)}, padding={list(pads)}, "
        f"dilation={list(dilations)}, ceil_mode={ceil_mode}"
    )
    for what, values in (("kernel_size", window), ("stride", strides), ("dilation", dilations)):
        if min(values) < 1:
            raise RuntimeError(f"{op}: {what} should be greater than zero, but got {list(values)} ({arguments})")
    if min(pads) < 0:
        raise RuntimeError(f"{op}: pad must be non-negative, but got {list(pads)} ({arguments})")
    for pad, k in zip(pads, window, strict=True):
        if pad > k // 2:
            raise RuntimeError(
                f"{op}: pad should be at most half of kernel size, but got pad={pad} and kernel_size={k} ({arguments})"
            )
    batch, channels, *spatial = input_shape if len(input_shape) == nd + 2 else (1, *input_shape)
    if channels < 1 or min(spatial) < 1:
        raise RuntimeError(
            f"{op}: expected input with non-zero sizes but for the batch's, but got input of size {list(input_shape)} "
            f"({arguments})"
        )
    # Torch's rule for means in three dimensions alone.
    if nd == 3 and name in ("avg_pool", "lp_pool") and any(n < k for n, k in zip(spatial, window, strict=True)):
        raise RuntimeError(f"{op}: input image {list(spatial)} smaller than kernel size {list(window)} ({arguments})")
    axes = zip(spatial, window, strides, pads, dilations, strict=True)
    out = tuple(pooled_size(*axis, ceil_mode) for axis in axes)
    if min(out) < 1:
        raise RuntimeError(
            f"{op}: given input size {list(spatial)}, the calculated output size {list(out)} is too small ({arguments})"
        )

    def lifted(values: Sequence[int], unit: int) -> Triple:
        return (unit,) * (3 - nd) + tuple(values)  # type: ignore[return-value]

    return PoolGeometry(
        nd, batch, channels, lifted(spatial, 1), lifted(window, 1), lifted(strides, 1), lifted(pads, 0),
        lifted(dilations, 1), ceil_mode, lifted(out, 1), name,
    )  # fmt: skip
