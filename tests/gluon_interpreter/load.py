"""Device functions as Python functions: the same code, with Gluon's names replaced among its globals."""

from __future__ import annotations

import builtins
import enum
import inspect
import types
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

from .errors import MARK, Fault
from .language import BUILTINS, stand_in, stand_in_module
from .scalars import Scalar

__all__ = ["Device", "interpreted"]


class Device:
    """An interpreted device function.

    Attributes:
        constants: names of the parameters that are constexpr.
    """

    def __init__(self, source: Any) -> None:
        fn = source.fn
        self.source = source
        self.__name__ = fn.__name__
        self.signature = inspect.signature(fn)
        self.parameters = list(self.signature.parameters)
        self.constants = {name for name, note in fn.__annotations__.items() if is_constant(note)}
        self.places = [i for i, name in enumerate(self.parameters) if name in self.constants]
        self.call: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = [self.parameters[i] for i in self.places if i < len(args) and isinstance(args[i], Scalar)]
        names += [name for name, value in kwargs.items() if name in self.constants and isinstance(value, Scalar)]
        if names:
            raise Fault(f"{self.__name__}: the constexpr {names[0]} is given a run-time value")
        return self.call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<interpreted {self.__name__}>"


def is_constant(note: Any) -> bool:
    return note is tl.constexpr or (isinstance(note, str) and note.endswith("constexpr"))


DEVICE: dict[int, Device] = {}
"""By the source's identity; the copy keeps the source alive."""


def device(source: Any) -> Device:
    found = DEVICE.get(id(source))
    if found is None:
        found = DEVICE[id(source)] = Device(source)
        # It is known before its globals are looked at, as functions may name each other.
        found.call = copy(source.fn)
    return found


def copy(fn: types.FunctionType) -> types.FunctionType:
    """A function with its globals and what it closes over interpreted."""
    names = {MARK: True, "__name__": fn.__module__, "__builtins__": {**vars(builtins), **BUILTINS}}
    for name in names_of(fn.__code__):
        if name in fn.__globals__:
            names[name] = interpreted(fn.__globals__[name])
    closure = tuple(types.CellType(interpreted(cell.cell_contents)) for cell in fn.__closure__ or ())
    defaults = tuple(map(interpreted, fn.__defaults__ or ()))
    made = types.FunctionType(fn.__code__, names, fn.__name__, defaults, closure)
    made.__kwdefaults__ = {name: interpreted(value) for name, value in (fn.__kwdefaults__ or {}).items()}
    return made


def names_of(code: types.CodeType) -> set[str]:
    """Names that a function and the functions within it may look up."""
    inner = [names_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


class Module:
    """A module of the kernels: its members are interpreted when they are used."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return interpreted(getattr(self._module, name))


def interpreted(value: Any) -> Any:
    """What device code sees in place of a value."""
    if isinstance(value, tl.constexpr):
        return interpreted(value.value)
    if value is tl.constexpr:
        return stand_in("triton.language.core", "constexpr")
    if isinstance(value, ConstexprFunction):
        return value.fn
    if isinstance(value, types.ModuleType):
        if value.__name__.partition(".")[0] == "triton":
            return stand_in_module(value.__name__)
        return value if value.__name__ in ("math", "functools", "itertools") else Module(value)
    if isinstance(value, JITFunction | InterpretedFunction):
        module = value.fn.__module__
        return stand_in(module, value.fn.__name__) if module.startswith("triton.") else device(value)
    if isinstance(value, type):
        own = (
            value.__module__.startswith("triton.")
            and not issubclass(value, enum.Enum)
            and not value.__name__.endswith("Layout")
        )
        return stand_in(value.__module__, value.__name__) if own else value
    if callable(value) and str(getattr(value, "__module__", "")).startswith("triton.") and hasattr(value, "__name__"):
        return stand_in(value.__module__, value.__name__)
    if type(value) in (tuple, list):
        return type(value)(map(interpreted, value))
    if type(value) is dict:
        return {key: interpreted(item) for key, item in value.items()}
    return value
