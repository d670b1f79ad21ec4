"""Group norm and SiLU, instance norm and LeakyReLU, layer norm over channels, 1-d to 3-d, as networks have them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import Case
from tritonconv.bench.registry import Operation, Specimen, dtype_of, register
from tritonconv.ops.core.activation import ActivationSpec, parse_activation
from tritonconv.ops.core.layout import as_format
from tritonconv.ops.group_norm.call import GROUP_NORM_FAMILY, INSTANCE_NORM, LAYER_NORM_CHANNELS
from tritonconv.ops.group_norm.launch import Affine, Needs, gradients
from tritonconv.ops.group_norm.torch_form import followed, normalized

__all__ = ["GroupNorm"]

EPS, MOMENTUM = 1e-5, 0.1


@register
class GroupNorm(Operation):
    """A case's groups are the norm's; 0: the channels of a pixel. `fused`: with a scale and a shift of an image's channels.

    The pass "dgrad" is the whole of backward.
    """

    kind = "gn"
    kernels = ("group_norm", "group_norm_backward")
    passes = ("fprop", "dgrad")
    products = False

    def activation(self, case: Case) -> ActivationSpec | None:
        if case.groups == 0:
            return None
        return parse_activation("leaky_relu" if case.groups == case.channels else "silu")

    def count(self, case: Case) -> tuple[int, int]:
        """Four operations an element; the input and whatever is added once in, results once out.

        Groups that registers do not hold are read twice, unless the cache holds them: no implementation reaches this floor.
        """
        elements = self._elements(case)
        if case.pass_ == "fprop":
            tensors = 3 if case.residual else 2
            return 4 * elements, (tensors * elements + 2 * case.channels) * dtype_of(case).itemsize
        tensors = 3 if not case.residual else 4 if self.activation(case) is None else 5
        return 4 * elements, tensors * elements * dtype_of(case).itemsize

    def _elements(self, case: Case) -> int:
        return math.prod(case.input_shape)

    def depth(self, case: Case) -> int:
        return self._elements(case) // case.channels

    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        """The input, weight and bias, then what the case and its pass have besides.

        Backward: dy and what the forward pass kept, statistics and normalized x.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        n, c = case.input_shape[:2]

        def random() -> Tensor:
            # The same numbers in both layouts.
            return as_format(torch.randn(case.input_shape, device=device, dtype=dtype), channels_last)

        x, weight, bias = random(), *(torch.rand(c, device=device, dtype=wide).add_(0.5) for _ in range(2))
        rows = [torch.randn(n, c, device=device, dtype=wide) for _ in range(2)] if case.fused else []
        residual = [random()] if case.residual else []
        if case.pass_ == "fprop":
            running = [torch.rand(c, device=device, dtype=wide) for _ in range(2)] if case.groups == c else []
            return (x, weight, bias, *rows, *residual, *running)
        grouped = x.to(wide).reshape(n, case.groups or 1, -1, *([] if case.groups else case.size))
        mean, var = grouped.mean(2), grouped.var(2, correction=0)
        rounded = [mean.flatten(), torch.zeros_like(mean).flatten(), var.flatten()]
        kept = normalized(x, weight.to(dtype), bias.to(dtype), case.groups, EPS).detach()
        return (x, weight, bias, *rows, *residual, random(), torch.stack(rounded), kept)

    def _named(self, case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
        names = ["x", "weight", "bias", *(("scale", "shift") if case.fused else ()), *(["residual"] * case.residual)]
        names += ["mean", "var"] if case.pass_ == "fprop" else ["dy", "statistics", "kept"]
        missing: dict[str, Tensor | None] = dict.fromkeys(("scale", "shift", "residual", "mean", "var"))
        return missing | dict(zip(names, tensors, strict=False))

    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        act, t = self.activation(case), self._named(case, tensors)
        following = (t["scale"], t["shift"], t["residual"])
        x, weight, bias = tensors[:3]
        y: Tensor
        if case.pass_ == "dgrad":
            affine, needs = Affine(weight, bias, *following[:2]), Needs(*(True,) * 3, *(case.fused,) * 2, case.residual)
            dy, statistics = t["dy"], t["statistics"]
            assert dy is not None and statistics is not None
            residual = t["residual"] if act is not None else None
            dx = gradients(dy, x, statistics, affine, case.groups, EPS, residual, act, needs)[0]
            assert dx is not None
            return dx
        if case.groups == case.channels:
            numbers = ((True, MOMENTUM, EPS), act, True)
            y = INSTANCE_NORM((x, t["mean"], t["var"], weight, bias, *following), numbers, "triton")
        elif case.groups == 0:
            y = LAYER_NORM_CHANNELS((x, weight, bias, *following), ((EPS,), act), "triton")
        else:
            y = GROUP_NORM_FAMILY((x, weight, bias, *following), ((case.groups, EPS), act), "triton")
        return y

    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The gradient by torch's own kernels, from what autograd would have kept."""
        if case.pass_ == "dgrad" and (case.fused or case.residual or case.groups == 0):
            return self.reference(case, *tensors)
        act, t = self.activation(case), self._named(case, tensors)
        x, weight, bias = tensors[0], *(v.to(tensors[0].dtype) for v in tensors[1:3])
        if case.pass_ == "fprop" and case.groups == case.channels:
            y = torch.nn.functional.instance_norm(x, t["mean"], t["var"], weight, bias, True, MOMENTUM, EPS)
            return followed(y, t["scale"], t["shift"], t["residual"], act)
        if case.pass_ == "fprop":
            y = normalized(x, weight, bias, case.groups, EPS)
            return followed(y, t["scale"], t["shift"], t["residual"], act)
        kept, statistics, dy, aten = t["kept"], t["statistics"], t["dy"], torch.ops.aten
        assert kept is not None and statistics is not None and act is not None
        back: Any = aten.silu_backward(dy, kept) if act.name == "silu" else aten.leaky_relu_backward(dy, kept, act.a, False)
        n, c, *size = case.input_shape
        mean, _, var = (v.view(n, case.groups).to(x.dtype) for v in statistics)
        needs = [True, True, True]
        dx: Tensor = aten.native_group_norm_backward(
            back.contiguous(), x.contiguous(), mean, (var + EPS).rsqrt(), weight, n, c, math.prod(size), case.groups, needs
        )[0]
        return dx

    def reference(self, case: Case, *tensors: Tensor) -> Tensor:
        if case.pass_ == "fprop":
            return self.torch(case, *tensors)
        act, t = self.activation(case), self._named(case, tensors)
        with torch.enable_grad():
            x = tensors[0].detach().requires_grad_()
            weight, bias = (v.to(x.dtype) for v in tensors[1:3])
            y = followed(normalized(x, weight, bias, case.groups, EPS), t["scale"], t["shift"], t["residual"], act)
        return torch.autograd.grad(y, x, t["dy"])[0]

    def checks(self) -> list[Case]:
        """Sizes that no block divides, groups that a tile holds and others, with all that follows."""
        return [
            _layer("gn of 24", 2, 24, (9, 8), 6),
            _layer("gn of 40, residual", 2, 40, (7, 9), 4, residual=True, fused=True),
            _layer("gn of two channels", 1, 4, (97, 103), 2),
            _layer("gn of two channels, large", 1, 4, (190, 187), 2),
            _layer("instance norm 1-d of 5", 3, 5, (301,), 5),
            _layer("instance norm 3-d of 9, residual", 2, 9, (5, 7, 6), 9, residual=True),
            _layer("layer norm of 70", 2, 70, (9, 7), 0, fused=True),
        ]

    def specimens(self) -> list[Specimen]:
        def seen(function: str, name: str, *layer: Any, configs: int | None = None, **more: Any) -> Specimen:
            backward = function in BACKWARD
            case = _layer(f"{function} {name}".strip(), *layer, pass_="dgrad" if backward else "fprop", **more)
            kernel = "group_norm_backward" if backward else "group_norm"
            return Specimen(kernel, case, configs, WHOLE.get(function) or f"group_norm_{function}_kernel")

        # Stable Diffusion's deepest stages and ConvNeXt, whose groups a tile holds; then its largest, and nnU-Net's.
        unet, convnext, large, volume = (8, 1280, (16, 16), 32), (64, 96, (56, 56), 0), (8, 320, (64, 64), 32), (2, 32)
        found = [seen("whole", "of 20 channels odd", 2, 640, (32, 32), 32)]
        for function in WHOLE:
            found += [
                seen(function, "", *unet),
                seen(function, "of pixels", *convnext),
                seen(function, "of pixels contiguous", *convnext, channels_last=False),
                seen(function, "of wide pixels", 64, 768, (14, 14), 0, configs=1),
                seen(function, "fused", 8, 512, (16, 16), 32, configs=2, fused=True),
                seen(function, "residual", 8, 1024, (16, 16), 32, configs=1, residual=True),
                seen(function, "contiguous", *unet, configs=1, channels_last=False),
                seen(function, "fp32", 8, 1024, (16, 16), 32, configs=1, dtype="fp32"),
                seen(function, "fp64", 8, 512, (8, 16), 32, configs=1, dtype="fp64"),
                seen(function, "of pixels fp64", *convnext, configs=1, dtype="fp64"),
                # Planes of 49 pixels, by single elements.
                seen(function, "odd", 8, 2048, (7, 7), 2048, configs=1, channels_last=False),
            ]
        for function in ("statistics", "normalize", "reduce", "input_gradient"):
            found += [
                # But for tiles of 4 channels, which are for images of 3.
                seen(function, "", *large, configs=3),
                seen(function, "of 3 odd", 8, 3, (512, 512), 3),
                seen(function, "fused", *large, configs=1, fused=True),
                seen(function, "contiguous", *large, configs=1, channels_last=False),
                seen(function, "3-d", *volume, (128, 128, 128), 32, configs=1),
                seen(function, "fp32", *large, configs=1, dtype="fp32"),
                seen(function, "fp64", *large, configs=1, dtype="fp64"),
                # More than 2^31 elements.
                seen(function, "int64", 64, 64, (1024, 1024), 32, configs=1),
            ]
        found += [seen(function, "residual", *large, configs=1, residual=True) for function in ("normalize", "reduce")]
        return [*found, *(seen(function, "", *large) for function in ("combine", "means", "parameters"))]


# The kernels of whole groups.
WHOLE = {"whole": "group_norm_kernel", "whole backward": "group_norm_backward_kernel"}
BACKWARD = ("whole backward", "reduce", "means", "input_gradient", "parameters")


def _layer(name: str, batch: int, channels: int, size: tuple[int, ...], groups: int, **more: Any) -> Case:
    return Case(name, "gn", batch, channels, size, channels, (1,) * len(size), groups=groups, **more)
