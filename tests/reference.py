"""References in fp64, and the comparison every kernel's test uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonconv.ops.epilogue import Epilogue

# Of the whole tensor: ||out - ref|| / ||ref||. fp32 grows with the length of the sum.
RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-14}
# Interpreted conversions to bf16 truncate, so that its unit is a whole last place.
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22, torch.float64: 2**-51}


def conv_reference(x: Tensor, weight: Tensor, epilogue: Epilogue | None = None, **arguments: object) -> Tensor:
    """What torch computes in fp64 from the same inputs."""
    nd = x.dim() - 2
    conv = getattr(torch.nn.functional, f"conv{nd}d")
    e = epilogue or Epilogue()
    norm = e.batch_norm
    if norm is not None:
        norm = norm._replace(**{k: t.double() for k, t in norm._asdict().items() if isinstance(t, Tensor)})
    wide = Epilogue(None, norm, None if e.residual is None else e.residual.double(), e.activation)
    bias = None if e.bias is None else e.bias.double()
    return wide.torch(conv(x.double(), weight.double(), bias, **arguments))


def assert_close(out: Tensor, ref: Tensor, *, depth: int = 1, what: object = "") -> None:
    """Bound the error of `out` against the fp64 `ref`: of the whole tensor, and of each element.

    Args:
        depth: length of the sum behind an element.
        what: named in the message.
    """
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if ref.numel() == 0:
        return
    out64 = out.double()
    finite = torch.isfinite(ref)
    same = torch.where(finite, torch.isfinite(out64), (out64 == ref) | (out64.isnan() & ref.isnan()))
    assert same.all(), f"{what}: {int((~same).sum())} elements differ in being finite, first at {_first(~same)}"
    error = torch.where(finite, out64 - torch.where(finite, ref, 0), 0).abs()
    scale = torch.where(finite, ref, 0)
    rms = scale.pow(2).mean().sqrt()
    relative = (error.norm() / scale.norm().clamp(min=1e-300)).item()
    grow = math.sqrt(depth) if out.dtype in (torch.float32, torch.float64) else 1.0
    bound = RELATIVE[out.dtype] * grow
    assert relative <= bound, f"{what}: relative error {relative:.2e}, bound {bound:.2e}"
    # One wrong pixel cannot hide in the norm.
    element = 4 * EPS[out.dtype] * (scale.abs() + rms * (grow if grow > 1 else 1))
    worst = error - element
    assert (worst <= 0).all(), (
        f"{what}: element {_first(worst > 0)} is {out64.flatten()[worst.argmax()]}, "
        f"expected {ref.flatten()[worst.argmax()]} within {element.flatten()[worst.argmax()]:.2e}"
    )


def _first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()
