"""Functions of tensors in registers, as Gluon's and Triton's language have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl

from .errors import Fault, Refused
from .scalars import Flag, Scalar, Wide, like, narrow, quotient
from .scheduler import machine
from .tensors import Pointer, Tensor, binary, common, dtype_of, register_dtype, sizes

__all__ = ["FUNCTIONS", "total"]


def unwrap(value: torch.Tensor, dtype: Any, layout: Any = None) -> Any:
    """Integers without axes are scalars."""
    if value.dim() or dtype.is_floating():
        return Tensor(value, dtype, layout)
    number = int(value)
    return Flag(number) if dtype == tl.int1 else Wide(number) if dtype.primitive_bitwidth == 64 else narrow(number)


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tensor:
    if isinstance(value, Tensor):
        return Tensor(value.to(dtype).value.expand(sizes([shape])), dtype, layout)
    return Tensor(torch.full(sizes([shape]), value, dtype=register_dtype(dtype)), dtype, layout)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


def full_like(input: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full(shape or input.shape, value, dtype or input.dtype, layout or input.layout)


def zeros_like(input: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full_like(input, 0, shape, dtype, layout)


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    if isinstance(start, Scalar) or isinstance(end, Scalar):
        raise Fault("arange of run-time bounds")
    if end - start & (end - start - 1) or end <= start:
        raise Fault(f"arange({start}, {end}): not a power of two")
    return Tensor(torch.arange(start, end), tl.int32, layout)


def cdiv(x: Any, y: Any) -> Any:
    # As Triton's standard library writes it, so that it overflows where that does.
    return quotient(x + (y - 1), y) if not isinstance(x, Scalar) and not isinstance(y, Scalar) else (x + (y - 1)) // y


def offsets(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A pointer's offsets that are accessed, checked, and the mask, both of the access's shape."""
    where = torch.as_tensor(pointer.offset)
    if mask is not None:
        mask = mask.value if isinstance(mask, Tensor) else torch.tensor(bool(mask))
        where, mask = torch.broadcast_tensors(where, mask)
    used = where if mask is None else where[mask]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= pointer.data.numel()):
        raise Fault(f"{pointer.name}: offsets {int(used.min())} to {int(used.max())} of {pointer.data.numel()} elements")
    return where, mask


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Any:
    """Hints of caching change nothing."""
    if set(hints) - {"cache_modifier", "eviction_policy", "volatile", "is_volatile"}:
        raise Refused(f"load with {sorted(hints)}")
    if not isinstance(pointer, Pointer):
        raise Fault(f"load of {pointer!r}, which is no pointer")
    where, inside = offsets(pointer, mask)
    dtype = dtype_of(pointer.data.dtype)
    m = machine()
    m.schedule.work(m, where.numel() * pointer.data.element_size())
    kind = register_dtype(dtype)
    if inside is None:
        return unwrap(pointer.data[where].to(kind), dtype)
    value = pointer.data[torch.where(inside, where, 0)].to(kind)
    # What a masked load gives without `other` is undefined.
    filler = torch.tensor(float("nan") if kind.is_floating_point else 0) if other is None else Tensor.of(other).value
    return unwrap(torch.where(inside, value, filler.to(kind)), dtype)


