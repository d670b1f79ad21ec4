"""Batch norm's device functions that more than one kernel needs.

Statistics travel in slots: whoever reads or makes some pixels of all channels writes how many they are, each channel's
mean over them and its sum of squared deviations, and a later kernel joins the slots in their order by Chan's formula
(T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1982). Sums of squares are never subtracted from each other.

The gradient of a batch norm's input is linear in each channel once the batch's two sums are known,

    dz = scale * g + slope * (z - mean) + offset,   g = dy * act'(v),   v = scale * (z - mean) + beta,

so that a kernel which reads dy and z needs five numbers a channel: TABLE's rows.
"""

import triton
import triton.language as tl

__all__ = ["input_gradient", "load_table", "moments"]

# Rows of the table [5, C] of a batch norm's backward pass.
MEAN = tl.constexpr(0)
SCALE = tl.constexpr(1)
BETA = tl.constexpr(2)
SLOPE = tl.constexpr(3)
OFFSET = tl.constexpr(4)


@triton.jit
def moments(values, mask, count, axis: tl.constexpr):
    """(mean, sum of squared deviations) along an axis of the `count` values that `mask` leaves."""
    mean = tl.sum(tl.where(mask, values, 0.0), axis) / count
    deviation = tl.where(mask, values - tl.expand_dims(mean, axis), 0.0)
    return mean, tl.sum(deviation * deviation, axis)


@triton.jit
def load_table(table_ptr, channels, mask, C, axis: tl.constexpr, SLOPED: tl.constexpr, ACT_GRADIENT: tl.constexpr):
    """The table's columns for some of its C channels, each with a unit axis for rows; zeros where `mask` is not."""
    scale = tl.expand_dims(tl.load(table_ptr + SCALE * C + channels, mask=mask, other=0.0), axis)
    mean = scale
    beta = scale
    slope = scale
    offset = scale
    if SLOPED or ACT_GRADIENT is not None:
        mean = tl.expand_dims(tl.load(table_ptr + MEAN * C + channels, mask=mask, other=0.0), axis)
    if ACT_GRADIENT is not None:
        beta = tl.expand_dims(tl.load(table_ptr + BETA * C + channels, mask=mask, other=0.0), axis)
    if SLOPED:
        slope = tl.expand_dims(tl.load(table_ptr + SLOPE * C + channels, mask=mask, other=0.0), axis)
        offset = tl.expand_dims(tl.load(table_ptr + OFFSET * C + channels, mask=mask, other=0.0), axis)
    return mean, scale, beta, slope, offset


@triton.jit
def input_gradient(
    dy, z,  # tiles of one shape
    table,  # of their channels, by load_table
    SLOPED: tl.constexpr,  # whether the statistics are the batch's own: else slope and offset are 0
    ACT_GRADIENT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
):  # fmt: skip
    """Gradient of a batch norm's input, of the table's type; 0 in channels that load_table's mask left out."""
    mean, scale, beta, slope, offset = table
    centered = z.to(scale.dtype) - mean
    gradient = dy.to(scale.dtype)
    if ACT_GRADIENT is not None:
        gradient = ACT_GRADIENT(gradient, scale * centered + beta, ACT_A, ACT_B)
    gradient = scale * gradient
    if SLOPED:
        gradient = gradient + slope * centered + offset
    return gradient
