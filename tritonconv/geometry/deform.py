"""Shape arithmetic of deformable convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tritonconv.geometry.convolution import ConvGeometry, Pass, expand
from tritonconv.geometry.limits import INT32_MAX

__all__ = ["DeformGeometry"]

OP = "deform_conv2d"


@dataclass(frozen=True)
class DeformGeometry:
    """Sizes of one deformable convolution: the plain one's, and how many groups of channels have offsets of their own."""

    conv: ConvGeometry
    offset_groups: int
    masked: bool

    @classmethod
    def parse(
        cls, input_shape: Sequence[int], offset_shape: Sequence[int], weight_shape: Sequence[int],
        mask_shape: Sequence[int] | None = None, *, stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> DeformGeometry:  # fmt: skip
        """Geometry of `torchvision.ops.deform_conv2d` with these arguments.

        Raises:
            RuntimeError, TypeError, ValueError: where torchvision raises them; the message has got and expected.

        >>> g = DeformGeometry.parse((2, 8, 9, 9), (2, 36, 9, 9), (6, 4, 3, 3), padding=1)
        >>> g.conv.groups, g.offset_groups, g.run, g.conv.output_shape
        (2, 2, 4, (2, 6, 9, 9))
        """
        numbers = (stride, padding, dilation)
        sizes = [*input_shape, *offset_shape, *weight_shape, *(mask_shape or ())]
        plain = all(type(size) is int for size in sizes)
        hashable = tuple(tuple(v) if isinstance(v, list) else v for v in numbers)
        plain = plain and all(type(v) is int or (type(v) is tuple and all(type(n) is int for n in v)) for v in hashable)
        # Symbolic sizes, under torch.compile with dynamic shapes, cannot be keys of a cache; nor can True, which equals 1.
        parse = _parse if plain else _parse.__wrapped__
        return parse(
            tuple(input_shape), tuple(offset_shape), tuple(weight_shape), None if mask_shape is None else tuple(mask_shape),
            *hashable,
        )  # fmt: skip

    @property
    def run(self) -> int:
        """How many neighboring channels share a weight group and an offset group."""
        c = self.conv.in_channels
        return math.gcd(c // self.conv.groups, c // self.offset_groups)

    @property
    def offset_shape(self) -> tuple[int, ...]:
        """(N, 2 * offset groups * taps, P, Q), pairs of (y, x)."""
        n, _, p, q = self.conv.output_shape
        return n, 2 * self.offset_groups * self.conv.taps, p, q

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """(N, offset groups * taps, P, Q)."""
        n, double, p, q = self.offset_shape
        return n, double // 2, p, q

    @property
    def samples(self) -> int:
        """Values that are interpolated, one an output pixel, tap and channel."""
        n, _, p, q = self.conv.output_shape
        return n * p * q * self.conv.taps * self.conv.in_channels

    @property
    def macs(self) -> int:
        """Multiply-adds: the plain convolution's, and four a sample."""
        return self.conv.macs + 4 * self.samples

    def bytes(self, itemsize: int, pass_: Pass = "fprop") -> int:
        """Least memory traffic: input, weight, output, offsets and mask once, each of `itemsize` bytes an element.

        `wgrad`: reads the same but the weight, which it writes. `dgrad`: reads all, and writes the gradients of input,
        offsets and mask.
        """
        x, weight, y = self.conv.elements()
        learned = math.prod(self.offset_shape) + (math.prod(self.mask_shape) if self.masked else 0)
        return (x + weight + y + learned + (x + learned if pass_ == "dgrad" else 0)) * itemsize

    @property
    def needs_int64(self) -> bool:
        """Whether an element of some tensor lies more than 2^31 - 1 elements behind its first one."""
        # A neighbor's address is formed before its mask is applied: three rows and columns before the image, or behind it.
        n, c, h, w = self.conv.input_shape
        return self.conv.needs_int64 or max(math.prod(self.offset_shape), n * c * (h + 4) * (w + 4)) > INT32_MAX

    def __str__(self) -> str:
        return f"{OP} {str(self.conv)[7:]}, offset groups {self.offset_groups}{', masked' if self.masked else ''}"


@functools.lru_cache(maxsize=4096)
def _parse(
    x_shape: tuple[int, ...], o_shape: tuple[int, ...], w_shape: tuple[int, ...], m_shape: tuple[int, ...] | None,
    stride: object, padding: object, dilation: object,
) -> DeformGeometry:  # fmt: skip
    strides, before, steps = (
        expand(value, 2, name, OP) for value, name in ((stride, "stride"), (padding, "padding"), (dilation, "dilation"))
    )
    mask = "" if m_shape is None else f", mask {list(m_shape)}"
    given = (
        f"input {list(x_shape)}, offset {list(o_shape)}, weight {list(w_shape)}{mask}, stride={list(strides)}, "
        f"padding={list(before)}, dilation={list(steps)}"
    )

    def wrong(text: str, error: type[Exception] = RuntimeError) -> Exception:
        return error(f"{OP}: {text} ({given})")

    for name, shape in (("input", x_shape), ("offset", o_shape), ("weight", w_shape), ("mask", m_shape)):
        if shape is not None and len(shape) != 4:
            # Torchvision unpacks the input's sizes.
            raise wrong(f"expected {name} of 4 axes, but got {len(shape)}", ValueError if name == "input" else RuntimeError)
    n, c, *_ = x_shape
    k, columns, r, s = w_shape
    if k < 1 or r < 1 or s < 1:
        raise wrong(f"expected weight sizes of at least 1, but got weight_h: {r} weight_w: {s}, {k} filters")
    if min(strides) < 1:
        raise wrong(f"expected positive strides, but got stride_h: {strides[0]} stride_w: {strides[1]}")
    if min(before) < 0:
        raise wrong(f"expected no negative padding, but got pad_h: {before[0]} pad_w: {before[1]}")
    if min(steps) < 1:
        raise wrong(f"expected positive dilations, but got dilation_h: {steps[0]} dilation_w: {steps[1]}")
    # A symbolic size becomes a number here: groups are part of the code, not of the image.
    groups = int(c // columns) if columns else 0
    if groups < 1 or groups * columns != c:
        raise wrong(f"expected weight.shape[1] to divide the input's {c} channels, but got {columns}")
    if k % groups:
        raise wrong(f"expected a number of filters that the {groups} groups divide, but got {k}")
    taps = r * s
    offset_groups = int(o_shape[1] // (2 * taps))
    if offset_groups == 0 or offset_groups * 2 * taps != o_shape[1]:
        raise wrong(
            "the shape of the offset tensor at dimension 1 is not valid: expected a multiple of 2 * weight.size[2] * "
            f"weight.size[3] = {2 * taps}, got offset.shape[1] = {o_shape[1]}"
        )
    if m_shape is not None and m_shape[1] != offset_groups * taps:
        raise wrong(f"mask.shape[1] is not valid: got: {m_shape[1]} expected: {offset_groups * taps}")
    if c % offset_groups:
        raise wrong(f"expected the offset groups to divide the input's {c} channels, but got {offset_groups}")
    p, q = (
        (size + 2 * pad - (step * (extent - 1) + 1)) // hop + 1
        for size, pad, step, extent, hop in zip(x_shape[2:], before, steps, (r, s), strides, strict=True)
    )
    for name, shape in (("offset", o_shape), ("mask", m_shape)):
        if shape is not None and shape[0] != n:
            raise wrong(f"invalid batch size of {name}: got {shape[0]}, expected {n}")
        if shape is not None and shape[2:] != (p, q):
            raise wrong(f"{name} output dims: ({shape[2]}, {shape[3]}) - computed output dims: ({p}, {q})")
    if p < 1 or q < 1:
        raise wrong(f"Calculated output size too small - out_h: {p} out_w: {q}")
    conv = ConvGeometry.parse(x_shape, w_shape, nd=2, stride=strides, padding=before, dilation=steps, groups=groups)
    return DeformGeometry(conv, offset_groups, m_shape is not None)