def store(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
    if set(hints) - {"cache_modifier", "eviction_policy"}:
        raise Refused(f"store with {sorted(hints)}")
    if not isinstance(pointer, Pointer):
        raise Fault(f"store to {pointer!r}, which is no pointer")
    where, inside = offsets(pointer, mask)
    data = Tensor.of(value).to(dtype_of(pointer.data.dtype)).value.expand(where.shape)
    if inside is not None:
        where, data = where[inside], data[inside]
    m = machine()
    m.schedule.work(m, where.numel() * pointer.data.element_size())
    m.written.elements(pointer, where.reshape(-1))
    pointer.data[where] = data.to(pointer.data.dtype)


def where(condition: Any, x: Any, y: Any) -> Any:
    if not any(isinstance(v, Tensor) for v in (condition, x, y)):
        return x if condition else y
    x, y = (Tensor.of(x), y) if not isinstance(x, Tensor) and not isinstance(y, Tensor) else (x, y)
    a, b, dtype = common(x, y)
    condition = Tensor.of(condition)
    return Tensor(torch.where(condition.value != 0, a, b), dtype, condition.layout)


def extremum(of_floats: Any, propagating: Any, of_numbers: Any) -> Callable[..., Any]:
    def function(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            result = of_numbers(x, y)
            return like(int(result), x, y) if isinstance(x, Scalar) or isinstance(y, Scalar) else result
        nan = "ALL" in str(propagate_nan)
        return binary(lambda a, b: (of_floats if a.is_floating_point() and not nan else propagating)(a, b), x, y)

    return function


def elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        x = Tensor.of(x)
        if not x.dtype.is_floating():
            raise Fault(f"a floating-point function of {x.dtype}")
        return x.like(function(x.value))

    return apply


def absolute(x: Any) -> Any:
    return abs(x) if isinstance(x, int | float) else x.like(x.value.abs())


def sigmoid(x: Any) -> Any:
    x = Tensor.of(x)
    return x.like(1 / (1 + (-x.value).exp()))


def fma(x: Any, y: Any, z: Any) -> Any:
    return x * y + z


def reduction(x: Any, axis: int | None, keep_dims: bool, function: Callable[..., torch.Tensor], dtype: Any) -> Any:
    value = x.to(dtype).value
    axes = tuple(range(value.dim())) if axis is None else (int(axis),)
    return unwrap(function(value, axes, keep_dims), dtype)


def total(input: Any, axis: int | None = None, keep_dims: bool = False, dtype: Any = None) -> Any:
    x = Tensor.of(input)
    small = not x.dtype.is_floating() and x.dtype.primitive_bitwidth < 32
    dtype = dtype or (tl.int32 if small else tl.float32 if x.dtype == tl.bfloat16 else x.dtype)
    return reduction(x, axis, keep_dims, lambda v, axes, keep: v.sum(axes, keepdim=keep, dtype=v.dtype), dtype)


def extreme(function: Callable[..., torch.Tensor], neutral: float) -> Callable[..., Any]:
    def reduce(input: Any, axis: int | None = None, return_indices: bool = False, keep_dims: bool = False) -> Any:
        if return_indices:
            raise Refused("indices of a maximum")

        def ignoring_nan(value: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
            if not value.is_floating_point():
                return function(value, axes, keepdim=keep)
            nan = value.isnan()
            best = function(value.masked_fill(nan, neutral), axes, keepdim=keep)
            return best.masked_fill(torch.amin(nan.to(torch.uint8), axes, keepdim=keep).bool(), float("nan"))

        x = Tensor.of(input)
        return reduction(x, axis, keep_dims, ignoring_nan, tl.float32 if x.dtype == tl.bfloat16 else x.dtype)

    return reduce


def join(a: Tensor, b: Tensor) -> Tensor:
    return a.like(torch.stack((a.value, b.value), -1))


def permute(input: Tensor, *order: Any) -> Tensor:
    return input.permute(*order)


def broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x, y = torch.broadcast_tensors(a.value, b.value)
    return a.like(x), b.like(y)


def convert_layout(value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    del assert_trivial
    return Tensor(value.value, value.dtype, layout)


def to_tensor(value: Any) -> Any:
    if isinstance(value, bool):
        return Flag(value)
    if isinstance(value, int):
        return value if isinstance(value, Scalar) else like(value, 0)
    return Tensor.of(value)


def cast(input: Any, dtype: Any, **options: Any) -> Any:
    return to_tensor(input).to(dtype, **options)


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Fault(f"static_assert: {message}")


def static_range(*bounds: int) -> Iterator[int]:
    if any(isinstance(bound, Scalar) for bound in bounds):
        raise Fault("static_range of run-time bounds")
    unrolled = machine().current.unrolled
    for i in range(*bounds):
        unrolled.append(i)
        try:
            yield i
        finally:
            unrolled.pop()


def program_id(axis: int) -> Scalar:
    return Scalar(machine().program if axis == 0 else 0)


def num_programs(axis: int) -> Scalar:
    return Scalar(machine().programs if axis == 0 else 1)


def same(value: Any, *_: Any) -> Any:
    """Hints to the compiler."""
    return value


def nothing(*_: Any, **__: Any) -> None:
    """Output of the compiler."""


def assume(condition: Any) -> None:
    if not condition:
        raise Fault("assume: the condition does not hold")


FUNCTIONS: dict[str, Any] = {
    "abs": absolute, "arange": arange, "assume": assume, "broadcast": broadcast, "cast": cast, "cdiv": cdiv,
    "ceil": elementwise(torch.ceil), "convert_layout": convert_layout, "cos": elementwise(torch.cos),
    "device_print": nothing, "div_rn": lambda x, y: x / y, "erf": elementwise(torch.erf), "exp": elementwise(torch.exp),
    "exp2": elementwise(torch.exp2), "expand_dims": lambda x, axis: x.expand_dims(axis), "fdiv": lambda x, y: x / y,
    "floor": elementwise(torch.floor),
    "fma": fma, "full": full, "full_like": full_like, "join": join, "load": load, "log": elementwise(torch.log),
    "log2": elementwise(torch.log2), "max": extreme(torch.amax, -math.inf), "max_constancy": same, "max_contiguous": same,
    "maximum": extremum(torch.fmax, torch.maximum, max), "min": extreme(torch.amin, math.inf),
    "minimum": extremum(torch.fmin, torch.minimum, min), "multiple_of": same, "num_programs": num_programs,
    "num_warps": lambda: machine().current.num_warps, "permute": permute, "program_id": program_id,
    "reshape": lambda x, *shape, **options: x.reshape(*shape, **options), "rsqrt": elementwise(torch.rsqrt),
    "set_auto_layout": convert_layout, "sigmoid": sigmoid, "sin": elementwise(torch.sin),
    "split": lambda x: x.split(), "sqrt": elementwise(torch.sqrt), "sqrt_rn": elementwise(torch.sqrt),
    "static_assert": static_assert, "static_print": nothing, "static_range": static_range, "store": store, "sum": total,
    "to_tensor": to_tensor, "trans": lambda x, *order: x.trans(*order), "where": where, "zeros": zeros,
    "zeros_like": zeros_like,
}  # fmt: skip
