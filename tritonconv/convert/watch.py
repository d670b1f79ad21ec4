"""Everything in a module tree that a traced graph took for granted, and whether it still holds."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import torch

from tritonconv.convert.snapshot import IncomparableError, freeze, is_quick, quick_copy
from tritonconv.convert.state import is_record
from tritonconv.convert.swap import MARK
from tritonconv.convert.witness import ANY_NAME
from tritonconv.fused.call import HOOKS

__all__ = ["Watch", "check_comparable"]

OWN_ATTRIBUTES = {*torch.nn.Module().__dict__, "forward", MARK}
MOST_OBJECTS = 100


class _Members(NamedTuple):
    """What is watched of one dictionary: of a module, or of an object of the user's that modules hold."""

    state: dict[str, Any]
    quick: dict[str, Any]
    slow: dict[str, Any]
    objects: dict[str, Any]


def _walk(state: dict[str, Any], mentioned: frozenset[str], seen: set[int]) -> Iterator[_Members]:
    """Members that code may read which mentions these names, but for torch's own and ours; the same of objects in them."""
    members = _Members(state, {}, {}, {})
    for name, value in state.items():
        if name in OWN_ATTRIBUTES or not (mentioned is ANY_NAME or name in mentioned):
            continue
        # Options often lie in an object that all modules share.
        kind = members.quick if is_quick(value) else members.objects if is_record(value) else members.slow
        kind[name] = value
    yield members
    for value in members.objects.values():
        if id(value) not in seen and len(seen) < MOST_OBJECTS:
            seen.add(id(value))
            yield from _walk(value.__dict__, mentioned, seen)


def check_comparable(modules: Iterable[torch.nn.Module], mentioned: frozenset[str]) -> None:
    """Raise IncomparableError where these modules hold something that their forwards may read and no one can compare."""
    # Where names are computed, most of what lies deep inside of objects is read by no one.
    deep = None if mentioned is not ANY_NAME else 1
    seen: set[int] = set()
    for module in modules:
        for members in islice(_walk(module.__dict__, mentioned, seen), deep):
            for name, value in members.slow.items():
                try:
                    freeze(value)
                except IncomparableError as error:
                    holder = type(module).__name__
                    raise IncomparableError(f"{holder} holds {error} in {name}, whose changes cannot be seen") from None


class Watch:
    """Attributes, children, hooks and modes of the modules that one program stands for.

    Args:
        root: the module whose forward was traced.
        inlined: modules whose own forwards ran in the trace, and their training flags.
        hooked: modules that carried hooks.
        mentioned: names of attributes that their code may read.
    """

    def __init__(
        self, root: torch.nn.Module, inlined: Sequence[torch.nn.Module], training: tuple[bool, ...],
        hooked: Iterable[torch.nn.Module], mentioned: frozenset[str],
    ) -> None:  # fmt: skip
        self.inlined, self.flags = inlined, training
        self.free = [getattr(module, name) for module in inlined if module is not root for name in HOOKS]
        self.hooked = [[getattr(module, name) for name in HOOKS] for module in hooked]
        self.children = [module._modules for module in inlined]
        self.had_children = [dict(children) for children in self.children]
        self.quick: list[tuple[dict[str, Any], int | None, operator.itemgetter[str], tuple[Any, ...]]] = []
        self.slow: list[tuple[dict[str, Any], str, Any]] = []
        self.objects: list[tuple[dict[str, Any], str, object]] = []
        seen: set[int] = set()
        for module, flag in zip(inlined, training, strict=True):
            for members in _walk(module.__dict__, mentioned, seen):
                size, own = len(members.state), members.state is module.__dict__
                if own:
                    # The root may get its FusedForward only now.
                    size += module is root and "forward" not in module.__dict__
                self._add(members, size, [("training", flag)] if own else [])
        if mentioned is not ANY_NAME:
            self._add_leaves(root, mentioned)

    def _add(self, members: _Members, size: int | None, also: list[tuple[str, Any]]) -> None:
        """Watch these members of a dictionary that has so many."""
        state, quick, slow, objects = members
        self.objects += [(state, name, value) for name, value in objects.items()]
        for name, value in slow.items():
            # As in `check_comparable`, which has let it pass.
            with suppress(IncomparableError):
                self.slow.append((state, name, freeze(value)))
        pairs = [*also, *quick.items()]
        if pairs:
            # Two names at least, so that the getter gives a tuple.
            names, values = zip(pairs[0], *pairs, strict=True)
            self.quick.append((state, size, operator.itemgetter(*names), tuple(map(quick_copy, values))))

    def _add_leaves(self, root: torch.nn.Module, mentioned: frozenset[str]) -> None:
        """Numbers of layers that code around them reads: `self.conv.stride`."""
        inlined = {id(module) for module in self.inlined}
        for module in root.modules():
            if id(module) not in inlined:
                members = next(_walk(module.__dict__, mentioned, set()))
                # They may get a FusedForward of their own.
                self._add(members._replace(slow={}, objects={}), None, [])

    def hooks_hold(self) -> bool:
        """Whether hooks are where they were when the module was traced."""
        return not any(self.free) and all(any(hooks) for hooks in self.hooked)

    def holds(self) -> bool:
        """Whether all is as it was."""
        if any(self.free) or self.children != self.had_children or not all(any(hooks) for hooks in self.hooked):
            return False
        try:
            # Cheaper than a generator, for this runs at every call.
            for state, size, read, expected in self.quick:
                if read(state) != expected or (size is not None and len(state) != size):
                    return False
            for state, name, held in self.objects:
                if state[name] is not held:
                    return False
            for state, name, frozen in self.slow:
                if freeze(state[name]) != frozen:
                    return False
        # An attribute may be gone, become something else, or compare to something that has no truth.
        except (IncomparableError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        return True

    def has_mode(self) -> bool:
        """Whether every module that the program stands for is in training or eval mode as it was."""
        return all(module.training == flag for module, flag in zip(self.inlined, self.flags, strict=True))
