"""What a forward may not change while it is traced: everything that modules hold.

A graph holds tensor operations alone. A forward that also counts, collects, or draws from a generator of its own would do
so when it is traced, and never again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["COLLECTIONS", "Kept", "is_record"]

LIBRARIES = ("builtins", "functools", "logging", "numpy", "threading", "torch", "triton", "tritonconv", "weakref")
COLLECTIONS = (dict, list, tuple, set, frozenset, deque)
# Of modules that hold more, say a data set, the rest is not looked at.
MOST = 100_000


def is_record(value: object) -> bool:
    """Whether the value is an object of the user's, or a namespace, with attributes of its own."""
    if isinstance(value, (torch.nn.Module, torch.Tensor, type, *COLLECTIONS)):
        return False
    return type(getattr(value, "__dict__", None)) is dict and type(value).__module__.split(".")[0] not in LIBRARIES


class Kept:
    """Attributes, collections, objects, generators and tensors that modules hold, as they were."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        # A scripted module keeps its state elsewhere, and shows it in dicts that only look like ones.
        modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self._buffers = {id(t) for m in modules for t in m._buffers.values()}
        self._collections: list[tuple[Any, dict[Any, Any]]] = []
        self._generators: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        self._tensors: list[tuple[torch.Tensor, int, torch.Tensor | None]] = []
        waiting: list[Any] = [module.__dict__ for module in modules]
        seen: set[int] = set()
        while waiting and len(seen) < MOST:
            value = waiting.pop()
            if id(value) not in seen:
                seen.add(id(value))
                waiting.extend(self._keep(value))

    def restore(self) -> bool:
        """Put back what has changed; whether anything had."""
        changed = False
        for value, members in self._collections:
            now = _members(value)
            if now.keys() != members.keys() or any(now[key] is not member for key, member in members.items()):
                changed = True
                _refill(value, members)
        for get, put, state in self._generators:
            now = get()
            changed |= not torch.equal(now, state) if isinstance(state, torch.Tensor) else str(now) != str(state)
            put(state)
        for tensor, version, copy in self._tensors:
            if tensor._version != version:
                changed = True
                if copy is not None:
                    tensor.detach().copy_(copy)
        return changed

    def _keep(self, value: Any) -> Iterable[Any]:
        """Remember one value, and give back what it holds."""
        if isinstance(value, (dict, list, deque, set)):
            members = _members(value)
            self._collections.append((value, members))
            return members.values()
        if isinstance(value, tuple):
            return value
        if is_record(value) and not isinstance(value, random.Random):
            return [value.__dict__]
        if isinstance(value, random.Random):
            self._generators.append((value.getstate, value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._generators.append((lambda: bits.state, lambda state: setattr(bits, "state", state), bits.state))
        elif isinstance(value, (np.random.RandomState, torch.Generator)):
            self._generators.append((value.get_state, value.set_state, value.get_state()))
        elif type(value) is torch.Tensor and not value.is_inference():
            # Buffers are stand-ins in a trace.
            copy = None if id(value) in self._buffers else value.detach().clone()
            self._tensors.append((value, value._version, copy))
        return ()


def _members(value: Any) -> dict[Any, Any]:
    """A collection's members by what tells them apart."""
    if isinstance(value, dict):
        return dict(value)
    return {id(v): v for v in value} if isinstance(value, set) else dict(enumerate(value))


def _refill(value: Any, members: dict[Any, Any]) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(members if isinstance(value, dict) else members.values())
    else:
        value.extend(members.values())
