"""Weights that a forward's own code views: they keep their strides, since `weight.view(n, -1)` wants contiguous memory."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["names_of_forward", "viewed_weights"]

READERS = {"weight", "parameters", "named_parameters"}
VIEWERS = {"as_strided", "view", "view_as", "view_as_complex"}
# Of functions and methods that code names.
DEPTH = 4


def viewed_weights(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Weights of modules whose forward, or a function that it calls, names both weights and what depends on strides."""
    seen: set[torch.nn.Parameter] = set()
    for module in model.modules():
        names = set(names_of_forward(module))
        if names & READERS and names & VIEWERS:
            seen.update(module.parameters())
    return seen


def names_of_forward(module: torch.nn.Module) -> Iterator[str]:
    """Names in the code of a module's forward, and of functions of the user's that it may call."""
    forward = getattr(type(module), "forward", None)
    if isinstance(forward, types.FunctionType):
        yield from _names(forward, module, DEPTH)


def _names(function: types.FunctionType, module: Any, depth: int) -> Iterator[str]:
    """Names in the code of a function of the user's, of functions inside it, and of those that it may call."""
    if depth == 0 or (function.__module__ or "").startswith(("torch.", "tritonconv.")):
        return
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        yield from code.co_names
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            for named in (function.__globals__.get(name), module.__dict__.get(name), *_methods(module, name)):
                if isinstance(named, types.FunctionType) and named is not function:
                    yield from _names(named, module, depth - 1)


def _methods(module: torch.nn.Module, name: str) -> Iterator[Any]:
    """Methods and getters of this name, those that `super()` calls among them."""
    for kind in type(module).__mro__:
        value = vars(kind).get(name)
        yield value.fget if isinstance(value, property) else getattr(value, "__func__", value)
