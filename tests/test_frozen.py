"""State that a forward reads may change between two calls, and its side effects happen at each call."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import logging
import os
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrix import rotate
from torch import Tensor, nn

import tritonconv


class Mode(enum.Enum):
    PLAIN = 1
    NEGATIVE = -1


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    more: Any = None


class Named(dict):  # type: ignore[type-arg]
    """A dictionary of the user's making."""


class Doubled:
    factor = 2.0


class Tripled:
    factor = 3.0


class Reads(nn.Module):
    """act(bn(conv(x))), and whatever `read` makes of it and of what the module holds."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], held: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.read = read
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.relu(self.bn(self.conv(x))))


def put(value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, "held", value)


# What the module holds, what its forward makes of it, and what changes later.
CHANGES: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], Callable[[Any], None]]] = {
    "enum": (Mode.PLAIN, lambda m, y: y * m.held.value, put(Mode.NEGATIVE)),
    "bound method": (F.relu, lambda m, y: m.held(y), lambda m: setattr(m, "held", m.bn.forward)),
    "partial": (functools.partial(F.leaky_relu, negative_slope=0.5), lambda m, y: m.held(y - 1), put(
        functools.partial(F.leaky_relu, negative_slope=0.1))),
    "partial's keywords": (functools.partial(F.leaky_relu, negative_slope=0.5), lambda m, y: m.held(y - 1),
        lambda m: m.held.keywords.update(negative_slope=0.1)),
    "class": (Doubled, lambda m, y: y * m.held.factor, put(Tripled)),
    "numpy scalar": (np.float32(2), lambda m, y: y * float(m.held), put(np.float32(3))),
    "numpy array": (np.array([2.0, 3.0]), lambda m, y: y * float(m.held[0]), lambda m: m.held.fill(5)),
    "fraction": (Fraction(1, 2), lambda m, y: y * float(m.held), put(Fraction(1, 3))),
    "range": (range(2), lambda m, y: sum((y * i for i in m.held), y), put(range(4))),
    "slice": (slice(0, 2), lambda m, y: y[:, m.held], put(slice(0, 3))),
    "tensor's item": (torch.tensor(2.0), lambda m, y: y * m.held.item(), put(torch.tensor(3.0))),
    "tensor's item, in place": (torch.tensor(2.0), lambda m, y: y * float(m.held), lambda m: m.held.fill_(3.0)),
    "empty list": ([], lambda m, y: y * (1 + len(m.held)), lambda m: m.held.append(1)),
    "empty dict": ({}, lambda m, y: y * (1 + len(m.held)), lambda m: m.held.update(a=1)),
    "list in a tuple": (([1.0],), lambda m, y: y * m.held[0][0], lambda m: m.held[0].append(2.0) or m.held[0].pop(0)),
    "deque": (deque([2.0]), lambda m, y: y * m.held[-1], lambda m: m.held.append(3.0)),
    "ordered dict": (OrderedDict(a=2.0, b=3.0), lambda m, y: y * next(iter(m.held.values())),
        lambda m: m.held.move_to_end("a")),
    "default dict": (defaultdict(lambda: 1.0), lambda m, y: y * m.held.get("a", 2.0), lambda m: m.held["a"]),
    "dict subclass": (Named(a=2.0), lambda m, y: y * m.held["a"], lambda m: m.held.update(a=3.0)),
    "user dict": (UserDict(a=2.0), lambda m, y: y * m.held.data["a"], lambda m: m.held.update(a=3.0)),
    "dataclass replaced": (Options(2.0), lambda m, y: y * m.held.scale, put(Options(3.0))),
    "dataclass replaced by its equal, then changed": (Options(2.0), lambda m, y: y * m.held.scale,
        lambda m: (setattr(m, "held", Options(2.0)), m(torch.zeros(1, 3, 5, 5)), setattr(m.held, "scale", 3.0))),
    "dataclass changed": (Options(2.0), lambda m, y: y * m.held.scale, lambda m: setattr(m.held, "scale", 3.0)),
    "dataclass in a dataclass": (Options(more=Options(2.0)), lambda m, y: y * m.held.more.scale,
        lambda m: setattr(m.held.more, "scale", 3.0)),
    "list in a dataclass": (Options(more=[2.0]), lambda m, y: y * m.held.more[0],
        lambda m: m.held.more.__setitem__(0, 3.0)),
    "builtin": (torch.relu, lambda m, y: m.held(y - 1), put(torch.sigmoid)),
    "layer's own number": (None, lambda m, y: y * m.conv.padding[0], lambda m: setattr(m.conv, "padding", (1, 1))),
    "computed name": (2.0, lambda m, y: y * getattr(m, "he" + "ld"), put(3.0)),
}  # fmt: skip


@rotate(training=[False, True], name=CHANGES)
def test_a_change_is_seen_at_the_next_call(name: str, training: bool) -> None:
    held, read, change = CHANGES[name]
    original = Reads(read, copy.deepcopy(held)).train(training)
    converted = tritonconv.convert(original)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)
        change(original)
        change(converted)
        torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)


def test_an_activation_put_in_the_place_of_a_module_is_seen() -> None:
    original, x = Reads(lambda _, y: y, None).eval(), torch.randn(1, 3, 5, 5)
    converted = tritonconv.convert(original)
    converted(x)
    for model in (original, converted):
        del model.relu
        model.relu = torch.sigmoid
    torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


INCOMPARABLE: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], Callable[[Any], None]]] = {
    "an object without a dictionary": (Slots(2.0), lambda m, y: y * m.held.value, lambda m: setattr(m.held, "value", 3.0)),
    "a large array": (np.ones(100_000), lambda m, y: y * float(m.held[0]), lambda m: m.held.fill(3)),
    "an array of objects": (np.array([Fraction(2)]), lambda m, y: y * float(m.held[0]),
        lambda m: m.held.__setitem__(0, Fraction(3))),
    "an object by a computed name": (Slots(2.0), lambda m, y: y * getattr(m, "he" + "ld").value,
        lambda m: setattr(m.held, "value", 3.0)),
    "a logger": (logging.getLogger("test"), lambda m, y: y * m.held.level, lambda m: m.held.setLevel(7)),
}  # fmt: skip


@rotate(training=[False, True], name=INCOMPARABLE)
def test_any_object_may_be_read_and_changed(name: str, training: bool) -> None:
    held, read, change = INCOMPARABLE[name]
    original, x = Reads(read, copy.deepcopy(held)).train(training), torch.randn(1, 3, 5, 5)
    converted = tritonconv.convert(original)
    torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)
    change(original)
    change(converted)
    torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)


FACTOR = 2.0
CALLS: list[int] = []


class ClassAttribute(Reads):
    factor = 2.0


def of_a_class(_: Any, y: Tensor) -> Tensor:
    return y * ClassAttribute.factor


def of_a_global(_: Any, y: Tensor) -> Tensor:
    return y * FACTOR


def of_the_environment(_: Any, y: Tensor) -> Tensor:
    return y * float(os.environ.get("TRITONCONV_TEST_FACTOR", "2"))


UNSEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[pytest.MonkeyPatch], None]]] = {
    "class attribute": (of_a_class, lambda patch: patch.setattr(ClassAttribute, "factor", 3.0)),
    "global": (of_a_global, lambda patch: patch.setitem(globals(), "FACTOR", 3.0)),
    "environment": (of_the_environment, lambda patch: patch.setenv("TRITONCONV_TEST_FACTOR", "3")),
}


@rotate(training=[True, False], name=UNSEEN)
def test_what_lies_outside_of_the_modules_is_seen(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read, change = UNSEEN[name]
    original, x = Reads(read, None).train(training), torch.randn(1, 3, 5, 5)
    converted = tritonconv.convert(original)
    converted(x)
    change(monkeypatch)
    torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-5)


def appending(_: Any, y: Tensor) -> Tensor:
    CALLS.append(len(y))
    return y


def counting(m: Any, y: Tensor) -> Tensor:
    m.held += 1
    return y * m.held


def printing(m: Any, y: Tensor) -> Tensor:
    print("called", m.held)
    return y


def warning(m: Any, y: Tensor) -> Tensor:
    warnings.warn(f"called with {m.held}", stacklevel=1)
    return y


def setting(m: Any, y: Tensor) -> Tensor:
    m.features = y
    return y


@rotate(training=[False, True], effect=[appending, counting, printing, warning, setting])
def test_side_effects_happen_at_each_call(
    effect: Callable[[Any, Tensor], Tensor], training: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Reads(effect, 0).train(training)
    converted = tritonconv.convert(original)
    images, seen = [torch.randn(i, 3, 5, 5) for i in (1, 2, 3)], []
    for model in (original, converted):
        CALLS.clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            values = [v for x in images for v in (model(x), getattr(model, "features", None))]
        seen.append((list(CALLS), model.held, capsys.readouterr().out, [str(w.message) for w in warned], values))
    assert seen[1][:-1] == seen[0][:-1]
    torch.testing.assert_close(seen[1][-1], seen[0][-1], rtol=1e-4, atol=1e-5)
