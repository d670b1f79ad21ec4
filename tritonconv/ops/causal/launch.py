"""Short causal depthwise convolution on Triton: what is checked, and the launches of forward, gradients and step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonconv.geometry import INT32_MAX, ConvGeometry, power, power_of_two_divisor
from tritonconv.ops.conv.dense import check_convolution
from tritonconv.ops.conv.depthwise import add_slots
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.epilogue import Epilogue, check_device, check_dtype
from tritonconv.ops.core.launch import Launch, device_of, forced_config, launch
from tritonconv.ops.core.layout import as_format, empty_output, wide
from tritonconv.tuning.rules.causal import causal_blocks, causal_config, causal_update_block

__all__ = [
    "LONGEST", "Gradients", "causal_backward", "causal_forward", "causal_geometry", "causal_update", "check_causal",
    "check_update", "is_short", "needs_copy", "time_last",
]  # fmt: skip

# Taps that the kernels take, as kernels/causal_conv1d.py has it; no import of triton here.
LONGEST = 8


def causal_geometry(x_shape: tuple[int, ...], taps: int) -> ConvGeometry:
    """The convolution's geometry, for x (B, D, T)."""
    channels = x_shape[1] if len(x_shape) > 1 else 1
    return ConvGeometry.parse(x_shape, (channels, 1, taps), nd=1, padding="causal", groups=channels)


def is_short(g: ConvGeometry) -> bool:
    """Whether a causal convolution has kernels of its own: depthwise, few taps, no stride and no dilation."""
    depthwise = g.in_channels == g.out_channels == g.groups
    return g.nd == 1 and depthwise and g.stride == g.dilation == (1, 1, 1) and g.taps <= LONGEST


