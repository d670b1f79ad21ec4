"""Who runs a pooling or a max unpooling: our kernels at once, the registered operators, or torch."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.geometry import PoolGeometry
from tritonconv.ops.conv.registered import is_traced
from tritonconv.ops.core.activation import ActivationSpec, to_numbers
from tritonconv.ops.core.backend import Backend, decide, needs_gradients
from tritonconv.ops.core.layout import reads_in_place, suggests_channels_last
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.ops.pool.launch import Pool, pool_forward, unpool_forward
from tritonconv.ops.pool.library import NAMES

__all__ = ["lp_pool", "pool", "pool_with_indices", "unpool"]

F = torch.nn.functional
Kind = Literal["max", "min", "avg", "lp"]
# Powers are products up to this one.
LARGEST_POWER = 16


def pool(
    kind: Kind, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, *,
    nd: int | None = None, power: Any = 1.0, divisor: Any = None, include_pad: bool = True,
    backend: Backend | None = None, activation: ActivationSpec | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(pooled x) on the backend that is chosen for it.

    Args:
        x: (N, C, *spatial) or (C, *spatial).
        nd: spatial dimensions; None: of a batched x.
        power: of "lp".
        divisor: of "avg": what a window's sum is divided by; None: its size.
        include_pad: whether that counts the padding.
        backend: the layer's own choice.
        out: where no gradients are needed and x is batched: a channels-last view (channel stride 1) of the result's size
            and dtype that is written in place of a new tensor.
    """
    arguments = (kernel, stride, padding, dilation, ceil_mode, power, divisor, include_pad)
    return _pool(kind, x, x.dim() - 2 if nd is None else nd, arguments, False, backend, activation, out)[0]


