"""Names that occur in the code of modules' classes, where no trace tells what runs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

__all__ = ["minds_strides", "reads_weights"]

READERS = {"weight", "parameters", "named_parameters"}
# What depends on strides.
VIEWERS = {"as_strided", "is_contiguous", "stride", "view", "view_as", "view_as_complex"}
# What may reach any of these.
DYNAMIC = {"__getattribute__", "attrgetter", "eval", "exec", "getattr", "methodcaller"}
# Of functions that functions call.
DEPTH = 3


def minds_strides(kind: Callable[..., Any]) -> bool:
    """Whether code of the user's in a module's class may depend on the strides of what it is given."""
    return any(names & (VIEWERS | DYNAMIC) for names in _names_of_class(kind))


def reads_weights(module: torch.nn.Module) -> bool:
    """Whether a method of the module's class, or a function that it holds, reads weights and depends on strides."""
    held = [value for value in vars(module).values() if isinstance(value, types.FunctionType)]
    kind: Any = type(module)
    every = [*_names_of_class(kind), *map(_names_of, held)]
    return any(names & READERS and names & VIEWERS for names in every)


@functools.cache
def _names_of_class(kind: Callable[..., Any]) -> list[set[str]]:
    """Names in each method that is not torch's, and in the functions that it calls."""
    found = []
    for cls in kind.__mro__:  # type: ignore[attr-defined]
        if not cls.__module__.startswith(("torch.", "tritonconv.")):
            for name, method in vars(cls).items():
                function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                if name != "__init__" and isinstance(function, types.FunctionType):
                    found.append(_names_of(function))
    return found


def _names_of(function: types.FunctionType) -> set[str]:
    return set(_names(function, DEPTH))


def _names(function: types.FunctionType, depth: int) -> Iterator[str]:
    """Names in the code of a function, of functions inside it, and of those that it names."""
    stack = [function.__code__]
    while stack:
        code = stack.pop()
        yield from code.co_names
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for named in _functions(code.co_names, function) if depth else ():
            yield from _names(named, depth - 1)


def _functions(names: Iterable[str], function: types.FunctionType) -> Iterator[types.FunctionType]:
    for name in names:
        named = function.__globals__.get(name)
        if isinstance(named, types.FunctionType) and not named.__module__.startswith(("torch.", "tritonconv.")):
            yield named
