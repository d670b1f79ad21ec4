"""Group norm, instance norm and layer norm, with what follows them: who runs a call."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.call import why_no_norm
from tritonconv.ops.batch_norm.operator import BATCH_NORM_EVAL
from tritonconv.ops.core.activation import ActivationSpec, to_numbers
from tritonconv.ops.core.backend import autocast_dtype
from tritonconv.ops.core.epilogue import ResidualError, check_device, check_dtype
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.group_norm.launch import fits, reads
from tritonconv.ops.group_norm.operator import GROUP_NORM, UPDATE_INSTANCE_STATS
from tritonconv.ops.group_norm.torch_form import followed, group_norm_on_torch, layer_norm_of_channels

__all__ = ["GROUP_NORM_FAMILY", "INSTANCE_NORM", "LAYER_NORM", "LAYER_NORM_CHANNELS"]


class NormCall(NamedTuple):
    """A call that parsed."""

    groups: int
    """Of an image; 0: each pixel is a group of all channels."""
    eps: float
    activation: ActivationSpec | None
    momentum: float = 0.0
    batch: bool = True
    """Whether it normalizes by the input's own statistics."""
    keeps: bool = True
    """Whether the result of a channels-last input is channels-last."""


class Following(Family[NormCall]):
    """act(norm(x) * (1 + scale) + shift + residual), with scale and shift of an image's channels.

    A call's tensors end with scale, shift and residual. Its numbers are (torch's numbers, activation).
    """

    tensors: ClassVar[tuple[str, ...]] = ("input", "weight", "bias", "scale", "shift", "residual")
    casts: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4, 5)
    torch_checks_types = True
    axis: ClassVar[int] = 1
    """Of the channels."""

    def autocast(self, x: Tensor) -> torch.dtype | None:
        """torch's autocast computes these norms in fp32 on GPUs, and leaves them alone on CPUs."""
        return torch.float32 if self.casts and x.device.type == "cuda" and autocast_dtype(x) is not None else None

    def why_unsupported(self, tensors: Any, parsed: NormCall) -> str | None:
        x, *vectors, scale, shift, _ = tensors
        reason = why_no_norm(x, *vectors) or why_no_norm(x, scale, shift)
        if reason is None and not fits(x.shape[self.axis], x, parsed.groups):
            return f"a norm over {x.shape[self.axis]} channels of each pixel has no kernel"
        return reason

    def check(self, tensors: Any, numbers: tuple[Any, ...]) -> None:
        """Raise RuntimeError for a scale, shift or residual that does not fit."""
        x, (scale, shift, residual), what = tensors[0], tensors[-3:], f"input {list(tensors[0].shape)}"
        expected = (x.shape[0], x.shape[self.axis])
        for name, t in (("scale", scale), ("shift", shift)):
            if t is not None and (t.dim() < 2 or _squeezed(t, self.axis, x.dim()) != expected):
                raise RuntimeError(
                    f"{self.op(numbers)}: expected {name} of size {list(expected)}, with unit axes for pixels or without, "
                    f"but got {list(t.shape)} ({what})"
                )
        if residual is not None and residual.shape != x.shape:
            raise ResidualError(
                f"{self.op(numbers)}: expected residual of the input's size, but got {list(residual.shape)} ({what})"
            )
        for name, t in zip(self.tensors[-3:], (scale, shift, residual), strict=True):
            if t is not None:
                check_device(self.op(numbers), x, name, t, what)
        if residual is not None:
            check_dtype(self.op(numbers), x, "residual", residual, what)

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: NormCall | None) -> str:  # noqa: ARG002
        return f"{self.op(numbers)} of {list(tensors[0].shape)}"

    def run(self, tensors: Any, parsed: NormCall) -> Tensor:
        x, weight, bias, scale, shift, residual = tensors
        rows = [None if t is None else t.view(x.shape[:2]) for t in (scale, shift)]
        y: Tensor = GROUP_NORM(
            x, weight, bias, *rows, residual, parsed.groups, parsed.eps, *to_numbers(parsed.activation)
        )[0]  # fmt: skip
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        scale, shift, residual = tensors[-3:]
        return followed(self.norm(tensors[:-3], numbers[0]), scale, shift, residual, numbers[1], self.axis)

    @abc.abstractmethod
    def norm(self, tensors: Sequence[Any], numbers: tuple[Any, ...]) -> Tensor:
        """torch's own function of the first tensors and its numbers."""

    @abc.abstractmethod
    def arguments(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        """What torch's function takes, in its order."""

    def cost(self, tensors: Any, parsed: NormCall) -> Cost:
        x, *others = tensors
        size = x.numel() * x.element_size()
        rest = sum(t.numel() * t.element_size() for t in others if t is not None)
        times = reads(x.shape[self.axis], x, parsed.groups) if parsed.batch else 1
        return Cost((1 + times) * size + rest)

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        scale, shift, residual = tensors[-3:]
        named = dict(scale=scale, shift=shift, residual=residual, activation=numbers[1])
        given = {name: value for name, value in named.items() if value is not None}
        return getattr(functional, self.name), self.arguments(tensors, numbers[0]), given


class GroupNorm(Following):
    """torch.nn.functional.group_norm; torch's numbers are (num_groups, eps)."""

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> NormCall | Unsupported:
        (groups, eps), activation = numbers
        x, *vectors = tensors[:3]
        # Torch says best what is wrong, and an empty batch has nothing to compute.
        integer = isinstance(groups, int) and not isinstance(groups, bool)
        if not integer or groups < 1 or not _is_number(eps) or x.dim() < 2 or x.shape[1] % groups or x.numel() == 0:
            return Unsupported()
        # Torch raises for groups of one element in all.
        if not _are_vectors(x, x.shape[1], vectors) or x.numel() == groups:
            return Unsupported()
        self.check(tensors, numbers)
        return NormCall(groups, eps, activation)

    def norm(self, tensors: Sequence[Any], numbers: tuple[Any, ...]) -> Tensor:
        (x, weight, bias), (groups, eps) = tensors, numbers
        # Torch says what is wrong with an argument that is not a tensor.
        function = group_norm_on_torch if isinstance(x, Tensor) else torch.nn.functional.group_norm
        return function(x, groups, weight, bias, eps)

    def arguments(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        return (tensors[0], numbers[0], *tensors[1:3], numbers[1])


class InstanceNorm(Following):
    """torch.nn.functional.instance_norm; a call's numbers are ((use_input_stats, momentum, eps), activation, keeps).

    Torch's result is contiguous always; with `keeps` ours is channels-last if the input is.
    """

    tensors = ("input", "running_mean", "running_var", "weight", "bias", "scale", "shift", "residual")
    # Torch's autocast leaves it alone everywhere.
    casts = ()

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> NormCall | Unsupported:
        (batch, momentum, eps), activation, keeps = numbers
        x, *vectors, scale, shift, _ = tensors
        if not _is_number(momentum) or not _is_number(eps) or x.dim() < 2 or x.numel() == 0:
            return Unsupported()
        if not _are_vectors(x, x.shape[1], vectors) or (vectors[0] is None) != (vectors[1] is None):
            return Unsupported()
        if eps <= 0 if batch else (eps < 0 or vectors[0] is None):
            return Unsupported()
        if batch and math.prod(x.shape[2:]) == 1:
            return Unsupported()
        if not batch and (scale is not None or shift is not None):
            raise ValueError("instance_norm: scale and shift need use_input_stats=True")
        self.check(tensors, numbers)
        return NormCall(x.shape[1], eps, activation, momentum, bool(batch), keeps)

    def run(self, tensors: Any, parsed: NormCall) -> Tensor:
        x, mean, var, weight, bias, scale, shift, residual = tensors
        numbers = to_numbers(parsed.activation)
        if not parsed.batch:
            y: Tensor = BATCH_NORM_EVAL(x, mean, var, weight, bias, residual, parsed.eps, *numbers)
            return y if parsed.keeps else y.contiguous()
        rows = [None if t is None else t.view(x.shape[:2]) for t in (scale, shift)]
        y, statistics = GROUP_NORM(x, weight, bias, *rows, residual, parsed.groups, parsed.eps, *numbers)
        if mean is not None:
            UPDATE_INSTANCE_STATS(statistics, mean, var, float(parsed.momentum), math.prod(x.shape[2:]))
        return y if parsed.keeps else y.contiguous()

    def norm(self, tensors: Sequence[Any], numbers: tuple[Any, ...]) -> Tensor:
        x, mean, var, weight, bias = tensors
        batch, momentum, eps = numbers
        return torch.nn.functional.instance_norm(x, mean, var, weight, bias, batch, momentum, eps)

    def arguments(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*tensors[:5], *numbers)


class LayerNorm(Following):
    """torch.nn.functional.layer_norm over the last axis; torch's numbers are (normalized_shape, eps)."""

    axis = -1

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> NormCall | Unsupported:
        (shape, eps), activation = numbers
        x, *vectors = tensors[:3]
        if not isinstance(shape, (tuple, list, torch.Size)) or not _is_number(eps) or x.numel() == 0:
            return Unsupported()
        if len(shape) > 1:
            return Unsupported("a layer norm over several axes has no kernel")
        if not shape or x.dim() < 1 or shape[0] != x.shape[-1] or not _are_vectors(x, x.shape[-1], vectors):
            return Unsupported()
        self.check(tensors, numbers)
        return NormCall(0, eps, activation)

    def run(self, tensors: Any, parsed: NormCall) -> Tensor:
        x, weight, bias, scale, shift, residual = tensors
        # Images with one axis of pixels, channels-last.
        x, residual = (None if t is None else _as_image(t) for t in (x, residual))
        y = super().run((x, weight, bias, scale, shift, residual), parsed)
        return y.permute(0, 2, 1).view(tensors[0].shape)

    def norm(self, tensors: Sequence[Any], numbers: tuple[Any, ...]) -> Tensor:
        (x, weight, bias), (shape, eps) = tensors, numbers
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    def arguments(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        return (tensors[0], numbers[0], *tensors[1:3], numbers[1])


class LayerNormChannels(Following):
    """Layer norm over axis 1, of which torch has no function; its numbers are (eps,)."""

    torch_checks_types = False

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> NormCall | Unsupported:
        (eps,), activation = numbers
        x, *vectors = tensors[:3]
        if x.dim() < 2:
            raise RuntimeError(f"{self.name}: expected input (N, C, *), but got {list(x.shape)}")
        if not _is_number(eps) or x.numel() == 0 or not _are_vectors(x, x.shape[1], vectors):
            return Unsupported()
        self.check(tensors, numbers)
        return NormCall(0, eps, activation)

    def norm(self, tensors: Sequence[Any], numbers: tuple[Any, ...]) -> Tensor:
        x, weight, bias = tensors
        return layer_norm_of_channels(x, weight, bias, numbers[0])

    def arguments(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*tensors[:3], *numbers)


GROUP_NORM_FAMILY = GroupNorm("group_norm")
INSTANCE_NORM = InstanceNorm("instance_norm")
LAYER_NORM = LayerNorm("layer_norm")
LAYER_NORM_CHANNELS = LayerNormChannels("layer_norm_channels")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_vectors(x: Tensor, channels: int, vectors: Sequence[Tensor | None]) -> bool:
    return all(t is None or (tuple(t.shape) == (channels,) and t.device == x.device) for t in vectors)


def _squeezed(t: Tensor, axis: int, dim: int) -> tuple[int, ...]:
    """The size of t without the unit axes that stand for pixels."""
    if t.dim() == 2:
        return tuple(t.shape)
    rest = t.shape[2:] if axis == 1 else t.shape[1:-1]
    return (t.shape[0], t.shape[axis]) if t.dim() == dim and all(n == 1 for n in rest) else ()


def _as_image(t: Tensor) -> Tensor:
    """(N, *, C) as (N, C, pixels)."""
    t = t.contiguous()
    n = t.shape[0] if t.dim() > 1 else 1
    return t.view(n, -1, t.shape[-1]).permute(0, 2, 1)
