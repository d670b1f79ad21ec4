"""What Hopper's kernels can do: every condition by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, Pass
from tritonconv.ops.core.launch import aligned
from tritonconv.tuning import Device

__all__ = ["MOST_PHASES", "why_no_boxes", "why_no_gradient", "why_unsupported"]

# Elements of 16 bytes: where boxes start, and how far apart their rows lie.
ALIGNED = 8
# Groups with fewer channels would fill their blocks with zeros.
LEAST_GROUP = 64
# Blocks of channels and tiles of filters that divide every config's.
WHOLE_BLOCKS = 128
# Tensors that a stride becomes, each a kernel argument.
MOST_PHASES = 8


def why_unsupported(g: ConvGeometry, dtype: torch.dtype, device: Device, pass_: Pass = "fprop") -> str | None:
    """Why Hopper's kernels cannot run a pass of this convolution; None where they can. Tensors are not looked at."""
    if device.arch != "sm_90":
        return f"{device.name} ({device.arch}) is no Hopper GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype)[6:]} is not float16 or bfloat16"
    c, k = g.in_channels // g.groups, g.out_channels // g.groups
    if c % ALIGNED or k % ALIGNED:
        return f"{c} channels and {k} filters{_of_a_group(g)} are not multiples of {ALIGNED}"
    if g.groups > 1 and min(c, k) < LEAST_GROUP:
        return f"groups of {c} channels and {k} filters have less than {LEAST_GROUP}"
    if g.groups > 1 and g.nd == 3 and (c % WHOLE_BLOCKS or k % WHOLE_BLOCKS):
        return f"groups of {c} channels and {k} filters in 3-d are not multiples of {WHOLE_BLOCKS}"
    # Extents and coordinates of a box are 32 bits wide; addresses are not.
    if max(g.batch, *g.input, *g.output, g.batch * math.prod(g.output), g.batch * math.prod(g.input)) > INT32_MAX:
        return "more than 2^31 pixels"
    phases = math.prod(
        min(stride if pass_ == "dgrad" else taps, stride) for taps, stride in zip(g.kernel, g.stride, strict=True)
    )
    if phases > MOST_PHASES:
        return f"a stride of {g.stride} has more than {MOST_PHASES} phases"
    if any(size < stride for size, stride in zip(g.input, g.stride, strict=True)):
        return f"an image of {g.input} is smaller than the stride {g.stride}"
    return None


def _of_a_group(g: ConvGeometry) -> str:
    return " of a group" if g.groups > 1 else ""


def why_no_boxes(strides: tuple[int, ...], sizes: tuple[int, ...], t: Tensor) -> str | None:
    """Why boxes cannot be read from a tensor with its channels side by side; `strides` and `sizes` of all other axes."""
    if not aligned(t):
        return "a tensor does not start on 16 bytes"
    if any(stride % ALIGNED or stride <= 0 for stride, size in zip(strides, sizes, strict=True) if size > 1):
        return f"pixels lie {strides} elements apart, which are not positive multiples of {ALIGNED}"
    return None


def why_no_gradient(
    g: ConvGeometry, dtype: torch.dtype, device: Device, pass_: Pass, contiguous: bool, computed: bool
) -> str | None:  # fmt: skip
    """Why Hopper's kernels cannot compute a gradient.

    Args:
        contiguous: whether the result's channels lie apart; a weight's may.
        computed: whether a batch norm's gradient is to be computed on the way in.
    """
    if computed:
        return "a gradient that is computed on its way in comes through registers"
    if contiguous:
        return "the result is contiguous"
    return why_unsupported(g, dtype, device, pass_)
