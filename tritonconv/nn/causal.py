"""Causal convolution over time as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.nn.conv import NO_EPILOGUE, member
from tritonconv.ops.causal.launch import LONGEST
from tritonconv.ops.causal.operator import causal_convolution, causal_step, last_steps, with_state
from tritonconv.ops.conv.call import CONVOLUTIONS
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.backend import Backend

__all__ = ["CausalConv1d"]


class CausalConv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` whose results depend on no later time step: (B, C, T) or (C, T) to (B, K, T / stride).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as for `torch.nn.Conv1d`; parameters and
            state_dict are the same too.
        activation: applied after the convolution, as for `tritonconv.functional.conv1d_bn_act`, or None.

    Zeros, or a state, come before the first step. A depthwise layer of up to 8 taps, without stride or dilation (as in
    Mamba), has separate kernels, computes all gradients in one pass, and has `step` for decoding. Every other layer is a
    convolution that pads only before its input, without a copy of it (as in TCN and WaveNet).
    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> layer = CausalConv1d(4, 4, 4, groups=4, activation="silu")
    >>> x = torch.randn(1, 4, 6)
    >>> y, state = layer(x[:, :, :3], return_final_state=True)
    >>> torch.allclose(torch.cat((y, layer(x[:, :, 3:], state)), 2), layer(x), atol=1e-6)
    True
    """

    backend: Backend | None = None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, dilation: Any = 1, groups: int = 1,
        bias: bool = True, *, activation: Any = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, device=device, dtype=dtype
        )
        self.act = parse_activation(activation)

    @property
    def state_steps(self) -> int:
        """How many earlier time steps a result depends on: the length of a state."""
        return self.dilation[0] * (self.kernel_size[0] - 1)

    @property
    def is_short(self) -> bool:
        """Whether the layer has separate kernels: depthwise, at most 8 taps, no stride and no dilation."""
        depthwise = self.in_channels == self.out_channels == self.groups
        return depthwise and self.stride == self.dilation == (1,) and self.kernel_size[0] <= LONGEST

    def forward(self, input: Tensor, initial_state: Tensor | None = None, return_final_state: bool = False) -> Any:
        """act(convolution of the state, or zeros, followed by the input).

        Args:
            input: (B, C, T) or (C, T).
            initial_state: (B, C, state_steps) or (C, state_steps): the steps before the input; None: zeros.
            return_final_state: also return the last steps of state and input, as the initial state of the next call.
        """
        if input.dim() == 2:
            state = None if initial_state is None else initial_state.unsqueeze(0)
            y = self._run(input.unsqueeze(0), state)
            if return_final_state:
                return y.squeeze(0), last_steps(input.unsqueeze(0), state, self.state_steps).squeeze(0)
            return y.squeeze(0)
        y = self._run(input, initial_state)
        return (y, last_steps(input, initial_state, self.state_steps)) if return_final_state else y

    def _run(self, x: Tensor, state: Tensor | None) -> Tensor:
        weight, bias = member(self, "weight"), member(self, "bias")
        if self.is_short:
            return causal_convolution(x, weight, bias, self.act, state, self.backend)
        if state is not None and tuple(state.shape) != (*x.shape[:2], self.state_steps):
            raise RuntimeError(
                f"CausalConv1d: expected initial_state of size {[*x.shape[:2], self.state_steps]}, but got "
                f"{list(state.shape)} (input {list(x.shape)}, {self.extra_repr()})"
            )
        x, padding = with_state(x, state)
        numbers = ((1, self.stride, padding, self.dilation, self.groups), "causal_conv1d", 0.0, self.act)
        y: Tensor = CONVOLUTIONS["conv"]((x, weight, bias, *NO_EPILOGUE), numbers, self.backend)
        return y

    def step(self, input: Tensor, state: Tensor) -> Tensor:
        """The next time step (B, C), or S steps (B, C, S); updates the state (B, C, L), L >= state_steps, in place.

        For decoding, without gradients; see `tritonconv.functional.causal_conv1d_update`.
        """
        if not self.is_short:
            raise RuntimeError(
                f"CausalConv1d.step: expected a depthwise layer of at most {LONGEST} taps without stride and dilation, but "
                f"got {self.extra_repr()}"
            )
        weight, bias = member(self, "weight"), member(self, "bias")
        if input.dim() == 2:
            return causal_step(input.unsqueeze(2), state, weight, bias, self.act, self.backend).squeeze(2)
        return causal_step(input, state, weight, bias, self.act, self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.act is None else f", activation={self.act}")
