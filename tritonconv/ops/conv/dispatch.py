"""Who runs a call: resolved once for each signature, then handed to the launcher, the registered operator or torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, expand
from tritonconv.ops.conv.dense import check_convolution
from tritonconv.ops.conv.registered import arguments_of, as_rows, batched, is_traced, through_operator
from tritonconv.ops.conv.route import prepare_call
from tritonconv.ops.core.backend import Backend, OnTorch, asking_hopper, current_backend, decide, needs_gradients, unusual
from tritonconv.ops.core.cache import Prepared, Registered, find, remember, signature
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.example import Example
from tritonconv.ops.core.launch import Kind
from tritonconv.ops.core.observe import Call, Decision, is_watched, notify, shared
from tritonconv.tuning import judge

__all__ = [
    "autocast", "check_tensors", "convolution", "linear", "missing", "on_torch", "replay", "run", "transposed_convolution",
]  # fmt: skip

Numbers = tuple[Any, ...]


def replay(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers, backend: Backend | None
) -> Tensor | None:
    """The result of a call whose like was resolved before; None where that has still to be done.

    Args:
        kind: "conv", "conv_transpose" or "matmul" (a linear layer).
        numbers: hashable, (nd, stride, padding, dilation, groups) of a convolution, (nd, stride, padding, output_padding,
            groups, dilation) of a transposed one, () of a linear layer.
    """
    if torch.compiler.is_compiling() or is_watched():
        return None
    if torch._C._is_any_autocast_enabled():
        try:
            x, weight, epilogue = autocast(x, weight, epilogue)
        except AttributeError:
            return None
    call = find(signature(kind, x, weight, epilogue, numbers, backend))
    if call is None:
        return None
    if isinstance(call, Prepared):
        return call.run(x, weight, epilogue)
    if isinstance(call, Registered):
        return _through_operator(kind, x, weight, epilogue, numbers, backend)
    call.warn()
    return _on_torch(kind, x, weight, epilogue, numbers)


def _through_operator(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers, backend: Backend | None
) -> Tensor:
    """An operator does not know the layer's own choice; its gradients remember this one."""
    if current_backend(backend) != "hopper":
        return through_operator(kind, x, weight, epilogue, numbers)
    with asking_hopper(True):
        return through_operator(kind, x, weight, epilogue, numbers)


def _on_torch(kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers) -> Tensor:
    if kind == "matmul":
        return epilogue.torch(torch.nn.functional.linear(x, weight, epilogue.bias))
    nd, *rest = numbers
    if kind == "conv" and rest[1] == "causal":
        x, rest[1] = _padded(x, weight, rest[2]), 0
    functional = getattr(torch.nn.functional, f"{kind}{nd}d")
    return epilogue.torch(functional(x, weight, epilogue.bias, *rest))


def _padded(x: Tensor, weight: Tensor, dilation: Any) -> Tensor:
    """The image with the zeros of causal padding, which torch has not."""
    taps = weight.shape[2:]
    steps = expand(dilation, len(taps), "dilation", "causal padding")
    before = [(d * (n - 1), 0) for d, n in zip(steps, taps, strict=True)]
    return torch.nn.functional.pad(x, [zeros for pair in reversed(before) for zeros in pair])


def run(example: Example) -> Tensor:
    """Make a call again."""
    kind, x, weight, epilogue, numbers = example
    return linear(x, weight, epilogue) if kind == "matmul" else _convolve(kind, kind, x, weight, epilogue, numbers, None)


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
    return _convolve("conv", op, x, weight, epilogue, (nd, stride, padding, dilation, groups), backend)


