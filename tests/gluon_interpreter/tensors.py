"""Tensors in registers, and pointers, over torch's CPU tensors. Layouts are carried along and mean nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl

from .errors import Fault, Refused
from .scalars import Flag, Scalar, Wide, fits

__all__ = ["DTYPES", "Pointer", "Tensor", "Token", "dtype_of", "promote", "torch_dtype"]

# Integers are kept as int64, so that overflow shows.
DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.bool: tl.int1,
}
TORCH = {str(dtype): torch_dtype for torch_dtype, dtype in DTYPES.items()}


def torch_dtype(dtype: Any) -> torch.dtype:
    """Torch's name of a type in memory."""
    try:
        return TORCH[str(dtype)]
    except KeyError:
        raise Refused(f"the type {dtype}") from None


def dtype_of(value: torch.dtype) -> Any:
    try:
        return DTYPES[value]
    except KeyError:
        raise Refused(f"the type {value}") from None


def register_dtype(dtype: Any) -> torch.dtype:
    found = torch_dtype(dtype)
    return found if found.is_floating_point or found == torch.bool else torch.int64


def promote(a: Any, b: Any, division: bool = False) -> Any:
    """Triton's type of a result, of two run-time types."""
    for dtype in (tl.float64, tl.float32):
        if dtype in (a, b):
            return dtype
    if tl.float16 in (a, b):
        return tl.float32 if division else tl.float16
    if a == b == tl.bfloat16:
        return tl.float32 if division else tl.bfloat16
    if tl.bfloat16 in (a, b):
        return tl.float32
    return a if a.primitive_bitwidth >= b.primitive_bitwidth else b


class Tensor:
    """A tensor in registers: `value` is torch's, `dtype` Triton's."""

    __slots__ = ("dtype", "layout", "value")
    __array_priority__ = 1

    def __init__(self, value: torch.Tensor, dtype: Any, layout: Any = None) -> None:
        self.value, self.dtype, self.layout = value, dtype, layout

    @classmethod
    def of(cls, value: Any) -> Tensor:
        """A number as a tensor without axes: the types that Triton gives run-time values."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Flag | bool):
            return cls(torch.tensor(bool(value)), tl.int1)
        if isinstance(value, int):
            wide = isinstance(value, Wide) or not fits(value, 32)
            return cls(torch.tensor(int(value), dtype=torch.int64), tl.int64 if wide else tl.int32)
        if isinstance(value, float):
            return cls(torch.tensor(value, dtype=torch.float32), tl.float32)
        if isinstance(value, Token):
            unwaited()
        raise Refused(f"a {type(value).__name__} in place of a tensor")

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    @property
    def numel(self) -> int:
        return self.value.numel()

    @property
    def T(self) -> Tensor:  # noqa: N802
        return self.trans()

    def like(self, value: torch.Tensor, dtype: Any = None) -> Tensor:
        return Tensor(value, dtype or self.dtype, self.layout)

    def to(self, dtype: Any, bitcast: bool = False, fp_downcast_rounding: Any = None) -> Tensor:
        if bitcast or fp_downcast_rounding not in (None, "rtne"):
            raise Refused("a bitcast, or another rounding than to nearest even")
        if dtype == self.dtype:
            return self
        kind = torch_dtype(dtype)
        if kind == torch.bool:
            return self.like(self.value != 0, dtype)
        if kind.is_floating_point:
            return self.like(self.value.to(kind), dtype)
        value = self.value.to(torch.int64)
        # Narrower integers wrap, as on the GPU.
        return self.like(value if kind == torch.int64 else value.to(kind).to(torch.int64), dtype)

    def __getitem__(self, key: Any) -> Tensor:
        key = key if isinstance(key, tuple) else (key,)
        if any(part is not None and part != slice(None) and part is not Ellipsis for part in key):
            raise Refused(f"indexing a tensor with {key}")
        return self.like(self.value[key])

    def reshape(self, *shape: Any, can_reorder: bool = False) -> Tensor:
        del can_reorder
        return self.like(self.value.reshape(sizes(shape)))

    def permute(self, *order: Any) -> Tensor:
        return self.like(self.value.permute(sizes(order)))

    def trans(self, *order: Any) -> Tensor:
        return self.permute(*order) if order else self.like(self.value.transpose(-1, -2))

    def split(self) -> tuple[Tensor, Tensor]:
        if self.value.shape[-1] != 2:
            raise Fault(f"split: the last axis of {self.shape} is not 2")
        return self.like(self.value[..., 0]), self.like(self.value[..., 1])

    def broadcast_to(self, *shape: Any) -> Tensor:
        return self.like(self.value.expand(sizes(shape)))

    def expand_dims(self, axis: int) -> Tensor:
        return self.like(self.value.unsqueeze(axis))

    def sum(self, axis: int | None = None, keep_dims: bool = False) -> Any:
        from .functions import total

        return total(self, axis, keep_dims)

    def __bool__(self) -> bool:
        if self.value.dim():
            raise Fault(f"a branch on a tensor of shape {self.shape}")
        return bool(self.value)

    def __neg__(self) -> Tensor:
        return self.like(-self.value)

    def __invert__(self) -> Tensor:
        return self.like(~self.value)

    def __getattr__(self, name: str) -> Any:
        raise Refused(f"tensor.{name}")

    def __repr__(self) -> str:
        return f"Tensor({self.shape}, {self.dtype})"


def sizes(shape: Sequence[Any]) -> list[int]:
    return [int(x) for x in (shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape)]


def common(a: Any, b: Any, division: bool = False) -> tuple[Any, Any, Any]:
    """Two operands as torch's, and the type of their result: constants take the other's type where that can hold them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        dtype = promote(a.dtype, b.dtype, division)
    else:
        tensor, other = (a, b) if isinstance(a, Tensor) else (b, a)
        dtype = tensor.dtype
        if isinstance(other, Scalar):
            dtype = promote(dtype, Tensor.of(other).dtype, division)
        elif isinstance(other, float) and not dtype.is_floating():
            dtype = tl.float32
        elif isinstance(other, int) and not isinstance(other, bool) and not dtype.is_floating():
            dtype = promote(dtype, Tensor.of(other).dtype)
        elif division and dtype in (tl.float16, tl.bfloat16):
            dtype = tl.float32
    return operand(a, dtype), operand(b, dtype), dtype


