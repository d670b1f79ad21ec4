"""Layers that the tests of batch norm share, and their comparison with torch in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from reference import assert_close

import tritonconv.functional as TF
from tritonconv.ops.core.layout import as_format

F = torch.nn.functional
FORWARD = ["batch_norm_statistics_kernel", "batch_norm_combine_kernel", "batch_norm_normalize_kernel"]
BACKWARD = [
    "batch_norm_reduce_kernel", "batch_norm_add_kernel", "batch_norm_table_kernel", "batch_norm_input_gradient_kernel",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("images", (3, 24, 9, 8)),
    # Planes of 49 pixels, which no vector divides, and many channels.
    Case("7x7", (2, 130, 7, 7)),
    Case("odd everything", (3, 17, 5, 3)),
    # Dense in both formats at once.
    Case("one channel", (4, 1, 6, 5)),
    Case("one pixel an image", (9, 20, 1, 1)),
    Case("one image", (1, 5, 7, 6)),
    Case("rows", (13, 37)),
    Case("1-d", (3, 6, 11)),
    Case("3-d", (2, 5, 3, 4, 5)),
]


@dataclass
class Layer:
    """Inputs of a batch norm; parameters are fp32, but for fp64 inputs."""

    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor
    running_var: torch.Tensor

    @classmethod
    def random(
        cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False, device: str = "cpu"
    ) -> Layer:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = [torch.rand(shape[1], dtype=wide, device=device) + 0.5 for _ in range(4)]
        # Each channel has a mean and a spread of its own.
        across = (shape[1], *(1,) * (len(shape) - 2))
        scale, shift = torch.rand(across, device=device) + 0.5, torch.randn(across, device=device)
        x = torch.randn(shape, device=device) * scale + shift
        x, dy = (as_format(t.to(dtype), channels_last) for t in (x, torch.randn(shape, device=device)))
        return cls(x, dy, *vectors)

    def double(self) -> Layer:
        return Layer(*(None if t is None else t.double() for t in vars(self).values()))

    def run(self, module: Any, training: bool, **more: Any) -> list[torch.Tensor | None]:
        """[y, dx, dweight, dbias, running_mean, running_var] of one step."""
        leaves = [None if t is None else t.detach().requires_grad_() for t in (self.x, self.weight, self.bias)]
        running = [self.running_mean.clone(), self.running_var.clone()]
        y = module.batch_norm(leaves[0], *running, *leaves[1:], training, **more)
        needed = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, needed, self.dy.to(y.dtype)))
        return [y.detach(), *(None if t is None else next(found) for t in leaves), *running]


NAMES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")


def compared(layer: Layer, training: bool, what: object, **more: Any) -> list[torch.Tensor | None]:
    """Ours, each result checked against torch's in fp64 from the same numbers."""
    ours, reference = layer.run(TF, training, **more), layer.double().run(F, training, **more)
    depth = layer.x.numel() // layer.x.shape[1]
    for name, out, ref in zip(NAMES, ours, reference, strict=True):
        assert (out is None) == (ref is None)
        if out is not None:
            assert_close(out, ref, depth=depth, what=f"{what}, {name}")
    return ours
