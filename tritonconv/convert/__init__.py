"""Conversion of a model: our layers replace torch's, chains of layers are fused, and a report says what runs where."""

from __future__ import annotations

import copy

import torch

from tritonconv.convert.explain import explain
from tritonconv.convert.forward import install, uninstall
from tritonconv.convert.report import Report
from tritonconv.convert.swap import move_weights, restore_layers, swap_layers
from tritonconv.convert.weights import viewed_weights
from tritonconv.ops.core.backend import Backend, check_backend

__all__ = ["Report", "convert", "explain", "revert"]


def convert(
    model: torch.nn.Module, *, inplace: bool = False, fuse: bool = True, backend: Backend = "auto",
    memory_format: torch.memory_format = torch.channels_last,
) -> torch.nn.Module:  # fmt: skip
    """The model with its layers on our kernels, and with chains of layers fused.

    The layers are convolutions, batch norms, linear layers, poolings and resamplings. Parameters, buffers, state_dict,
    hooks, shared submodules and the training flag stay as they are. Layers of exactly torch's classes become layers of the
    same name in `tritonconv.nn`; subclasses are not changed. Weights of convolutions are stored channels-last, except for
    those that the model's own code reads. The results of the model, and all tensors that its own code sees, have torch's
    strides.

    Args:
        model: any module.
        inplace: convert the model itself, with the same Parameter objects, which an optimizer may hold; otherwise convert a
            deep copy.
        fuse: run a convolution, batch norm, residual addition and activation that follow each other as one kernel call; in
            training mode as one operator with gradients. If one of the modules has a hook, they run one by one.
        backend: the choice for every converted layer: "auto", "triton", "hopper" or "torch".
        memory_format: how weights of convolutions are stored: torch.channels_last, or torch.contiguous_format, which leaves
            their strides alone for code that calls `weight.view(n, -1)` (Muon, orthogonal regularizers); our kernels copy
            them at each call then.

    Returns:
        The converted model, of the same class as before.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown backend or memory format.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> fast = convert(model)
    >>> type(fast[0]).__module__, list(fast.state_dict()) == list(model.state_dict())
    ('tritonconv.nn.conv', True)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    check_backend(backend)
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"convert(): memory_format must be torch.channels_last or torch.contiguous_format, got {memory_format}"
        )
    # Parameters that are copied in inference mode could be neither moved nor trained later.
    with torch.inference_mode(False):
        if not inplace:
            model = copy.deepcopy(model)
        uninstall(model)
        layers, viewed = swap_layers(model, backend), viewed_weights(model)
        if memory_format == torch.channels_last:
            move_weights([layer for layer in layers if layer._parameters["weight"] not in viewed])
        if fuse:
            install(model, backend)
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert` in place: restore torch's layers, forwards and memory formats, for instance before an ONNX export.

    Args:
        model: a converted model; any other model is not changed.

    Returns:
        `model` itself, with the same Parameter objects.

    Raises:
        TypeError: `model` is not a module.

    >>> model = revert(convert(torch.nn.Sequential(torch.nn.Linear(2, 3))))
    >>> type(model[0]) is torch.nn.Linear
    True
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"revert(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    uninstall(model)
    restore_layers(model)
    return model
