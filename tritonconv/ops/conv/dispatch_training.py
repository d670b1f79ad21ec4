"""Who runs a convolution and a batch norm with the batch's own statistics: our operators, or torch part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.batch_norm.dispatch import missing_norm, move_running
from tritonconv.ops.conv.dense import check_convolution
from tritonconv.ops.conv.dispatch import autocast, check_tensors, missing
from tritonconv.ops.conv.library_training import OwnNorm, call_training
from tritonconv.ops.conv.registered import arguments_of, is_traced
from tritonconv.ops.core.backend import Backend, asking_hopper, current_backend, decide
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.launch import Kind
from tritonconv.ops.core.observe import Call, Decision, notify
from tritonconv.ops.core.torch_norm import batch_norm_on_torch

__all__ = ["convolution_batch_norm", "parts_on_torch"]


def convolution_batch_norm(
    op: str, kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, norm: OwnNorm, numbers: tuple[Any, ...],
    momentum: Callable[[], float], backend: Backend | None = None, group: str = "",
) -> Tensor | None:  # fmt: skip
    """act(batch_norm(conv(x)) + residual) by the batch's own statistics; None where torch is to run it part by part.

    Args:
        op: the public function's name, for messages.
        kind: "conv" or "conv_transpose".
        epilogue: bias, residual and activation.
        norm: affine parameters, and the running statistics that are updated, or None for each.
        numbers: as `dispatch.replay` takes them.
        momentum: gives the weight of the batch in the running statistics; called once and only if the call runs here, so
            that a module can count its batches.
        group: name of the process group whose pixels are normalized together; "" for none.
    """
    check_tensors(op, x, weight, epilogue)
    x, weight, epilogue = autocast(x, weight, epilogue)
    given = arguments_of(kind, numbers)
    tensors = (x, weight, *epilogue.tensors(), *(t for t in norm[:4] if t is not None))
    # Of an unbatched image the channels would be the batch.
    if x.dim() != numbers[0] + 2:
        return None
    geometry = ConvGeometry.parse(x.shape, weight.shape, nd=numbers[0], transposed=kind == "conv_transpose", **given)
    if not _is_valid(geometry, norm):
        return None

    def describe() -> str:
        return f"{op} in training of {geometry}"

    if decide(tensors, backend, describe, missing(x, weight, epilogue) or missing_norm(x, *norm[:4])) is not None:
        return None
    check_convolution(op, x, weight, epilogue, geometry)

    def seen() -> Call:
        size = geometry.bytes(x.element_size(), residual=epilogue.residual is not None)
        decision = Decision("triton", "convolution and batch norm in training")
        return Call(op, decision, geometry, geometry.macs, size, x.dtype, x.device, None, "")

    # Who observes calls computes them all with torch.
    if notify(seen):
        return parts_on_torch(kind, x, weight, epilogue, norm, numbers, momentum())
    weight_of_batch = momentum()
    # The operator does not know the layer's own choice.
    with asking_hopper(current_backend(backend) == "hopper"):
        y, mean, var, count = call_training(kind, x, weight, epilogue, norm, **given, fixed=False, group=group)
    move_running(mean, var, count, norm.mean, norm.var, weight_of_batch, is_traced(tensors))
    return y


def parts_on_torch(
    kind: Kind, x: Tensor, weight: Tensor, epilogue: Epilogue, norm: OwnNorm, numbers: tuple[Any, ...], momentum: float
) -> Tensor:
    """What torch computes, one function after the other; arguments as `convolution_batch_norm` takes them."""
    functional: Any = torch.nn.functional
    y = getattr(functional, f"{kind}{numbers[0]}d")(x, weight, epilogue.bias, *numbers[1:])
    y = batch_norm_on_torch(y, *norm[:4], training=True, momentum=momentum, eps=norm.eps)
    return Epilogue(residual=epilogue.residual, activation=epilogue.activation).torch(y)


def _is_valid(geometry: ConvGeometry, norm: OwnNorm) -> bool:
    """Whether torch takes the batch norm; else it says best what is wrong. An empty batch has nothing to compute."""
    pixels = geometry.elements()[2] // geometry.out_channels
    shapes = all(tuple(t.shape) == (geometry.out_channels,) for t in norm[:4] if isinstance(t, Tensor))
    return pixels > 1 and isinstance(norm.eps, (int, float)) and norm.eps > 0 and shapes
