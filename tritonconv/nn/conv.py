"""torch.nn's convolutions on our kernels: same constructors, parameters, state_dict and hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.nn.format import as_original
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.launch import ConvKind

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


# No batch norm and no residual.
NO_EPILOGUE = (None,) * 5


def member(module: torch.nn.Module, name: str) -> Any:
    """A module's parameter or buffer, as `module.name`, but without Module.__getattr__, which takes 0.7 us."""
    if name in module._parameters:
        return module._parameters[name]
    return module._buffers[name] if name in module._buffers else getattr(module, name)


def numbers_of(conv: torch.nn.modules.conv._ConvNd) -> tuple[ConvKind, tuple[Any, ...]]:
    """The kind of the module's convolution, and its numbers in the form that ops/conv/call.py expects."""
    nd = len(conv.kernel_size)
    if conv.transposed:
        return "conv_transpose", (nd, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    return "conv", (nd, conv.stride, conv.padding, conv.dilation, conv.groups)


def _convolve(conv: Any, op: str, input: Tensor) -> Tensor:
    """The forward of torch's convolutions; for padding modes other than zeros it pads first, as torch does."""
    padding, parameters, source = conv.padding, conv._parameters, input
    if conv.padding_mode != "zeros":
        source = torch.nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0,) * len(conv.kernel_size)
    try:
        # Without Module.__getattr__, as in `member`.
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:
        weight, bias = conv.weight, conv.bias
    numbers = (len(conv.kernel_size), conv.stride, padding, conv.dilation, conv.groups)
    y: Tensor = CONVOLUTIONS["conv"]((source, weight, bias, *NO_EPILOGUE), (numbers, op, 0.0, None), conv.backend)
    return as_original(conv, input, y) if conv.weight_moved else y


def _transpose(conv: Any, op: str, input: Tensor, output_size: list[int] | None) -> Tensor:
    """The forward of torch's transposed convolutions; an output size, if given, determines the output padding."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for {type(conv).__name__}, got {conv.padding_mode!r}")
    extra: Any = conv.output_padding
    if output_size is not None:
        sizes = conv.stride, conv.padding, conv.kernel_size, len(conv.kernel_size), conv.dilation
        extra = tuple(conv._output_padding(input, output_size, *sizes))
    numbers = (len(conv.kernel_size), conv.stride, conv.padding, extra, conv.groups, conv.dilation)
    tensors = (input, member(conv, "weight"), member(conv, "bias"), *NO_EPILOGUE)
    y: Tensor = CONVOLUTIONS["conv_transpose"](tensors, (numbers, op, 0.0, None), conv.backend)
    return as_original(conv, input, y) if conv.weight_moved else y


class Conv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` on our kernels: (N, C, L) or (C, L) to (N, K, Q).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> Conv1d(2, 4, 3, padding="same")(torch.ones(1, 2, 8)).shape
    torch.Size([1, 4, 8])
    """

    backend: Backend | None = None
    weight_moved = False

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(self, "conv1d", input)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on our kernels: (N, C, H, W) or (C, H, W) to (N, K, P, Q).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> Conv2d(2, 4, 3, stride=2)(torch.ones(1, 2, 9, 9)).shape
    torch.Size([1, 4, 4, 4])
    """

    backend: Backend | None = None
    weight_moved = False

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(self, "conv2d", input)


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on our kernels: (N, C, D, H, W) or (C, D, H, W) to (N, K, O, P, Q).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> Conv3d(1, 2, 2)(torch.ones(1, 1, 3, 3, 3)).shape
    torch.Size([1, 2, 2, 2, 2])
    """

    backend: Backend | None = None
    weight_moved = False

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(self, "conv3d", input)


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on our kernels: (N, C, L) or (C, L) to (N, K, Q).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> ConvTranspose1d(4, 2, 2, stride=2)(torch.ones(1, 4, 8)).shape
    torch.Size([1, 2, 16])
    """

    backend: Backend | None = None
    weight_moved = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transpose(self, "conv_transpose1d", input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on our kernels: (N, C, H, W) or (C, H, W) to (N, K, P, Q).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> ConvTranspose2d(4, 2, 2, stride=2)(torch.ones(1, 4, 8, 8)).shape
    torch.Size([1, 2, 16, 16])
    """

    backend: Backend | None = None
    weight_moved = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transpose(self, "conv_transpose2d", input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on our kernels: (N, C, D, H, W) or (C, D, H, W) to
    (N, K, O, P, Q).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> ConvTranspose3d(4, 2, 2, stride=2)(torch.ones(1, 4, 3, 3, 3)).shape
    torch.Size([1, 2, 6, 6, 6])
    """

    backend: Backend | None = None
    weight_moved = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transpose(self, "conv_transpose3d", input, output_size)
