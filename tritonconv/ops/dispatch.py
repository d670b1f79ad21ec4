"""Who runs a call: decided, checked, shown to observers, and handed to the launcher, the registered operator or torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.backend import Backend, Call, Decision, decide, notify
from tritonconv.ops.convolution import check_convolution, conv_forward, output_format, plan_for
from tritonconv.ops.epilogue import Epilogue
from tritonconv.ops.layout import as_format, is_dense
from tritonconv.ops.library import call_operator

__all__ = ["convolution", "linear"]


def convolution(
    op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, nd: int, stride: Any, padding: Any, dilation: Any,
    groups: int, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """act(bn(conv(x, weight) + bias) + residual) on the backend that is chosen for it.

    Args:
        op: the public function's name, for messages.
        x: (N, C, *spatial) or unbatched (C, *spatial).
        weight: (K, C/groups, *filter).
        stride, padding, dilation, groups: as torch.nn.functional.conv2d takes them.
        backend: the layer's own choice.
    """
    _check_tensors(op, x, weight)
    x, weight, epilogue = _autocast(x, weight, epilogue)

    def on_torch() -> Tensor:
        functional = getattr(torch.nn.functional, f"conv{nd}d")
        return epilogue.torch(functional(x, weight, epilogue.bias, stride, padding, dilation, groups))

    if _is_traced(x):
        why_not = decide((x, weight, *epilogue.tensors()), backend, lambda: op, _missing(x, weight, epilogue))
        if why_not is not None:
            return on_torch()
        batched, squeeze = (x, False) if x.dim() == nd + 2 else (x.unsqueeze(0), True)
        if squeeze and epilogue.residual is not None:
            epilogue = epilogue._replace(residual=epilogue.residual.unsqueeze(0))
        y = call_operator(batched, weight, epilogue, stride, padding, dilation, groups, "conv")
        return y.squeeze(0) if squeeze else y

    geometry = ConvGeometry.parse(
        x.shape, weight.shape, nd=nd, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    if x.dim() == nd + 2:
        return _dispatch(op, x, weight, epilogue, geometry, on_torch, backend, "conv")
    batched_epilogue = epilogue
    if epilogue.residual is not None:
        batched_epilogue = epilogue._replace(residual=epilogue.residual.unsqueeze(0))
    return _dispatch(
        op, x.unsqueeze(0), weight, batched_epilogue, geometry, lambda: on_torch().unsqueeze(0), backend, "conv"
    ).squeeze(0)


def linear(x: Tensor, weight: Tensor, epilogue: Epilogue, backend: Backend | None = None) -> Tensor:
    """act(x @ weight.T + bias + residual): a 1x1 convolution over rows.

    Args:
        x: (*, C).
        weight: (K, C).
        backend: the layer's own choice.
    """
    op = "linear"
    _check_tensors(op, x, weight)
    x, weight, epilogue = _autocast(x, weight, epilogue)

    def on_torch() -> Tensor:
        return epilogue.torch(torch.nn.functional.linear(x, weight, epilogue.bias))

    if x.dim() == 0 or weight.dim() != 2 or 0 in weight.shape:
        decide((x, weight), backend, lambda: op, f"a weight of size {list(weight.shape)} has no kernel")
        return on_torch()
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"linear: input and weight shapes cannot be multiplied: input {list(x.shape)} has {x.shape[-1]} features, but "
            f"weight {list(weight.shape)} expects {weight.shape[1]}"
        )
    rows, filters = x.reshape(-1, x.shape[-1], 1), weight.unsqueeze(-1)
    shape = (*x.shape[:-1], weight.shape[0])
    row_epilogue = epilogue
    if epilogue.residual is not None:
        row_epilogue = epilogue._replace(residual=epilogue.residual.expand(shape).reshape(-1, weight.shape[0], 1))
    if _is_traced(x):
        why_not = decide((x, weight, *epilogue.tensors()), backend, lambda: op, _missing(rows, weight, epilogue))
        if why_not is not None:
            return on_torch()
        return call_operator(rows, filters, row_epilogue, 1, 0, 1, 1, "matmul").reshape(shape)
    geometry = ConvGeometry.parse(rows.shape, filters.shape, nd=1)
    y = _dispatch(
        op, rows, filters, row_epilogue, geometry, lambda: on_torch().reshape(-1, weight.shape[0], 1), backend, "matmul"
    )
    return y.reshape(shape)


def _check_tensors(op: str, x: object, weight: object) -> None:
    """Raise TypeError for arguments that are no tensors."""
    for name, value in (("input", x), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _is_traced(x: Tensor) -> bool:
    """Whether a call must go through the registered operator: someone traces, fakes or intercepts operators.

    Otherwise it goes straight to the launcher; a Python operator costs tens of microseconds.
    """
    if torch.compiler.is_compiling():
        return True
    return type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0


def _dispatch(
    op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, on_torch: Callable[[], Tensor],
    backend: Backend | None, kind: Literal["conv", "matmul"],
) -> Tensor:  # fmt: skip
    """Check, decide, tell the observer, and run a batched call."""
    check_convolution(op, x, weight, epilogue, geometry)
    why_not = decide(
        (x, weight, *epilogue.tensors()),
        backend,
        lambda: str(geometry) if str(geometry).startswith(f"{op} ") else f"{op} of {geometry}",
        _missing(x, weight, epilogue),
    )
    channels_last = output_format(x, weight)

    def call() -> Call:
        decision = Decision("torch", why_not or "")
        if why_not is None:
            plan = plan_for(x, weight, geometry)
            copy_residual = epilogue.residual is not None and not is_dense(epilogue.residual, channels_last)
            decision = Decision("triton", plan.kernel, plan.copies + copy_residual)
        size = geometry.bytes(x.element_size(), residual=epilogue.residual is not None)
        return Call(op, decision, geometry, geometry.macs, size, x.dtype, x.device)

    observed = notify(call)
    if why_not is not None:
        return on_torch()
    if observed:
        # An observed run takes the format that the kernel would give, so that copies further on are counted right.
        return as_format(on_torch(), channels_last)
    return conv_forward(x, weight, epilogue, geometry, kind)


def _missing(x: Tensor, weight: Tensor, epilogue: Epilogue) -> str | None:
    """Why there is no kernel for this, beside what `decide` finds."""
    if weight.shape[1] == 0:
        return "an input without channels has no kernel"
    if epilogue.residual is not None and epilogue.residual.dtype != x.dtype:
        return f"a residual of {epilogue.residual.dtype} under an input of {x.dtype} has no kernel"
    return None


def _autocast(x: Tensor, weight: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor, Epilogue]:
    """Cast as torch's autocast does for convolutions; batch norm's tensors stay as they are."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, epilogue
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    bias = None if epilogue.bias is None else cast(epilogue.bias)
    return cast(x), cast(weight), epilogue._replace(bias=bias)
