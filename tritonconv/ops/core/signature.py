"""Signatures: keys of calls, made of everything on which checks, backend, config and constants depend.

The function that computes an operator's signatures is generated once from the names of its tensors. It contains no loop,
because a call that was seen before spends most of its time here.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tritonconv.ops.core import backend, launch

__all__ = ["Memo", "clear_caches", "signature_of"]

# A model has at most a few hundred; the bound limits the memory of a service whose input sizes change all the time.
MOST_CALLS = 4096

SCOPE: dict[str, Any] = dict(
    settings=backend.settings, asked=backend.asked, launching=launch.state, dumps=marshal.dumps, fp32=torch.float32,
    grad_enabled=torch.is_grad_enabled, any_autocast=torch._C._is_any_autocast_enabled,
    is_autocast_enabled=torch.is_autocast_enabled, autocast_dtype=torch.get_autocast_dtype,
    fp32_products=torch._C._get_fp32_precision_getter,
)  # fmt: skip
# Sizes, strides, types and devices determine checks, geometry and launches. Addresses determine whether descriptors can be
# used, and whether there is any memory.
TENSOR = (
    "{t}.dtype, {t}.shape, {t}.stride(), {t}.device, type({t}), {t}.is_neg(), "
    "(address := {t}.data_ptr()) and address % 16 + 1"
)  # fmt: skip
STATE = (
    "settings.backend", "settings.hopper", "asked.hopper", "launching.forced",
    "any_autocast() and (is_autocast_enabled({x}.device.type), autocast_dtype({x}.device.type))",
    "{x}.dtype is fp32 and (fp32_products('cuda', 'conv'), fp32_products('cuda', 'matmul'))",
)  # fmt: skip


def signature_of(name: str, tensors: Sequence[str], *, packed: bool) -> Callable[..., tuple[Any, ...]]:
    """A function that returns a call's signature.

    It raises AttributeError, RuntimeError, TypeError or ValueError for a call that can have no signature: with
    symbolic, sparse or opaque tensors, with arguments that are not tensors, or with numbers of wrong types.

    Args:
        name: the operator's name, for tracebacks.
        tensors: the names of the tensors; the first one is always given, the others may be None.
        packed: the function takes (tensors, numbers, backend), with numbers as a user may pass them; else it takes tensors
            and numbers as separate arguments, where the numbers are hashable and of known types.
    """
    first, *others = tensors
    needs = " or ".join([f"{first}.requires_grad", *(f"({t} is not None and {t}.requires_grad)" for t in others)])
    parts = [part.format(x=first) for part in STATE] + [f"grad_enabled() and ({needs})", TENSOR.format(t=first)]
    parts += [f"None if {t} is None else ({TENSOR.format(t=t)})" for t in others]
    if packed:
        # As bytes: 1, True and 1.0 are equal, but torch accepts only the first. Version 2 has one form for each value.
        parts += ["dumps(numbers[0], 2)", "numbers[1:]", "backend"]
        lines = [f"def signature(tensors, numbers, backend):\n    {', '.join(tensors)}, = tensors"]
    else:
        parts += ["numbers"]
        lines = [f"def signature({', '.join(tensors)}, *numbers):"]
    lines.append(f"return ({', '.join(parts)})")
    scope = dict(SCOPE)
    exec(compile("\n    ".join(lines), f"<tritonconv: the signature of {name}>", "exec"), scope)
    result: Callable[..., tuple[Any, ...]] = scope["signature"]
    return result


class Memo(dict[Any, Any]):
    """Results by signature, kept until `clear_caches`."""

    def __init__(self) -> None:
        super().__init__()
        _memos.append(self)

    def remember(self, signature: Any, value: Any) -> None:
        if len(self) >= MOST_CALLS:
            self.clear()
        self[signature] = value


_memos: list[Memo] = []


def clear_caches() -> None:
    """Resolve every call again, for instance after a change of the tables by which configs and backends are chosen."""
    for memo in _memos:
        memo.clear()
