"""Fusion in graphs that inductor compiles."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from tritonconv.graph.fuse import fuse_graph

__all__ = ["enable_inductor"]

SOURCES = ("graph", "fused", "ops")


class _Pass(CustomGraphPass):
    """`fuse` as a pass of inductor's before gradients are traced."""

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        fuse_graph(module)

    def uuid(self) -> Any:
        # What inductor kept of another version of these sources is not used.
        root = Path(__file__).parents[1]
        return get_hash_for_files(tuple(str(path) for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))))


class enable_inductor:  # noqa: N801 - a context manager that reads as a function, like torch.set_grad_enabled
    """Let `torch.compile` with its own backend run layers on our kernels, at once for the process, or for a `with` block.

    Models need not be converted. Whatever inductor compiled before stays as it is.

    >>> with enable_inductor():
    ...     compiled = torch.compile(torch.nn.Conv2d(3, 8, 3))
    """

    def __init__(self) -> None:
        import torch._inductor.config as config

        self._previous = config.pre_grad_custom_pass
        config.pre_grad_custom_pass = _Pass()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import torch._inductor.config as config

        config.pre_grad_custom_pass = self._previous