def check_causal(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> ConvGeometry:
    """The geometry; raises what torch raises for a wrong size, dtype or device.

    Args:
        x: (B, D, T).
        weight: (D, K).
        state: (B, D, K - 1).
    """
    if x.dim() != 3:
        raise RuntimeError(f"{op}: expected 3D input (B, D, T), but got input of size {list(x.shape)}")
    check_weight(op, x, weight)
    geometry = causal_geometry(tuple(x.shape), weight.shape[1])
    check_convolution(op, x, weight, Epilogue(bias), geometry)
    expected = (*x.shape[:2], weight.shape[1] - 1)
    if state is not None and tuple(state.shape) != expected:
        raise RuntimeError(
            f"{op}: expected initial_state of size {list(expected)}, one step less than the filter, but got "
            f"{list(state.shape)} ({geometry})"
        )
    if state is not None:
        check_dtype(op, x, "initial_state", state, geometry)
        check_device(op, x, "initial_state", state, geometry)
    return geometry


def check_update(op: str, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise what torch raises for a wrong size, dtype or device.

    Args:
        x: (B, D, S).
        state: (B, D, L).
        weight: (D, K).
    """
    if x.dim() != 3:
        raise RuntimeError(f"{op}: expected 2D input (B, D) or 3D (B, D, S), but got input of size {list(x.shape)}")
    check_weight(op, x, weight)
    sizes = f"input {list(x.shape)}, conv_state {list(state.shape)}, weight {list(weight.shape)}"
    if state.dim() != 3 or tuple(state.shape[:2]) != tuple(x.shape[:2]) or state.shape[2] < weight.shape[1] - 1:
        raise RuntimeError(
            f"{op}: expected conv_state of size {[*x.shape[:2]]} and at least {weight.shape[1] - 1} steps, but got "
            f"{list(state.shape)} ({sizes})"
        )
    if any(n > 1 and s == 0 for n, s in zip(state.shape, state.stride(), strict=True)):
        raise RuntimeError(
            f"{op}: conv_state is written, but several of its elements share memory; clone it first ({sizes})"
        )
    for name, t in (("weight", weight), ("conv_state", state)):
        check_dtype(op, x, name, t, sizes)
        check_device(op, x, name, t, sizes)
    Epilogue(bias).check(op, sizes, x, x.shape[1], None)


def check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] < 1 or weight.shape[0] != x.shape[1] or weight.shape[0] < 1:
        raise RuntimeError(
            f"{op}: expected weight of size [{x.shape[1]}, K] or [{x.shape[1]}, 1, K] for input of size {list(x.shape)}, "
            f"but got {list(weight.shape)}"
        )


def time_last(x: Tensor) -> bool:
    """Whether time steps lie side by side, not channels: the result does as x; where neither does, time steps."""
    return x.stride(1) != 1 or (x.stride(2) == 1 and x.shape[2] > 1)


def needs_copy(x: Tensor) -> bool:
    """Whether neither channels nor time steps lie side by side, so that x is copied first."""
    return time_last(x) and x.stride(2) != 1 and x.shape[2] > 1


class Walk(NamedTuple):
    """How a tensor (B, D, T) is gone through."""

    config: Any
    patch: int
    channels_last: bool
    block_t: int
    block_c: int
    range: int
    slots: int

    @classmethod
    def over(cls, x: Tensor, channels_last: bool, taps: int, backward: bool) -> Walk:
        """By a forced config, or by the rule."""
        family = ("BACK" if backward else "WALK") if channels_last else "PATCH"
        b, d, t = x.shape
        config = forced_config(family) or causal_config(t, channels_last, taps, x.element_size(), backward)
        patch = config.kwargs[family]
        blocks = causal_blocks(config, patch, (b, d, t), x.element_size(), channels_last, device_of(x.device))
        return cls(config, patch, channels_last, *blocks)

    def programs(self, channels: int) -> int:
        return self.slots * -(-channels // self.block_c)

    def constants(self, x: Tensor, taps: int, *others: Tensor) -> dict[str, Any]:
        """The arguments that forward and backward share. `others` are further large tensors."""
        b, d, t = x.shape
        # Patches reach past the ends, before their masks are applied.
        far = max(sum(n * s for n, s in zip((b, d, t + 4 * self.patch), o.stride(), strict=True)) for o in (x, *others))
        return dict(
            B=b, T=t, RANGE=self.range, D=d, K=taps, VEC_T=power_of_two_divisor(t), CHANNELS_LAST=self.channels_last,
            INDEX_64=far > INT32_MAX, PATCH=self.patch, BLOCK_T=self.block_t, BLOCK_C=self.block_c,
            **self.strides("x", x),
        )  # fmt: skip

    def strides(self, name: str, t: Tensor) -> dict[str, int]:
        """Of a large tensor; those along which elements lie side by side are ones, also of a size of one."""
        b, d, s = t.stride()
        d, s = (1, s) if self.channels_last else (d, 1)
        return {
            f"stride_{name}b": b, f"stride_{name}d": d, f"STRIDE_{name.upper()}T": s,
            f"VEC_{name.upper()}": power_of_two_divisor(b) if self.channels_last else power_of_two_divisor(b, d),
        }  # fmt: skip


def activation_constants(activation: ActivationSpec | None, gradient: bool = False) -> dict[str, Any]:
    """The activation's arguments, or those of its gradient, which is None for none."""
    from tritonconv.kernels import activations, causal_conv1d

    a, b = (activation.a, activation.b) if activation else (0.0, 0.0)
    if activation is None:
        function = None if gradient else activations.identity
    elif activation.name == "silu":
        function = causal_conv1d.lean_silu_gradient if gradient else causal_conv1d.lean_silu
    else:
        row = activations.ACTIVATIONS[activation.name]
        function = row.gradient if gradient else row.device
    return {"GRADIENT" if gradient else "ACT": function, "ACT_A": a, "ACT_B": b}


def state_arguments(state: Tensor | None) -> dict[str, Any]:
    strides = (0, 0, 0) if state is None else state.stride()
    return dict(state_ptr=state, stride_sb=strides[0], stride_sd=strides[1], stride_st=strides[2])


def causal_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: ActivationSpec | None
) -> Tensor:
    """act(bias + causal depthwise convolution), as x lies; arguments as `check_causal` wants them, K <= LONGEST."""
    from tritonconv.kernels.causal_conv1d import causal_forward_kernel

    channels_last = not time_last(x)
    y = empty_output(x, tuple(x.shape), channels_last, x.dtype)
    if y.numel() == 0:
        return y
    x = as_format(x, False) if needs_copy(x) else x
    taps = weight.shape[1]
    walk = Walk.over(x, channels_last, taps, False)
    arguments = walk.constants(x, taps, y) | activation_constants(activation) | state_arguments(state) | dict(
        x_ptr=x, w=weight.contiguous(), bias_ptr=_contiguous(bias), y_ptr=y,
    )  # fmt: skip
    launch(Launch(causal_forward_kernel, walk.programs(x.shape[1]), arguments, None, walk.config), x.device)
    return y


class Gradients(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None


def causal_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: ActivationSpec | None
) -> Gradients:
    """Gradients of what `causal_forward` took, in one pass over x and dy; sums go through a workspace in fp32 (fp64)."""
    from tritonconv.kernels.causal_conv1d import causal_backward_kernel

    channels_last, taps, (b, d, t) = not time_last(x), weight.shape[1], x.shape
    dx = empty_output(x, (b, d, t), channels_last, x.dtype)
    dw = empty_output(x, (d, taps), False, x.dtype)
    db = None if bias is None else empty_output(x, (d,), False, x.dtype)
    dstate = None if state is None else empty_output(x, (b, d, taps - 1), False, x.dtype)
    found = Gradients(dx, dw, db, dstate)
    if dx.numel() == 0:
        for gradient in (dw, db):
            if gradient is not None:
                gradient.zero_()
        return found
    x = as_format(x, False) if needs_copy(x) else x
    # As x lies, so that both are read alike.
    axis = 1 if channels_last else 2
    dy = dy if dy.stride(axis) == 1 or dy.shape[axis] == 1 else as_format(dy, channels_last)
    walk = Walk.over(x, channels_last, taps, True)
    sums = empty_output(x, (walk.slots, taps + 1, d), False, wide(x.dtype))
    shared = walk.constants(x, taps, dy) | walk.strides("y", dy)
    arguments = shared | activation_constants(activation, True) | state_arguments(state) | dict(
        dy_ptr=dy, x_ptr=x, w=weight.contiguous(), bias_ptr=_contiguous(bias), dx_ptr=dx, dstate_ptr=dstate, sums_ptr=sums,
        WHOLE=t % (walk.range * walk.patch) == 0, EVEN=t % walk.patch == 0,
    )  # fmt: skip
    launch(Launch(causal_backward_kernel, walk.programs(d), arguments, None, walk.config), x.device)
    add_slots(sums, dw, db)
    return found


def causal_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: ActivationSpec | None
) -> Tensor:
    """Results of the next steps, with the state moved on in place; arguments as `check_update` wants them."""
    from tritonconv.kernels.causal_conv1d import causal_update_kernel

    b, d, steps = x.shape
    y = empty_output(x, (b, d, steps), False, x.dtype)
    if y.numel() == 0:
        return y
    length, block = state.shape[2], causal_update_block(d, device_of(x.device))
    xb, xd, xt = x.stride()
    arguments = activation_constants(activation) | state_arguments(state) | dict(
        x_ptr=x, stride_xb=xb, stride_xd=xd, stride_xt=xt, w=weight.contiguous(), bias_ptr=_contiguous(bias), y_ptr=y,
        STEPS=steps, D=d, K=weight.shape[1], L=length, BLOCK_C=block, BLOCK_L=power(length, 1 << 20),
    )  # fmt: skip
    launch(Launch(causal_update_kernel, b * -(-d // block), arguments, None, None), x.device)
    return y


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
