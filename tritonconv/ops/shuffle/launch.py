"""Launches of pixel shuffle, pixel unshuffle and channel shuffle: which axes are moved, with which strides.

Any strides are read in place; numbers are moved as integers of their size, whatever their type.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import needs_int64, power, power_of_two_divisor
from tritonconv.ops.core.launch import Launch, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, suggests_channels_last
from tritonconv.tuning.rules.resampling import shuffle_config

__all__ = ["BITS", "ShuffleKind", "follows_channels_last", "needs_copy", "result_shape", "shuffle"]

ShuffleKind = Literal["pixel_shuffle", "pixel_unshuffle", "channel_shuffle"]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The longest run of few elements that goes through registers as a whole.
LONGEST = 64
STRIDED, FLAT_IN, FLAT_OUT = range(3)
Sizes = tuple[int, ...]


class Plan(NamedTuple):
    """A transposition as the kernel sees it: sizes, and strides of both sides, for four outer axes, M, and F as (i, j)."""

    outer: tuple[int, int, int, int]
    many: int
    few: tuple[int, int]
    inside: Sizes
    outside: Sizes

    def flat(self) -> int:
        """Which side is one run of memory that vectors may take."""
        few = math.prod(self.few)
        if not 1 < few <= LONGEST or few & (few - 1):
            return STRIDED
        for side, strides in ((FLAT_IN, self.inside), (FLAT_OUT, self.outside)):
            *_, m, i, j = strides
            if m == few and j == 1 and (self.few[0] == 1 or i == self.few[1]):
                return side
        return STRIDED

    def vector(self, strides: Sizes, run: bool) -> int:
        """What divides all of a side's strides but those of its run, or of M where that lies side by side."""
        sizes = (*self.outer, *self.few)
        used = (s for n, s in zip(sizes, (*strides[:4], *strides[5:]), strict=True) if n > 1)
        kept = tuple(used)[: sum(n > 1 for n in self.outer)] if run else tuple(used)
        return power_of_two_divisor(*kept)

    def reversed(self) -> Plan:
        return self._replace(inside=self.outside, outside=self.inside)


def shuffle(kind: ShuffleKind, x: Tensor, factor: int) -> Tensor:
    """What torch's function of that name gives for a valid call whose result has elements."""
    channels_last = follows_channels_last(kind, x)
    y = empty_output(x, result_shape(kind, tuple(x.shape), factor), channels_last, x.dtype)
    if kind == "channel_shuffle":
        x = as_format(x, channels_last) if needs_copy(kind, x) else x
        plan = _channels(tuple(x.flatten(2).shape), x.flatten(2).stride(), y.flatten(2).stride(), factor, channels_last)
    else:
        x, result = _four(x), _four(y)
        deep, flat = (x, result) if kind == "pixel_shuffle" else (result, x)
        plan = _pixels(tuple(deep.shape), deep.stride(), flat.stride(), factor, channels_last)
        plan = plan if kind == "pixel_shuffle" else plan.reversed()
    _launch(plan, x, y)
    return y


def result_shape(kind: ShuffleKind, shape: Sizes, r: int) -> Sizes:
    """The result's size."""
    if kind == "channel_shuffle":
        return shape
    *rest, c, h, w = shape
    return (*rest, c // (r * r), h * r, w * r) if kind == "pixel_shuffle" else (*rest, c * r * r, h // r, w // r)


def follows_channels_last(kind: ShuffleKind, x: Tensor) -> bool:
    """Whether the result is channels-last, as torch has it."""
    return x.dim() in ((4, 5) if kind == "channel_shuffle" else (4,)) and suggests_channels_last(x)


def needs_copy(kind: ShuffleKind, x: Tensor) -> bool:
    """Whether axes that count as one do not follow each other, so that x is copied first."""
    sizes, strides = x.shape, x.stride()
    merged = range(2, x.dim()) if kind == "channel_shuffle" else range(x.dim() - 3)
    kept = [d for d in merged if sizes[d] > 1]
    return any(strides[a] != strides[b] * sizes[b] for a, b in itertools.pairwise(kept))


def _four(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-3:])


