"""Values that modules hold, remembered so that a change is seen: a graph took them for granted when it was traced."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import types
import uuid
from typing import Any

import numpy as np
import torch

from tritonconv.convert.state import COLLECTIONS, is_record

__all__ = ["IncomparableError", "freeze", "is_quick", "quick_copy"]

# Whoever holds one holds the same until another is put in its place, or they compare by value.
LEAVES = (
    bool, int, float, complex, str, bytes, types.NoneType, types.EllipsisType, type, enum.Enum, range, slice,
    fractions.Fraction, decimal.Decimal, np.generic, np.dtype, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.GenericAlias,
    re.Pattern, pathlib.PurePath, datetime.date, datetime.timedelta, uuid.UUID, np.ufunc, torch._ops.OpOverload,
    torch._ops.OpOverloadPacket, torch.jit.ScriptFunction, torch.finfo, torch.iinfo,
)  # fmt: skip
QUICK_COLLECTIONS = (list, dict, set, frozenset, tuple)
# Of larger ones a comparison at each call would cost more than the graph gains.
MOST_BYTES, MOST_MEMBERS = 1 << 16, 10_000


class IncomparableError(Exception):
    """A value of which nobody can say whether it has changed."""


class _Same:
    """Equal for one and the same object alone."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def is_quick(value: object) -> bool:
    """Whether `value == quick_copy(value)` says that nothing has changed."""
    kind = type(value)
    if kind is dict:
        return all(map(_is_leaf, value)) and all(map(is_quick, value.values()))  # type: ignore[attr-defined, call-overload]
    if kind in QUICK_COLLECTIONS:
        return all(map(is_quick, value))  # type: ignore[call-overload]
    return _is_leaf(value)


def _is_leaf(value: object) -> bool:
    return isinstance(value, LEAVES)


def quick_copy(value: Any) -> Any:
    """A value that `is_quick`, behind copies of its collections."""
    if type(value) is dict:
        return {key: quick_copy(member) for key, member in value.items()}
    return type(value)(map(quick_copy, value)) if type(value) in QUICK_COLLECTIONS else value


def freeze(value: Any) -> Any:
    """What equals a later `freeze` of the value as long as nothing in it has changed.

    Raises:
        IncomparableError: of some member nobody can tell.
    """
    return _freeze(value, {})


def _freeze(value: Any, seen: dict[int, Any]) -> Any:
    if _is_leaf(value):
        return value
    if len(seen) > MOST_MEMBERS:
        raise IncomparableError(f"more than {MOST_MEMBERS} values")
    if id(value) in seen:
        return _Same(value)
    # Held, so that no other value gets its address meanwhile.
    seen[id(value)] = value
    kind = type(value)
    if isinstance(value, COLLECTIONS):
        # Classes of the user's may hold more than members.
        more = _freeze(getattr(value, "__dict__", None), seen)
        if isinstance(value, dict):
            return kind, more, tuple((_freeze(key, seen), _freeze(member, seen)) for key, member in value.items())
        if isinstance(value, (set, frozenset)):
            # A copy, whose members hash and compare as they like.
            return kind, more, frozenset(value)
        return kind, more, tuple(_freeze(member, seen) for member in value)
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject or value.nbytes > MOST_BYTES:
            raise IncomparableError(f"an array of {value.nbytes} bytes, {value.dtype}")
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, torch.nn.Parameter):
        return _Same(value)
    if isinstance(value, torch.Tensor):
        # Parameters and buffers are read when the graph runs; of other tensors a forward may take numbers.
        if value.is_inference():
            raise IncomparableError("a tensor made in inference mode")
        return _Same(value), value._version, value.data_ptr() if value.device.type != "meta" else 0
    if isinstance(value, torch.nn.Module):
        return _Same(value)
    if isinstance(value, functools.partial):
        return kind, _freeze((value.func, value.args, value.keywords), seen)
    if is_record(value):
        return kind, _freeze(value.__dict__, seen)
    raise IncomparableError(f"a {kind.__module__}.{kind.__qualname__}")
