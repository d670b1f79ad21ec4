"""Weights that a model's own code looks at: they keep their strides, since `weight.view(n, -1)` wants contiguous memory."""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch

from tritonconv.convert.trace import Survey, Traced, is_layer

__all__ = ["seen_weights"]

READERS = {"weight", "parameters", "named_parameters"}
# What depends on strides.
VIEWERS = {"as_strided", "is_contiguous", "stride", "view", "view_as", "view_as_complex"}
# Of functions that functions call.
DEPTH = 3


def seen_weights(model: torch.nn.Module, found: Survey) -> set[torch.nn.Parameter]:
    """Weights that forwards do more with than to hand them to a convolution, as graphs or code tell.

    Args:
        model: any module.
        found: graphs of it and of its parts, as far as there are, as they were traced.
    """
    seen: set[torch.nn.Parameter] = set()
    for root, traced in found.items():
        if isinstance(traced, Traced):
            named = dict(root.named_parameters(remove_duplicate=False))
            seen.update(named[path] for path in traced.read if path in named)
    for module in model.modules():
        if not is_layer(module) and _looks_at_weights(type(module)):
            seen.update(parameter for parameter in module.parameters())
    return seen


def _looks_at_weights(kind: type[torch.nn.Module]) -> bool:
    """Whether a method of the user's, or a function that it calls, reads weights and depends on strides."""
    for cls in kind.__mro__:
        if cls.__module__.startswith(("torch.", "tritonconv.")):
            continue
        for name, method in vars(cls).items():
            function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            if name == "__init__" or not isinstance(function, types.FunctionType):
                continue
            names = {n for code in _code_of(function, DEPTH) for n in code.co_names}
            if names & READERS and names & VIEWERS:
                return True
    return False


def _code_of(function: types.FunctionType, depth: int) -> Iterator[types.CodeType]:
    """The code of a function, of functions inside it, and of those that it names."""
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names if depth else ():
            named = function.__globals__.get(name)
            if isinstance(named, types.FunctionType) and not named.__module__.startswith(("torch.", "tritonconv.")):
                yield from _code_of(named, depth - 1)
