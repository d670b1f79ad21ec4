"""Random small networks as source text: torch.fx must trace their forward as anyone's."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Builder"]

F = torch.nn.functional
LARGEST = 1500
"""Elements of a value."""


class Builder:
    """Grows __init__ and forward line by line; each line is run on meta tensors first, and left out where it raises."""

    def __init__(self, r: Random, shape: tuple[int, ...]) -> None:
        self.r = r
        self.values: dict[str, Tensor] = {"x": torch.empty(shape, device="meta")}
        self.used: set[str] = set()
        self.modules: dict[str, torch.nn.Module] = {}
        self.inits: list[str] = []
        self.lines: list[str] = []

    def one(self, *choices: Any) -> Any:
        return self.r.choice(choices)

    def chance(self, share: float) -> bool:
        return self.r.random() < share

    def pick(self) -> str:
        """Mostly the latest value."""
        names = [name for name, t in self.values.items() if t.dim() > 1]
        return names[-1] if self.chance(0.8) else self.r.choice(names)

    def like(self, name: str, fits: Callable[[Tensor], bool]) -> str | None:
        """Another value that fits."""
        names = [n for n, t in self.values.items() if n != name and fits(t)]
        return self.r.choice(names) if names else None

    def module(self, code: str, share: float = 0.15) -> str:
        """A module of that kind as an attribute; now and then one that is there already."""
        same = [n for n, line in zip(self.modules, self.inits, strict=True) if line.endswith(f" = nn.{code}")]
        if same and self.chance(share):
            return f"self.{self.r.choice(same)}"
        name = f"m{len(self.modules)}"
        with torch.device("meta"):
            self.modules[name] = eval(f"nn.{code}", {"nn": torch.nn})
        self.inits.append(f"self.{name} = nn.{code}")
        return f"self.{name}"

    def emit(self, expression: str, count: int = 1) -> str | None:
        """The last name of what an expression gives; None where it cannot be."""
        names = [f"v{len(self.values) + k}" for k in range(count)]
        scope = {"F": F, "torch": torch, "self": SimpleNamespace(**self.modules), **self.values}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = eval(expression, scope)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AssertionError):
            return None
        results = [found] if count == 1 else list(found)
        if any(not 0 < t.numel() <= LARGEST or t.dim() > 6 for t in results):
            return None
        self.lines.append(f"{', '.join(names)} = {expression}")
        self.used.update(name for name in self.values if name in _names(expression))
        self.values.update(zip(names, results, strict=True))
        return names[-1]

    def outputs(self) -> list[str]:
        """The latest value, and now and then others."""
        *others, last = self.values
        return [last, *(n for n in others if n != "x" and self.chance(0.2 if n not in self.used else 0.05))]

    def build(self, name: str) -> tuple[type[torch.nn.Module], str]:
        """The class, and its source."""
        outputs = self.outputs()
        result = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        body = [
            "class Network(torch.nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in self.inits),
            "",
            "    def forward(self, x):",
            *(f"        {line}" for line in self.lines),
            f"        return {result}",
        ]
        source = "\n".join(body) + "\n"
        file = f"<network {name}>"
        # So that inspect finds the source of forward.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": F, "__name__": __name__}
        exec(compile(source, file, "exec"), scope)
        return scope["Network"], source


def _names(expression: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in expression).split())
