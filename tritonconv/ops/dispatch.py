"""Who runs a call: resolved once for each signature, then handed to the launcher, the registered operator or torch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.backend import (
    Backend,
    OnTorch,
    current_backend,
    decide,
    interpreting,
    needs_gradients,
    unusual,
)
from tritonconv.ops.calls import Prepared, find, remember, signature
from tritonconv.ops.convolution import check_convolution, prepare
from tritonconv.ops.epilogue import Epilogue
from tritonconv.ops.example import Example
from tritonconv.ops.library import call_operator
from tritonconv.ops.watch import Call, Decision, is_watched, notify
from tritonconv.tuning import judge, mostly_zeros

__all__ = ["convolution", "linear", "on_torch", "replay", "run"]

Kind = Literal["conv", "matmul"]
Numbers = tuple[Any, ...]


def replay(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers, backend: Backend | None
) -> Tensor | None:
    """The result of a call whose like was resolved before; None where that has still to be done.

    Args:
        kind: "conv" or "matmul" (a linear layer).
        numbers: (nd, stride, padding, dilation, groups) of a convolution, hashable, () of a linear layer.
    """
    if torch.compiler.is_compiling() or is_watched():
        return None
    if torch._C._is_any_autocast_enabled():
        try:
            x, weight, epilogue = _autocast(x, weight, epilogue)
        except AttributeError:
            return None
    call = find(signature(kind, x, weight, epilogue, numbers, backend))
    if call is None:
        return None
    if isinstance(call, Prepared):
        return call.run(x, weight, epilogue)
    call.warn()
    return _on_torch(kind, x, weight, epilogue, numbers)


def _on_torch(kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers) -> Tensor:
    if kind == "matmul":
        return epilogue.torch(torch.nn.functional.linear(x, weight, epilogue.bias))
    nd, *rest = numbers
    functional = getattr(torch.nn.functional, f"conv{nd}d")
    return epilogue.torch(functional(x, weight, epilogue.bias, *rest))


def run(example: Example) -> Tensor:
    """Make a call again."""
    kind, x, weight, epilogue, numbers = example
    return linear(x, weight, epilogue) if kind == "matmul" else convolution("conv", x, weight, epilogue, *numbers)


def on_torch(example: Example) -> Tensor:
    """What torch makes of a call."""
    return _on_torch(*example)


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
    numbers = (nd, _hashable(stride), _hashable(padding), _hashable(dilation), groups)
    y = replay("conv", x, weight, epilogue, numbers, backend)
    if y is not None:
        return y
    _check_tensors(op, x, weight, epilogue)
    x, weight, epilogue = _autocast(x, weight, epilogue)
    key = _key("conv", x, weight, epilogue, numbers, backend)
    # As torch does, take numpy's integers for Python's.
    stride, padding, dilation, groups = (_plain(value) for value in (stride, padding, dilation, groups))
    batched, batched_epilogue = x, epilogue
    unbatched = x.dim() == nd + 1
    if unbatched:
        batched = x.unsqueeze(0)
        if epilogue.residual is not None:
            batched_epilogue = epilogue._replace(residual=epilogue.residual.unsqueeze(0))
    if _is_traced(x, weight, epilogue):
        refused = decide((x, weight, *epilogue.tensors()), backend, lambda: op, _missing(x, weight, epilogue))
        # Times that were measured in eager mode say nothing of the compiler's, so that tables are not asked.
        grouped = isinstance(groups, int) and groups > 1 and not interpreting()
        slow = grouped and current_backend(backend) == "auto" and mostly_zeros(groups, weight.shape[0] // groups)
        if refused is not None or slow:
            return _on_torch("conv", x, weight, epilogue, numbers)
    else:
        geometry = ConvGeometry.parse(
            x.shape, weight.shape, nd=nd, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        call = _resolve(op, batched, weight, batched_epilogue, geometry, backend, "conv")
        if isinstance(call, Prepared) and unbatched:
            call = call.unbatched()
        if call is not None:
            return _first_run(op, call, geometry, key, Example("conv", x, weight, epilogue, numbers), backend)
    y = _operator(batched, weight, batched_epilogue, stride, padding, dilation, groups, "conv")
    return y.squeeze(0) if unbatched else y


def linear(x: Tensor, weight: Tensor, epilogue: Epilogue, backend: Backend | None = None) -> Tensor:
    """act(x @ weight.T + bias + residual): a 1x1 convolution over rows.

    Args:
        x: (*, C).
        weight: (K, C).
        backend: the layer's own choice.
    """
    y = replay("matmul", x, weight, epilogue, (), backend)
    if y is not None:
        return y
    op = "linear"
    _check_tensors(op, x, weight, epilogue)
    x, weight, epilogue = _autocast(x, weight, epilogue)
    key = _key("matmul", x, weight, epilogue, (), backend)
    odd = unusual((x, weight))
    if odd is None and (x.dim() == 0 or weight.dim() != 2 or 0 in weight.shape):
        odd = f"a weight of size {list(weight.shape)} has no kernel"
    if odd is not None:
        decide((x, weight), backend, lambda: op, odd)
        return _on_torch("matmul", x, weight, epilogue, ())
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
    if _is_traced(x, weight, epilogue):
        refused = decide((x, weight, *epilogue.tensors()), backend, lambda: op, _missing(rows, weight, epilogue))
        if refused is not None:
            return _on_torch("matmul", x, weight, epilogue, ())
    else:
        geometry = ConvGeometry.parse(rows.shape, filters.shape, nd=1)
        call = _resolve(op, rows, filters, row_epilogue, geometry, backend, "matmul")
        if isinstance(call, Prepared):
            call = call.of_rows(x, weight, epilogue, shape, rows.data_ptr() != x.data_ptr())
        if call is not None:
            return _first_run(op, call, geometry, key, Example("matmul", x, weight, epilogue, ()), backend)
    return _operator(rows, filters, row_epilogue, 1, 0, 1, 1, "matmul").reshape(shape)


def _resolve(
    op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, backend: Backend | None, kind: Kind
) -> Prepared | OnTorch | None:  # fmt: skip
    """Check a batched call and decide who runs it and how; all of it holds for every call of its signature.

    None: the registered operator runs it, which autograd knows.
    """
    check_convolution(op, x, weight, epilogue, geometry)
    tensors = (x, weight, *epilogue.tensors())
    refused = decide(
        tensors,
        backend,
        lambda: str(geometry) if str(geometry).startswith(f"{op} ") else f"{op} of {geometry}",
        _missing(x, weight, epilogue),
    )
    if refused is not None or needs_gradients(tensors):
        return refused
    call = prepare(x, weight, epilogue, geometry, kind)
    if current_backend(backend) == "auto" and call.recipe is not None:
        verdict = judge(call.recipe.problem, call.conditions(epilogue))
        if verdict.torch:
            return OnTorch(verdict.reason, conditions=call.conditions(epilogue))
    return call


def _key(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers, backend: Backend | None
) -> tuple[Any, ...] | None:
    """What this call is remembered by; None where it is not to be."""
    return None if torch.compiler.is_compiling() or is_watched() else signature(kind, x, weight, epilogue, numbers, backend)


def _first_run(
    op: str, call: Prepared | OnTorch, geometry: ConvGeometry, key: tuple[Any, ...] | None, example: Example,
    backend: Backend | None,
) -> Tensor:  # fmt: skip
    """Remember who runs calls of this signature, tell the observer, and run this one."""
    kind, x, weight, epilogue, numbers = example
    # Another thread may have changed the backend or a switch since the key was made: then this decision is not the key's.
    if key is not None and key == signature(kind, x, weight, epilogue, numbers, backend):
        remember(key, call)

    def seen() -> Call:
        if isinstance(call, OnTorch):
            decision, conditions = Decision("torch", call.reason), call.conditions
        else:
            conditions = call.conditions(epilogue)
            measured = judge(call.recipe.problem, conditions).reason if call.recipe is not None else ""
            decision = Decision("triton", f"{call.kernel}{measured and ', '}{measured}", call.copies)
        size = geometry.bytes(x.element_size(), residual=epilogue.residual is not None)
        to_measure = None if conditions is None or 0 in geometry.elements() else example.on_meta()
        return Call(op, decision, geometry, geometry.macs, size, x.dtype, x.device, to_measure, conditions or "")

    observed = notify(seen)
    if isinstance(call, OnTorch):
        return _on_torch(kind, x, weight, epilogue, numbers)
    if observed:
        # An observed run takes the format that the kernel would give, so that copies further on are counted right.
        return call.output.like(_on_torch(kind, x, weight, epilogue, numbers))
    return call.run(x, weight, epilogue)


def _hashable(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def _plain(value: Any) -> Any:
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, np.integer) else value


def _check_tensors(op: str, x: object, weight: object, epilogue: Epilogue) -> None:
    """Raise TypeError for arguments that are no tensors."""
    optional = [(name, t) for name, t in (("bias", epilogue.bias), ("residual", epilogue.residual)) if t is not None]
    for name, value in (("input", x), ("weight", weight), *optional):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _operator(
    x: Tensor, weight: Tensor, epilogue: Epilogue, stride: Any, padding: Any, dilation: Any, groups: int, kind: Kind
) -> Tensor:
    """A batched call through the registered operator; for gradients what follows the convolution is torch's."""
    if not needs_gradients((x, weight, *epilogue.tensors())):
        return call_operator(x, weight, epilogue, stride, padding, dilation, groups, kind)
    y = call_operator(x, weight, Epilogue(epilogue.bias), stride, padding, dilation, groups, kind)
    return epilogue.torch(y)


def _is_traced(x: Tensor, weight: Tensor, epilogue: Epilogue) -> bool:
    """Whether a call must go through the registered operator: someone traces, fakes or intercepts operators.

    Otherwise it goes straight to the launcher; a Python operator costs tens of microseconds.
    """
    if torch.compiler.is_compiling():
        return True
    plain = (Tensor, torch.nn.Parameter)
    return torch._C._len_torch_dispatch_stack() > 0 or any(type(t) not in plain for t in (x, weight, *epilogue.tensors()))


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
