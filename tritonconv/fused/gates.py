"""Squeeze-excite and global averages: calls that share a launch if they can, and run one by one otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from tritonconv.fused.call import eval_call, fused_call, unchanged
from tritonconv.nn.conv import Conv1d, Conv2d, Conv3d, member
from tritonconv.nn.linear import Linear
from tritonconv.ops.adaptive.operator import adaptive_pool, global_average
from tritonconv.ops.conv.extended import AVERAGED, GATED, averaged_convolution, gated_convolution
from tritonconv.ops.core.activation import from_module, parse_activation
from tritonconv.ops.core.observe import Call, Decision, Share, is_observed, notify, sharing
from tritonconv.ops.squeeze_excite.operator import EXCITE, scale_channels

__all__ = ["all_pixels", "fused_average", "fused_excite", "fused_gated_call", "fused_scale", "pixel_mean"]

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)


def fused_average(
    layer: Module, norm: Module | None, activation: Any, input: Tensor, residual: Tensor | None, in_place: bool, keep: bool,
    dim: tuple[int, ...] | None, keepdim: bool, pool: Module | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(y, y's average over pixels), with y as from `fused_call`; one pass in eval mode if y is batched.

    Args:
        layer, norm, activation, input, residual, in_place: as for `fused_call`.
        keep: whether other code reads y; if not, y may be None.
        dim, keepdim: the average is y.mean(dim, keepdim), over as many axes as the layer has spatial axes; if dim is None,
            the average is an adaptive pooling to one pixel.
        pool: the module that averages; it is called itself if it has hooks.
    """
    parts = _parts(layer, norm, activation, input, residual, in_place)
    plain = pool is None or unchanged(pool)
    if parts is not None and plain:
        found = averaged_convolution(*parts, keep)
        if found is not None:
            y, mean = found
            return y, mean if dim is None else _shaped(mean, keepdim)
    if (
        parts is not None
        and plain
        and is_observed()
        and AVERAGED.resolve(parts[0], (*parts[1], keep), parts[2]) is not None
    ):
        named: Any = "mean" if pool is None else pool
        with sharing(Share("{}, with its global average", unwritten=not keep, members=(named,))):
            y = fused_call(layer, norm, activation, input, residual, in_place)
        return y, y.mean(tuple(range(2, y.dim())) if dim is None else dim, keepdim)
    y = fused_call(layer, norm, activation, input, residual, in_place)
    if dim is not None:
        return y, pixel_mean(y, dim, keepdim)
    return y, pool(y) if pool is not None else adaptive_pool("avg", y, 1, len(layer.kernel_size))  # type: ignore[arg-type]


def pixel_mean(input: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """input.mean(dim, keepdim), on our kernel if these are all axes except the first two."""
    if all_pixels(dim, input.dim()):
        return _shaped(global_average(input, True), keepdim)
    size = input.numel() * input.element_size()
    decision = Decision("torch", "these axes are not all pixels of a batch of images")
    notify(lambda: Call("mean", decision, None, 0, size, input.dtype, input.device, None, ""))
    return input.mean(dim, keepdim)


def _shaped(mean: Tensor, keepdim: bool) -> Tensor:
    """A mean (N, C, ...) of one number for each image and channel, with the shape that `Tensor.mean` gives it."""
    rows = mean.flatten(1)
    return rows.view(mean.shape) if keepdim else rows


def all_pixels(dim: tuple[int, ...], axes: int) -> bool:
    """Whether these are all of a tensor's axes except the first two, one to three axes."""
    return axes - 2 == len(dim) in (1, 2, 3) and sorted(d % axes for d in dim) == list(range(2, axes))


def fused_excite(first: Module, activation: Any, second: Module, gate: Any, mean: Tensor) -> Tensor:
    """gate(second(activation(first(mean)))), (N, C, 1, ...), in one launch in eval mode.

    Args:
        first, second: our convolutions with a filter of one tap, or linear layers.
        mean: (N, C, 1, ...), or (N, C) for linear layers.
    """
    acts = [from_module(a) if isinstance(a, Module) else parse_activation(a) for a in (activation, gate)]
    known = all(
        not isinstance(a, Module) or (s is not None and unchanged(a)) for a, s in zip((activation, gate), acts, strict=True)
    )
    if known and _single(first) and _single(second) and first.backend == second.backend:
        whole = mean if mean.dim() > 2 else mean[..., None]
        w1, b1, w2, b2 = (member(layer, name) for layer in (first, second) for name in ("weight", "bias"))
        tensors, numbers = (whole, w1, b1, w2, b2), ((), *acts)
        backend: Any = first.backend
        found = EXCITE.find(tensors, numbers, backend)
        if found is not None:
            gated: Tensor = found.run(*tensors)
            return gated.view(mean.shape)
        if is_observed() and EXCITE.resolve(tensors, numbers, backend) is not None:
            with sharing(Share("excite, its first product", unwritten=True)):
                hidden = fused_call(first, None, activation, mean)
            with sharing(Share("excite, its second product", unread=True)):
                return fused_call(second, None, gate, hidden)
    return fused_call(second, None, gate, fused_call(first, None, activation, mean))


def fused_scale(
    input: Tensor, gate: Tensor, residual: Tensor | None = None, activation: Any = None, in_place: bool = False
) -> Tensor:
    """activation(input * gate + residual) in one pass if gradients are not needed."""
    spec = from_module(activation) if isinstance(activation, Module) else parse_activation(activation)
    known = not isinstance(activation, Module) or (spec is not None and unchanged(activation))
    if known and not (in_place and residual is not None and residual.dtype != input.dtype):
        return scale_channels(input, gate, residual, spec)
    y = scale_channels(input, gate)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    return activation(y) if isinstance(activation, Module) else y if spec is None else spec.torch(y)


def fused_gated_call(
    layer: Module, norm: Module | None, activation: Any, input: Tensor, gate: Tensor, residual: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:  # fmt: skip
    """activation(norm(layer(input * gate)) + residual); in eval mode the product is never written to memory.

    Args:
        layer: our convolution with a filter of one tap.
        gate: (N, C, 1, ...).
        norm, activation, residual, in_place: as for `fused_call`.
    """
    parts = _parts(layer, norm, activation, input, residual, in_place)
    if parts is not None:
        tensors, numbers, backend = parts
        y = gated_convolution(tensors, gate, numbers, backend)
        if y is not None:
            return y
        if is_observed() and GATED.resolve((*tensors, gate), numbers, backend) is not None:
            with sharing(Share("{}, gated on its way in", members=("mul",))):
                return fused_call(layer, norm, activation, input * gate, residual, in_place)
    return fused_call(layer, norm, activation, scale_channels(input, gate), residual, in_place)


def _single(layer: Any) -> bool:
    """Whether our layer is a product of vectors, one for each image."""
    if type(layer) is Linear:
        return unchanged(layer)
    if type(layer) not in CONVOLUTIONS or not unchanged(layer) or layer.padding_mode != "zeros":
        return False
    ones = (1,) * len(layer.kernel_size)
    return layer.groups == 1 and layer.kernel_size == layer.stride == ones and not any(layer.padding)


def _parts(
    layer: Any, norm: Any, activation: Any, input: Tensor, residual: Tensor | None, in_place: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...], Any] | None:
    """(tensors, numbers, backend) of a convolution in eval mode, or None if its modules run one by one."""
    if type(layer) not in CONVOLUTIONS:
        return None
    call = eval_call(layer, norm, activation, input, residual, in_place)
    return None if call is None else (*call[1:], layer.backend)
