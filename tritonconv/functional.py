"""torch.nn.functional's names and signatures on our kernels, and fused convolutions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.activation import parse_activation
from tritonconv.ops.dispatch import convolution, transposed_convolution
from tritonconv.ops.dispatch import linear as _linear
from tritonconv.ops.dispatch_batch_norm import batch_norm as _batch_norm
from tritonconv.ops.dispatch_training import convolution_batch_norm, parts_on_torch
from tritonconv.ops.epilogue import BatchNorm, Epilogue
from tritonconv.ops.library_causal import causal_convolution, causal_step, last_steps
from tritonconv.ops.library_training import OwnNorm

__all__ = [
    "batch_norm", "causal_conv1d", "causal_conv1d_update", "conv1d", "conv1d_bn_act", "conv2d", "conv2d_bn_act",
    "conv3d", "conv3d_bn_act", "conv_transpose1d", "conv_transpose1d_bn_act", "conv_transpose2d",
    "conv_transpose2d_bn_act", "conv_transpose3d", "conv_transpose3d_bn_act", "linear",
]  # fmt: skip

Size = int | Sequence[int]
Padding = str | int | Sequence[int]


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Batch norm, as `torch.nn.functional.batch_norm` (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Statistics are computed in fp32 (fp64 for fp64), and never as a difference of sums of squares.

    Args:
        input: (N, C) or (N, C, *spatial), fp16, bf16, fp32 or fp64.
        running_mean, running_var: (C,); in training they are updated in place, and both may be None.
        weight, bias: (C,) or None; of the input's dtype or, for fp16 and bf16, all four in fp32.
        training: normalize with the batch's own statistics.
        momentum: weight of the batch in the running statistics; eps: added to the variance.

    Returns:
        Of the input's size and dtype; channels-last if the input is, else contiguous.

    Raises:
        ValueError: a single value per channel in training; eps that is not positive then, or negative.
        RuntimeError: sizes, dtypes or devices that do not fit; running statistics missing in eval mode.

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=1e-12).tolist()
    [[-1.0], [1.0]]
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: object = None, initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:  # fmt: skip
    """Causal depthwise convolution over time with what follows it, as the causal-conv1d package has it (Mamba's, say).

    y[b, d, t] = act(bias[d] + sum over j of weight[d, j] * x[b, d, t - (K - 1) + j]) in one kernel, its gradients in
    another: nothing but x is kept for them.

    Args:
        x: (B, D, T), channels-last (x.stride(1) == 1) or contiguous, fp16, bf16, fp32 or fp64.
        weight: (D, K) or (D, 1, K), of x's dtype; more than 8 taps run as a convolution of their own.
        bias: (D,), of x's dtype.
        activation: None, "silu", "swish", or whatever `conv2d_bn_act` takes.
        initial_state: (B, D, K - 1), of x's dtype: what came before x; None: zeros.
        return_final_state: return what came last too, for the next call.

    Returns:
        (B, D, T), channels-last if x is; with `return_final_state` a pair of it and the last K - 1 steps of what was given,
        (B, D, K - 1).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.
        ValueError: an unknown activation.

    >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])
    >>> causal_conv1d(x, weight).tolist()
    [[[1.0, 12.0, 23.0]]]
    >>> y, state = causal_conv1d(x, weight, return_final_state=True)
    >>> causal_conv1d(x, weight, initial_state=state).tolist()
    [[[31.0, 12.0, 23.0]]]
    """
    y = causal_convolution(x, weight, bias, parse_activation(activation), initial_state)
    return (y, last_steps(x, initial_state, weight.shape[-1] - 1)) if return_final_state else y


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: object = None
) -> Tensor:
    """The next time step of `causal_conv1d`, or a few, for decoding: one launch, which moves the state on in place.

    Args:
        x: (B, D), or (B, D, S) for S steps, fp16, bf16, fp32 or fp64.
        conv_state: (B, D, L), L at least K - 1, of x's dtype: the steps before x. It loses its first and gains x's.
        weight: (D, K) or (D, 1, K), of x's dtype.
        bias: (D,), of x's dtype.
        activation: as `causal_conv1d` takes it.

    Returns:
        Of x's size.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; gradients are needed, and there are none.
        TypeError: arguments of a wrong type.
        ValueError: an unknown activation.

    >>> state = torch.zeros(1, 1, 1)
    >>> [causal_conv1d_update(torch.tensor([[x]]), state, torch.tensor([[10.0, 1.0]])).item() for x in (1.0, 2.0, 3.0)]
    [1.0, 12.0, 23.0]
    """
    act = parse_activation(activation)
    if isinstance(x, Tensor) and x.dim() == 2:
        return causal_step(x.unsqueeze(2), conv_state, weight, bias, act).squeeze(2)
    return causal_step(x, conv_state, weight, bias, act)


def _torchs(padding: object, op: str) -> None:
    """Raise where the geometry knows a padding by name that torch has not."""
    if isinstance(padding, str) and padding == "causal":
        raise RuntimeError(f"{op}: invalid padding string 'causal', expected 'same' or 'valid'")


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """1-d convolution (cross-correlation), as `torch.nn.functional.conv1d`.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        weight: (K, C/groups, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in samples.
        padding: zeros on both sides, "same" or "valid".

    Returns:
        (N, K, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.

    >>> conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 3)).tolist()
    [[[3.0, 3.0]]]
    """
    _torchs(padding, "conv1d")
    return convolution("conv1d", input, weight, Epilogue(bias), 1, stride, padding, dilation, groups)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """2-d convolution (cross-correlation), as `torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        weight: (K, C/groups, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in pixels, one or two numbers.
        padding: zeros on both sides of each axis, "same" or "valid".

    Returns:
        (N, K, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.

    >>> conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding="same").shape
    torch.Size([1, 1, 4, 4])
    """
    _torchs(padding, "conv2d")
    return convolution("conv2d", input, weight, Epilogue(bias), 2, stride, padding, dilation, groups)


def conv3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """3-d convolution (cross-correlation), as `torch.nn.functional.conv3d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        weight: (K, C/groups, T, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in voxels, one or three numbers.
        padding: zeros on both sides of each axis, "same" or "valid".

    Returns:
        (N, K, O, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.

    >>> conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 2, 2, 2), stride=2).shape
    torch.Size([1, 3, 2, 2, 2])
    """
    _torchs(padding, "conv3d")
    return convolution("conv3d", input, weight, Epilogue(bias), 3, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """1-d transposed convolution, as `torch.nn.functional.conv_transpose1d`.

    Args:
        input: (N, C, L) or (C, L), fp16, bf16, fp32 or fp64.
        weight: (C, K/groups, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in samples of the output.
        padding: samples left out on both sides of each axis of the output.
        output_padding: samples added behind each axis of the output, fewer than the stride or the dilation.

    Returns:
        (N, K, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; a result without samples.
        TypeError: arguments of a wrong type.

    >>> conv_transpose1d(torch.ones(1, 1, 2), torch.ones(1, 1, 3), stride=2).tolist()
    [[[1.0, 1.0, 2.0, 1.0, 1.0]]]
    """
    numbers = (stride, padding, output_padding, groups, dilation)
    return transposed_convolution("conv_transpose1d", input, weight, Epilogue(bias), 1, *numbers)


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """2-d transposed convolution, as `torch.nn.functional.conv_transpose2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), fp16, bf16, fp32 or fp64.
        weight: (C, K/groups, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in pixels of the output, one or two numbers.
        padding: pixels left out on both sides of each axis of the output.
        output_padding: pixels added behind each axis of the output, fewer than the stride or the dilation.

    Returns:
        (N, K, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; a result without pixels.
        TypeError: arguments of a wrong type.

    >>> conv_transpose2d(torch.ones(1, 4, 8, 8), torch.ones(4, 2, 2, 2), stride=2).shape
    torch.Size([1, 2, 16, 16])
    """
    numbers = (stride, padding, output_padding, groups, dilation)
    return transposed_convolution("conv_transpose2d", input, weight, Epilogue(bias), 2, *numbers)


def conv_transpose3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> Tensor:  # fmt: skip
    """3-d transposed convolution, as `torch.nn.functional.conv_transpose3d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), fp16, bf16, fp32 or fp64.
        weight: (C, K/groups, T, R, S), of the input's dtype.
        bias: (K,), of the input's dtype.
        stride, dilation: steps in voxels of the output, one or three numbers.
        padding: voxels left out on both sides of each axis of the output.
        output_padding: voxels added behind each axis of the output, fewer than the stride or the dilation.

    Returns:
        (N, K, O, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; a result without voxels.
        TypeError: arguments of a wrong type.

    >>> conv_transpose3d(torch.ones(1, 4, 3, 3, 3), torch.ones(4, 2, 3, 3, 3), stride=2, output_padding=1).shape
    torch.Size([1, 2, 8, 8, 8])
    """
    numbers = (stride, padding, output_padding, groups, dilation)
    return transposed_convolution("conv_transpose3d", input, weight, Epilogue(bias), 3, *numbers)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias, as `torch.nn.functional.linear`.

    Args:
        input: (*, C), fp16, bf16, fp32 or fp64.
        weight: (K, C), of the input's dtype.
        bias: (K,), of the input's dtype.

    Returns:
        (*, K).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])
    """
    return _linear(input, weight, Epilogue(bias))


def conv1d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv1d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> conv1d_bn_act(torch.ones(1, 1, 4), -torch.ones(1, 1, 3), None, None, None, None, None, activation="relu").tolist()
    [[[0.0, 0.0]]]
    """
    return _conv_bn_act(
        "conv", 1, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, (stride, padding, dilation, groups),
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv2d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv2d(input, weight, bias)) + residual) in one kernel.

    The batch norm is folded in fp32 inside the kernel, from its own tensors: weights are not rounded with a scale in them.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as `conv2d`.
        running_mean, running_var: (K,); both None: no batch norm.
        bn_weight, bn_bias: (K,) or None.
        training: normalize with the batch's own statistics, which the convolution takes from its accumulators, and update
            the running ones in place. A bias has no gradient then, and gets zeros.
        momentum: weight of the batch in the running statistics; eps: added to the variance.
        activation: None, a name ("relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh",
            "hardswish", "hardsigmoid", "mish", "softplus", "hardtanh"), a tuple of a name and its numbers, such as
            ("leaky_relu", 0.2), or a module of torch.nn.
        residual: added before the activation, of the output's size.

    Returns:
        (N, K, P, Q); channels-last if the input or the weight is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.
        ValueError: an unknown activation, or affine parameters without statistics.

    >>> ones = torch.ones(2)
    >>> x, w = torch.ones(1, 1, 2, 2), torch.ones(2, 1, 1, 1)
    >>> conv2d_bn_act(x, w, None, 3 * ones, ones, None, None, eps=0.0, activation=("leaky_relu", 0.5))[0, 0, 0, 0].item()
    -1.0
    """
    return _conv_bn_act(
        "conv", 2, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, (stride, padding, dilation, groups),
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv3d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Padding = 0, dilation: Size = 1,
    groups: int = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, activation: object = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv3d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w = torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    >>> conv3d_bn_act(x, w, None, None, None, None, None, activation="relu6").item()
    6.0
    """
    return _conv_bn_act(
        "conv", 3, input, weight, bias, running_mean, running_var, bn_weight, bn_bias, (stride, padding, dilation, groups),
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv_transpose1d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    activation: object = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv_transpose1d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w = torch.ones(1, 1, 2), -torch.ones(1, 1, 2)
    >>> conv_transpose1d_bn_act(x, w, None, None, None, None, None, stride=2, activation="relu").tolist()
    [[[0.0, 0.0, 0.0, 0.0]]]
    """
    return _conv_bn_act(
        "conv_transpose", 1, input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        (stride, padding, output_padding, groups, dilation), training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv_transpose2d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    activation: object = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv_transpose2d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w, ones = torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, 2), torch.ones(2)
    >>> conv_transpose2d_bn_act(x, w, None, 3 * ones, ones, None, None, stride=2, eps=0.0).unique().item()
    -2.0
    """
    return _conv_bn_act(
        "conv_transpose", 2, input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        (stride, padding, output_padding, groups, dilation), training, momentum, eps, activation, residual,
    )  # fmt: skip


def conv_transpose3d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, *, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    activation: object = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(conv_transpose3d(input, weight, bias)) + residual) in one kernel; see `conv2d_bn_act`.

    >>> x, w = torch.ones(1, 1, 1, 1, 1), 7 * torch.ones(1, 1, 2, 2, 2)
    >>> conv_transpose3d_bn_act(x, w, None, None, None, None, None, activation="relu6").unique().item()
    6.0
    """
    return _conv_bn_act(
        "conv_transpose", 3, input, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        (stride, padding, output_padding, groups, dilation), training, momentum, eps, activation, residual,
    )  # fmt: skip


def _conv_bn_act(
    kind: Literal["conv", "conv_transpose"], nd: int, input: Tensor, weight: Tensor, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    numbers: tuple[Any, ...], training: bool, momentum: float, eps: float, activation: object, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`numbers`: what torch's convolution takes behind its bias, in its order."""
    op = f"{kind}{nd}d_bn_act"
    _torchs(numbers[1], op)
    act = parse_activation(activation)
    if training:
        own = OwnNorm(running_mean, running_var, bn_weight, bn_bias, eps)
        behind, numbers = Epilogue(bias, None, residual, act), (nd, *numbers)
        y = convolution_batch_norm(op, kind, input, weight, behind, own, numbers, lambda: momentum)
        return parts_on_torch(kind, input, weight, behind, own, numbers, momentum) if y is None else y
    affine_alone = running_mean is None and (bn_weight is not None or bn_bias is not None)
    if affine_alone or (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: expected running_mean and running_var to be defined when training=False")
    norm = None
    if running_mean is not None and running_var is not None:
        norm = BatchNorm(running_mean, running_var, bn_weight, bn_bias, eps)
    run = convolution if kind == "conv" else transposed_convolution
    return run(op, input, weight, Epilogue(bias, norm, residual, act), nd, *numbers)
