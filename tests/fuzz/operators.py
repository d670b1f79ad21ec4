"""Random calls of every public operator: call i of a run follows from (seed, i) alone."""

from __future__ import annotations

import copy
import traceback
from random import Random
from typing import Any

import torch

from . import convolutions, images, norms
from .call import Call, WrongError, check
from .draw import Draw
from .views import DTYPES, Input

__all__ = ["NAMES", "OPERATORS", "run"]

OPERATORS = convolutions.OPERATORS | norms.OPERATORS | images.OPERATORS
NAMES = tuple(OPERATORS)
# Of calls whose errors are torch's.
SPOILED = 0.06
WRONG_NUMBERS = (0, -1, 5, 1.5, "1", None, (1, 1, 1, 1), [])


def run(seed: int, i: int) -> dict[str, Any]:
    """What came of call i: a line of the log."""
    r = Random(f"{seed}/{i}")
    name = NAMES[i % len(NAMES)]
    dtype = r.choice(list(DTYPES))
    d = Draw(r, DTYPES[dtype])
    torch.manual_seed(r.getrandbits(32))
    call = OPERATORS[name](d)
    first = next(given for given in call.inputs.values() if given is not None)
    spoiled = spoil(call, r) if call.exact and r.random() < SPOILED else ""
    record = dict(operator=name, dtype=str(d.dtype)[6:], layout=first.layout, backend="", result="right", why="")
    try:
        check(call, r, d.dtype)
    except WrongError as wrong:
        record |= dict(result="wrong", why=f"{wrong}; {spoiled}{call.describe()}")
    except Exception:
        record |= dict(result="crash", why=f"{traceback.format_exc(limit=-4)}; {spoiled}{call.describe()}")
    return record | dict(backend=call.backend)


def spoil(call: Call, r: Random) -> str:
    """Make an argument wrong, perhaps so that torch raises; what was changed."""
    numbers = [n for n, v in call.arguments.items() if not isinstance(v, (str, bool))]
    tensors = [n for n, i in call.inputs.items() if i is not None]
    name = r.choice(numbers + tensors)
    if name in call.arguments:
        call.arguments[name] = r.choice(WRONG_NUMBERS)
        call.kernel = False
        return f"{name} spoiled; "
    given = copy.copy(call.inputs[name])
    assert isinstance(given, Input)
    shape = list(given.shape)
    change = r.choice(("longer", "axis", "none"))
    if change == "longer" and shape:
        shape[r.randrange(len(shape))] += 1
    elif change == "axis":
        shape = [2, *shape] if r.random() < 0.5 else shape[1:]
    else:
        call.inputs[name] = None
    if isinstance(given.values, str) and call.inputs[name] is not None:
        given.shape = tuple(shape)
        call.inputs[name] = given
    call.kernel = False
    return f"{name} spoiled ({change}); "
