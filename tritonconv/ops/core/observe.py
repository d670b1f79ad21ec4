"""Observers of single calls: our own, and tracers, transforms and modes that intercept operators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.core.backend import capture

__all__ = [
    "Call", "Decision", "Example", "Share", "intercept", "intercepted", "is_observed", "is_watched", "notify",
    "notify_copy", "observe", "shared", "sharing", "wants_parts",
]  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """Where a call runs. `reason` is the kernel, or why it is not on Triton; `copies` counts hidden layout copies."""

    backend: Literal["triton", "torch"]
    reason: str
    copies: int = 0


@dataclass(frozen=True)
class Call:
    """One call of our operators, in the form for observers."""

    op: str
    decision: Decision
    geometry: ConvGeometry | None
    macs: int
    bytes: int
    dtype: torch.dtype
    device: torch.device
    example: Example | None
    """The call itself, without memory, if our kernels can run it."""
    conditions: str
    """The conditions under which a measurement is valid for the call."""


class Example(NamedTuple):
    """A call as a value without memory, which can be repeated: to measure, capture or compile it ahead."""

    family: Any
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Example:
        """The same with every tensor mapped."""
        return self._replace(tensors=tuple(t if t is None else function(t) for t in self.tensors))

    def on_meta(self) -> Example:
        """The same sizes, strides and dtypes without memory."""
        return self.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))

    def key(self) -> tuple[Any, ...]:
        """Equal for calls that do the same on tensors of the same sizes, strides and dtypes."""
        lie = tuple(t if t is None else (t.shape, t.stride(), t.dtype) for t in self.tensors)
        return self.family.name, self.numbers[0], self.numbers[3:], lie

    def run(self) -> Any:
        """Repeat the call."""
        return self.family(self.tensors, self.numbers)

    def on_torch(self) -> Any:
        """The same call by torch."""
        return self.family.on_torch(self.tensors, self.numbers)


class _Observer(threading.local):
    callback: Callable[[Call], None] | None = None
    copied: Callable[[], None] | None = None


_observer = _Observer()


@contextmanager
def observe(callback: Callable[[Call], None], copied: Callable[[], None] | None = None) -> Iterator[None]:
    """Call `callback` for every call of our operators on this thread, and compute all of them with torch meanwhile.

    The decisions are those that a normal run would take; this is how `explain` reports without launching kernels.
    `copied` is called for each result that is copied to another memory format after its operator.
    """
    previous = _observer.callback, _observer.copied
    _observer.callback, _observer.copied = callback, copied
    try:
        yield
    finally:
        _observer.callback, _observer.copied = previous


def notify_copy() -> None:
    """Tell the observer, if there is one, that a result is copied to another memory format."""
    if not torch.compiler.is_compiling() and _observer.copied is not None:
        _observer.copied()


def notify(make_call: Callable[[], Call]) -> bool:
    """Report a call to the observer, if there is one; whether there is one."""
    callback = None if torch.compiler.is_compiling() else _observer.callback
    if callback is None:
        return False
    call, share = make_call(), shared()
    if share is not None:
        decision = replace(call.decision, reason=share.reason.format(call.decision.reason))
        call = replace(call, decision=decision)
    callback(call)
    return True


def is_observed() -> bool:
    """Whether an observer sees this thread's calls."""
    return not torch.compiler.is_compiling() and _observer.callback is not None


class Share(NamedTuple):
    """The launch of which an observed call would be a part."""

    reason: str
    """The description of the shared launch; "{}" stands for the call's kernel."""
    unread: bool = False
    """Whether the call's input would not be read from memory."""
    unwritten: bool = False
    """Whether the call's result would not be written to memory."""
    members: tuple[Any, ...] = ()
    """What else the launch computes: modules, or names of functions."""


class _Shared(threading.local):
    share: Share | None = None


_shared = _Shared()


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Tell observers that calls on this thread would be part of a launch that computes more."""
    outer, _shared.share = _shared.share, share
    try:
        yield
    finally:
        _shared.share = outer


def shared() -> Share | None:
    """The launch of which an observed call would be a part."""
    return _shared.share


class _Interceptor(threading.local):
    def __init__(self) -> None:
        self.receive: Callable[..., Any] | None = None


_interceptor = _Interceptor()


@contextmanager
def intercept(receive: Callable[..., Any]) -> Iterator[None]:
    """Give every call of a family on this thread to `receive`: (family, tensors, numbers, backend), in place of its result.

    This is how a graph pass learns which call a public function makes, without computing anything.
    """
    outer, _interceptor.receive = _interceptor.receive, receive
    try:
        yield
    finally:
        _interceptor.receive = outer


def intercepted() -> Callable[..., Any] | None:
    """Who gets this thread's calls in place of a result. Must not be called under torch.compile."""
    return _interceptor.receive


# Looked up once, because every call uses them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state


def is_watched() -> bool:
    """Whether a tracer, transform, mode, observer or capture sees this thread's calls one by one.

    Must not be called under torch.compile.
    """
    return (
        _dispatch_modes() > 0
        or _observer.callback is not None
        or _interceptor.receive is not None
        or capture.active
        or _transform() is not None
        or _trace() is not None
        or forward_ad._current_level >= 0
    )


def wants_parts() -> bool:
    """Whether tracers or observers see single calls, and thus each part of a launch; a capture keeps shared launches."""
    return torch.compiler.is_compiling() or (is_watched() and not capture.active)
