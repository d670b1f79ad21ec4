"""Pooling over windows, with an activation, and max unpooling: who runs a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import PoolGeometry
from tritonconv.ops.core.activation import ActivationSpec, to_numbers
from tritonconv.ops.core.backend import Backend, needs_gradients
from tritonconv.ops.core.family import Cost, Family, Unsupported
from tritonconv.ops.core.launch import is_recording
from tritonconv.ops.core.operator import gradients_wanted, is_traced, mutated
from tritonconv.ops.pool.launch import Pool, pool_forward
from tritonconv.ops.pool.operator import MAX_UNPOOL, NAMES, POOL, pool_on_torch

__all__ = ["PoolKind", "lp_pool", "pool", "pool_with_indices", "unpool"]

F = torch.nn.functional
PoolKind = Literal["max", "min", "avg", "lp"]
# Powers are products up to this one.
LARGEST_POWER = 16


class PoolNumbers(NamedTuple):
    """What a pooling is called with, as users give it."""

    nd: int
    kernel: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: Any = False
    power: Any = 1.0
    """Of "lp"."""
    divisor: Any = None
    """Of "avg": what a window's sum is divided by; None: its size."""
    include_pad: Any = True
    """Whether that counts the padding."""


class PoolCall(NamedTuple):
    """A call that parsed."""

    numbers: PoolNumbers
    geometry: PoolGeometry | None
    """None if the call is traced."""
    indices: bool
    activation: ActivationSpec | None
    wide: bool
    """Whether it is computed in fp32, as torch has powers in autocast on a GPU."""


class Windows(Family[PoolCall]):
    """act(pooled x), or (pooled x, int64 positions in the planes of x).

    A call's numbers are (PoolNumbers in a plain tuple, whether indices are asked for, the activation). Its second tensor, a
    channels-last view (channel stride 1) of the result's size and dtype, is written in place of a new one; then x is
    batched, and no gradients are needed.
    """

    tensors = ("input", "out")

    torch_checks_types = True

    def __init__(self, kind: PoolKind) -> None:
        self.kind = kind
        super().__init__(NAMES[kind])

    def op(self, numbers: tuple[Any, ...]) -> str:
        return f"{self.name}{numbers[0][0]}d"

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> PoolCall | Unsupported:
        (x, out), n = tensors, PoolNumbers(*numbers[0])
        compiling = is_traced(tensors)
        if x.dim() not in (n.nd + 1, n.nd + 2) or (not compiling and x.numel() == 0):
            return Unsupported()
        if out is not None and (needs_gradients(tensors) or x.dim() != n.nd + 2):
            raise RuntimeError(f"{self.op(numbers)}: `out` is for batched inputs without gradients (input {list(x.shape)})")
        reason = _why_unsupported(self.kind, n)
        if reason is not None:
            return Unsupported(reason)
        geometry = None
        if not compiling:
            try:
                geometry = PoolGeometry.parse(x.shape, *n[1:6], nd=n.nd, name=self.name)
            except (RuntimeError, TypeError) as error:
                return Unsupported(str(error))
            if out is not None:
                _check_out(out, x, geometry)
        wide = self.kind == "lp" and x.is_cuda and x.is_floating_point() and torch.is_autocast_enabled("cuda")
        return PoolCall(n, geometry, numbers[1], numbers[2], wide and x.element_size() == 2)

    def run(self, tensors: Any, parsed: PoolCall) -> Any:
        (x, out), (n, geometry, indices, activation, wide) = tensors, parsed
        x = x.float() if wide else x
        batch = x if x.dim() == n.nd + 2 else x.unsqueeze(0)
        spec = Pool(self.kind, float(n.power), None if n.divisor is None else float(n.divisor), n.include_pad)
        gradients = gradients_wanted((x,))
        if out is not None and is_recording():
            assert geometry is not None
            pool_forward(batch, geometry, spec, "", activation, out)
            mutated(out)
            return out
        what = "flat" if indices else "tap" if gradients and spec.extremal else ""
        lists = [_as_list(value) for value in n[1:5]]
        act = to_numbers(None if gradients else activation)
        y, found = POOL(batch, *lists, n.ceil_mode, *spec, what, *act)
        if gradients and activation is not None:
            y = activation.torch(y)
        if batch is not x:
            y, found = y.squeeze(0), found.squeeze(0) if indices else None
        if indices:
            return y, found
        return y if out is None else out.copy_(y)

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Any:
        (nd, *arguments), indices, activation = numbers
        y, found = pool_on_torch(self.kind, nd, tensors[0], tuple(arguments), indices)
        y = y if activation is None else activation.torch(y)
        if indices:
            return y, found
        return y if tensors[1] is None else tensors[1].copy_(y)

    def cost(self, tensors: Any, parsed: PoolCall) -> Cost:
        return Cost(parsed.geometry.bytes(tensors[0].element_size()) if parsed.geometry else 0)

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: PoolCall | None) -> str:
        if parsed is None or parsed.geometry is None:
            return f"{self.op(numbers)} of {list(tensors[0].shape)}"
        return str(parsed.geometry)

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        x, n = tensors[0], PoolNumbers(*numbers[0])
        public: Any = functional
        if (
            numbers[2] is not None
            or tensors[1] is not None
            or self.kind == "min"
            or (self.kind == "avg" and n.divisor == 1)
        ):
            return super().face(tensors, numbers)
        function = getattr(public, self.op(numbers))
        if self.kind == "max":
            return function, (x, *n[1:6]), dict(return_indices=numbers[1])
        if self.kind == "lp":
            return function, (x, n.power, n.kernel, n.stride, n.ceil_mode), {}
        more = {} if n.nd == 1 else dict(divisor_override=n.divisor)
        return function, (x, n.kernel, n.stride, n.padding, n.ceil_mode, n.include_pad), more


