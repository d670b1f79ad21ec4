"""Seeded fuzzing of the whole forward path: a failure prints the one line that repeats it.

Inputs are sparse small integers, so that sums are exact in every dtype and a wrong element cannot hide in a tolerance.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tritonconv.functional as TF
from tritonconv.ops.layout import as_format

pytestmark = pytest.mark.usefixtures("on_triton")


def draw(seed: int) -> dict[str, Any]:
    """A random layer, small enough for the interpreter."""
    r = random.Random(seed)
    nd = r.choice([1, 2, 2, 2, 3])
    groups = r.choice([1, 1, 1, 2, 3])
    per_group = r.choice([1, 2, 3, 4, 5, 8, 12, 16, 24, 40, 64, 128])
    kernel = [r.choice([1, 1, 2, 3, 3, 4, 5]) for _ in range(nd)]
    patches = r.random() < 0.15
    stride = kernel if patches else [r.choice([1, 1, 2, 3]) for _ in range(nd)]
    padding = [0] * nd if patches else [r.choice([0, 1, 2]) for _ in range(nd)]
    dilation = [1] * nd if patches else [r.choice([1, 1, 2]) for _ in range(nd)]
    spatial = [max(d * (k - 1) + 1 - 2 * p, 1) + r.randrange(7) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return dict(
        x=(r.choice([1, 2, 3]), groups * per_group, *spatial), w=(groups * r.choice([1, 2, 5, 9, 16]), per_group, *kernel),
        stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation), groups=groups,
        dtype=r.choice(["float32", "float16", "bfloat16", "float64"]), x_cl=r.random() < 0.6, w_cl=r.random() < 0.6,
        bias=r.random() < 0.5, residual=r.random() < 0.3, relu=r.random() < 0.5,
    )  # fmt: skip


def sparse(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    values = torch.randint(-2, 3, shape) * (torch.rand(shape) < 0.3)
    return values.to(device=device, dtype=dtype)


@pytest.mark.parametrize("seed", range(120))
def test_random_layers_are_exact(seed: int, device: str) -> None:
    c = draw(seed)
    torch.manual_seed(seed)
    dtype, nd = getattr(torch, c["dtype"]), len(c["x"]) - 2
    x = as_format(sparse(c["x"], dtype, device), c["x_cl"])
    w = as_format(sparse(c["w"], dtype, device), c["w_cl"])
    bias = sparse((c["w"][0],), dtype, device) if c["bias"] else None
    arguments = {name: c[name] for name in ("stride", "padding", "dilation", "groups")}
    wide = getattr(torch.nn.functional, f"conv{nd}d")(
        x.double(), w.double(), None if bias is None else bias.double(), **arguments
    )
    residual = sparse(tuple(wide.shape), dtype, device) if c["residual"] else None
    if residual is not None:
        wide = wide + residual.double()
    wide = torch.relu(wide) if c["relu"] else wide
    out = getattr(TF, f"conv{nd}d_bn_act")(
        x, w, bias, None, None, None, None, residual=residual, activation="relu" if c["relu"] else None, **arguments
    )
    # bf16 holds integers up to 256.
    exact = wide.abs() <= 256
    assert torch.equal(out.double()[exact], wide[exact]), f"repeat with draw({seed}): {c}"
