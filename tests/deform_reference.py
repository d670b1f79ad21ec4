"""Deformable convolution in fp64, as the papers write it (Dai et al. 2017, eq. 2 to 4; Zhu et al. 2019, eq. 1).

y(p) = sum over k of w_k * x(p + p_k + dp_k) * m_k, where x between pixels is sum over q of g(q_y, p_y) g(q_x, p_x) x(q)
with g(a, b) = max(0, 1 - |a - b|), over all pixels q. It is written so, without corners or floors: matrices of g.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deform_reference"]


def deform_reference(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, stride: object = 1, padding: object = 0,
    dilation: object = 1, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `deform_conv2d` is to give, differentiable wherever no place is a whole number."""
    (sh, sw), (ph, pw), (dh, dw) = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    x, offset, weight = x.double(), offset.double(), weight.double()
    n, c, h, w = x.shape
    k, cg, r, s = weight.shape
    p, q = offset.shape[2:]
    groups, taps = c // cg, r * s
    dg = offset.shape[1] // (2 * taps)
    offset = offset.view(n, dg, r, s, 2, p, q)
    rows = torch.arange(p).double().mul(sh).sub(ph).view(p, 1) + torch.arange(r).double().mul(dh).view(r, 1, 1, 1)
    columns = torch.arange(q).double().mul(sw).sub(pw) + torch.arange(s).double().mul(dw).view(s, 1, 1)
    y_at, x_at = rows + offset[:, :, :, :, 0], columns + offset[:, :, :, :, 1]

    def hat(size: int, at: Tensor) -> Tensor:
        distance = (torch.arange(size).double() - at.unsqueeze(-1)).abs()
        return torch.where(distance < 1, 1 - distance, torch.zeros((), dtype=torch.float64))

    image = x.view(n, dg, c // dg, h, w)
    samples = torch.einsum("ngrspqh,ngrspqw,ngchw->ngcrspq", hat(h, y_at), hat(w, x_at), image)
    if mask is not None:
        samples = samples * mask.double().view(n, dg, 1, r, s, p, q)
    samples = samples.reshape(n, groups, cg, r, s, p, q)
    y = torch.einsum("ngcrspq,gkcrs->ngkpq", samples, weight.view(groups, k // groups, cg, r, s)).reshape(n, k, p, q)
    return y if bias is None else y + bias.double().view(1, -1, 1, 1)
