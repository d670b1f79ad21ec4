"""Deformable convolutions of other libraries, known by their classes' names and forwards: neither library is imported."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from tritonconv import nn

__all__ = ["DEFORM_LAYERS", "deform_twin", "digest_of_forward"]

DEFORM_LAYERS = (nn.DeformConv2d, nn.DeformConv2dPack)
KNOWN: dict[tuple[str, str, str], type[torch.nn.Module]] = {
    # torchvision 0.29.1
    ("torchvision", "DeformConv2d", "d59863c51d784a8a901a09872aa11b4d20e338a9e3abfd8d2152a341dea30e4c"): nn.DeformConv2d,
    # mmcv at commits f127a737 (1.x, the first of the two) and 0093647e (2.x)
    ("mmcv", "ModulatedDeformConv2dPack", "4e799e6a8a65204bdd490a2c18bf28d2687ca6299fe38850a4ba26265fcc5176"):
        nn.DeformConv2dPack,
    ("mmcv", "DeformConv2dPack", "a0aba44c8e728a46491df67f52b4eff9d62bf55d27f86982942d2d89070f4541"): nn.DeformConv2dPack,
}  # fmt: skip
"""Ours for (package, class, `digest_of_forward`): another forward of the same name may compute anything."""


def deform_twin(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """Our class for a deformable convolution of torchvision's or mmcv's making; None for everything else.

    A layer of mmcv's has a plain convolution inside, which predicts the offsets, or offsets and mask, that its own weight
    then samples at.
    """
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    named = any(key[:2] == (package, kind.__name__) for key in KNOWN)
    if not named or "forward" in module.__dict__ or not _is_convolution(module):
        return None
    twin = KNOWN.get((package, kind.__name__, digest_of_forward(kind.forward)))
    children = dict(module.named_children())
    if twin is nn.DeformConv2dPack:
        return twin if list(children) == ["conv_offset"] and _predicts(children["conv_offset"], module) else None
    return twin if not children else None


@functools.cache
def digest_of_forward(forward: Callable[..., Any]) -> str:
    """SHA-256 of a forward's source without comments, docstring, annotations and layout; "" where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, SyntaxError, TypeError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    tree.returns = None
    for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _is_convolution(module: torch.nn.Module) -> bool:
    """Whether it has a 2-d convolution's numbers, its weight and bias, and nothing else."""
    given: Any = module
    try:
        r, s = nn.deform.pair(given.kernel_size)
        expected = (given.out_channels, given.in_channels // given.groups, r, s)
        pairs = [nn.deform.pair(value) for value in (given.stride, given.padding, given.dilation)]
        sizes = {name: tuple(t.shape) for name, t in module._parameters.items() if t is not None}
    # Lazy parameters have no size yet.
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    fits = sizes in ({"weight": expected}, {"weight": expected, "bias": expected[:1]})
    return fits and not module._buffers and all(type(number) is int for one in pairs for number in one)


def _predicts(conv: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether the convolution has an offset, or an offset and a mask, for every tap and result of the module."""
    given: Any = module
    groups = getattr(module, "deform_groups", getattr(module, "deformable_groups", None))
    if not isinstance(conv, torch.nn.Conv2d) or type(groups) is not int:
        return False
    same = all(
        tuple(getattr(conv, name)) == nn.deform.pair(getattr(given, name))
        for name in ("kernel_size", "stride", "padding", "dilation")
    )
    taps = groups * conv.kernel_size[0] * conv.kernel_size[1]
    return same and conv.in_channels == given.in_channels and conv.out_channels in (2 * taps, 3 * taps)
