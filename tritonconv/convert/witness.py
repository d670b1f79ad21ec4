"""The Python code that a forward runs while it is traced: what it asks of values, and which attributes it may read.

A stand-in for a value is no tensor. Most questions about its type reach it, and it refuses them (trace.py). Some never do,
`type(x)` for one: these are found by reading the code that ran.
"""

from __future__ import annotations

import builtins
import dis
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["ANY_NAME", "Code", "Witness", "mentioned_names", "wrong_question"]

# Whose code knows stand-ins.
OURS = {"torch", "tritonconv", "triton"}
# Whose code counts where it is given one: `copy.copy` asks for the type of its argument, and so does `numpy.prod`.
LIBRARIES = sys.stdlib_module_names | {"numpy"}

# What a stand-in answers otherwise than a tensor, and nobody can teach it.
WRONG = {
    type: "type",
    callable: "callable",
    fx.Proxy: "torch.fx.Proxy",
    torch.jit.isinstance: "torch.jit.isinstance",
    torch.typename: "torch.typename",
    torch.fx._symbolic_trace.is_fx_tracing: "torch.fx's is_fx_tracing",
    torch.overrides.is_tensor_like: "torch.overrides.is_tensor_like",
    torch._C._has_torch_function: "has_torch_function",
    torch._C._has_torch_function_unary: "has_torch_function_unary",
    torch._C._has_torch_function_variadic: "has_torch_function_variadic",
}
NAMED = (type, types.FunctionType, types.BuiltinFunctionType)
# These may be asked of the module itself.
OF_SELF = (type, callable)
# Names that reach attributes without naming them.
DYNAMIC = {"__dict__", "__getattribute__", "attrgetter", "eval", "exec", "getattr", "getattr_static", "getmembers", "vars"}
ANY_NAME = frozenset({"*"})
"""Stands for all names."""

# They end a statement, or choose what runs next.
ENDS = ("RETURN", "STORE", "POP_JUMP", "JUMP", "POP_TOP", "FOR_ITER", "YIELD")


class Code(NamedTuple):
    """A function's code and what its names stand for."""

    code: types.CodeType
    names: dict[str, Any]
    closure: dict[str, Any]


class Witness:
    """Code that ran on this thread while it was watched, but for that of torch, and of libraries that met no stand-in."""

    def __init__(self) -> None:
        self.seen: dict[types.CodeType, Code] = {}
        self._others: set[types.CodeType] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        outer = sys.getprofile()
        sys.setprofile(self._see)
        try:
            yield
        finally:
            # A profiler written in C is put back by its own method.
            if outer is not None and not callable(outer):
                sys.setprofile(None)
                outer.enable()
            else:
                sys.setprofile(outer)

    def _see(self, frame: types.FrameType, event: str, argument: object) -> None:  # noqa: ARG002
        code = frame.f_code
        if event != "call" or code in self.seen or code in self._others:
            return
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in OURS:
            self._others.add(code)
        elif package not in LIBRARIES or any(map(_holds_stand_in, frame.f_locals.values())):
            # Not values, which nobody may keep.
            held = {name: frame.f_locals.get(name) for name in code.co_freevars}
            closure = {name: value for name, value in held.items() if isinstance(value, (types.ModuleType, *NAMED))}
            self.seen[code] = Code(code, frame.f_globals, closure)

    def codes(self) -> list[Code]:
        return list(self.seen.values())


def _holds_stand_in(value: object) -> bool:
    kind = type(value)
    if issubclass(kind, (list, tuple)):
        return any(issubclass(type(item), fx.Proxy) for item in value)  # type: ignore[attr-defined]
    return issubclass(kind, fx.Proxy)


def mentioned_names(codes: list[Code]) -> frozenset[str]:
    """Names of attributes that the code may read; `ANY_NAME` where it computes them."""
    names: set[str] = set()
    for code, *_ in codes:
        names.update(code.co_names)
    return ANY_NAME if names & DYNAMIC else frozenset(names)


def wrong_question(codes: list[Code]) -> str | None:
    """The name of something that the code asks of a value and that a stand-in answers wrongly; None if there is nothing."""
    for code in codes:
        found = _question(code.code, code)
        if found is not None:
            return found
    return None


def _question(code: types.CodeType, known: Code) -> str | None:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    value: Any = None
    for at, step in enumerate(steps):
        value = _value(step, value, known)
        name = WRONG.get(value) if isinstance(value, NAMED) else None
        if name is not None and not _is_harmless(value, steps[at + 1 :]):
            return name
    return None


def _value(step: dis.Instruction, before: Any, known: Code) -> Any:
    """What a name, or a module's member, stands for; None where only a run could tell."""
    name = step.argval
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        return known.names.get(name, getattr(builtins, name, None))
    if step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
        return known.closure.get(name)
    if step.opname == "IMPORT_NAME":
        return sys.modules.get(name)
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") and isinstance(before, types.ModuleType):
        return getattr(before, name, None)
    return None


def _is_harmless(value: object, behind: list[dis.Instruction]) -> bool:
    """Whether it is asked of the module itself, or while an exception's message is written."""
    if value in OF_SELF and behind and behind[0].argval == "self":
        return value is callable or (len(behind) > 1 and "CALL" in behind[1].opname)
    for step in behind:
        if step.opname == "RAISE_VARARGS":
            return True
        if step.opname.startswith(ENDS):
            return False
    return False
