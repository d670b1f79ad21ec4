"""References in fp64, and the comparison of measure/check.py as an assertion."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.measure.check import compare
from tritonconv.ops.core.epilogue import Epilogue


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
    complaint = compare(out, ref, depth=depth).complaint
    assert complaint is None, f"{what}: {complaint}"