def pool_with_indices(
    kind: Kind, x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, *,
    nd: int | None = None, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(pooled x, int64 positions in the planes of x) of a maximum or minimum; arguments as of `pool`."""
    arguments = (kernel, stride, padding, dilation, ceil_mode, 1.0, None, True)
    y, found = _pool(kind, x, x.dim() - 2 if nd is None else nd, arguments, True, backend, None, None)
    assert found is not None
    return y, found


def _pool(
    kind: Kind, x: Tensor, nd: int, arguments: tuple[Any, ...], flat: bool, backend: Backend | None,
    activation: ActivationSpec | None, out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    compiling = torch.compiler.is_compiling()
    if not isinstance(x, Tensor) or x.dim() not in (nd + 1, nd + 2) or (not compiling and x.numel() == 0):
        return _on_torch(kind, nd, x, arguments, flat, activation, out)
    if out is not None and (needs_gradients((x, out)) or x.dim() != nd + 2):
        raise RuntimeError(f"{NAMES[kind]}{nd}d: `out` is for batched inputs without gradients (input {list(x.shape)})")
    *numbers, power, divisor, include_pad = arguments
    geometry, missing = None, _missing(kind, nd, *arguments)
    if missing is None and not compiling:
        try:
            geometry = PoolGeometry.parse(x.shape, *numbers, nd=nd, name=NAMES[kind])
        except (RuntimeError, TypeError) as error:
            missing = str(error)
    if missing is not None:
        # Torch says best what is wrong, and where it finds nothing, its result is no silent one.
        result = _on_torch(kind, nd, x, arguments, flat, activation, out)
        decide((x,), backend, lambda: f"{NAMES[kind]}{nd}d of {list(x.shape)}", missing)
        return result
    refused = decide((x,), backend, lambda: str(geometry or f"{NAMES[kind]}{nd}d of {list(x.shape)}"))
    if notify(lambda: _as_call(kind, x, geometry, refused and refused.reason)):
        return _on_torch(kind, nd, x, arguments, flat, activation, out)
    if refused is not None:
        return _on_torch(kind, nd, x, arguments, flat, activation, out)

    batched = x if x.dim() == nd + 2 else x.unsqueeze(0)
    spec = Pool(kind, float(power), None if divisor is None else float(divisor), include_pad)
    gradients = needs_gradients((x,))
    if gradients or is_traced((x,)):
        indices = "flat" if flat else "tap" if gradients and spec.extremal else ""
        lists = [_as_list(value) for value in numbers[:4]]
        act = to_numbers(None if gradients else activation)
        y, found = torch.ops.tritonconv.pool(
            batched, *lists, numbers[4], kind=kind, power=spec.power, divisor=spec.divisor, include_pad=include_pad,
            indices=indices, **act,
        )  # fmt: skip
        if gradients and activation is not None:
            y = activation.torch(y)
        if out is not None:
            y = out.copy_(y)
    else:
        assert geometry is not None
        if out is not None:
            _check_out(out, x, geometry)
        y, found = pool_forward(batched, geometry, spec, "flat" if flat else "", activation, out)
        if out is not None and not out.is_inference():
            # As an operator of torch would: what was saved for a backward pass before must notice.
            torch.autograd.graph.increment_version(out)
    if not flat:
        found = None
    if batched is not x:
        y, found = y.squeeze(0), None if found is None else found.squeeze(0)
    return y, found


def _check_out(out: Tensor, x: Tensor, geometry: PoolGeometry) -> None:
    if tuple(out.shape) != geometry.output_shape or out.dtype != x.dtype or out.device != x.device:
        raise RuntimeError(
            f"{geometry.name}: expected `out` of size {list(geometry.output_shape)}, {x.dtype} on {x.device}, but got "
            f"{list(out.shape)}, {out.dtype} on {out.device} ({geometry})"
        )


def _as_list(value: Any) -> tuple[int, ...]:
    """An argument as operators take it; no stride is an empty one."""
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _missing(
    kind: Kind, nd: int, kernel: Any, _stride: Any, _padding: Any, _dilation: Any, ceil_mode: Any, power: Any, divisor: Any,
    include_pad: Any,
) -> str | None:  # fmt: skip
    """Why no kernel takes these arguments, whatever the sizes."""
    if type(ceil_mode) is not bool or type(include_pad) is not bool:
        return "a flag is not a bool"
    if divisor is not None and (type(divisor) is not int or divisor == 0):
        return f"divisor_override={divisor!r} has no kernel"
    if kind == "lp":
        if not isinstance(power, (int, float)) or not 0 < power < math.inf:
            return f"norm_type={power!r} has no kernel"
        if power == int(power) and power > LARGEST_POWER:
            return f"norm_type={power!r} has no kernel, only whole powers up to {LARGEST_POWER} and others"
        if type(kernel) is not int and (nd == 1 or not isinstance(kernel, (tuple, list)) or len(kernel) != nd):
            return f"kernel_size={kernel!r} has no kernel"
    return None


def _on_torch(
    kind: Kind, nd: int, x: Tensor, arguments: tuple[Any, ...], flat: bool, activation: ActivationSpec | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    kernel, stride, padding, dilation, ceil_mode, power, divisor, include_pad = arguments
    found = None
    y: Any
    if kind in ("max", "min"):
        function: Any = getattr(F, f"max_pool{nd}d")
        y = function(x if kind == "max" else -x, kernel, stride, padding, dilation, ceil_mode, return_indices=flat)
        y, found = y if flat else (y, None)
        y = y if kind == "max" else -y
    elif kind == "lp":
        y = getattr(F, f"lp_pool{nd}d")(x, power, kernel, stride, ceil_mode)
    elif nd > 1:
        stride = () if stride is None else stride
        y = getattr(F, f"avg_pool{nd}d")(x, kernel, stride, padding, ceil_mode, include_pad, divisor)
    elif divisor is None:
        y = F.avg_pool1d(x, kernel, () if stride is None else stride, padding, ceil_mode, include_pad)
    else:
        k, s, p = (_as_list(value) for value in (kernel, stride, padding))
        lists = ((1, *k), (1, *s) if s else (), (0, *p))
        y = F.avg_pool2d(x.unsqueeze(-2), *lists, ceil_mode, include_pad, divisor).squeeze(-2)
    y = y if activation is None else activation.torch(y)
    return (y if out is None else out.copy_(y)), found


def _as_call(kind: Kind, x: Tensor, geometry: PoolGeometry | None, refused: str | None) -> Call:
    op = f"{NAMES[kind]}{geometry.nd}d" if geometry else NAMES[kind]
    size = geometry.bytes(x.element_size()) if geometry else 0
    if refused is not None:
        return Call(op, Decision("torch", refused), None, 0, size, x.dtype, x.device, None, "")
    batched = x if geometry is None or x.dim() == geometry.nd + 2 else x.unsqueeze(0)
    copies = int(not reads_in_place(batched, suggests_channels_last(batched)))
    return Call(op, Decision("triton", "pool", copies), None, 0, size, x.dtype, x.device, None, "")


def lp_pool(
    nd: int, x: Tensor, norm_type: Any, kernel: Any, stride: Any, ceil_mode: bool, backend: Backend | None = None
) -> Tensor:
    """torch.nn.functional.lp_pool of nd dimensions; `backend` is the layer's own choice."""
    # Under autocast torch computes powers in fp32 on a GPU.
    if isinstance(x, Tensor) and x.is_cuda and x.is_floating_point() and torch.is_autocast_enabled("cuda"):
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # As torch has it: the limits are of absolute values.
    if isinstance(x, Tensor) and isinstance(norm_type, (int, float)) and abs(norm_type) == math.inf:
        return pool("max" if norm_type > 0 else "min", x.abs(), kernel, stride, 0, 1, ceil_mode, nd=nd, backend=backend)
    return pool("lp", x, kernel, stride, 0, 1, ceil_mode, nd=nd, power=norm_type, backend=backend)


def unpool(
    nd: int, x: Tensor, indices: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, output_size: Any = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.max_unpool of nd dimensions; `backend` is the layer's own choice."""
    size = _unpooled(nd, x, indices, kernel, stride, padding, output_size)
    y = None if size is None else _unpool(x, indices, size, backend)
    if y is None:
        # Torch says best what is wrong.
        y = getattr(F, f"max_unpool{nd}d")(x, indices, kernel, stride, padding, output_size)
    return y


def _unpooled(
    nd: int, x: Any, indices: Any, kernel: Any, stride: Any, padding: Any, output_size: Any
) -> tuple[int, ...] | None:
    """Size of an unpooled plane; None for arguments that torch must judge."""
    if not isinstance(x, Tensor) or not isinstance(indices, Tensor) or x.dim() not in (nd + 1, nd + 2):
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


def _unpool(x: Tensor, indices: Tensor, size: tuple[int, ...], backend: Backend | None = None) -> Tensor | None:
    """Zeros of (N, C, *size) with the values of x where indices say, or None where torch must do it.

    Args:
        x, indices: (N, C, *spatial) or (C, *spatial); the second int64, positions in a plane of the result.
        size: of the result's planes.
        backend: the layer's own choice.
    """
    nd = len(size)
    compiling = torch.compiler.is_compiling()
    if x.dim() not in (nd + 1, nd + 2) or x.shape != indices.shape or indices.dtype != torch.int64:
        return None
    if not compiling and (x.numel() == 0 or 0 in size):
        return None
    refused = decide((x, indices), backend, lambda: f"max_unpool{nd}d of {list(x.shape)} to {list(size)}")

    def seen() -> Call:
        moved = x.numel() * (x.element_size() + 8) + math.prod(x.shape[:-nd]) * math.prod(size) * x.element_size()
        decision = Decision("torch", refused.reason) if refused else Decision("triton", "unpool")
        return Call(f"max_unpool{nd}d", decision, None, 0, moved, x.dtype, x.device, None, "")

    if (notify(seen)) or refused is not None:
        return None
    traced = is_traced((x, indices))
    # On a GPU an index outside is skipped; to look would wait for the device.
    if not compiling and not traced and x.device.type == "cpu":
        least, most = torch.aminmax(indices)
        if least < 0 or most >= math.prod(size):
            return None
    small, where = (x, indices) if x.dim() == nd + 2 else (x.unsqueeze(0), indices.unsqueeze(0))
    if traced or needs_gradients((x,)):
        y: Tensor = torch.ops.tritonconv.max_unpool(small, where, size)
    else:
        y = unpool_forward(small, where, tuple(size))
    return y if small is x else y.squeeze(0)
