"""Functions of torch, and operators of aten, as calls of our families.

Each has a function of ours with the same arguments. It is called with the values that the trace knows, and the call of a
family that it makes is intercepted: this call takes the node's place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from tritonconv import functional
from tritonconv.graph.elementwise import bind, name_of
from tritonconv.graph.nodes import (
    FamilyCall,
    call_of,
    example,
    insert_family,
    only_user,
    order_of,
    replace,
    same_size,
    tensor_of,
)
from tritonconv.ops.adaptive.operator import global_average
from tritonconv.ops.core.activation import ActivationSpec, from_numbers
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.observe import intercept

__all__ = ["translate"]

F = torch.nn.functional
NAMES = (
    "linear", "batch_norm", "group_norm", "instance_norm", "layer_norm",
    "interpolate", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    *(f"{kind}{nd}d" for kind in ("conv", "conv_transpose") for nd in (1, 2, 3)),
    *(f"{kind}_pool{nd}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for nd in (1, 2, 3)),
    *(f"max_unpool{nd}d" for nd in (1, 2, 3)),
    *(f"{kind}_pool{nd}d_with_indices" for kind in ("max", "adaptive_max") for nd in (1, 2, 3)),
)  # fmt: skip
# torch.adaptive_max_pool1d returns indices too; two norms have their arguments in another order.
OTHER = {
    torch.adaptive_max_pool1d: functional.adaptive_max_pool1d_with_indices,
    torch.batch_norm: None,
    torch.instance_norm: None,
}
RESULT = object()
"""Stands for the result of an intercepted call."""


@functools.cache
def functions() -> dict[Any, Callable[..., Any]]:
    """Functions of torch, each with ours of the same arguments."""
    found = {
        theirs: getattr(functional, name) for name in NAMES for home in (torch, F)
        if (theirs := getattr(home, name, None)) is not None and theirs not in OTHER
    }  # fmt: skip
    return (
        found
        | {k: v for k, v in OTHER.items() if v is not None}
        | {torch.native_channel_shuffle: functional.channel_shuffle}
    )


def translate(graph: fx.Graph, backend: Backend | None = None) -> None:
    """Write every call of a layer as a call of its family, and take away what computes nothing.

    Args:
        backend: of the calls that functions of torch become.
    """
    for node in graph.find_nodes(op="call_function", target=ActivationSpec):
        # A value without tensors, which Dynamo writes into the graph as a call.
        node.replace_all_uses_with(ActivationSpec(*node.args))
        graph.erase_node(node)
    for node in list(graph.nodes):
        if (same := _unchanged(node)) is not None:
            replace(graph, node, same)
            continue
        if _takes_contiguous(node):
            # Our layers give the format of the original layer where they are called: here this is their result.
            source = node.args[0]
            source.meta.update(node.meta)
            replace(graph, node, source)
            continue
        found, end = _own(node) or _call(node), node
        if found is None and name_of(node) in NATIVE_NORMS:
            found, end = _native_norm(node)
        if found is not None:
            replace(graph, end, insert_family(graph, end, found._replace(backend=backend), end, (node,)))
            if end is not node:
                graph.erase_node(node)


DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The argument that a node returns as it is, or None: dropout in eval mode does so."""
    if node.op != "call_function" or name_of(node) not in DROPOUTS:
        return None
    training = "train" if isinstance(node.target, OpOverload) else "training"
    given = bind(node, ("input", "p", training, "inplace")) or {}
    return given.get("input") if given.get(training) is False else None


def _takes_contiguous(node: fx.Node) -> bool:
    """Whether a node gives contiguous strides to the result of a convolution of a batch that nobody else reads."""
    name, source = name_of(node), node.args[0] if node.args else None
    call, x, y = call_of(source), tensor_of(source), tensor_of(node)
    if name not in ("contiguous", "clone", "as_strided") or call is None or x is None or y is None:
        return False
    if not call.family.startswith("conv") or only_user(source) != node or y.dim() != call.numbers[0][0] + 2:  # type: ignore[arg-type]
        return False
    return same_size(x.shape, y.shape) and order_of(y) == tuple(range(y.dim()))