KINDS: tuple[PoolKind, ...] = ("max", "min", "avg", "lp")
POOLS = {kind: Windows(kind) for kind in KINDS}


def pool(
    kind: PoolKind, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, *, nd: int | None = None, power: Any = 1.0, divisor: Any = None, include_pad: bool = True,
    backend: Backend | None = None, activation: ActivationSpec | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(pooled x) on the backend that is chosen for it.

    Args:
        x: (N, C, *spatial) or (C, *spatial).
        nd: spatial dimensions; None: of a batched x.
        kernel, ..., include_pad: as `PoolNumbers` has them.
        backend: the layer's own choice.
        out: as `Windows` has it.
    """
    numbers = (x.dim() - 2 if nd is None else nd, kernel, stride, padding, dilation, ceil_mode, power, divisor, include_pad)
    y: Tensor = POOLS[kind]((x, out), (numbers, False, activation), backend)
    return y


def pool_with_indices(
    kind: PoolKind, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, *, nd: int | None = None, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(pooled x, int64 positions in the planes of x) of a maximum or minimum; arguments as of `pool`."""
    numbers = (x.dim() - 2 if nd is None else nd, kernel, stride, padding, dilation, ceil_mode, 1.0, None, True)
    found: tuple[Tensor, Tensor] = POOLS[kind]((x, None), (numbers, True, None), backend)
    return found


def _check_out(out: Tensor, x: Tensor, geometry: PoolGeometry) -> None:
    if tuple(out.shape) != geometry.output_shape or out.dtype != x.dtype or out.device != x.device:
        raise RuntimeError(
            f"{geometry.name}: expected `out` of size {list(geometry.output_shape)}, {x.dtype} on {x.device}, but got "
            f"{list(out.shape)}, {out.dtype} on {out.device} ({geometry})"
        )


def _as_list(value: Any) -> tuple[int, ...]:
    """An argument as operators take it; no stride is an empty one."""
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _why_unsupported(kind: PoolKind, n: PoolNumbers) -> str | None:
    """Why no kernel takes these arguments, whatever the sizes."""
    if type(n.ceil_mode) is not bool or type(n.include_pad) is not bool:
        return "a flag is not a bool"
    if n.divisor is not None and (type(n.divisor) is not int or n.divisor == 0):
        return f"divisor_override={n.divisor!r} has no kernel"
    if kind == "lp":
        if not isinstance(n.power, (int, float)) or not 0 < n.power < math.inf:
            return f"norm_type={n.power!r} has no kernel"
        if n.power == int(n.power) and n.power > LARGEST_POWER:
            return f"norm_type={n.power!r} has no kernel, only whole powers up to {LARGEST_POWER} and others"
        if type(n.kernel) is not int and (n.nd == 1 or not isinstance(n.kernel, (tuple, list)) or len(n.kernel) != n.nd):
            return f"kernel_size={n.kernel!r} has no kernel"
    return None


def lp_pool(
    nd: int, x: Tensor, norm_type: Any, kernel: Any, stride: Any, ceil_mode: bool, backend: Backend | None = None
) -> Tensor:
    """torch.nn.functional.lp_pool of nd dimensions; `backend` is the layer's own choice."""
    # As torch has it: the limits are of absolute values.
    if isinstance(x, Tensor) and isinstance(norm_type, (int, float)) and abs(norm_type) == math.inf:
        return pool("max" if norm_type > 0 else "min", x.abs(), kernel, stride, 0, 1, ceil_mode, nd=nd, backend=backend)
    return pool("lp", x, kernel, stride, 0, 1, ceil_mode, nd=nd, power=norm_type, backend=backend)


# Max unpooling.


class UnpoolCall(NamedTuple):
    """A call that parsed."""

    nd: int
    size: tuple[int, ...]
    """Of an unpooled plane."""


class Unpool(Family[UnpoolCall]):
    """torch.nn.functional.max_unpool; a call's numbers are ((nd, kernel, stride, padding, output_size),)."""

    tensors = ("input", "indices")
    required = 2

    torch_checks_types = True

    def op(self, numbers: tuple[Any, ...]) -> str:
        return f"max_unpool{numbers[0][0]}d"

    def parse(self, tensors: Any, numbers: tuple[Any, ...]) -> UnpoolCall | Unsupported:
        (x, indices), (nd, *given) = tensors, numbers[0]
        size = _unpooled(nd, x, *given)
        # Torch says best what is wrong.
        if size is None or x.shape != indices.shape or indices.dtype != torch.int64:
            return Unsupported()
        if is_traced(tensors):
            return UnpoolCall(nd, size)
        return Unsupported() if x.numel() == 0 or 0 in size else UnpoolCall(nd, size)

    def run(self, tensors: Any, parsed: UnpoolCall) -> Tensor:
        x, indices = tensors
        batched = x.dim() == parsed.nd + 2
        small, where = (x, indices) if batched else (x.unsqueeze(0), indices.unsqueeze(0))
        y: Tensor = MAX_UNPOOL(small, where, parsed.size)
        return y if batched else y.squeeze(0)

    def on_torch(self, tensors: Any, numbers: tuple[Any, ...]) -> Tensor:
        nd, *given = numbers[0]
        y: Tensor = getattr(F, f"max_unpool{nd}d")(*tensors, *given)
        return y

    def describe(self, tensors: Any, numbers: tuple[Any, ...], parsed: UnpoolCall | None) -> str:
        to = "" if parsed is None else f" to {list(parsed.size)}"
        return f"{self.op(numbers)} of {list(tensors[0].shape)}{to}"

    def cost(self, tensors: Any, parsed: UnpoolCall) -> Cost:
        x = tensors[0]
        planes = math.prod(x.shape[: -parsed.nd]) * math.prod(parsed.size)
        return Cost(x.numel() * (x.element_size() + 8) + planes * x.element_size())

    def face(self, tensors: Any, numbers: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        from tritonconv import functional

        return getattr(functional, self.op(numbers)), (*tensors, *numbers[0][1:]), {}


UNPOOL = Unpool("max_unpool")


def unpool(
    nd: int, x: Tensor, indices: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, output_size: Any = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.max_unpool of nd dimensions; `backend` is the layer's own choice."""
    numbers = (nd, kernel, stride, padding, output_size)
    y: Tensor
    if _has_index_outside(x, indices, numbers):
        y = UNPOOL.on_torch((x, indices), (numbers,))
    else:
        y = UNPOOL((x, indices), (numbers,), backend)
    return y


def _has_index_outside(x: Any, indices: Any, numbers: tuple[Any, ...]) -> bool:
    """Whether torch must say so. On a GPU an index outside is skipped; to look would wait for the device."""
    if not isinstance(x, Tensor) or not isinstance(indices, Tensor):
        return False
    if is_traced((x, indices)) or x.device.type != "cpu" or indices.numel() == 0:
        return False
    if indices.device.type != "cpu" or indices.dtype != torch.int64:
        return False
    size = _unpooled(numbers[0], x, *numbers[1:])
    least, most = torch.aminmax(indices)
    return size is not None and bool(least < 0 or most >= math.prod(size))


def _unpooled(nd: int, x: Tensor, kernel: Any, stride: Any, padding: Any, output_size: Any) -> tuple[int, ...] | None:
    """Size of an unpooled plane; None for arguments that torch must judge."""
    if x.dim() not in (nd + 1, nd + 2):
        return None

    def each(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * nd

    window, pads = each(kernel), each(padding)
    steps = window if stride is None else each(stride)
    if any(len(v) != nd or not all(type(n) is int for n in v) for v in (window, steps, pads)) or min(steps) < 1:
        return None
    axes = zip(x.shape[-nd:], window, steps, pads, strict=True)
    usual = tuple((n - 1) * step + k - 2 * pad for n, k, step, pad in axes)
    if output_size is None:
        return usual if min(usual) >= 0 else None
    size = tuple(output_size) if isinstance(output_size, (tuple, list)) else ()
    size = size[2:] if len(size) == nd + 2 else size
    fits = len(size) == nd and all(d - step < n < d + step for n, d, step in zip(size, usual, steps, strict=True))
    return size if fits and min(size) >= 0 else None
