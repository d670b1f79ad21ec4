"""Calls that share a launch, resolved once for each signature; if they cannot share one, each call has its own launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tritonconv.ops.core.backend import Backend, asking_hopper, current_backend, needs_gradients
from tritonconv.ops.core.observe import wants_parts
from tritonconv.ops.core.recording import Recording, record
from tritonconv.ops.core.signature import Memo, signature_of

__all__ = ["SharedLaunch"]

Tensors = Sequence[Any]


class SharedLaunch:
    """A launch that computes two or more calls.

    Args:
        name: the name for tracebacks.
        tensors: the number of tensors of all calls; only the first one is required.
        plan: (tensors, numbers, backend): returns a function of the tensors that launches, and the tensors on which it is
            recorded; or None if each call must have its own launch, which then reports the reason.
    """

    def __init__(
        self, name: str, tensors: int, plan: Callable[..., tuple[Callable[..., Any], Tensors] | None]
    ) -> None:  # fmt: skip
        self.signature = signature_of(name, [f"t{i}" for i in range(tensors)], packed=True)
        self.plan, self.found = plan, Memo()

    def find(self, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None) -> Recording | None:
        """The launch for these tensors; arguments as for a family."""
        if wants_parts():
            return None
        try:
            signature = self.signature(tensors, numbers, backend)
            found = self.found.get(signature, self)
        # Unusual tensors: the separate calls report what is wrong with them.
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None
        if found is self:
            found = self.resolve(tensors, numbers, backend)
            self.found.remember(signature, found)
        result: Recording | None = found
        return result

    def resolve(self, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None) -> Recording | None:
        """The same, also while calls are observed: the launch that would run without an observer."""
        if current_backend(backend) == "torch" or needs_gradients(tensors):
            return None
        with asking_hopper(current_backend(backend) == "hopper"):
            planned = self.plan(tensors, numbers, backend)
            return None if planned is None else record(*planned, tensors[0].device)