def _own(node: fx.Node) -> FamilyCall | None:
    """The call of a family that one of our operators was traced from: of a convolution or of a norm in eval mode."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "tritonconv" or node.kwargs:
        return None
    name, args = name_of(node), node.args
    if name == "batch_norm_eval":
        *tensors, eps, act, a, b = args
        return FamilyCall("batch_norm", tuple(tensors), ((False, 0.0, eps), from_numbers(act, a, b), ""))  # type: ignore[arg-type]
    if name == "conv" and args[-1] == "conv":
        *tensors, stride, padding, padding_name, dilation, groups, eps, act, a, b, _ = args
        given: tuple[Any, ...] = (stride, padding_name or padding, dilation, groups)
    elif name == "conv_transpose":
        *tensors, stride, padding, extra, groups, dilation, eps, act, a, b = args
        given = (stride, padding, extra, groups, dilation)
    else:
        return None
    nd = len(stride)  # type: ignore[arg-type]
    op = f"{name}{nd}d" + ("_bn_act" if tensors[3] is not None else "")
    numbers = (nd, *(tuple(value) if isinstance(value, list) else value for value in given))
    return FamilyCall(name, tuple(tensors), (numbers, op, eps, from_numbers(act, a, b)))  # type: ignore[arg-type]


def _call(node: fx.Node) -> FamilyCall | None:
    """The call of a family that does what a node does, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    function, args, kwargs = _arguments(node)
    if function is None:
        return None
    received: list[FamilyCall] = []

    def receive(family: Any, tensors: tuple[Any, ...], numbers: tuple[Any, ...], backend: Any) -> object:
        received.append(FamilyCall(family.name, tensors, numbers, backend))
        return RESULT

    values: dict[int, fx.Node] = {id(example(n)): n for n in node.all_input_nodes}
    try:
        with intercept(receive), _without_guards(node):
            result = function(*fx.map_arg(args, example), **fx.map_arg(kwargs, example))
    # What torch refuses, it refuses where it runs; what depends on the value of a symbol stays as it is.
    except Exception:
        return None
    # A result of which something else is made is not the node's.
    if result is not RESULT or len(received) != 1:
        return None
    call = received[0]
    leaves = pytree.tree_leaves((call.tensors, call.numbers))
    if any(id(leaf) not in values for leaf in leaves if isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat))):
        return None
    tensors, numbers = (_as_nodes(value, values) for value in (call.tensors, call.numbers))
    return call._replace(tensors=tensors, numbers=numbers)


def _as_nodes(value: Any, values: dict[int, fx.Node]) -> Any:
    if isinstance(value, tuple):
        items = [_as_nodes(item, values) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return tuple(_as_nodes(item, values) for item in value)
    return values[id(value)] if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat)) else value


def _without_guards(node: fx.Node) -> Any:
    """Nothing that is asked of a symbol here may become a guard."""
    for n in node.all_input_nodes:
        value = tensor_of(n)
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            # Some versions of torch can only leave guards out.
            return getattr(mode.shape_env, "error_on_new_guards", mode.shape_env.suppress_guards)()
    return nullcontext()


Arguments = tuple[Callable[..., Any] | None, Any, Any]
NOTHING: Arguments = (None, (), {})


def _arguments(node: fx.Node) -> Arguments:
    """Our function for a node, and its arguments."""
    if name_of(node) == "mean":
        return _mean(node)
    if node.op != "call_function":
        return NOTHING
    if node.target in functions():
        return functions()[node.target], node.args, node.kwargs
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        return _aten(node, node.target)
    return _deformable(node) if name_of(node) == "deform_conv2d" else NOTHING


def _mean(node: fx.Node) -> Arguments:
    """A mean over all axes of a batch of images but the first two."""
    given = bind(node, ("input", "dim", "keepdim")) or {}
    x, dim = tensor_of(given.get("input")), given.get("dim")
    if x is None or x.dim() not in (3, 4, 5) or not x.is_floating_point() or not isinstance(dim, (tuple, list, int)):
        return NOTHING
    axes = (dim,) if isinstance(dim, int) else dim
    if not all(type(d) is int for d in axes) or sorted(d % x.dim() for d in axes) != list(range(2, x.dim())):
        return NOTHING
    return global_average, (given["input"], bool(given.get("keepdim", False))), {}


