"""A forward that asks what a value is gets the answers that it gets without convert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import helpers_of_forwards as helpers
import torch
from matrix import rotate
from torch import Tensor, fx, nn

import tritonconv


def by_imported_jit(_: Any, x: Any) -> bool:
    from torch.jit import isinstance as is_instance

    return is_instance(x, Tensor)


def by_closure() -> Any:
    ask = type
    return lambda _, x: ask(x) is Tensor


@functools.singledispatch
def dispatched(x: Any) -> bool:  # noqa: ARG001
    return False


dispatched.register(Tensor, lambda _: True)


def by_match_of_a_class(_: Any, x: Any) -> bool:
    match x:
        case Tensor():
            return True
    return False


def by_match_of_an_attribute(_: Any, x: Any) -> bool:
    match x:
        case Tensor(ndim=3):
            return False
        case Tensor(ndim=4):
            return True
    return False


def by_match_of_a_shape(_: Any, x: Any) -> bool:
    match tuple(x.shape):
        case (n, 4, *pixels):
            return n == 2 and len(pixels) == 2
    return False


def by_match_of_none(_: Any, x: Any) -> bool:
    match x:
        case None:
            return False
        case _:
            return True


def by_unpacking(_: Any, x: Any) -> bool:
    n, channels, *pixels = x.shape
    return n == 2 and channels == 4 and pixels == [5, 5]


def by_trying_an_attribute(_: Any, x: Any) -> bool:
    try:
        return bool(x.pyramid)
    except AttributeError:
        return True


def by_trying_an_index(_: Any, x: Any) -> bool:
    try:
        return x[2].dim() == 0
    except IndexError:
        return True


def by_trying_to_unpack(_: Any, x: Any) -> bool:
    try:
        a, b, c = x.shape
    except ValueError:
        return True
    return a == b == c


def by_trying_to_convert(_: Any, x: Any) -> bool:
    try:
        return int(x.dim()) == 4
    except TypeError:
        return False


def by_raising(_: Any, x: Any) -> bool:
    try:
        if x.dim() != 3:
            raise ValueError(f"{x.dim()} axes")
    except ValueError as error:
        return str(error) == "4 axes"
    return False


# Each is true for an fp32 tensor of 2x4x5x5 that is contiguous, and needs no gradient.
QUESTIONS: dict[str, Callable[[Any, Any], bool]] = {
    # Its class.
    "torch.jit.isinstance": lambda _, x: torch.jit.isinstance(x, Tensor),
    "jit's, imported": by_imported_jit,
    "type is": lambda _, x: type(x) is Tensor,
    "type in": lambda _, x: type(x) in (Tensor, nn.Parameter),
    "name of the type": lambda _, x: type(x).__name__ == "Tensor",
    "__class__": lambda _, x: x.__class__ == Tensor,
    "issubclass": lambda _, x: issubclass(type(x), Tensor),
    "isinstance": lambda _, x: isinstance(x, Tensor) and not isinstance(x, nn.Parameter),
    "isinstance of one of several": lambda _, x: isinstance(x, (list, tuple, Tensor)),
    "no list": lambda _, x: not isinstance(x, (list, tuple, dict)),
    "has_torch_function": lambda _, x: not torch.overrides.has_torch_function((x,)),
    "callable": lambda _, x: not callable(x),
    "no proxy": lambda _, x: not isinstance(x, fx.Proxy),
    "is_tensor": lambda _, x: torch.is_tensor(x),
    "typename": lambda _, x: torch.typename(x) == "torch.FloatTensor",
    "type()": lambda _, x: x.type() == "torch.FloatTensor",
    "a helper": lambda _, x: helpers.is_a_tensor(x),
    "a closure": by_closure(),
    "singledispatch": lambda _, x: dispatched(x),
    # Its sizes.
    "dim()": lambda _, x: x.dim() == 4,
    "ndim": lambda _, x: x.ndim in (3, 4),
    "len of the shape": lambda _, x: len(x.shape) == 4,
    "channels": lambda m, x: x.shape[1] == m.conv.in_channels,
    "size(-1)": lambda _, x: x.size(-1) == 5,
    "remainder": lambda _, x: x.shape[-1] % 2 == 1,
    "shape": lambda _, x: x.shape == (2, 4, 5, 5),
    "len": lambda _, x: len(x) == 2,
    "least size": lambda _, x: min(x.shape[2:]) < 6,
    "numel": lambda _, x: x.numel() == 200,
    "unpacking": by_unpacking,
    # What its elements are, and where they lie.
    "dtype": lambda _, x: x.dtype is torch.float32,
    "dtype of the weights": lambda m, x: x.dtype == m.conv.weight.dtype,
    "is_floating_point": lambda _, x: x.is_floating_point() and not torch.is_complex(x),
    "finfo": lambda _, x: torch.finfo(x.dtype).bits == 32,
    "device": lambda m, x: x.device == m.conv.weight.device,
    "type of the device": lambda _, x: x.device.type in ("cpu", "cuda"),
    "is_cuda": lambda m, x: x.is_cuda == m.conv.weight.is_cuda,
    "layout": lambda _, x: x.layout is torch.strided and not x.is_sparse and not x.is_nested,
    "is_contiguous": lambda _, x: x.is_contiguous(),
    "no channels-last": lambda _, x: not x.is_contiguous(memory_format=torch.channels_last),
    "stride": lambda _, x: x.stride() == (100, 25, 5, 1),
    "storage_offset": lambda _, x: x.storage_offset() == 0,
    # Modes.
    "training": lambda m, _: m.training == m.bn.training,
    "is_grad_enabled": lambda m, _: torch.is_grad_enabled() == m.training,
    "requires_grad": lambda _, x: not x.requires_grad,
    "grad_fn": lambda _, x: x.grad_fn is None and x.is_leaf,
    "is_inference": lambda _, x: not torch.is_inference_mode_enabled() and not x.is_inference(),
    "is_autocast_enabled": lambda _, x: not torch.is_autocast_enabled(x.device.type),
    "is_scripting": lambda *_: not torch.jit.is_scripting(),
    "is_tracing": lambda *_: not torch.jit.is_tracing(),
    "is_fx_tracing": lambda *_: not torch.fx._symbolic_trace.is_fx_tracing(),
    # Values, which end a graph.
    "bool of a sum": lambda _, x: bool(x.square().sum() > 0),
    "item": lambda _, x: x.detach().abs().max().item() < 1e6,
    "equal": lambda _, x: torch.equal(x, x.clone()),
    "tolist": lambda _, x: len(x.mean((1, 2, 3)).tolist()) == 2,
    # None, attributes, identity.
    "is None": lambda _, x: x is not None,
    "is": lambda m, x: x is not m.conv.weight,
    "hasattr": lambda _, x: hasattr(x, "shape") and not hasattr(x, "pyramid"),
    "getattr": lambda _, x: getattr(x, "stem", None) is None,
    "what the module has": lambda m, _: hasattr(m, "conv") and getattr(m, "head", None) is None,
    "names of the module's children": lambda m, _: "bn" in m._modules and "head" not in dict(m.named_children()),
    # Attempts.
    "try an attribute": by_trying_an_attribute,
    "try an index": by_trying_an_index,
    "try to unpack": by_trying_to_unpack,
    "try to convert": by_trying_to_convert,
    "raise": by_raising,
    # match.
    "match a class": by_match_of_a_class,
    "match an attribute": by_match_of_an_attribute,
    "match a shape": by_match_of_a_shape,
    "match None": by_match_of_none,
    # Text.
    "f-string": lambda _, x: f"rank {x.dim()}" == "rank 4",
    "format": lambda _, x: "{} {:d}".format("rank", x.dim()) == "rank 4",
    "str": lambda _, x: str(x.dim()) == "4",
    "percent": lambda _, x: "rank %s" % x.dim() == "rank 4",  # noqa: UP031
    "text of the shape": lambda _, x: "x".join(str(n) for n in x.shape) == "2x4x5x5",
    "repr of the shape": lambda _, x: repr(x.shape).startswith("torch.Size"),
    "str of the dtype": lambda _, x: str(x.dtype) == "torch.float32",
}


class Asks(nn.Module):
    """Takes its skip connection only where the question has the right answer."""

    def __init__(self, question: Callable[[Any, Any], bool]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return y + x if self.question(self, x) else y


def other() -> Tensor:
    """A tensor for which most questions about sizes, strides and gradients have another answer."""
    x = torch.randn(3, 4, 6, 7).to(memory_format=torch.channels_last)
    return (x.requires_grad_() * 2) if torch.is_grad_enabled() else x


@rotate(training=[False, True], name=QUESTIONS)
def test_a_branch_goes_the_way_that_it_goes_without_convert(name: str, training: bool) -> None:
    original, x = Asks(QUESTIONS[name]).train(training), torch.randn(2, 4, 5, 5)
    converted = tritonconv.convert(original)
    with torch.set_grad_enabled(training):
        assert QUESTIONS[name](original, x) is True
        for image in (x, other()):
            found, expected = converted(image), original(image)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if training:
        results = [(found, converted.conv.weight), (expected, original.conv.weight)]
        ours, theirs = (torch.autograd.grad(y.sin().sum(), weight) for y, weight in results)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Harmless(nn.Module):
    """Asks for types, but never for that of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        name = type(self).__name__
        y = self.bn(self.conv(x))
        if scale < 0:
            raise ValueError(f"{name}: a scale of {type(scale)} must not be negative")
        return self.act(y) if callable(self.act) else y


def test_questions_about_the_module_itself_and_in_error_messages_do_no_harm() -> None:
    report = tritonconv.explain(tritonconv.convert(Harmless().eval()), torch.randn(1, 3, 4, 4))
    assert report.totals["fused"] == 1
