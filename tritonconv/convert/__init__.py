"""Converting a model: our layers in the place of torch's, chains of them fused, and a report of what runs where."""

from __future__ import annotations

import copy

import torch

from tritonconv.convert.explain import explain
from tritonconv.convert.fuse import fuse_chains, unfuse_chains
from tritonconv.convert.report import Report
from tritonconv.convert.swap import move_weights, restore_layers, swap_layers
from tritonconv.convert.weights import seen_weights
from tritonconv.ops.core.backend import Backend, check_backend

__all__ = ["Report", "convert", "explain", "revert"]


def convert(
    model: torch.nn.Module, *, inplace: bool = False, fuse: bool = True, backend: Backend = "auto"
) -> torch.nn.Module:
    """The model with its convolutions, batch norms and linear layers on our kernels, and with chains of layers fused.

    Parameters, buffers, state_dict, hooks, shared submodules and the training flag stay as they are. Layers of exactly
    torch's classes become their twins in `tritonconv.nn`; subclasses with a forward of their own are left alone. Weights of
    convolutions are stored channels-last, but for those that the model's own code looks at; what the model gives, and
    whatever its own code sees on the way, has the strides that torch gives.

    Args:
        model: any module.
        inplace: convert the model itself, with the very Parameter objects that an optimizer may hold; otherwise a deep
            copy.
        fuse: make one kernel call of convolution, batch norm, residual addition and activation, as far as they follow
            each other; in training mode one operator with gradients. Around modules that carry hooks the parts run one by
            one.
        backend: the choice of every converted layer: "auto", "triton", "hopper" or "torch".

    Returns:
        The converted model, of the class it had.

    Raises:
        TypeError: `model` is no module.
        ValueError: an unknown backend.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> fast = convert(model)
    >>> type(fast[0]).__module__, list(fast.state_dict()) == list(model.state_dict())
    ('tritonconv.nn.conv', True)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    check_backend(backend)
    # Copies of parameters that are made in inference mode could never be moved nor trained.
    with torch.inference_mode(False):
        if not inplace:
            model = copy.deepcopy(model)
        unfuse_chains(model)
        layers = swap_layers(model, backend)
        found = fuse_chains(model) if fuse else {}
        seen = seen_weights(model, found)
        move_weights([layer for layer in layers if layer._parameters["weight"] not in seen])
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert` in place: torch's own layers, forwards and memory formats; for instance before an ONNX export.

    Args:
        model: a converted model; any other stays as it is.

    Returns:
        `model` itself, with the same Parameter objects.

    Raises:
        TypeError: `model` is no module.

    >>> model = revert(convert(torch.nn.Sequential(torch.nn.Linear(2, 3))))
    >>> type(model[0]) is torch.nn.Linear
    True
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"revert(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    unfuse_chains(model)
    restore_layers(model)
    return model