def operand(x: Any, dtype: Any) -> Any:
    kind = register_dtype(dtype)
    if isinstance(x, Tensor):
        return x.value if x.value.dtype == kind else x.value.to(kind)
    number = bool(x) if kind == torch.bool else float(x) if kind.is_floating_point else int(x)
    # Constants are rounded to the type before the operation.
    return torch.tensor(number, dtype=kind)


def checked(value: torch.Tensor, dtype: Any) -> torch.Tensor:
    if dtype == tl.int32 and value.numel():
        low, high = torch.aminmax(value)
        if not fits(int(low), 32) or not fits(int(high), 32):
            raise Fault(f"int32 overflow in a tensor: {int(low)} to {int(high)}")
    return value


def c_quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_floating_point() or b.is_floating_point():
        raise Fault("// of floating-point tensors")
    if bool((b == 0).any()):
        raise Fault("division by zero")
    return torch.div(a, b, rounding_mode="trunc")


def c_remainder(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not b.is_floating_point() and bool((b == 0).any()):
        raise Fault("division by zero")
    return torch.fmod(a, b)


def binary(function: Callable[[Any, Any], Any], a: Any, b: Any, compare: bool = False, division: bool = False) -> Any:
    if not isinstance(b, Tensor | int | float) or not isinstance(a, Tensor | int | float):
        return NotImplemented
    x, y, dtype = common(a, b, division)
    value = function(x, y)
    layout = next(operand.layout for operand in (a, b) if isinstance(operand, Tensor))
    if compare:
        return Tensor(value, tl.int1, layout)
    return Tensor(checked(value, dtype), dtype, layout)


def true_quotient(a: Any, b: Any) -> Any:
    """Division of integers is in fp32."""
    if isinstance(b, Pointer):
        return NotImplemented
    a, b = (x.to(tl.float32) if isinstance(x, Tensor) and not x.dtype.is_floating() else x for x in (a, b))
    if not isinstance(a, Tensor):
        a = float(a)
    elif not isinstance(b, Tensor):
        b = float(b)
    return binary(torch.div, a, b, division=True)


def install(name: str, function: Callable[[Any, Any], Any], compare: bool = False, division: bool = False) -> None:
    def forward(self: Tensor, other: Any) -> Any:
        return binary(function, self, other, compare, division)

    def backward(self: Tensor, other: Any) -> Any:
        return binary(function, other, self, compare, division)

    setattr(Tensor, f"__{name}__", forward)
    if not compare:
        setattr(Tensor, f"__r{name}__", backward)


for _name in ("add", "sub", "mul"):
    install(_name, getattr(operator, _name))
for _name, _function in (("and", torch.bitwise_and), ("or", torch.bitwise_or), ("xor", torch.bitwise_xor),
                         ("lshift", torch.bitwise_left_shift), ("rshift", torch.bitwise_right_shift)):  # fmt: skip
    install(_name, _function)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    install(_name, getattr(operator, _name), compare=True)
install("floordiv", c_quotient)
install("mod", c_remainder, division=True)
setattr(Tensor, "__truediv__", true_quotient)  # noqa: B010
setattr(Tensor, "__rtruediv__", lambda self, other: true_quotient(other, self))  # noqa: B010
Tensor.__hash__ = None  # type: ignore[assignment]


class Token:
    """A result in flight: an accumulator of the next product, or something to wait for."""

    __slots__ = ("dtype", "layout", "operation", "shape")

    def __init__(self, operation: Any, shape: list[int], dtype: Any, layout: Any) -> None:
        self.operation, self.shape, self.dtype, self.layout = operation, shape, dtype, layout

    def tensor(self) -> Tensor:
        return Tensor(self.operation.value, self.dtype, self.layout)

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"unwaited result: .{name} of a product that may be in flight")


def unwaited(*_: Any) -> Any:
    raise Fault("unwaited result: a value that a product in flight may still change")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "neg", "getitem",
              "bool", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "iter", "len"):  # fmt: skip
    setattr(Token, f"__{_name}__", unwaited)


class Pointer:
    """A pointer into a flat tensor, or a tensor of pointers: an offset or a tensor of them."""

    __slots__ = ("data", "name", "offset")

    def __init__(self, data: torch.Tensor, offset: Any = 0, name: str = "pointer") -> None:
        self.data, self.offset, self.name = data, offset, name

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=dtype_of(self.data.dtype))

    @property
    def shape(self) -> list[int]:
        return list(self.offset.shape) if isinstance(self.offset, torch.Tensor) else []

    def __add__(self, other: Any) -> Pointer:
        if isinstance(other, Tensor):
            if other.dtype.is_floating():
                raise Fault("a pointer plus a floating-point tensor")
            return Pointer(self.data, self.offset + other.value, self.name)
        if isinstance(other, int):
            return Pointer(self.data, self.offset + int(other), self.name)
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + (-other)

    def __getattr__(self, name: str) -> Any:
        raise Refused(f"pointer.{name}")
