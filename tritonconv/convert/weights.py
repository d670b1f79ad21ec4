"""Weights that a model's own code looks at: they keep their strides, since `weight.view(n, -1)` wants contiguous memory."""

from __future__ import annotations

import torch

from tritonconv.convert.code import reads_weights
from tritonconv.convert.trace import Survey, Traced, is_layer

__all__ = ["seen_weights"]


def seen_weights(model: torch.nn.Module, found: Survey) -> set[torch.nn.Parameter]:
    """Weights that forwards do more with than to hand them to a convolution, as graphs or code tell.

    Args:
        model: any module.
        found: graphs of it and of its parts, as far as there are, as they were traced.
    """
    seen: set[torch.nn.Parameter] = set()
    for root, traced in found.items():
        if isinstance(traced, Traced):
            named = dict(root.named_parameters(remove_duplicate=False))
            seen.update(named[path] for path in traced.read if path in named)
    for module in model.modules():
        if not is_layer(module) and reads_weights(module):
            seen.update(module.parameters())
    return seen
