"""Deformable convolution by torch's own operators, for calls that no kernel of ours takes: torch itself has none."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.geometry import DeformGeometry
from tritonconv.ops.core.layout import suggests_channels_last

__all__ = ["deform_on_torch"]


def deform_on_torch(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, g: DeformGeometry
) -> Tensor:
    """The deformable convolution with its bias, differentiable as often as one likes, by gathers and one product a tap.

    Autograd keeps the samples of every tap: taps x input channels x output pixels, which our kernels never store.
    """
    conv = g.conv
    n, c, h, w = conv.input_shape
    (_, k, p, q), (_, r, s), groups, dg = conv.output_shape, conv.kernel, conv.groups, g.offset_groups
    # Places are fp32 at least.
    fine = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    device = x.device
    offsets = offset.reshape(n, dg, r, s, 2, p, q).to(fine)
    masks = None if mask is None else mask.reshape(n, dg, 1, r, s, p * q).to(fine)
    image = x.reshape(n, dg, c // dg, h * w)
    filters = weight.reshape(groups, k // groups, c // groups, r, s)
    rows = torch.arange(p, device=device).mul(conv.stride[1]).sub(conv.padding[1]).view(p, 1)
    columns = torch.arange(q, device=device).mul(conv.stride[2]).sub(conv.padding[2])
    total = torch.zeros((), dtype=fine, device=device)
    for tap_h in range(r):
        for tap_w in range(s):
            at_h = offsets[:, :, tap_h, tap_w, 0] + (rows + tap_h * conv.dilation[1])
            at_w = offsets[:, :, tap_h, tap_w, 1] + (columns + tap_w * conv.dilation[2])
            values = _sampled(image, at_h, at_w, h, w)
            if masks is not None:
                values = values * masks[:, :, :, tap_h, tap_w]
            values = values.to(x.dtype).reshape(n, groups, c // groups, p * q)
            total = total + torch.matmul(filters[..., tap_h, tap_w], values).to(fine)
    y = total.reshape(n, k, p, q).to(x.dtype)
    y = y if bias is None else y + bias.view(1, -1, 1, 1)
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


def _sampled(image: Tensor, at_h: Tensor, at_w: Tensor, h: int, w: int) -> Tensor:
    """Values at points (n, groups, ...) of an image (n, groups, channels, h * w): (n, groups, channels, points)."""
    # At -1 values are zero, and derivatives those to the right.
    outside = (at_h < -1) | (at_h >= h) | (at_w < -1) | (at_w >= w)
    at_h, at_w = (torch.where(outside, -2, at) for at in (at_h, at_w))
    # A NaN counts as a place at the first pixel with weights of NaN.
    top, left = (torch.where(at.isnan(), 0, at.detach()).floor() for at in (at_h, at_w))
    below, beside = at_h - top, at_w - left
    i, j = top.long(), left.long()
    size = (*image.shape[:3], at_h.shape[-2] * at_h.shape[-1])
    values = torch.zeros((), dtype=at_h.dtype, device=image.device)
    for down, share_h in ((0, 1 - below), (1, below)):
        for right, share_w in ((0, 1 - beside), (1, beside)):
            row, column = i + down, j + right
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            place = row.clamp(0, max(h - 1, 0)) * w + column.clamp(0, max(w - 1, 0))
            found = image.gather(3, place.flatten(2).unsqueeze(2).expand(size)).to(at_h.dtype)
            found = torch.where(inside.flatten(2).unsqueeze(2), found, 0)
            values = values + found * (share_h * share_w).flatten(2).unsqueeze(2)
    return values
