"""Who looks at single calls: observers of ours, and whoever traces, transforms or intercepts operators."""

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
    "Call", "Decision", "Example", "Share", "is_observed", "is_watched", "notify", "notify_copy", "observe", "shared",
    "sharing", "wants_parts",
]  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """Where a call runs. `reason` says why not on Triton, or which kernel; `copies` counts hidden layout copies."""

    backend: Literal["triton", "torch"]
    reason: str
    copies: int = 0


@dataclass(frozen=True)
class Call:
    """One call of our operators, as an observer sees it."""

    op: str
    decision: Decision
    geometry: ConvGeometry | None
    macs: int
    bytes: int
    dtype: torch.dtype
    device: torch.device
    example: Example | None
    """The call itself, without memory, where our kernels can run it."""
    conditions: str
    """What a measurement must share with it to count for it."""


class Example(NamedTuple):
    """A call as a value without memory, to be made again: measured, captured, compiled ahead."""

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
        """Equal for calls that do the same on tensors that lie alike."""
        lie = tuple(t if t is None else (t.shape, t.stride(), t.dtype) for t in self.tensors)
        return self.family.name, self.numbers[0], self.numbers[3:], lie

    def run(self) -> Any:
        """Make the call again."""
        return self.family(self.tensors, self.numbers)

    def on_torch(self) -> Any:
        """What torch makes of it."""
        return self.family.on_torch(self.tensors, self.numbers)


class _Observer(threading.local):
    callback: Callable[[Call], None] | None = None
    copied: Callable[[], None] | None = None


_observer = _Observer()


@contextmanager
def observe(callback: Callable[[Call], None], copied: Callable[[], None] | None = None) -> Iterator[None]:
    """Show every call of our operators on this thread to `callback`, and compute them all with torch meanwhile.

    The decisions are those that a normal run would take; this is how `explain` reports without launching kernels.
    `copied` is called for each result that is copied to another memory format behind its operator.
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
    """Tell the observer, if there is one; whether there is."""
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
    """What an observed call would be a part of."""

    reason: str
    """The launch that it would share; "{}" stands for its kernel."""
    unread: bool = False
    """Whether its input would not come from memory."""
    unwritten: bool = False
    """Whether its result would not go there."""
    members: tuple[Any, ...] = ()
    """What else the launch computes: modules, or names of functions."""


class _Shared(threading.local):
    share: Share | None = None


_shared = _Shared()


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Let observers know that calls on this thread would be part of a launch that computes more."""
    outer, _shared.share = _shared.share, share
    try:
        yield
    finally:
        _shared.share = outer


def shared() -> Share | None:
    """What an observed call would be a part of."""
    return _shared.share


# Looked up once, for every call asks them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state


def is_watched() -> bool:
    """Whether someone traces, transforms, intercepts, observes or captures this thread's calls one by one.

    Not to be asked under torch.compile.
    """
    return (
        _dispatch_modes() > 0
        or _observer.callback is not None
        or capture.active
        or _transform() is not None
        or _trace() is not None
        or forward_ad._current_level >= 0
    )


def wants_parts() -> bool:
    """Whether someone sees single calls, and so each part of a launch; who keeps launches wants them as they are."""
    return torch.compiler.is_compiling() or (is_watched() and not capture.active)
