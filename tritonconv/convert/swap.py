"""Layers exchanged in place: a module of torch becomes ours by its class alone, and back again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from tritonconv import nn
from tritonconv.convert.deform import DEFORM_LAYERS, deform_twin
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.layout import as_format, dense_strides, is_dense, suggests_channels_last

__all__ = ["MARK", "Mark", "is_originally_last", "mark_of", "move_weights", "restore_layers", "set_mark", "swap_layers"]

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
    torch.nn.SyncBatchNorm: nn.SyncBatchNorm,
    torch.nn.GroupNorm: nn.GroupNorm,
    torch.nn.InstanceNorm1d: nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d: nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d: nn.InstanceNorm3d,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.Conv1d: nn.Conv1d,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.Conv3d: nn.Conv3d,
    torch.nn.ConvTranspose1d: nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d: nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d: nn.ConvTranspose3d,
    torch.nn.Linear: nn.Linear,
    torch.nn.MaxPool1d: nn.MaxPool1d,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.MaxPool3d: nn.MaxPool3d,
    torch.nn.AvgPool1d: nn.AvgPool1d,
    torch.nn.AvgPool2d: nn.AvgPool2d,
    torch.nn.AvgPool3d: nn.AvgPool3d,
    torch.nn.LPPool1d: nn.LPPool1d,
    torch.nn.LPPool2d: nn.LPPool2d,
    torch.nn.LPPool3d: nn.LPPool3d,
    torch.nn.MaxUnpool1d: nn.MaxUnpool1d,
    torch.nn.MaxUnpool2d: nn.MaxUnpool2d,
    torch.nn.MaxUnpool3d: nn.MaxUnpool3d,
    torch.nn.AdaptiveAvgPool1d: nn.AdaptiveAvgPool1d,
    torch.nn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
    torch.nn.AdaptiveAvgPool3d: nn.AdaptiveAvgPool3d,
    torch.nn.AdaptiveMaxPool1d: nn.AdaptiveMaxPool1d,
    torch.nn.AdaptiveMaxPool2d: nn.AdaptiveMaxPool2d,
    torch.nn.AdaptiveMaxPool3d: nn.AdaptiveMaxPool3d,
    torch.nn.Upsample: nn.Upsample,
    torch.nn.UpsamplingNearest2d: nn.UpsamplingNearest2d,
    torch.nn.UpsamplingBilinear2d: nn.UpsamplingBilinear2d,
    torch.nn.PixelShuffle: nn.PixelShuffle,
    torch.nn.PixelUnshuffle: nn.PixelUnshuffle,
    torch.nn.ChannelShuffle: nn.ChannelShuffle,
}

OURS = {*TWINS.values(), *DEFORM_LAYERS}
MARK = "_tritonconv"


@dataclass(frozen=True)
class Mark:
    """What `convert` did to a module: the one attribute that it adds to it."""

    original: type[torch.nn.Module] | None = None
    """The class it had, where that was changed."""
    contiguous: bool = False
    """Whether its weight was contiguous and is channels-last now."""
    layer: bool = False
    """Whether it is a layer of ours now, with a `backend` of its own."""
    previous_backend: Backend | None = None
    """The backend that the user had given to a layer that was ours already."""


def mark_of(module: torch.nn.Module) -> Mark | None:
    """What `convert` noted on the module."""
    return module.__dict__.get(MARK)


LEAF = "torch.nn"


def set_mark(module: torch.nn.Module, **changes: Any) -> None:
    module.__dict__[MARK] = dataclasses.replace(mark_of(module) or Mark(), **changes)


def twin_of(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class of ours that a layer of torch, or a deformable convolution of another library, becomes."""
    return TWINS.get(type(module)) or deform_twin(module)


