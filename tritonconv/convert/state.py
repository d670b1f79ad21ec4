"""What a forward may read although Dynamo does not guard it, compared before each call.

These are hooks, lists in tuples, the order of an OrderedDict, and the environment. A forward that draws from a generator of
its own is not traced at all.
"""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tritonconv.convert.weights import names_of_forward
from tritonconv.fused.call import HOOKS

__all__ = ["State", "draws_numbers"]

OWN = set(vars(torch.nn.Module()))


def draws_numbers(module: torch.nn.Module) -> bool:
    """Whether a module holds a generator of Python's, whose state Dynamo does not keep."""
    return any(isinstance(value, random.Random) for value in vars(module).values())


class State:
    """The state of a model at the time when it is made; `key` tells two of one model apart."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._next = RemovableHandle.next_id
        self._modules = list(model.modules())
        self._hooks = tuple(_hooks(self._modules))
        self._held = [(module, name) for module in self._modules for name in _unguarded(module)]
        reads = any({"environ", "getenv"} & set(names_of_forward(module)) for module in self._modules)
        self._environment = dict(os.environ) if reads else None
        self._values = self._keys()
        environment = None if self._environment is None else frozenset(self._environment.items())
        self.key = (self._hooks, self._values, environment)

    def holds(self) -> bool:
        """Whether everything is as it was."""
        # A handle's number tells that hooks came; those that are there may go.
        if self._hooks or RemovableHandle.next_id != self._next:
            seen = RemovableHandle.next_id
            if tuple(_hooks(self._modules)) != self._hooks:
                return False
            self._next = seen
        if self._environment is not None and self._environment != os.environ:
            return False
        return not self._held or self._keys() == self._values

    def _keys(self) -> tuple[Any, ...]:
        return tuple(_key(vars(module).get(name)) for module, name in self._held)


def _hooks(modules: list[torch.nn.Module]) -> Iterator[tuple[int, ...]]:
    for module in modules:
        state = module.__dict__
        for name in HOOKS:
            if state.get(name):
                yield id(module), *state[name]


def _unguarded(module: torch.nn.Module) -> list[str]:
    """Attributes that are tuples of lists and the like, or ordered."""
    return [
        name for name, value in vars(module).items()
        if name not in OWN and (type(value) is OrderedDict or (type(value) is tuple and not _is_constant(value)))
    ]  # fmt: skip


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes, type, torch.dtype, torch.Tensor))


def _key(value: Any) -> Any:
    """Equal for values that a forward cannot tell apart, as far as collections are concerned."""
    if isinstance(value, dict):
        return (type(value), tuple((_key(k), _key(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_key, value)))
    return (type(value), value) if isinstance(value, (bool, int, float, str, bytes)) else (type(value), id(value))
