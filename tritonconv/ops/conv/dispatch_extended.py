"""Convolutions in eval mode with more in their kernel: an average behind, channels of a wider tensor, a gate before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.dense import check_convolution, output_format
from tritonconv.ops.conv.dispatch import autocast, missing
from tritonconv.ops.conv.registered import arguments_of, is_traced
from tritonconv.ops.conv.route import prepare_call, takes_gate, takes_sink
from tritonconv.ops.conv.target import MOST_IMAGES, WHOLE, Sink, average
from tritonconv.ops.core.backend import Backend, OnTorch, asking_hopper, current_backend, needs_gradients, unsupported
from tritonconv.ops.core.cache import Prepared, find, remember, signature
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.layout import dense_strides, empty_output, wide
from tritonconv.ops.core.observe import wants_parts
from tritonconv.tuning import judge

__all__ = ["averaged_convolution", "convolution_into", "gated_convolution", "would_average", "would_gate"]

ELSEWHERE = OnTorch("it runs on its own")

Memory = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor | None]


def averaged_convolution(
    x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None, keep: bool
) -> tuple[Tensor | None, Tensor] | None:
    """(y, y's mean over each image's pixels), both in one pass; None where convolution and average run on their own.

    Args:
        x: (N, C, *spatial).
        numbers: as `dispatch.replay` takes them.
        keep: whether someone else reads y; else it is not written, and None here.

    Returns:
        y, and its mean (N, K, 1, ...) in its dtype and format.
    """
    if wants_parts():
        return None
    x, weight, epilogue = autocast(x, weight, epilogue)
    sink = Sink(average="also" if keep else "alone")
    call = _find(x, weight, epilogue, numbers, backend, sink)
    if call is None or call.recipe is None:
        return None
    shape, recipe = call.output.shape, call.recipe
    assert recipe.sums is not None
    tile, units, images = recipe.sums
    sums = empty_output(x, (recipe.slots, images, shape[1]), False, wide(x.dtype))
    # What is not written needs no memory, but a type.
    y = call.run(x, weight, epilogue, (None, sums), None if keep else sums)
    mean = average(sums, shape, tile, units, images, x.dtype)
    if output_format(x, weight):
        mean = mean.as_strided(mean.shape, dense_strides(tuple(mean.shape), True))
    return y if keep else None, mean


def would_average(
    x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None, keep: bool
) -> bool:
    """Whether a call that someone observes would give both if no one did."""
    return isinstance(
        _suits(*autocast(x, weight, epilogue), numbers, backend, Sink(None, "also" if keep else "alone")), Prepared
    )


def convolution_into(
    x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None, pitch: int,
    memory: Memory,
) -> Tensor | None:  # fmt: skip
    """The convolution's result as some channels of a wider channels-last tensor; None where it must run on its own.

    Args:
        x: (N, C, *spatial).
        numbers: as `dispatch.replay` takes them.
        pitch: channels of the wider tensor.
        memory: gives these channels for (size, dtype, device), or None where they do not fit.
    """
    if wants_parts() or epilogue.residual is not None:
        return None
    x, weight, epilogue = autocast(x, weight, epilogue)
    call = _find(x, weight, epilogue, numbers, backend, Sink(pitch))
    out = None if call is None else memory(call.output.shape, call.dtype, call.device)
    return None if call is None or out is None else call.run(x, weight, epilogue, y=out)


def gated_convolution(
    x: Tensor, gate: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None
) -> Tensor | None:
    """act(bn(conv(x * gate) + bias) + residual) without a pass for the product; None where there must be one.

    Args:
        x: (N, C, *spatial).
        gate: (N, C, 1, ...), of x's dtype.
        numbers: as `dispatch.replay` takes them.
    """
    if wants_parts() or needs_gradients((gate,)):
        return None
    x, weight, epilogue = autocast(x, weight, epilogue)
    if (gate.dtype, gate.device) != (x.dtype, x.device) or gate.shape != (*x.shape[:2], *(1,) * (x.dim() - 2)):
        return None
    call = _find(x, weight, epilogue, numbers, backend, WHOLE, gated=True)
    return None if call is None else call.run(x, weight, epilogue, gate=gate.contiguous())


def would_gate(x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None) -> bool:
    """Whether a call that someone observes would multiply by a gate on the way in if no one did."""
    return isinstance(_suits(*autocast(x, weight, epilogue), numbers, backend, WHOLE, True), Prepared)


def _find(
    x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None, sink: Sink,
    gated: bool = False,
) -> Prepared | None:  # fmt: skip
    """The call, resolved once for each signature; None where the sink or the gate does not suit it."""
    own = signature("conv", x, weight, epilogue, numbers, backend)
    if own is None:
        return None
    key = (sink, gated, *own)
    call = find(key)
    if call is None:
        call = _suits(x, weight, epilogue, numbers, backend, sink, gated)
        remember(key, call)
    return call if isinstance(call, Prepared) else None


def _suits(
    x: Tensor, weight: Tensor, epilogue: Epilogue, numbers: tuple[Any, ...], backend: Backend | None, sink: Sink,
    gated: bool = False,
) -> Prepared | OnTorch:  # fmt: skip
    """The call for one launch; `ELSEWHERE` where it is to see to itself, and says why."""
    tensors = (x, weight, *epilogue.tensors())
    if current_backend(backend) == "torch" or needs_gradients(tensors) or x.dim() != numbers[0] + 2:
        return ELSEWHERE
    if is_traced(tensors) or missing(x, weight, epilogue) or unsupported(tensors):
        return ELSEWHERE
    try:
        g = ConvGeometry.parse(x.shape, weight.shape, nd=numbers[0], **arguments_of("conv", numbers))
        check_convolution("conv", x, weight, epilogue, g)
    # The call on its own says what is wrong.
    except (RuntimeError, TypeError, ValueError):
        return ELSEWHERE
    if gated and not takes_gate(x, weight, g):
        return ELSEWHERE
    if not takes_sink(x, weight, g) or (sink.pitch is not None and not output_format(x, weight)):
        return ELSEWHERE
    with asking_hopper(current_backend(backend) == "hopper"):
        call = prepare_call(x, weight, epilogue, g, "conv", sink=sink, gated=gated)
    if call.recipe is None:
        return ELSEWHERE
    if sink.average and (call.recipe.sums is None or call.recipe.sums[2] > MOST_IMAGES):
        return ELSEWHERE
    if current_backend(backend) == "auto" and judge(call.recipe.problem, call.conditions(epilogue)).torch:
        return ELSEWHERE
    return call
