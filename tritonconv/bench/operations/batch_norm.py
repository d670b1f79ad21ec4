"""Batch norm by the batch's own statistics, 1-d to 3-d, with a residual and ReLU behind it where the layer has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.ops.batch_norm.call import BATCH_NORM
from tritonconv.ops.batch_norm.gradient import Norm
from tritonconv.ops.batch_norm.operator import gradients
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.layout import as_dense, as_format

__all__ = ["BatchNorm"]

EPS, MOMENTUM = 1e-5, 0.1


@register
class BatchNorm(Operation):
    """Training: the pass "dgrad" is the whole of backward, gradients of input, weight, bias and residual."""

    kind = "bn"
    kernels = ("batch_norm", "batch_norm_backward")
    passes = ("fprop", "dgrad")
    products = False

    def count(self, case: Case) -> tuple[int, int]:
        """Four operations an element; the input and whatever is added once in, results once out.

        The statistics are needed before the first result, so that the input comes from memory twice unless the cache holds
        it: no implementation reaches this floor on large layers.
        """
        elements = self._elements(case)
        if case.pass_ == "fprop":
            tensors = 3 if case.residual else 2
            return 4 * elements, (tensors * elements + 4 * case.channels) * dtype_of(case).itemsize
        # dy and x in, dx out; the residual in, for the sign of the sum, and its gradient out.
        tensors = 5 if case.residual else 3
        return 4 * elements, tensors * elements * dtype_of(case).itemsize

    def _elements(self, case: Case) -> int:
        elements = case.batch * case.channels
        for size in case.size:
            elements *= size
        return elements

    def depth(self, case: Case) -> int:
        return self._elements(case) // case.channels

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def random() -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.randn(case.input_shape, device=device, dtype=dtype), channels_last)

        x, vectors = random(), [torch.rand(case.channels, device=device, dtype=wide).add_(0.5) for _ in range(4)]
        residual = (random(),) if case.residual else ()
        if case.pass_ == "fprop":
            return (x, *vectors, *residual)
        axes = (0, *range(2, x.dim()))
        mean, var = x.mean(axes, dtype=wide), x.to(wide).var(axes, correction=0)
        for r in residual:
            # Away from ReLU's kink, where rounding decides.
            v = torch.nn.functional.batch_norm(x, mean, var, vectors[0], vectors[1], eps=EPS) + r
            r.add_(torch.where(v < 0, -0.25, 0.25).to(dtype))
        return (x, vectors[0], vectors[1], mean, var, random(), *residual)

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        act = parse_activation("relu" if case.residual else None)
        if case.pass_ == "fprop":
            x, weight, bias, running_mean, running_var, *rest = tensors
            residual = rest[0] if rest else None
            y: Tensor = BATCH_NORM(
                (x, running_mean, running_var, weight, bias, residual), ((True, MOMENTUM, EPS), act, ""), "triton"
            )
            return y
        x, weight, bias, mean, var, dy, *rest = tensors
        count = torch.full((1,), float(self.depth(case)), dtype=mean.dtype, device=mean.device)
        residual, needs = rest[0] if rest else None, (True, True, True, bool(rest))
        norm = Norm(mean, var, weight, bias, EPS, residual, act, count)
        dx = gradients(dy, as_dense(x), norm, "", needs)[0]
        assert dx is not None
        return dx

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The gradient by torch's own kernels, which take no time for the graph around them."""
        if case.pass_ == "fprop":
            x, weight, bias, running_mean, running_var, *rest = tensors
            y = torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
            return torch.relu_(y.add_(rest[0])) if rest else y
        x, weight, bias, mean, var, dy, *rest = tensors
        if rest:
            y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=EPS) + rest[0]
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        invstd = (var + EPS).rsqrt()
        backward: Any = torch.ops.aten.native_batch_norm_backward
        dx: Tensor = backward(dy, x, weight, None, None, mean, invstd, True, EPS, [True, True, True])[0]
        return dx

    def checks(self) -> list[Case]:
        """Sizes that no block divides, with several blocks a slot."""
        return [
            _layer("bn of 24", 2, 24, (9, 8)),
            _layer("bn of 70, residual", 3, 70, (41, 13), residual=True),
            _layer("bn 7x7 of 130", 2, 130, (7, 7)),
            _layer("bn 1-d of 5", 3, 5, (301,)),
            _layer("bn 3-d of 9, residual", 2, 9, (5, 7, 6), residual=True),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(function: str, name: str, *layer: Any, configs: int | None = None, **more: Any) -> Specimen:
            backward = function in BACKWARD
            case = _layer(name, *layer, pass_="dgrad" if backward else "fprop", **more)
            return Specimen(
                "batch_norm_backward" if backward else "batch_norm", case, configs, f"batch_norm_{function}_kernel"
            )

        wide, stem, small = (256, 256, (56, 56)), (256, 64, (112, 112)), (256, 2048, (7, 7))
        found = []
        for function in ("statistics", "normalize", "reduce", "input_gradient"):
            found += [
                # But for tiles of 4 channels, which are for images of 3.
                seen(function, function, *wide, configs=3),
                seen(function, f"{function} of 3 odd", 64, 3, (224, 224)),
                seen(function, f"{function} contiguous", *stem, channels_last=False),
                # Rows of 48 bytes.
                seen(function, f"{function} of 24", 256, 24, (56, 56), configs=1),
                seen(function, f"{function} fp32", *wide, dtype="fp32", configs=1),
                seen(function, f"{function} fp64", *wide, dtype="fp64", configs=1),
                # More than 2^31 elements.
                seen(function, f"{function} int64", 64, 64, (1024, 1024), configs=1),
                # Planes of 49 pixels, by single elements.
                seen(function, f"{function} odd", *small, channels_last=False, configs=1),
            ]
        found += [
            seen(function, f"{function} residual", *wide, configs=3, residual=True) for function in ("normalize", "reduce")
        ]
        return [*found, seen("combine", "combine", *wide), seen("add", "add", *wide)]


BACKWARD = ("reduce", "add", "input_gradient")


def _layer(name: str, batch: int, channels: int, size: tuple[int, ...], **more: Any) -> Case:
    ones = (1,) * len(size)
    return Case(name, "bn", batch, channels, size, channels, ones, **more)