@functools.lru_cache(maxsize=4096)
def _pixels(shape: Sizes, deep: Sizes, flat: Sizes, r: int, channels_last: bool) -> Plan:
    """From (N, C r^2, H, W) to (N, C, H r, W r); the strides of both are given."""
    (n, c, h, w), (dn, dc, dh, dw), (fn, fc, fh, fw) = shape, deep, flat
    c //= r * r
    if channels_last:
        return Plan((n, 1, h, w), c, (r, r), (dn, 0, dh, dw, r * r * dc, r * dc, dc), (fn, 0, r * fh, r * fw, fc, fh, fw))
    return Plan(
        (n, c, r, h), w, (1, r), (dn, r * r * dc, r * dc, dh, dw, 0, dc), (fn, fc, fh, r * fh, r * fw, 0, fw)
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _channels(shape: Sizes, x: Sizes, y: Sizes, groups: int, channels_last: bool) -> Plan:
    """From (N, G K, P) to (N, K G, P)."""
    (n, c, p), (xn, xc, xp), (yn, yc, yp) = shape, x, y
    size = c // groups
    if not channels_last:
        # Whole planes.
        return Plan(
            (n, groups, 1, size), p, (1, 1), (xn, size * xc, 0, xc, xp, 0, 0), (yn, yc, 0, groups * yc, yp, 0, 0)
        )  # fmt: skip
    if n == 1 or (xn == p * xp and yn == p * yp):
        n, p = 1, n * p
    outer = (n, 1, 1, p)
    # The fewer of the two are F, which is (1, F) here.
    of_group, of_member = (size * xc, yc), (xc, groups * yc)
    many, few, m, f = (size, groups, of_member, of_group) if groups <= size else (groups, size, of_group, of_member)
    return Plan(outer, many, (1, few), (xn, 0, 0, xp, m[0], 0, f[0]), (yn, 0, 0, yp, m[1], 0, f[1]))


def _launch(plan: Plan, x: Tensor, y: Tensor) -> None:
    from tritonconv.kernels.shuffle import shuffle_kernel

    device, itemsize = device_of(x.device), x.element_size()
    config = forced_config("BYTES") or shuffle_config(device, plan.outer[3] * plan.many * math.prod(plan.few) * itemsize)
    constants, programs = _constants(plan, config.kwargs["BYTES"] // itemsize)
    bits = BITS[itemsize]
    arguments = dict(x_ptr=x.view(bits), y_ptr=y.view(bits), **constants, **config.kwargs)
    launch(Launch(shuffle_kernel, programs, arguments, None, config), x.device)


def _constants(plan: Plan, elements: int) -> tuple[dict[str, Any], int]:
    """(the kernel's arguments that are no tensors, how many programs), for tiles of so many elements."""
    few, flat = math.prod(plan.few), plan.flat()
    block_f = power(few, min(LONGEST, elements))
    block_m = power(plan.many, elements // block_f)
    block_o = elements // (block_m * block_f)
    names = ("0", "1", "2", "3", "m", "i", "j")
    sizes = (*plan.outer, plan.many, *plan.few)
    extents = [sum((n - 1) * s for n, s in zip(sizes, side, strict=True)) for side in (plan.inside, plan.outside)]
    constants: dict[str, Any] = {f"in_{name}": s for name, s in zip(names, plan.inside, strict=True)}
    constants.update({f"out_{name}": s for name, s in zip(names, plan.outside, strict=True)})
    constants.update(
        SIZE_1=plan.outer[1], SIZE_2=plan.outer[2], SIZE_3=plan.outer[3], M=plan.many, F=few, J=plan.few[1], FLAT=flat,
        VEC_M=power_of_two_divisor(plan.many), VEC_IN=plan.vector(plan.inside, flat == FLAT_IN),
        VEC_OUT=plan.vector(plan.outside, flat == FLAT_OUT), INDEX_64=needs_int64(max(extents)), BLOCK_M=block_m,
        BLOCK_F=block_f,
    )  # fmt: skip
    programs = (
        math.prod(plan.outer[:3]) * math.ceil(plan.outer[3] / block_o) * math.ceil(plan.many / block_m)
        * math.ceil(few / block_f)
    )  # fmt: skip
    return constants, programs
