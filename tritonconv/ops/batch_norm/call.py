"""Batch norm, with a residual and an activation: who runs a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.operator import BATCH_NORM_EVAL, BATCH_NORM_TRAIN, UPDATE_RUNNING_STATS
from tritonconv.ops.core.activation import ActivationSpec, to_numbers
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.torch_norm import batch_norm_on_torch

__all__ = ["BATCH_NORM", "update_running", "why_no_norm"]


class NormCall(NamedTuple):
    """A call that parsed."""

    training: bool
    momentum: float
    eps: float
    activation: ActivationSpec | None
    group: str
    """Name of the process group whose pixels are normalized together in training; "" for none."""


class BatchNormFamily(Family[NormCall]):
    """act(torch.nn.functional.batch_norm(x) + residual), with the residual of x's size and dtype.

    A call's numbers are ((training, momentum, eps), activation, group).
    """

    tensors = ("input", "running_mean", "running_var", "weight", "bias", "residual")

    torch_checks_types = True

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> NormCall | Unsupported:
        (training, momentum, eps), activation, group = numbers
        x, *parameters = tensors[:5]
        # Torch says best what is wrong, and an empty batch has nothing to compute.
        valid = _is_valid(x, parameters, training, momentum, eps) and (group or x.numel() > 0)
        return NormCall(training, momentum, eps, activation, group) if valid else Unsupported()

    def why_unsupported(self, tensors: Any, parsed: NormCall) -> str | None:  # noqa: ARG002
        return why_no_norm(*tensors[:5])

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: NormCall | None) -> str:  # noqa: ARG002
        return f"batch_norm of {list(tensors[0].shape)}{' in training' if numbers[0][0] else ''}"

    def run(self, tensors: Any, parsed: NormCall) -> Tensor:
        x, running_mean, running_var, weight, bias, residual = tensors
        training, momentum, eps, activation, group = parsed
        numbers = to_numbers(activation)
        if not training:
            y: Tensor = BATCH_NORM_EVAL(x, running_mean, running_var, weight, bias, residual, eps, *numbers)
            return y
        y, mean, var, count = BATCH_NORM_TRAIN(x, weight, bias, residual, eps, *numbers, group)
        update_running(mean, var, count, running_mean, running_var, momentum)
        return y

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        y = batch_norm_on_torch(*tensors[:5], *numbers[0])
        return Epilogue(residual=tensors[5], activation=numbers[1]).torch(y)

    def cost(self, tensors: Any, parsed: NormCall) -> Cost:
        x, _, _, weight, bias, _ = tensors
        parameters = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
        return Cost((3 if parsed.training else 2) * x.numel() * x.element_size() + parameters)

    def is_collective(self, parsed: NormCall) -> bool:
        return bool(parsed.group)

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        if tensors[5] is not None or numbers[1] is not None or numbers[2]:
            return super().face(tensors, numbers)
        return functional.batch_norm, (*tensors[:5], *numbers[0]), {}


BATCH_NORM = BatchNormFamily("batch_norm")


def update_running(
    mean: Tensor, var: Tensor, count: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """Move running statistics, where there are any, towards the batch's."""
    if running_mean is not None or running_var is not None:
        UPDATE_RUNNING_STATS(mean, var, count, running_mean, running_var, float(momentum))


def _is_valid(x: Tensor, parameters: list[Any], training: Any, momentum: Any, eps: Any) -> bool:
    """Whether torch takes these arguments, but for their dtypes."""
    running_mean, running_var, *_ = parameters
    if x.dim() < 2 or not isinstance(momentum, (int, float)) or not isinstance(eps, (int, float)):
        return False
    if training and (eps <= 0 or x.numel() == x.shape[1]):
        return False
    if eps < 0 or (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        return False
    return all(tuple(t.shape) == (x.shape[1],) and t.device == x.device for t in parameters if t is not None)


def why_no_norm(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why there is no kernel for a norm of `x`, or of a convolution of it, beside what holds for all families.

    Args:
        parameters: running statistics, weight and bias.
    """
    dtypes = {t.dtype for t in parameters if t is not None}
    if len(dtypes) > 1:
        return f"parameters of {' and '.join(sorted(map(str, dtypes)))} together have no kernel"
    half = x.dtype in (torch.float16, torch.bfloat16)
    if dtypes and dtypes != {x.dtype} and not (half and dtypes == {torch.float32}):
        return f"parameters of {dtypes.pop()} with an input of {x.dtype} have no kernel"
    return None
