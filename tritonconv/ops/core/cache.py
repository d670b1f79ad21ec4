"""Calls seen before: one key, one look-up, the result's memory, and the launch.

A call's signature is everything that checks, backend, plan, config and constants depend on, but no tensor. Whoever looks
at single calls (tracing, transforms, dispatch modes, observers) keeps them away from here: `watch.is_watched`.
"""

from __future__ import annotations

import functools
import marshal
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tritonconv.ops.core.backend import Backend, OnTorch, current_backend, hopper_asked, needs_gradients
from tritonconv.ops.core.epilogue import BatchNorm, Epilogue
from tritonconv.ops.core.launch import NO_STATISTICS, Kind, Recipe, Slots, forcing, precision
from tritonconv.ops.core.layout import dense_strides, same_elements

__all__ = ["Dense", "Memo", "Prepared", "Registered", "clear_caches", "find", "remember", "signature"]

# A model has at most a few hundred; the bound only stops a service with endless input sizes from growing.
MOST_CALLS = 4096

Value = TypeVar("Value")


class Dense(NamedTuple):
    """A tensor to be allocated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], channels_last: bool = False) -> Dense:
        return cls(tuple(shape), dense_strides(shape, channels_last))

    def copy(self, t: Tensor) -> Tensor:
        """A copy of `t`, broadcast if need be."""
        return torch.empty_strided(self.shape, self.strides, dtype=t.dtype, device=t.device).copy_(t)

    def like(self, t: Tensor) -> Tensor:
        """`t` itself if it has these strides, else a copy that has."""
        return t if t.stride() == self.strides else self.copy(t)

    def fits(self, t: Tensor) -> bool:
        """Whether `t`, of this size, has exactly these elements."""
        return same_elements(self.shape, t.stride(), self.strides)

    def unbatched(self) -> Dense:
        return Dense(self.shape[1:], self.strides[1:])


@dataclass(frozen=True)
class Prepared:
    """A call for a kernel, resolved but for its tensors."""

    kernel: str
    recipe: Recipe | None
    """None where the result has no elements."""
    output: Dense
    dtype: torch.dtype
    device: torch.device
    copy_x: Dense | None
    copy_weight: Dense | None
    copy_residual: Dense | None
    copy_vectors: bool
    copy_y: Dense | None = None
    """The format that the result has in the end, where the kernel writes another."""
    note: str = ""
    """Why another kernel that was asked for does not run it."""

    @classmethod
    def of(
        cls, kernel: str, recipe: Recipe | None, output: Dense, x: Tensor, epilogue: Epilogue, copy_x: Dense | None,
        copy_weight: Dense | None,
    ) -> Prepared:  # fmt: skip
        """With the copies that the epilogue's tensors need."""
        residual, vectors = epilogue.residual, (epilogue.bias, *(epilogue.batch_norm or ())[:4])
        return cls(
            kernel, recipe, output, x.dtype, x.device, copy_x, copy_weight,
            None if residual is None or output.fits(residual) else output,
            not all(t is None or t.is_contiguous() for t in vectors),
        )  # fmt: skip

    @property
    def copies(self) -> int:
        """Hidden layout copies."""
        return sum(copy is not None for copy in (self.copy_x, self.copy_weight, self.copy_residual, self.copy_y))

    def conditions(self, epilogue: Epilogue) -> str:
        """What a measurement must share with a call: what follows in the same kernel, and hidden copies before it."""
        copies = [f"{self.copies} hidden copies"] if self.copies else []
        return "+".join([epilogue.describe()] * bool(epilogue.describe()) + copies)

    @functools.cached_property
    def rearranges(self) -> bool:
        """Whether any tensor is copied before the launch."""
        return self.copies > (self.copy_y is not None) or self.copy_vectors

    @property
    def result(self) -> Dense:
        """The result as callers get it."""
        return self.output if self.copy_y is None else self.copy_y

    def unbatched(self) -> Prepared:
        """The same for an image (C, *spatial); this one is for a batch of one."""
        copy_x, residual = self.copy_x, self.copy_residual
        return replace(
            self, output=self.output.unbatched(), copy_x=copy_x and copy_x.unbatched(),
            copy_residual=residual and residual.unbatched(), copy_y=self.copy_y and self.copy_y.unbatched(),
        )  # fmt: skip

    def of_rows(self, x: Tensor, weight: Tensor, epilogue: Epilogue, shape: tuple[int, ...], copied: bool) -> Prepared:
        """The same for a linear layer's own tensors; this one is for its rows (R, C, 1), `copied` to be so."""
        residual, output = epilogue.residual, Dense.of(shape)
        plain = residual is None or (tuple(residual.shape) == shape and residual.is_contiguous())
        return replace(
            self, output=output, copy_x=Dense.of(x.shape) if copied or self.copy_x else None,
            copy_weight=Dense.of(weight.shape) if self.copy_weight else None, copy_residual=None if plain else output,
        )  # fmt: skip

    def run(
        self, x: Tensor, weight: Tensor, epilogue: Epilogue, statistics: Slots = NO_STATISTICS, y: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Launch the kernel for tensors of this call's signature, and take statistics where there is room for them.

        Args:
            y: where the result goes; None: into memory of its own.
            gate: [N, C], where the call was prepared to be gated.
        """
        if y is None:
            y = torch.empty_strided(self.output.shape, self.output.strides, dtype=self.dtype, device=self.device)
        if self.recipe is None:
            return y if self.copy_y is None else self.copy_y.copy(y)
        if self.rearranges:
            x, weight, epilogue = self._rearranged(x, weight, epilogue)
        self.recipe.run(x, weight, y, epilogue, self.device, statistics, gate)
        return y if self.copy_y is None else self.copy_y.copy(y)

    def _rearranged(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor, Epilogue]:
        residual = epilogue.residual
        if self.copy_x is not None:
            x = self.copy_x.copy(x)
        if self.copy_weight is not None:
            weight = self.copy_weight.copy(weight)
        if self.copy_vectors:
            epilogue = epilogue._replace(residual=None).map(Tensor.contiguous)
        if self.copy_residual is not None and residual is not None:
            residual = self.copy_residual.copy(residual)
        return x, weight, epilogue._replace(residual=residual)


class Registered(NamedTuple):
    """A call for the registered operator, which autograd knows."""

    call: Prepared
    """What it runs forward."""


class Memo(Generic[Value]):
    """What was found for calls' signatures, until `clear_caches`."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Value] = {}
        _memos.append(self)

    def get(self, key: Hashable) -> Value | None:
        try:
            return self.found.get(key)
        # Numbers may be anything until they are checked.
        except TypeError:
            return None

    def put(self, key: Hashable, value: Value) -> None:
        """Let `get` give this for the key, unless it is None or can be no key."""
        if len(self.found) >= MOST_CALLS:
            self.found.clear()
        if key is not None:
            with suppress(TypeError):
                self.found[key] = value


_memos: list[Memo[Any]] = []
_calls: Memo[Prepared | Registered | OnTorch] = Memo()
find = _calls.get
"""Who runs calls of a signature, if one was seen."""
remember = _calls.put
"""Let `find` give this call for a signature, unless that is None or can be no key."""


def clear_caches() -> None:
    """Resolve every call anew, as after a change of what configs and backends are chosen by."""
    for memo in _memos:
        memo.found.clear()


def signature(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...],
    backend: Backend | None,
) -> tuple[Any, ...] | None:  # fmt: skip
    """The key of a call; None where it can have none: unusual tensors, or arguments that are none.

    Args:
        kind: whose switch fp32 products follow.
        numbers: what the geometry is parsed from beside the sizes.
        backend: the layer's own choice.
    """
    bias, norm, residual, activation = epilogue
    try:
        dtype = x.dtype
        # Sizes, strides, types and devices settle checks, geometry and plan; addresses whether descriptors can be used, and
        # whether there is any memory.
        x_address, w_address = x.data_ptr(), weight.data_ptr()
        return (
            # As bytes: 1, True and 1.0 are equal, and torch takes the first alone. Version 2 has one form for each value.
            kind, numbers and marshal.dumps(numbers, 2), activation, current_backend(backend), hopper_asked(), forcing(),
            dtype is torch.float32 and precision(dtype, kind),
            torch.is_grad_enabled() and needs_gradients((x, weight, *epilogue.tensors())),
            dtype, x.shape, x.stride(), x.device, type(x), x.is_neg(), x_address and x_address % 16 + 1,
            weight.dtype, weight.shape, weight.stride(), weight.device, type(weight), weight.is_neg(),
            w_address and w_address % 16 + 1,
            bias if bias is None else _vector(bias),
            norm if norm is None else _norm(norm),
            residual if residual is None else (residual.stride(), residual.data_ptr() % 16, *_vector(residual)),
        )  # fmt: skip
    # Symbolic, sparse and opaque tensors have no such numbers; whatever is no tensor or no integer raises what it should
    # elsewhere.
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _norm(norm: BatchNorm) -> tuple[Any, ...]:
    # Dtypes are Triton's affair alone. Written out, which takes 0.5 us less than a loop.
    mean, var, weight, bias, eps = norm
    return (
        eps,
        mean.shape, mean.device, type(mean), mean.is_neg(), mean.is_contiguous() or mean.layout,
        var.shape, var.device, type(var), var.is_neg(), var.is_contiguous() or var.layout,
        weight if weight is None else (
            weight.shape, weight.device, type(weight), weight.is_neg(), weight.is_contiguous() or weight.layout),
        bias if bias is None else (bias.shape, bias.device, type(bias), bias.is_neg(), bias.is_contiguous() or bias.layout),
    )  # fmt: skip


def _vector(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.device, type(t), t.is_neg(), t.is_contiguous() or t.layout
