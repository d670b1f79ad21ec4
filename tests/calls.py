"""Calls as tests make them: with an epilogue as one value, recorded, or with something of the library replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from tritonconv.geometry import ConvGeometry
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.conv.route import convolve
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.ops.core.recording import Recording, record
from tritonconv.ops.core.signature import clear_caches
from tritonconv.tuning import Problem

__all__ = ["behind", "convolution", "patched", "problem_of", "recorded", "tensors_of", "transposed_convolution"]


def tensors_of(x: Tensor, weight: Tensor, epilogue: Epilogue) -> tuple[Tensor | None, ...]:
    """A call's tensors in the order of the family `Convolution`."""
    norm = (None,) * 4 if epilogue.batch_norm is None else epilogue.batch_norm[:4]
    return x, weight, epilogue.bias, *norm, epilogue.residual


def behind(op: str, epilogue: Epilogue) -> tuple[Any, ...]:
    """What a call's numbers have behind torch's own."""
    return op, 1e-5 if epilogue.batch_norm is None else epilogue.batch_norm.eps, epilogue.activation


def convolution(
    x: Tensor, weight: Tensor, epilogue: Epilogue, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Tensor:
    """act(bn(conv(x, weight) + bias) + residual) of a batched x."""
    nd = x.dim() - 2
    numbers = ((nd, stride, padding, dilation, groups), *behind(f"conv{nd}d", epilogue))
    result: Tensor = CONVOLUTIONS["conv"](tensors_of(x, weight, epilogue), numbers)
    return result


def transposed_convolution(
    x: Tensor, weight: Tensor, epilogue: Epilogue, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: Any = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """act(bn(conv_transpose(x, weight) + bias) + residual) of a batched x."""
    nd = x.dim() - 2
    given = (nd, stride, padding, output_padding, groups, dilation)
    numbers = (given, *behind(f"conv_transpose{nd}d", epilogue))
    result: Tensor = CONVOLUTIONS["conv_transpose"](tensors_of(x, weight, epilogue), numbers)
    return result


def recorded(function: Callable[..., Any], *tensors: Tensor) -> Recording:
    """What a function of tensors would launch and copy; nothing runs."""
    return record(function, tensors, tensors[0].device)


def problem_of(x: Tensor, weight: Tensor, geometry: ConvGeometry, *gate: Tensor) -> Problem:
    """What a convolution's config is chosen for."""
    problem = recorded(
        lambda x, w, *gate: convolve(x, w, Epilogue(), geometry, "conv", gate=gate[0] if gate else None).y, x, weight, *gate
    ).problem
    assert problem is not None
    return problem


@contextmanager
def patched(target: Any, name: str, value: Any, caches: Sequence[Any] = ()) -> Iterator[None]:
    """Replace something of the library for a block, and resolve every call anew: recorded ones hold what was decided.

    Args:
        caches: functions with a cache of their own, which is emptied too.
    """

    def anew() -> None:
        clear_caches()
        for function in caches:
            function.cache_clear()

    anew()
    try:
        with mock.patch.object(target, name, value):
            yield
    finally:
        anew()
