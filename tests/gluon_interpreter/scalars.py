"""Integers that are known at run time only: they divide as C does, and do not leave their type."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from .errors import Fault, Refused

__all__ = ["Flag", "Scalar", "Wide", "fits", "like", "loop", "narrow", "quotient"]

LOW, HIGH = -(2**31), 2**31 - 1


def fits(value: int, bits: int) -> bool:
    return -(2 ** (bits - 1)) <= int(value) < 2 ** (bits - 1)


class Scalar(int):
    """A run-time int32, as program ids, arguments, loop variables and what is computed from them."""

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        """This number as another type: int64 lifts the check for overflow to 64 bits."""
        if bitcast:
            raise Refused("a bitcast of a scalar")
        if dtype.is_floating():
            from .tensors import Tensor

            return Tensor.of(self).to(dtype)
        if dtype.primitive_bitwidth == 64:
            return Wide(self)
        return Flag(self != 0) if dtype.primitive_bitwidth == 1 else narrow(int(self))

    def __truediv__(self, other: Any) -> Any:
        from .tensors import Tensor

        return Tensor.of(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        from .tensors import Tensor

        return other / Tensor.of(self)

    def __neg__(self) -> Any:
        return like(-int(self), self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return like(abs(int(self)), self)

    def __invert__(self) -> Any:
        return like(~int(self), self)

    def __pow__(self, *_: Any) -> Any:
        raise Refused("a power of a run-time integer")


class Wide(Scalar):
    """A run-time int64."""


class Flag(Scalar):
    """A run-time int1: what a comparison gives."""

    def __invert__(self) -> Flag:
        return Flag(not self)


def narrow(value: int) -> Scalar:
    """A number as a run-time int32."""
    if not LOW <= int(value) <= HIGH:
        raise Fault(f"int32 overflow: {value}")
    return Scalar(value)


def plain(x: int) -> bool:
    """Whether it is an int32, or a constant that is one."""
    kind = x.__class__
    return kind is Scalar or (kind is int and LOW <= x <= HIGH)


def like(value: int, *operands: int) -> Scalar:
    """A result of operands: int64 if one of them is, and checked against its range."""
    if any(isinstance(x, Wide) or not fits(x, 32) for x in operands):
        if not fits(value, 64):
            raise Fault(f"int64 overflow: {value}")
        return Wide(value)
    return narrow(value)


def quotient(a: int, b: int) -> int:
    """a // b as C has it."""
    a, b = int(a), int(b)
    if b == 0:
        raise Fault("division by zero")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return int(a) - int(b) * quotient(a, b)


def floating(name: str, a: Any, b: Any) -> Any:
    """Of a run-time integer and a constant that is none: in fp32, as a tensor without axes."""
    from .tensors import Tensor

    return getattr(operator, name)(Tensor.of(a), Tensor.of(b))


def install(name: str, function: Callable[[int, int], int], logical: bool = False) -> None:
    def result(a: Any, b: Any) -> Any:
        value = function(a, b)
        # By far the most frequent case first, with nothing compared but plain integers.
        if LOW <= value <= HIGH and plain(a) and plain(b):
            return Scalar(value)
        if logical and isinstance(a, Flag | bool) and isinstance(b, Flag | bool):
            return Flag(value)
        return like(value, a, b)

    def forward(self: Scalar, other: Any) -> Any:
        if self.__class__ is other.__class__ is Scalar and LOW <= (value := function(self, other)) <= HIGH:
            return Scalar(value)
        if isinstance(other, int):
            return result(self, other)
        return floating(name, self, other) if isinstance(other, float) else NotImplemented

    def backward(self: Scalar, other: Any) -> Any:
        if isinstance(other, int):
            return result(other, self)
        return floating(name, other, self) if isinstance(other, float) else NotImplemented

    method = name.strip("_")
    setattr(Scalar, f"__{method}__", forward)
    setattr(Scalar, f"__r{method}__", backward)


def install_comparison(name: str) -> None:
    function = getattr(operator, name)

    def compare(self: Scalar, other: Any) -> Any:
        return Flag(function(int(self), other)) if isinstance(other, int | float) else NotImplemented

    setattr(Scalar, f"__{name}__", compare)


for _name in ("add", "sub", "mul", "lshift", "rshift"):
    install(_name, getattr(int, f"__{_name}__"))
for _name in ("and_", "or_", "xor"):
    install(_name, getattr(int, f"__{_name.strip('_')}__"), logical=True)
install("floordiv", quotient)
install("mod", remainder)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    install_comparison(_name)
# Defining __eq__ took it away.
Scalar.__hash__ = int.__hash__  # type: ignore[method-assign]


def loop(*bounds: int, **_: Any) -> Any:
    """`range` of device code: its variable is a run-time value. Options of the compiler's pipeliner change nothing."""
    if not all(isinstance(bound, int) for bound in bounds):
        raise Refused(f"range of {bounds}")
    wide = any(isinstance(bound, Wide) for bound in bounds)
    return map(Wide if wide else Scalar, range(*map(int, bounds)))
