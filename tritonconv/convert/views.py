"""Whether a model views activations in a way that channels-last memory does not allow.

`x.view(n, -1)` joins channels and pixels, which lie side by side in contiguous memory alone: a model that does it between
convolutions and its classifier, as many tutorials' do, would raise with channels-last weights, in training too. Such a
model keeps contiguous weights and activations.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch
from torch import fx

from tritonconv.convert.calls import module_of, spec_of_call
from tritonconv.convert.trace import leaf_modules, trace
from tritonconv.ops.activation import module_types

__all__ = ["why_contiguous"]

GLOBAL_POOLS = (
    torch.nn.AdaptiveAvgPool1d, torch.nn.AdaptiveAvgPool2d, torch.nn.AdaptiveAvgPool3d, torch.nn.AdaptiveMaxPool1d,
    torch.nn.AdaptiveMaxPool2d, torch.nn.AdaptiveMaxPool3d,
)  # fmt: skip
LAYOUT_KEEPING = (
    torch.nn.Identity, torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d,
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d,
)  # fmt: skip
# Their results are contiguous, or have no pixels left.
SAFE_FUNCTIONS = {torch.flatten, torch.mean, torch.reshape, torch.nn.functional.linear}
SAFE_METHODS = {"contiguous", "flatten", "mean", "reshape"}

# A view of so many axes splits channels or pixels, which any memory format allows.
SPLITTING_AXES = 4


def why_contiguous(model: torch.nn.Module) -> str:
    """Why the model must keep contiguous activations, or "" if channels-last ones will do."""
    users = [module for module in model.modules() if _mentions_view(type(module))]
    if not users:
        return ""
    reason = (
        f"{type(users[0]).__name__} calls Tensor.view, which channels-last memory may not allow; Tensor.reshape would do"
    )
    try:
        graph = trace(model, leaf_modules(model)).graph
    # A forward may raise anything. Without a graph nothing tells which views are safe.
    except Exception:
        return reason
    modules = dict(model.named_modules())
    views = [node for node in graph.nodes if node.op == "call_method" and node.target == "view"]
    return "" if all(_is_safe(node, modules) for node in views) else reason


def _mentions_view(kind: type[torch.nn.Module]) -> bool:
    """Whether code of a class that is not torch's calls something named view, itself or in a function beside it."""
    for cls in kind.__mro__:
        if cls.__module__.startswith(("torch.", "tritonconv.")):
            continue
        for method in vars(cls).values():
            if isinstance(method, types.FunctionType) and any("view" in code.co_names for code in _code_of(method)):
                return True
    return False


def _code_of(function: types.FunctionType) -> Iterator[types.CodeType]:
    """The code of a function, of functions inside it, and of those of its own module that it names."""
    stack = [function.__code__]
    for name in function.__code__.co_names:
        named = function.__globals__.get(name)
        if isinstance(named, types.FunctionType) and named.__module__ == function.__module__:
            stack.append(named.__code__)
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _is_safe(view: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the view is possible in channels-last memory: it splits axes, or what it views has no pixels."""
    sizes = view.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return len(sizes) >= SPLITTING_AXES or _has_no_pixels(view.args[0], modules)


def _has_no_pixels(value: object, modules: dict[str, torch.nn.Module]) -> bool:
    while isinstance(value, fx.Node):
        if value.op in ("placeholder", "get_attr"):
            # The caller's own memory, of which nothing is changed.
            return True
        module = module_of(value, modules)
        if isinstance(module, torch.nn.Linear):
            return True
        if isinstance(module, GLOBAL_POOLS):
            sizes = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,)
            return all(size == 1 for size in sizes)
        if value.op == "call_method" and value.target in SAFE_METHODS:
            return True
        if value.op == "call_function" and value.target in SAFE_FUNCTIONS:
            return True
        keeps_layout = module is not None and (isinstance(module, LAYOUT_KEEPING) or type(module) in module_types())
        if not (keeps_layout or spec_of_call(value) is not None or value.target in ("view", torch.nn.functional.dropout)):
            return False
        value = value.args[0]
    return True
