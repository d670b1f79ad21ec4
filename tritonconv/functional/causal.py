"""Short causal convolution over time, and one step of it for decoding."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 - the examples' name
from torch import Tensor

from tritonconv.ops.causal.operator import causal_convolution, causal_step, last_steps
from tritonconv.ops.core.activation import parse_activation

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: object = None, initial_state: Tensor | None = None,
    return_final_state: bool = False, *, initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, seq_idx: Tensor | None = None,
) -> Any:  # fmt: skip
    """Causal depthwise convolution over time with bias and activation, as in the causal-conv1d package (used by Mamba).

    y[b, d, t] = act(bias[d] + sum over j of weight[d, j] * x[b, d, t - (K - 1) + j]) in one kernel. Another
    kernel computes all gradients, for which only x is saved.

    Args:
        x: (B, D, T), channels-last (x.stride(1) == 1) or contiguous, fp16, bf16, fp32 or fp64.
        weight: (D, K) or (D, 1, K), of x's dtype; with more than 8 taps, a general depthwise convolution runs.
        bias: (D,), of x's dtype.
        activation: None, "silu", "swish", or any other activation that `conv2d_bn_act` accepts.
        initial_state: (B, D, K - 1), of x's dtype: the steps before x; None: zeros.
        return_final_state: also return the last steps, as the initial state of the next call.
        initial_states, return_final_states: the same two arguments, with the causal-conv1d package's names.
        final_states_out: (B, D, K - 1), a tensor into which the last steps are written; it is returned too.
        seq_idx: must be None; several sequences in one row are not supported.

    Returns:
        (B, D, T), channels-last if x is. With `return_final_state` a pair: this tensor, and the last K - 1 steps of the
        initial state and x, (B, D, K - 1).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit.
        TypeError: arguments of a wrong type.
        ValueError: an unknown activation; one argument that is given by both of its names.
        NotImplementedError: `seq_idx` is given.

    >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]])
    >>> causal_conv1d(x, weight).tolist()
    [[[1.0, 12.0, 23.0]]]
    >>> y, state = causal_conv1d(x, weight, return_final_state=True)
    >>> causal_conv1d(x, weight, initial_state=state).tolist()
    [[[31.0, 12.0, 23.0]]]
    """
    if seq_idx is not None:
        raise NotImplementedError("causal_conv1d: seq_idx, several sequences in one row, has no kernel: pass one row each")
    if initial_states is not None:
        if initial_state is not None:
            raise ValueError("causal_conv1d: initial_state and initial_states are the same argument, and both were given")
        initial_state = initial_states
    y = causal_convolution(x, weight, bias, parse_activation(activation), initial_state)
    if not (return_final_state or return_final_states or final_states_out is not None):
        return y
    last = last_steps(x, initial_state, weight.shape[-1] - 1)
    return y, last if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: object = None
) -> Tensor:
    """The next time step of `causal_conv1d`, or the next few, for decoding: one launch, which updates the state in place.

    Args:
        x: (B, D), or (B, D, S) for S steps, fp16, bf16, fp32 or fp64.
        conv_state: (B, D, L), L at least K - 1, of x's dtype: the steps before x. Its first steps are dropped, and
            those of x are appended.
        weight: (D, K) or (D, 1, K), of x's dtype.
        bias: (D,), of x's dtype.
        activation: as for `causal_conv1d`.

    Returns:
        A tensor of x's size.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit; gradients are needed, but this function has none.
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
