"""Who runs a batch norm: our kernels at once, the registered operators, or torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.launch import check_sizes, normalize, update_running
from tritonconv.ops.batch_norm.library import (
    as_dense,
    as_readable,
    batch_norm_eval,
    batch_norm_train,
    batch_statistics,
    update_running_stats,
)
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.activation import ActivationSpec, to_numbers
from tritonconv.ops.core.backend import Backend, decide, needs_gradients
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.ops.core.torch_norm import batch_norm_on_torch

__all__ = ["batch_norm", "missing_norm", "move_running", "norm_act", "refused"]


def batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, backend: Backend | None = None, residual: Tensor | None = None,
    activation: ActivationSpec | None = None,
) -> Tensor:  # fmt: skip
    """act(torch.nn.functional.batch_norm(x) + residual) on the backend that is chosen for it.

    Args:
        backend: the layer's own choice.
        residual: of x's size and dtype.
    """
    arguments = (x, running_mean, running_var, weight, bias, training, momentum, eps)
    # Torch says best what is wrong, and an empty batch has nothing to compute. Who observes calls computes them with torch.
    if (
        not _is_valid(*arguments)
        or x.numel() == 0
        or refused(x, running_mean, running_var, weight, bias, training, backend)
        or notify(lambda: _as_call(x, weight, bias, training))
    ):
        y = batch_norm_on_torch(*arguments)
        return Epilogue(residual=residual, activation=activation).torch(y)
    return norm_act(*arguments, residual, activation)


def refused(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, backend: Backend | None,
) -> bool:  # fmt: skip
    """Whether torch must run a batch norm; `decide` has said why then."""
    parameters = tuple(t for t in (weight, bias, running_mean, running_var) if t is not None)

    def describe() -> str:
        return f"batch_norm of {list(x.shape)}{' in training' if training else ''}"

    missing = missing_norm(x, running_mean, running_var, weight, bias)
    return decide((x, *parameters), backend, describe, missing) is not None


def norm_act(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, residual: Tensor | None = None, activation: ActivationSpec | None = None,
    group: str = "",
) -> Tensor:  # fmt: skip
    """act(batch_norm(x) + residual) on our kernels; running statistics are updated in training.

    Args:
        residual: of x's size and dtype.
        group: name of the process group whose pixels are normalized together in training; "" for none.
    """
    check_sizes(x, residual, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    tensors = tuple(t for t in (x, weight, bias, residual, running_mean, running_var) if t is not None)
    registered = is_traced(tensors) or needs_gradients(tensors)
    if not training:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"batch_norm: {missing} must be defined in evaluation mode (input {list(x.shape)})")
        if registered:
            numbers = to_numbers(activation)
            return batch_norm_eval(x, running_mean, running_var, weight, bias, residual, eps=eps, **numbers)
        return normalize(as_readable(x), running_mean, running_var, weight, bias, eps, residual, activation)
    if registered:
        numbers = to_numbers(activation)
        y, mean, var, count = batch_norm_train(x, weight, bias, residual, eps=eps, **numbers, group=group)
    else:
        x = as_dense(x)
        mean, var, count = batch_statistics(x, group)
        y = normalize(x, mean, var, weight, bias, eps, residual, activation)
    move_running(mean, var, count, running_mean, running_var, momentum, registered)
    return y


def move_running(
    mean: Tensor, var: Tensor, count: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    registered: bool,
) -> None:  # fmt: skip
    """Move running statistics, where there are any, towards the batch's.

    Args:
        registered: whether the registered operator must do it, for someone traces or intercepts.
    """
    running = [t for t in (running_mean, running_var) if t is not None]
    if not running:
        return
    if registered:
        update_running_stats(mean, var, count, running_mean, running_var, momentum)
        return
    update_running(mean, var, count, running_mean, running_var, momentum)
    # As an operator of torch would: what was saved for a backward pass before must notice.
    torch.autograd.graph.increment_version(running)


def _is_valid(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> bool:  # fmt: skip
    """Whether torch takes these arguments, but for their dtypes."""
    parameters = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if not all(isinstance(t, Tensor) for t in (x, *parameters)) or x.dim() < 2:
        return False
    if not isinstance(momentum, (int, float)) or not isinstance(eps, (int, float)):
        return False
    if training and (eps <= 0 or x.numel() == x.shape[1]):
        return False
    if eps < 0 or (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        return False
    return all(tuple(t.shape) == (x.shape[1],) and t.device == x.device for t in parameters)


def missing_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why there is no kernel for a batch norm of `x` or what becomes of it, beside what `decide` finds."""
    dtypes = {t.dtype for t in (running_mean, running_var, weight, bias) if t is not None}
    if len(dtypes) > 1:
        return f"parameters of {' and '.join(sorted(map(str, dtypes)))} together have no kernel"
    half = x.dtype in (torch.float16, torch.bfloat16)
    if dtypes and dtypes != {x.dtype} and not (half and dtypes == {torch.float32}):
        return f"parameters of {dtypes.pop()} with an input of {x.dtype} have no kernel"
    return None


def _as_call(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> Call:
    parameters = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    size = (3 if training else 2) * x.numel() * x.element_size() + parameters
    kernel = "batch_norm_statistics" if training else "batch_norm_normalize"
    return Call("batch_norm", Decision("triton", kernel), None, 0, size, x.dtype, x.device, None, "")
