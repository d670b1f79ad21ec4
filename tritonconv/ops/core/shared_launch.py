"""Calls that share a launch: resolved once for each signature; where they cannot, each call runs on its own."""

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
    """What two or more calls compute in one.

    Args:
        name: for tracebacks.
        tensors: how many there are, of all calls; only the first must be there.
        plan: (tensors, numbers, backend): a function of the tensors that launches, with the tensors to record it on, or
            None where each call is to run on its own, which says why.
    """

    def __init__(
        self, name: str, tensors: int, plan: Callable[..., tuple[Callable[..., Any], Tensors] | None]
    ) -> None:  # fmt: skip
        self.signature = signature_of(name, [f"t{i}" for i in range(tensors)], packed=True)
        self.plan, self.found = plan, Memo()

    def find(self, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None) -> Recording | None:
        """The launch for these tensors; arguments as a family takes them."""
        if wants_parts():
            return None
        try:
            signature = self.signature(tensors, numbers, backend)
            found = self.found.get(signature, self)
        # Unusual tensors: the call on its own says what is wrong with them.
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None
        if found is self:
            found = self.resolve(tensors, numbers, backend)
            self.found.remember(signature, found)
        result: Recording | None = found
        return result

    def resolve(self, tensors: Tensors, numbers: tuple[Any, ...], backend: Backend | None) -> Recording | None:
        """The same, also for observers, who see what would be launched if they did not look."""
        if current_backend(backend) == "torch" or needs_gradients(tensors):
            return None
        with asking_hopper(current_backend(backend) == "hopper"):
            planned = self.plan(tensors, numbers, backend)
            return None if planned is None else record(*planned, tensors[0].device)
