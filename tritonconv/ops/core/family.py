"""Families of public calls: what runs a call (our kernels, or torch and why), resolved once for each signature.

A family defines how a user's arguments are parsed, what our kernels cannot do, what torch computes, what a call costs, and
which operators compute the result. The path of repeated calls, autocast, warnings, observers and gradients follow from this
definition, and are the same for all families.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.core.backend import (
    FLOATS,
    Backend,
    OnTorch,
    asking_hopper,
    autocast_dtype,
    cast_for_autocast,
    constant_under_compile,
    current_backend,
    decide,
    needs_gradients,
    why_no_views,
)
from tritonconv.ops.core.observe import Call, Decision, intercepted, is_watched, notify
from tritonconv.ops.core.operator import is_traced
from tritonconv.ops.core.recording import Recording, record
from tritonconv.ops.core.signature import Memo, signature_of

__all__ = ["IN_GRAPHS", "Cost", "Family", "Resolved", "Unsupported", "call_family", "family_named"]

Parsed = TypeVar("Parsed")
Tensors = Sequence[Any]


class Unsupported(NamedTuple):
    """Our kernels do not take these arguments: torch runs the call or raises an error."""

    reason: str = ""
    """ "" if torch is expected to raise, or if there is nothing to compute."""


class Cost(NamedTuple):
    """The multiply-adds of a call, and the bytes that it moves."""

    bytes: int
    macs: int = 0
    geometry: ConvGeometry | None = None


@dataclass(frozen=True)
class Resolved:
    """What runs a call."""

    refused: OnTorch | None
    """Why torch runs it; None if our kernels do."""
    recording: Recording | None
    """What our kernels do; None if torch runs the call, or if it is traced."""


_families: dict[str, Family[Any]] = {}


def family_named(name: str) -> Family[Any]:
    """The family of this name."""
    return _families[name]


def call_family(name: str, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None = None) -> Any:
    """The result of a call, as a node of a graph has it: Dynamo writes the call into its graph and does not look into it.

    Args:
        name: the family's.
        tensors, numbers, backend: as for `Family.__call__`.
    """
    return _families[name](tensors, numbers, backend)


IN_GRAPHS: list[Callable[..., Any]] = [call_family]
"""Functions that Dynamo writes into its graph, and does not look into."""


@constant_under_compile
def known_to_dynamo() -> bool:
    """Register `IN_GRAPHS` with Dynamo while it traces. An import does not, because that would import Dynamo."""
    for function in IN_GRAPHS:
        torch.compiler.allow_in_graph(function)
    return True


class Family(abc.ABC, Generic[Parsed]):
    """Public functions whose arguments have the same form."""

    tensors: ClassVar[tuple[str, ...]] = ("input",)
    """Names of the tensors, for error messages; only the first one is always required."""
    required: ClassVar[int] = 1
    """How many of them, from the first, are required."""
    casts: ClassVar[tuple[int, ...]] = ()
    """Indices of the tensors that autocast casts."""
    dtypes: ClassVar[Sequence[torch.dtype] | None] = FLOATS
    """Dtypes that the first tensor may have; None: any."""
    torch_checks_types: ClassVar[bool] = False
    """Whether torch's own function raises the error for an argument that is not a tensor."""

    def __init__(self, name: str) -> None:
        assert name not in _families, name
        _families[name] = self
        self.name = name
        self.signature = signature_of(name, [f"t{i}" for i in range(len(self.tensors))], packed=True)
        self.found = Memo()

    # What each family defines.

    @abc.abstractmethod
    def parse(self, tensors: Tensors, numbers: tuple[Any, ...]) -> Parsed | Unsupported:
        """The call's geometry and numbers; under torch.compile no geometry, which would add guards for all sizes."""

    @abc.abstractmethod
    def run(self, tensors: Tensors, parsed: Parsed) -> Any:
        """The result, computed by operators."""

    @abc.abstractmethod
    def on_torch(self, tensors: Tensors, numbers: tuple[Any, ...]) -> Any:
        """The result of torch's function, or its exception."""

    @abc.abstractmethod
    def cost(self, tensors: Tensors, parsed: Parsed) -> Cost:
        """The multiply-adds of the call, and the least bytes that it moves."""

    def why_unsupported(self, tensors: Tensors, parsed: Parsed) -> str | None:  # noqa: ARG002
        """Why there is no kernel for a call that could be parsed, besides the reasons that all families share."""
        return None

    def describe(self, tensors: Tensors, numbers: tuple[Any, ...], parsed: Parsed | None) -> str:
        """The call, for warnings and errors."""
        return f"{self.op(numbers)} of {list(tensors[0].shape)}" if parsed is None else str(parsed)

    def op(self, numbers: tuple[Any, ...]) -> str:  # noqa: ARG002
        """The public function's name."""
        return self.name

    def prefers_torch(self, recording: Recording, tensors: Tensors, parsed: Parsed) -> OnTorch | None:  # noqa: ARG002
        """Why torch runs a call that our kernels could run: it was measured to be faster."""
        return None

    def observed(self, resolved: Resolved, tensors: Tensors, numbers: tuple[Any, ...], parsed: Parsed) -> Call:
        """The call in the form for observers."""
        cost = self.cost(tensors, parsed)
        x = tensors[0]
        if resolved.refused is not None:
            decision = Decision("torch", resolved.refused.reason)
        else:
            recording = resolved.recording or Recording(self.run)
            decision = Decision("triton", recording.kernel, recording.copies)
        return Call(self.op(numbers), decision, cost.geometry, cost.macs, cost.bytes, x.dtype, x.device, None, "")

    def autocast(self, x: Tensor) -> torch.dtype | None:
        """The dtype to which autocast casts the tensors of `casts`; None if it casts nothing."""
        return autocast_dtype(x) if self.casts else None

    def is_collective(self, parsed: Parsed) -> bool:  # noqa: ARG002
        """Whether the call waits for other processes, so that it cannot be recorded."""
        return False

    def face(
        self, tensors: Tensors, numbers: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The public function of a call, its arguments and its named arguments, for __torch_function__."""
        return self.__call__, (tensors, numbers), {}

    # What is the same for all families.

    def __call__(self, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None = None) -> Any:
        """The result of a call.

        Args:
            tensors: one for each name, None for those that are not given.
            numbers: a tuple of the user's arguments, then values that are hashable and of known types.
            backend: the layer's own choice.
        """
        if torch.compiler.is_dynamo_compiling() and known_to_dynamo():
            return call_family(self.name, tensors, numbers, backend)
        signature = None
        if isinstance(tensors[0], Tensor) and not torch.compiler.is_compiling() and not is_watched():
            try:
                try:
                    signature = self.signature(tensors, numbers, backend)
                except ValueError:
                    numbers = (_settled(numbers[0]), *numbers[1:])
                    signature = self.signature(tensors, numbers, backend)
                found = self.found.get(signature)
            # Symbolic, sparse and opaque tensors have no signature; arguments of wrong types raise elsewhere.
            except (AttributeError, RuntimeError, TypeError, ValueError):
                signature = found = None
            if found is not None:
                return found(*tensors)
        return self._first(signature, tensors, numbers, backend)

    def _first(self, signature: Any, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None) -> Any:
        """The result of a call that was not seen before, or that is traced or observed."""
        receive = intercepted()
        if receive is not None:
            return receive(self, tensors, numbers, backend)
        if self._check(tensors, numbers):
            return self.on_torch(tensors, numbers)
        if not torch.compiler.is_compiling():
            # Tensor classes with rules for torch's own function get a call of it (`why_no_views`).
            overriding = [t for t in tensors if t is not None and not isinstance(t, Tensor)]
            if overriding:
                function, arguments, named = self.face(tensors, numbers)
                return handle_torch_function(function, overriding, *arguments, **named)
        dtype = self.autocast(tensors[0])
        cast = self._cast(tensors, dtype)
        given = tuple(t for t in cast if t is not None)
        reason = why_no_views(given)
        if reason is not None:
            decide(given, backend, lambda: self.describe(cast, numbers, None), reason, self.dtypes)
            return self.on_torch(cast, numbers)
        parsed = self.parse(cast, numbers)
        if isinstance(parsed, Unsupported):
            # torch checks the arguments first; if it raises nothing, the run on torch is reported.
            result = self.on_torch(cast, numbers)
            if parsed.reason:
                decide(given, backend, lambda: self.describe(cast, numbers, None), parsed.reason, self.dtypes)
                decision, x = Decision("torch", parsed.reason), cast[0]
                notify(lambda: Call(self.op(numbers), decision, None, 0, 0, x.dtype, x.device, None, ""))
            return result
        reason = self.why_unsupported(cast, parsed)
        refused = decide(given, backend, lambda: self.describe(cast, numbers, parsed), reason, self.dtypes)
        if is_traced(tensors) or (refused is None and self.is_collective(parsed)):
            # Times measured in eager mode are not valid under a compiler, so that the tables are not used.
            if refused is not None:
                return self.on_torch(cast, numbers)
            with asking_hopper(current_backend(backend) == "hopper"):
                return self.run(cast, parsed)
        resolved = Resolved(refused, None)
        if refused is None:
            with asking_hopper(current_backend(backend) == "hopper"):
                recording = record(
                    lambda *t: self.run(self._cast(t, dtype), parsed), tensors, tensors[0].device, needs_gradients(given)
                )
            resolved = Resolved(None, recording)
            if current_backend(backend) == "auto":
                resolved = Resolved(self.prefers_torch(recording, cast, parsed), recording)
        run = self._by_torch(resolved.refused, numbers, dtype) if resolved.refused is not None else recording.run
        # If another thread has changed a setting since the signature was made, this decision does not belong to it.
        if signature is not None and signature == self.signature(tensors, numbers, backend):
            self.found.remember(signature, run)
        if notify(lambda: self.observed(resolved, cast, numbers, parsed)):
            return _lies_like(self.on_torch(cast, numbers), resolved)
        return run(*tensors)

    def refuses(self, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None) -> bool:
        """Whether torch would run a call; gives a warning if the reason requires one."""
        cast = self._cast(tensors, self.autocast(tensors[0]))
        parsed = self.parse(cast, numbers)
        if isinstance(parsed, Unsupported):
            return True
        given = tuple(t for t in cast if t is not None)
        reason = self.why_unsupported(cast, parsed)
        return decide(given, backend, lambda: self.describe(cast, numbers, parsed), reason, self.dtypes) is not None

    def _by_torch(self, refused: OnTorch, numbers: tuple[Any, ...], dtype: torch.dtype | None) -> Callable[..., Any]:
        def run(*tensors: Any) -> Any:
            refused.warn()
            return self.on_torch(self._cast(tensors, dtype), numbers)

        return run

    def _check(self, tensors: Tensors, numbers: tuple[Any, ...]) -> bool:
        """Whether torch must raise the error for an argument that is not a tensor; else raise a TypeError here."""
        for i, (name, t) in enumerate(zip(self.tensors, tensors, strict=True)):
            if not isinstance(t, Tensor) and not (t is None and i >= self.required) and not has_torch_function((t,)):
                if self.torch_checks_types:
                    return True
                raise TypeError(f"{self.op(numbers)}(): argument '{name}' must be Tensor, not {type(t).__name__}")
        return False

    def _cast(self, tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
        if dtype is None:
            return tensors
        return tuple(cast_for_autocast(t, dtype) if i in self.casts else t for i, t in enumerate(tensors))


def _lies_like(result: Any, resolved: Resolved) -> Any:
    """The result of an observed run in the kernel's format, so that later copies are counted right."""
    recording = resolved.recording
    if resolved.refused is not None or recording is None or not isinstance(result, Tensor):
        return result
    strides = recording.result.stride()
    return result if result.stride() == strides else torch.empty_strided(
        result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)  # fmt: skip


def _settled(value: Any) -> Any:
    """Numbers of Python's own types: torch.Size becomes a tuple, and numpy's integers become Python's, as in torch."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_settled, value))
    return int(value) if isinstance(value, np.integer) else value