# Arguments of aten's operators under the names of torch.nn.functional's functions.
RENAMED = {"self": "input", "cudnn_enabled": None, "cudnn_enable": None}


def _aten(node: fx.Node, overload: OpOverload) -> Arguments:
    name = name_of(node)
    schema = overload._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    if name == "convolution":
        return _convolution(given)
    if name.startswith(("upsample_", "_upsample_")):
        return _upsample(name, given)
    ours = getattr(functional, name, None)
    if ours is None or name not in NAMES:
        return NOTHING
    if given.get("stride") == []:
        given["stride"] = None
    return ours, (), {key: v for old, v in given.items() if (key := RENAMED.get(old, old)) is not None}


def _deformable(node: fx.Node) -> Arguments:
    """torchvision's deformable convolution: the function, or the operator that it calls."""
    if (getattr(node.target, "__module__", None) or "").startswith("torchvision."):
        return functional.deform_conv2d, node.args, node.kwargs
    if str(getattr(node.target, "namespace", "torchvision")) != "torchvision" or len(node.args) != 14:
        return NOTHING
    x, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, _groups, _offset_groups, masked = node.args
    args = (x, offset, weight, bias, (sh, sw), (ph, pw), (dh, dw), mask if masked else None)
    return functional.deform_conv2d, args, {}


def _convolution(given: dict[str, Any]) -> Arguments:
    """aten.convolution, of which conv and conv_transpose are made."""
    nd = len(given["stride"])
    kind = "conv_transpose" if given["transposed"] else "conv"
    named = {key: given[key] for key in ("input", "weight", "bias", "stride", "padding", "dilation", "groups")}
    if given["transposed"]:
        named["output_padding"] = given["output_padding"]
    return getattr(functional, f"{kind}{nd}d"), (), named


NATIVE_NORMS = ("_native_batch_norm_legit_no_training", "native_group_norm", "native_layer_norm")


def _native_norm(node: fx.Node) -> tuple[FamilyCall | None, fx.Node]:
    """A norm of core aten, whose first result alone is read: its call, and that result."""
    end = only_user(node)
    if end is None or end.target is not operator.getitem or end.args[1] != 0 or node.kwargs:
        return None, node
    name, args = name_of(node), node.args
    call: FamilyCall | None = None
    if name == "_native_batch_norm_legit_no_training" and len(args) == 7:
        x, weight, bias, mean, var, _, eps = args
        call = FamilyCall("batch_norm", (x, mean, var, weight, bias, None), ((False, 0.0, eps), None, ""))  # type: ignore[arg-type]
    elif name == "native_group_norm" and len(args) == 8:
        x, weight, bias, _, _, _, groups, eps = args
        call = FamilyCall("group_norm", (x, weight, bias, None, None, None), ((groups, eps), None))  # type: ignore[arg-type]
    elif name == "native_layer_norm" and len(args) == 5 and len(args[1]) == 1:  # type: ignore[arg-type]
        x, shape, weight, bias, eps = args
        call = FamilyCall("layer_norm", (x, weight, bias, None, None, None), ((tuple(shape), eps), None))  # type: ignore[arg-type]
    return call, end


MODES = {name.replace("-", "_"): name for name in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")}


def _upsample(name: str, given: dict[str, Any]) -> Arguments:
    """aten.upsample_<mode>, as torch.nn.functional.interpolate calls it."""
    mode = MODES.get(name.lstrip("_").removeprefix("upsample_").rstrip("123d"))
    if mode is None or "scale_factors" not in given:
        return NOTHING
    corners = {"align_corners": given["align_corners"]} if "align_corners" in given else {}
    x = given.get("input", given.get("self"))
    return functional.interpolate, (x, given.get("output_size"), given["scale_factors"], mode), corners
