"""A minute of the fuzzer (tests/fuzz, `make fuzz`), and the whole forward path of convolutions on sparse small integers.

Sums of these are exact in every dtype, so that a wrong element cannot hide in a tolerance.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fuzz import networks, operators
from fuzz.runner import run_one
from matrix import TEST_ALL, every, some

import tritonconv
import tritonconv.functional as TF
from tritonconv.ops.core.layout import as_format

# Of each operator so many calls, and so many networks.
ROUNDS, NETWORKS = (3, 20) if TEST_ALL else (1, 5)


def draw(seed: int) -> dict[str, Any]:
    """A random layer, small enough for the interpreter."""
    r = random.Random(seed)
    nd = r.choice([1, 2, 2, 2, 3])
    groups = r.choice([1, 1, 1, 2, 3])
    per_group = r.choice([1, 2, 3, 4, 5, 8, 12, 16, 24, 40, 64, 128])
    kernel = [r.choice([1, 1, 2, 3, 3, 4, 5]) for _ in range(nd)]
    patches = r.random() < 0.15
    stride = kernel if patches else [r.choice([1, 1, 2, 3]) for _ in range(nd)]
    padding = [0] * nd if patches else [r.choice([0, 1, 2]) for _ in range(nd)]
    dilation = [1] * nd if patches else [r.choice([1, 1, 2]) for _ in range(nd)]
    spatial = [max(d * (k - 1) + 1 - 2 * p, 1) + r.randrange(7) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return dict(
        x=(r.choice([1, 2, 3]), groups * per_group, *spatial), w=(groups * r.choice([1, 2, 5, 9, 16]), per_group, *kernel),
        stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation), groups=groups,
        dtype=r.choice(["float32", "float16", "bfloat16", "float64"]), x_cl=r.random() < 0.6, w_cl=r.random() < 0.6,
        bias=r.random() < 0.5, residual=r.random() < 0.3, relu=r.random() < 0.5,
    )  # fmt: skip


def sparse(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    values = torch.randint(-2, 3, shape) * (torch.rand(shape) < 0.3)
    return values.to(device=device, dtype=dtype)


@pytest.mark.usefixtures("on_triton")
@every(seed=some(range(120), 40))
def test_random_layers_are_exact(seed: int, device: str) -> None:
    c = draw(seed)
    torch.manual_seed(seed)
    dtype, nd = getattr(torch, c["dtype"]), len(c["x"]) - 2
    x = as_format(sparse(c["x"], dtype, device), c["x_cl"])
    w = as_format(sparse(c["w"], dtype, device), c["w_cl"])
    bias = sparse((c["w"][0],), dtype, device) if c["bias"] else None
    arguments = {name: c[name] for name in ("stride", "padding", "dilation", "groups")}
    wide = getattr(torch.nn.functional, f"conv{nd}d")(
        x.double(), w.double(), None if bias is None else bias.double(), **arguments
    )
    residual = sparse(tuple(wide.shape), dtype, device) if c["residual"] else None
    if residual is not None:
        wide = wide + residual.double()
    wide = torch.relu(wide) if c["relu"] else wide
    out = getattr(TF, f"conv{nd}d_bn_act")(
        x, w, bias, None, None, None, None, residual=residual, activation="relu" if c["relu"] else None, **arguments
    )
    # bf16 holds integers up to 256.
    exact = wide.abs() <= 256
    assert torch.equal(out.double()[exact], wide[exact]), f"repeat with draw({seed}): {c}"


@pytest.mark.parametrize("name", operators.NAMES)
def test_operators(name: str) -> None:
    for k in range(ROUNDS):
        i = operators.NAMES.index(name) + k * len(operators.NAMES)
        record = operators.run(1, i)
        assert record["operator"] == name
        assert record["result"] == "right", f"python -m tests.fuzz operators --seed 1 --only {i}: {record['why']}"


@pytest.mark.parametrize("i", range(NETWORKS))
def test_networks(i: int) -> None:
    record = networks.run(1, i)
    assert record["result"] == "right", f"python -m tests.fuzz networks --seed 1 --only {i}: {record['why']}"


def test_every_public_operator_is_drawn() -> None:
    assert set(operators.NAMES) == {*TF.__all__, "global_average"}


def test_a_call_follows_from_its_numbers_alone() -> None:
    first, again, other = (operators.run(5, i) for i in (3, 3, 3 + len(operators.NAMES)))
    assert first == again and first["operator"] == other["operator"]
    record = run_one("operators", 5, 3)
    assert record | first == record


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is a little off, one that raises, and a network whose conversion changes it."""
    of_pool = operators.NAMES.index("avg_pool1d")
    right = TF.avg_pool1d
    monkeypatch.setattr(TF, "avg_pool1d", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    assert [operators.run(0, of_pool + k * len(operators.NAMES))["result"] for k in range(2)] == ["wrong", "wrong"]
    monkeypatch.setattr(TF, "avg_pool1d", lambda *_args, **_kwargs: 1 / 0)
    found = operators.run(0, of_pool)
    assert found["result"] == "wrong" and "ZeroDivisionError" in found["why"]
    monkeypatch.setattr(tritonconv, "convert", lambda model: torch.nn.Sequential(model, torch.nn.Dropout(1.0)))
    assert networks.run(0, 0)["result"] == "wrong"