def swap_layers(model: torch.nn.Module, backend: Backend) -> list[torch.nn.Module]:
    """Make every layer of exactly torch's class ours, and deformable convolutions of torchvision's and mmcv's making.

    Parameters, hooks and names stay: the new classes add no state, so a change of `__class__` is all, and all that share
    the module share the change.

    Returns:
        Layers of ours whose weights are contiguous and can be made channels-last, for `move_weights`.
    """
    twins = {m: twin_of(m) for m in model.modules()}
    modules = [m for m, twin in twins.items() if twin is not None or type(m) in OURS]
    for module in modules:
        mark = mark_of(module)
        twin = twins[module]
        if twin is not None:
            set_mark(module, original=type(module), layer=True)
            module.__class__ = twin
            # torch.fx asks an instance where its class stands: layers of torch.nn are kept whole, and so are these.
            module.__dict__["__module__"] = LEAF
        elif (mark is None or not mark.layer) and backend == "auto":
            # The user's own layer of ours keeps the backend that it was given.
            continue
        elif mark is None or not mark.layer:
            set_mark(module, layer=True, previous_backend=module.__dict__.get("backend"))
        module.backend = backend  # type: ignore[assignment]
    # Two layers that share a weight both have it contiguous.
    return [module for module in modules if _movable(module)]


def move_weights(layers: list[torch.nn.Module]) -> None:
    """Store the weights of these layers channels-last, in the same Parameters."""
    for layer in layers:
        set_mark(layer, contiguous=True)
        layer.weight_moved = True  # type: ignore[assignment]
    _move(layers, channels_last=True)


def restore_layers(model: torch.nn.Module) -> None:
    """Undo `swap_layers`; modules that it did not touch stay as they are."""
    contiguous = []
    for module in model.modules():
        mark: Mark | None = module.__dict__.pop(MARK, None)
        if mark is None:
            continue
        if mark.original is not None and type(module) is TWINS.get(mark.original, type(module)) and type(module) in OURS:
            module.__class__ = mark.original
        if mark.layer:
            module.__dict__.pop("backend", None)
            module.__dict__.pop("__module__", None)
        if mark.previous_backend is not None:
            module.backend = mark.previous_backend  # type: ignore[assignment]
        if mark.contiguous:
            contiguous.append(module)
            module.__dict__.pop("weight_moved", None)
    _move(contiguous, channels_last=False)


def is_originally_last(layer: torch.nn.Module) -> bool:
    """Whether a convolution's weight is channels-last, and not by our doing."""
    weight, mark = layer._parameters.get("weight"), mark_of(layer)
    if weight is None or weight.dim() < 3 or weight.layout != torch.strided or (mark is not None and mark.contiguous):
        return False
    return suggests_channels_last(weight)


def _movable(module: torch.nn.Module) -> bool:
    """Whether the layer's weight is a plain contiguous parameter in memory of its own."""
    weight = module._parameters.get("weight")
    if type(weight) is not torch.nn.Parameter or weight.dim() < 3:
        return False
    if weight.layout != torch.strided or weight.is_inference() or type(weight.data) is not torch.Tensor:
        return False
    # Other processes, or a buffer that holds many parameters, look at the same memory.
    shared = weight.device.type == "cpu" and weight.is_shared()
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    is_channels_last = weight.stride() == dense_strides(tuple(weight.shape), True)
    return is_dense(weight, False) and not is_channels_last and alone and not shared


def _move(modules: list[torch.nn.Module], channels_last: bool) -> None:
    """Store the layers' weights in that format; parameters that share memory go on sharing it."""
    done: set[int] = set()
    moved: dict[int, torch.Tensor] = {}
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 3 or weight.layout != torch.strided or id(weight) in done:
            continue
        done.add(id(weight))
        # Parameters on "meta" all lie at address 0.
        at = weight.data_ptr() or id(weight)
        if at not in moved or moved[at].shape != weight.shape:
            # Sizes of one leave strides open, but a format shows in them: the weight of a single input channel, say,
            # must tell that what follows is channels-last.
            strides = dense_strides(tuple(weight.shape), channels_last)
            moved[at] = as_format(weight.detach(), channels_last).as_strided(weight.shape, strides)
        weight.data = moved[at]
