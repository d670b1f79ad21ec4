"""Which combinations run: all of them under `make test-all`, by default a part that stays the same from run to run.

`make test-all` sets TEST_ALL=1. A test that `make test` does not have is run by `TEST_ALL=1 pytest ID`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
Axes = dict[str, Sequence[Any]]
Mark = Callable[[Any], Any]

TEST_ALL = os.environ.get("TEST_ALL", "0") == "1"


def some(values: Iterable[T], count: int) -> list[T]:
    """All values under test-all, by default `count` of them at equal distances: the first, the last, others between."""
    found = list(values)
    if TEST_ALL or len(found) <= count:
        return found
    return [found[i * (len(found) - 1) // max(1, count - 1)] for i in range(count)]


def cover(configs: Iterable[T]) -> list[T]:
    """All configs under test-all, by default so many that every value of every tile keyword occurs.

    Left out are other combinations of these values, and other numbers of warps and stages, which the interpreter does
    not see.
    """
    found = list(configs)
    if TEST_ALL or not found:
        return found
    values = [frozenset(config.kwargs.items()) for config in found]  # type: ignore[attr-defined]
    missing, chosen = set().union(*values), []
    while missing:
        best = max(range(len(found)), key=lambda i: len(values[i] & missing))
        chosen.append(best)
        missing -= values[best]
    return [found[i] for i in sorted(chosen)]


def named(cases: Iterable[T], name: str) -> T:
    """The case of that name."""
    (found,) = (case for case in cases if str(case) in (name, name.replace(" ", "-")))
    return found


def every(axes: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]) -> Mark:
    """Parametrize a test by every combination, by default too.

    Args:
        axes: those whose values are tuples for several arguments, by their names: `{"shape, size": SHAPES}`.
        more: the others.
    """
    lists = _lists(axes, more)
    return _parametrize(lists, list(itertools.product(*lists.values())))


def rotate(axes: Mapping[str, Iterable[Any]] | None = None, /, **more: Iterable[Any]) -> Mark:
    """Parametrize a test by every combination under test-all, by default by one for each value of the longest axis.

    The other axes take turns there: each of their values occurs, and each of their combinations before one comes again.
    Left out by default is the rest of the product. Arguments are those of `every`.
    """
    lists = _lists(axes, more)
    return _parametrize(lists, rotated(*lists.values()))


def rotated(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The combinations that `rotate` takes."""
    if TEST_ALL:
        return list(itertools.product(*lists))
    longest = max(range(len(lists)), key=lambda i: len(lists[i]))
    rest = list(itertools.product(*lists[:longest], *lists[longest + 1 :]))
    # Steps of a golden section soon meet each value of each axis, and all combinations if they share no divisor with them.
    step = next(s for s in itertools.count(round(len(rest) * 0.618)) if math.gcd(s, len(rest)) == 1)
    chosen = []
    for i, value in enumerate(lists[longest]):
        others = rest[i * step % len(rest)]
        chosen.append((*others[:longest], value, *others[longest:]))
    for place, values in enumerate(lists):
        missed = [v for v in values if not any(c[place] is v for c in chosen)]
        assert not missed, f"{missed} get no turn: the longest axis has too few values"
    return chosen


def _lists(axes: Mapping[str, Iterable[Any]] | None, more: Mapping[str, Iterable[Any]]) -> Axes:
    return {name: list(values) for name, values in ((axes or {}) | dict(more)).items()}  # type: ignore[operator]


def _parametrize(axes: Axes, combinations: Sequence[tuple[Any, ...]]) -> Mark:
    names = [name.strip() for axis in axes for name in axis.split(",")]
    arguments, ids = [], []
    for combination in combinations:
        # An axis of several arguments gives a tuple of them.
        flat = [value if "," in name else (value,) for name, value in zip(axes, combination, strict=True)]
        arguments.append([value for values in flat for value in values])
        ids.append("-".join(itertools.starmap(_described, zip(names, arguments[-1], strict=True))))
    return pytest.mark.parametrize(names, arguments, ids=ids)


def _described(name: str, value: Any) -> str:
    """A value's part of a test's id: layouts are C and CL."""
    if name.endswith("channels_last"):
        return "CL" if value else "C"
    if name.endswith("_cl"):
        return f"{name[0]}{'CL' if value else 'C'}"
    if hasattr(value, "num_stages"):
        return "x".join(map(str, value.kwargs.values())) + f"w{value.num_warps}s{value.num_stages}"
    if isinstance(value, (bool, type(None))):
        return f"{name}={value}"
    return getattr(value, "__name__", str(value)).removeprefix("torch.").replace(" ", "-")
