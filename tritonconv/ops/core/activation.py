"""Activations by name, for fused calls, and their computation by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.core.backend import HAS_TRITON

if TYPE_CHECKING:
    from tritonconv.kernels.activations import Activation

__all__ = [
    "ActivationSpec", "from_module", "from_numbers", "module_types", "parse_activation", "table", "to_module", "to_numbers",
]  # fmt: skip


def table() -> dict[str, Activation]:
    """The rows of kernels/activations.py; none if triton is not installed, when everything runs on torch.

    Imported here and not at the top, so that `import tritonconv` does not import triton.
    """
    if not HAS_TRITON:
        return {}
    from tritonconv.kernels.activations import ACTIVATIONS

    return ACTIVATIONS


class ActivationSpec(NamedTuple):
    """An activation: the name of its row in the table, and its numbers."""

    name: str
    a: float = 0.0
    b: float = 0.0

    def torch(self, x: Tensor) -> Tensor:
        """The activation of x by torch."""
        row = table()[self.name]
        numbers = dict(zip((n for n, _ in row.parameters), (self.a, self.b), strict=False))
        function: Callable[..., Tensor] = getattr(torch.nn.functional, row.function)
        return function(x, **numbers, **dict(row.fixed))

    def given(self) -> tuple[Any, ...]:
        """The form in which a user writes it, such as ("leaky_relu", 0.2)."""
        return (self.name, *(self.a, self.b)[: len(table()[self.name].parameters)])

    def __str__(self) -> str:
        _, *numbers = self.given()
        return f"{self.name}({', '.join(f'{n:g}' for n in numbers)})" if numbers else self.name


def to_numbers(activation: ActivationSpec | None) -> tuple[str, float, float]:
    """An activation as arguments of an operator; the name is "" if there is none."""
    return tuple(activation) if activation is not None else ("", 0.0, 0.0)  # type: ignore[return-value]


def from_numbers(activation: str, a: float, b: float) -> ActivationSpec | None:
    """The reverse of `to_numbers`."""
    return ActivationSpec(activation, a, b) if activation else None


ALIASES = {"swish": "silu", "clamp": "hardtanh"}


_defaults: dict[str, ActivationSpec] = {}


def default_specs() -> dict[str, ActivationSpec]:
    """Every activation with its default numbers, by each of its names."""
    if not _defaults:
        for name, row in table().items():
            _defaults[name] = ActivationSpec(name, *(float(value) for _, value in row.parameters))
        _defaults.update((alias, _defaults[name]) for alias, name in ALIASES.items() if name in _defaults)
    return _defaults


def make_spec(name: str, numbers: tuple[float, ...] = ()) -> ActivationSpec:
    """The named activation, with default values for the numbers that are missing."""
    if not table():
        raise ImportError(f"activation {name!r}: activations by name need triton, which is not installed")
    name = ALIASES.get(name, name)
    if name not in table():
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(table())}")
    defaults = tuple(value for _, value in table()[name].parameters)
    if len(numbers) > len(defaults):
        raise ValueError(f"activation {name!r} takes {len(defaults)} numbers, got {numbers}")
    return ActivationSpec(name, *(float(n) for n in numbers + defaults[len(numbers) :]))


_module_types: dict[type[torch.nn.Module], tuple[str, ...]] = {}
_plain_types: dict[type[torch.nn.Module], ActivationSpec] = {}
"""The types without options, filled together with the others."""


def module_types() -> dict[type[torch.nn.Module], tuple[str, ...]]:
    """torch.nn's activation classes, each with the rows of the table that it can compute."""
    # Filled once, without functools.cache: Dynamo gives a warning whenever it traces through one.
    if not _module_types:
        for name, row in table().items():
            kind = getattr(torch.nn, row.module)
            _module_types[kind] = (*_module_types.get(kind, ()), name)
            if not row.parameters and not row.fixed:
                _plain_types[kind] = ActivationSpec(name)
    return _module_types


def from_module(module: torch.nn.Module) -> ActivationSpec | None:
    """The activation that a module computes, or None if it is none of ours (a subclass is none)."""
    plain = _plain_types.get(type(module))
    if plain is not None:
        return plain
    for name in module_types().get(type(module), ()):
        row = table()[name]
        if all(getattr(module, key) == value for key, value in row.fixed):
            return make_spec(name, tuple(getattr(module, parameter) for parameter, _ in row.parameters))
    return None


def to_module(spec: ActivationSpec | None) -> torch.nn.Module:
    """torch.nn's module for an activation, or Identity for None."""
    if spec is None:
        return torch.nn.Identity()
    row = table()[spec.name]
    numbers = dict(zip((name for name, _ in row.parameters), (spec.a, spec.b), strict=False))
    module: torch.nn.Module = getattr(torch.nn, row.module)(**numbers, **dict(row.fixed))
    return module


def parse_activation(value: object) -> ActivationSpec | None:
    """The activation for None, "identity", a name, (name, numbers...), a module of torch.nn, or a spec.

    >>> parse_activation("relu"), parse_activation(("leaky_relu", 0.2)).a, parse_activation(torch.nn.GELU("tanh")).name
    (ActivationSpec(name='relu', a=0.0, b=0.0), 0.2, 'gelu_tanh')
    """
    if value is None or isinstance(value, ActivationSpec):
        return value
    if value == "identity" or isinstance(value, torch.nn.Identity):
        return None
    if isinstance(value, str):
        return default_specs().get(value) or make_spec(value)
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return make_spec(value[0], value[1:])
    spec = from_module(value) if isinstance(value, torch.nn.Module) else None
    if spec is None:
        raise ValueError(f"unknown activation {value!r}, expected one of {', '.join(table())} or its torch.nn module")
    return spec
