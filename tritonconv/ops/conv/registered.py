"""Calls through the registered operators, for whoever traces, intercepts or needs gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritonconv.ops.conv.library import call_operator
from tritonconv.ops.conv.library_training import call_training
from tritonconv.ops.conv.library_transposed import call_transposed
from tritonconv.ops.core.backend import needs_gradients
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Kind

__all__ = ["arguments_of", "as_rows", "batched", "is_traced", "through_operator"]

# Of torch's functions, in its order, behind input, weight and bias.
ARGUMENTS: dict[Kind, tuple[str, ...]] = {
    "conv": ("stride", "padding", "dilation", "groups"),
    "conv_transpose": ("stride", "padding", "output_padding", "groups", "dilation"),
}


def is_traced(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call must be an operator's: someone traces, fakes or intercepts them.

    Otherwise it goes straight to the launcher; a Python operator costs tens of microseconds.
    """
    if torch.compiler.is_compiling():
        return True
    plain = (Tensor, torch.nn.Parameter)
    return torch._C._len_torch_dispatch_stack() > 0 or any(type(t) not in plain for t in tensors)


def arguments_of(kind: Kind, numbers: tuple[Any, ...]) -> dict[str, Any]:
    """A convolution's numbers behind the first, nd, by their names. As torch does, numpy's integers count as Python's."""
    return dict(zip(ARGUMENTS[kind], map(_plain, numbers[1:]), strict=True))


def _plain(value: Any) -> Any:
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, np.integer) else value


def batched(x: Tensor, epilogue: Epilogue) -> tuple[Tensor, Epilogue]:
    """An unbatched call's tensors as a batch of one."""
    residual = epilogue.residual
    return x.unsqueeze(0), epilogue if residual is None else epilogue._replace(residual=residual.unsqueeze(0))


def as_rows(x: Tensor, weight: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor, Epilogue]:
    """A linear layer's tensors as those of a 1x1 convolution over a batch of rows (R, C, 1)."""
    residual = epilogue.residual
    if residual is not None:
        rows = residual.expand(*x.shape[:-1], weight.shape[0]).reshape(-1, weight.shape[0], 1)
        epilogue = epilogue._replace(residual=rows)
    return x.reshape(-1, x.shape[-1], 1), weight.unsqueeze(-1), epilogue


def through_operator(kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...]) -> Tensor:
    """A call that Triton can run, with its numbers as `dispatch.replay` takes them."""
    if kind == "matmul":
        rows = as_rows(x, weight, epilogue)
        return _operator(kind, *rows, dict(stride=1, padding=0, dilation=1, groups=1)).reshape(
            *x.shape[:-1], weight.shape[0]
        )
    given = arguments_of(kind, numbers)
    if x.dim() == numbers[0] + 1:
        x, epilogue = batched(x, epilogue)
        return _operator(kind, x, weight, epilogue, given).squeeze(0)
    return _operator(kind, x, weight, epilogue, given)


def _operator(kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: dict[str, Any]) -> Tensor:
    """For gradients what follows the convolution is torch's, but for a batch norm and its own behind a convolution."""
    behind = None
    if needs_gradients((x, weight, *epilogue.tensors())):
        norm = epilogue.batch_norm
        if kind != "matmul" and norm is not None:
            return call_training(kind, x, weight, epilogue._replace(batch_norm=None), norm, **numbers, fixed=True)[0]
        behind, epilogue = epilogue, Epilogue(epilogue.bias)
    if kind == "conv_transpose":
        y = call_transposed(x, weight, epilogue, **numbers)
    else:
        y = call_operator(x, weight, epilogue, **numbers, kind=kind)
    return y if behind is None else behind.torch(y)
