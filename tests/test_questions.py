"""A forward that asks what a value is: its stand-in would answer wrongly, so that no graph may replace the forward."""

from __future__ import annotations

import copy
import functools
from typing import Any

import helpers_of_forwards as helpers
import pytest
import torch
from torch import Tensor, fx, nn

import tritonconv


def by_jit(x: Any) -> bool:
    return torch.jit.isinstance(x, Tensor)


def by_imported_jit(x: Any) -> bool:
    from torch.jit import isinstance as is_instance

    return is_instance(x, Tensor)


def by_class(x: Any) -> bool:
    return type(x) is Tensor


def by_membership(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def by_name(x: Any) -> bool:
    return type(x).__name__ == "Tensor"


def by_subclass(x: Any) -> bool:
    return issubclass(type(x), Tensor)


def by_override(x: Any) -> bool:
    return not torch.overrides.has_torch_function((x,))


def by_callable(x: Any) -> bool:
    return not callable(x)


def by_proxy(x: Any) -> bool:
    return not isinstance(x, fx.Proxy)


def by_text_of_a_number(x: Any) -> bool:
    return f"rank {x.dim()}" == "rank 4"


def by_format(x: Any) -> bool:
    return "{} {:d}".format("rank", x.dim()) == "rank 4"


def by_str(x: Any) -> bool:
    return str(x.dim()) == "4"


def by_percent(x: Any) -> bool:
    return "rank %s" % x.dim() == "rank 4"  # noqa: UP031


def by_repr(x: Any) -> bool:
    return repr(x.shape).startswith("torch.Size")


def by_typename(x: Any) -> bool:
    return torch.typename(x) == "torch.FloatTensor"


def by_tracing(x: Any) -> bool:  # noqa: ARG001
    return not torch.fx._symbolic_trace.is_fx_tracing()


def by_helper(x: Any) -> bool:
    return helpers.is_a_tensor(x)


def by_closure() -> Any:
    ask = type

    def asks(x: Any) -> bool:
        return ask(x) is Tensor

    return asks


@functools.singledispatch
def by_dispatch(x: Any) -> bool:  # noqa: ARG001
    return False


by_dispatch.register(Tensor, lambda _: True)


def by_match(x: Any) -> bool:
    match x:
        case Tensor():
            return True
    return False


def by_isinstance(x: Any) -> bool:
    return isinstance(x, Tensor)


def by_is_tensor(x: Any) -> bool:
    return torch.is_tensor(x)


QUESTIONS = [
    by_jit, by_imported_jit, by_class, by_membership, by_name, by_subclass, by_override, by_callable, by_proxy,
    by_text_of_a_number, by_format, by_str, by_percent, by_repr, by_typename, by_tracing, by_helper, by_closure(),
    by_dispatch, by_match, by_isinstance, by_is_tensor,
]  # fmt: skip


class Asks(nn.Module):
    """Takes its skip connection only where the question has the right answer."""

    def __init__(self, question: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return y + x if self.question(x) else y


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_branch_goes_the_way_that_it_goes_with_tensors(question: Any, training: bool) -> None:
    model, x = Asks(question).train(training), torch.randn(2, 4, 5, 5)
    assert question(x) is True
    converted = tritonconv.convert(model)
    torch.testing.assert_close(converted(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)


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