def transposed_convolution(
    op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, nd: int, stride: Any, padding: Any, output_padding: Any,
    groups: int, dilation: Any, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """act(bn(conv_transpose(x, weight) + bias) + residual) on the backend that is chosen for it.

    Args:
        op: the public function's name, for messages.
        x: (N, C, *spatial) or unbatched (C, *spatial).
        weight: (C, K/groups, *filter).
        stride, padding, output_padding, groups, dilation: as torch.nn.functional.conv_transpose2d takes them.
        backend: the layer's own choice.
    """
    numbers = (nd, stride, padding, output_padding, groups, dilation)
    return _convolve("conv_transpose", op, x, weight, epilogue, numbers, backend)


def _convolve(
    kind: Kind, op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers, backend: Backend | None
) -> Tensor:
    """A convolution or a transposed one, with its numbers in the order of torch's arguments."""
    numbers = tuple(map(_hashable, numbers))
    y = replay(kind, x, weight, epilogue, numbers, backend)
    if y is not None:
        return y
    check_tensors(op, x, weight, epilogue)
    x, weight, epilogue = autocast(x, weight, epilogue)
    key = _key(kind, x, weight, epilogue, numbers, backend)
    if is_traced((x, weight, *epilogue.tensors())):
        refused = decide((x, weight, *epilogue.tensors()), backend, lambda: op, missing(x, weight, epilogue))
        # Times that were measured in eager mode say nothing of the compiler's, so that tables are not asked.
        if refused is not None:
            return _on_torch(kind, x, weight, epilogue, numbers)
        return through_operator(kind, x, weight, epilogue, numbers)
    given = arguments_of(kind, numbers)
    geometry = ConvGeometry.parse(x.shape, weight.shape, nd=numbers[0], transposed=kind == "conv_transpose", **given)
    unbatched = x.dim() == numbers[0] + 1
    image, behind = batched(x, epilogue) if unbatched else (x, epilogue)
    call = _resolve(op, image, weight, behind, geometry, backend, kind)
    if isinstance(call, Prepared) and unbatched:
        call = call.unbatched()
    return _first_run(op, call, geometry, key, Example(kind, x, weight, epilogue, numbers), backend)


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
    check_tensors(op, x, weight, epilogue)
    x, weight, epilogue = autocast(x, weight, epilogue)
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
    if is_traced((x, weight, *epilogue.tensors())):
        refused = decide((x, weight, *epilogue.tensors()), backend, lambda: op, missing(x, weight, epilogue))
        if refused is not None:
            return _on_torch("matmul", x, weight, epilogue, ())
        return through_operator("matmul", x, weight, epilogue, ())
    rows, filters, behind = as_rows(x, weight, epilogue)
    geometry = ConvGeometry.parse(rows.shape, filters.shape, nd=1)
    call = _resolve(op, rows, filters, behind, geometry, backend, "matmul")
    if isinstance(call, Prepared):
        shape = (*x.shape[:-1], weight.shape[0])
        call = call.of_rows(x, weight, epilogue, shape, rows.data_ptr() != x.data_ptr())
    return _first_run(op, call, geometry, key, Example("matmul", x, weight, epilogue, ()), backend)


def _resolve(
    op: str, x: Tensor, weight: Tensor, epilogue: Epilogue, geometry: ConvGeometry, backend: Backend | None, kind: Kind
) -> Prepared | Registered | OnTorch:  # fmt: skip
    """Check a batched call and decide who runs it and how; all of it holds for every call of its signature."""
    check_convolution(op, x, weight, epilogue, geometry)
    tensors = (x, weight, *epilogue.tensors())
    refused = decide(
        tensors,
        backend,
        lambda: str(geometry) if str(geometry).startswith(f"{op} ") else f"{op} of {geometry}",
        missing(x, weight, epilogue),
    )
    if refused is not None:
        return refused
    with asking_hopper(current_backend(backend) == "hopper"):
        call = prepare_call(x, weight, epilogue, geometry, kind)
    if current_backend(backend) == "auto" and call.recipe is not None:
        verdict = judge(call.recipe.problem, call.conditions(epilogue))
        if verdict.torch:
            return OnTorch(verdict.reason, conditions=call.conditions(epilogue))
    return Registered(call) if needs_gradients(tensors) else call


def _key(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: Numbers, backend: Backend | None
) -> tuple[Any, ...] | None:
    """What this call is remembered by; None where it is not to be."""
    return None if torch.compiler.is_compiling() or is_watched() else signature(kind, x, weight, epilogue, numbers, backend)


def _first_run(
    op: str, call: Prepared | Registered | OnTorch, geometry: ConvGeometry, key: tuple[Any, ...] | None, example: Example,
    backend: Backend | None,
) -> Tensor:  # fmt: skip
    """Remember who runs calls of this signature, tell the observer, and run this one."""
    kind, x, weight, epilogue, numbers = example
    # Another thread may have changed the backend or a switch since the key was made: then this decision is not the key's.
    if key is not None and key == signature(kind, x, weight, epilogue, numbers, backend):
        remember(key, call)

    prepared = call.call if isinstance(call, Registered) else call

    def seen() -> Call:
        if isinstance(prepared, OnTorch):
            decision, conditions = Decision("torch", prepared.reason), prepared.conditions
        else:
            conditions = prepared.conditions(epilogue)
            measured = judge(prepared.recipe.problem, conditions).reason if prepared.recipe is not None else ""
            parts = (prepared.kernel, prepared.note, measured)
            decision = Decision("triton", ", ".join(filter(None, parts)), prepared.copies)
        size = geometry.bytes(x.element_size(), residual=epilogue.residual is not None)
        share = shared()
        if share is not None:
            # What lies between two parts never goes to memory.
            image, _, result = geometry.elements()
            size -= (image * share.unread + result * share.unwritten) * x.element_size()
        to_measure = None if conditions is None or 0 in geometry.elements() else example.on_meta()
        return Call(op, decision, geometry, geometry.macs, size, x.dtype, x.device, to_measure, conditions or "")

    observed = notify(seen)
    if isinstance(call, OnTorch) or (observed and isinstance(call, Registered)):
        return _on_torch(kind, x, weight, epilogue, numbers)
    if isinstance(call, Registered):
        return _through_operator(kind, x, weight, epilogue, numbers, backend)
    if observed:
        # An observed run takes the format that the kernel would give, so that copies further on are counted right.
        return call.result.like(_on_torch(kind, x, weight, epilogue, numbers))
    return call.run(x, weight, epilogue)


def _hashable(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def check_tensors(op: str, x: object, weight: object, epilogue: Epilogue) -> None:
    """Raise TypeError for arguments that are no tensors."""
    optional = [(name, t) for name, t in (("bias", epilogue.bias), ("residual", epilogue.residual)) if t is not None]
    for name, value in (("input", x), ("weight", weight), *optional):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def missing(x: Tensor, weight: Tensor, epilogue: Epilogue) -> str | None:
    """Why there is no kernel for this, beside what `decide` finds."""
    if weight.shape[1] == 0:
        return f"a weight of size {list(weight.shape)} has no kernel"
    if epilogue.residual is not None and epilogue.residual.dtype != x.dtype:
        return f"a residual of {epilogue.residual.dtype} under an input of {x.dtype} has no kernel"
    return None


def autocast(x: Tensor, weight: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor, Epilogue]:
    """Cast as torch's autocast does for convolutions; batch norm's tensors stay as they are."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, epilogue
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    bias = None if epilogue.bias is None else cast(epilogue.bias)
    return cast(x), cast(weight), epilogue._replace(bias=bias)
