"""Concatenations, poolings, averages and gates that convert puts together: the same numbers, nobody's memory disturbed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import DenseBlock, EfficientNet, InceptionB

import tritonconv
from tritonconv.fused.join import Join, joined
from tritonconv.ops.core.launch import record_launches


class Written(nn.Module):
    """A forward of its own around two convolutions."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Conv2d(20, 8, 1)
        self.relu, self.pool, self.bn = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.BatchNorm2d(8)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def compared(model: nn.Module, x: Tensor) -> tuple[Any, list[str]]:
    """The converted model's results, compared with the original's in fp64, and its launches."""
    reference, given = copy.deepcopy(model).double().eval(), x.clone()
    converted = tritonconv.convert(model.eval())
    with torch.no_grad(), record_launches() as launches:
        out = converted(x)
        expected = reference(given.double())
    assert_close(x, given.double() if not model.eval() else x.double())
    for ours, theirs in zip(flat(out), flat(expected), strict=True):
        assert_close(ours, theirs, depth=1000)
    return out, launches


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def image(*size: int, device: str) -> Tensor:
    return torch.randn(*(size or (2, 8, 6, 6)), device=device).to(memory_format=torch.channels_last)


def lies_in_one(out: Tensor, parts: list[Tensor]) -> bool:
    return all(part.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for part in parts)


def test_parts_are_written_where_they_belong(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    fill = Join.fill

    def watched(self: Join, place: int, value: Tensor) -> bool:
        result = fill(self, place, value)
        copies.extend([place] * (place in self.copied))
        return result

    monkeypatch.setattr(Join, "fill", watched)
    compared(InceptionB(16).to(device), image(2, 16, 9, 9, device=device))
    assert copies == []
    # The block's input is copied once, for all concatenations that begin with it.
    compared(DenseBlock(16, 8, 3).to(device), image(2, 16, 5, 5, device=device))
    assert set(copies) == {0}


def test_a_dense_block_has_one_tensor(device: str) -> None:
    block = tritonconv.convert(DenseBlock(16, 8, 3).to(device).eval())
    seen: list[Tensor] = []
    x = image(2, 16, 5, 5, device=device)
    original = Join.memory

    def memory(self: Join, *what: Any) -> Tensor | None:
        found = original(self, *what)
        seen.append(found if found is not None else torch.empty(0))
        return found

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Join, "memory", memory)
        y = block(x)
    assert seen and y.shape[1] == 40 and y.is_contiguous(memory_format=torch.channels_last) and lies_in_one(y, seen)


BODIES: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    # Whether the parts may share memory.
    "plain": (lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), True),
    "by keywords": (lambda m, x: m.c(torch.cat(tensors=[m.a(x), m.b(x)], dim=1)), True),
    "the input as a part": (lambda m, x: torch.cat([x, F.relu(m.a(x)), m.pool(m.b(x)).repeat(1, 1, 2, 2)], 1), True),
    "read again": (lambda m, x: (lambda a: m.c(torch.cat([a, m.b(x)], 1)) + m.a(a))(m.a(x)), True),
    "a part changed in place before": (lambda m, x: m.c(torch.cat([m.a(x).mul_(2), m.b(x)], 1)), True),
    "a part changed in place behind": (
        lambda m, x: (lambda a: (torch.cat([a, m.b(x)], 1), a.add_(1))[0])(m.a(x)), False,
    ),
    "the whole changed in place": (lambda m, x: (lambda a: torch.cat([a, m.b(x)], 1).add_(1).sum() + a)(m.a(x)), False),
    "a part is given back": (lambda m, x: (lambda a: (a, torch.cat([a, m.b(x)], 1)))(m.a(x)), False),
    "twice the same part": (lambda m, x: (lambda a: torch.cat([a, a, m.b(x)], 1))(m.a(x)), False),
    "along another axis": (lambda m, x: torch.cat([m.a(x), m.a(x)], 2), False),
    "an activation between": (lambda m, x: torch.cat([m.relu(m.bn(m.a(x))), torch.tanh(m.b(x))], 1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_only_where_nobody_could_tell(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, shares = BODIES[name]
    used: list[Join] = []
    memory = Join.memory
    monkeypatch.setattr(Join, "memory", lambda self, *what: (used.append(self), memory(self, *what))[1])
    out, _ = compared(Written(body).to(device), image(device=device))
    assert bool(used) == shares
    if name == "a part is given back":
        part, whole = out
        part.zero_()
        assert whole[:, :8].abs().sum() > 0


def test_formats_types_gradients_and_compilers(device: str) -> None:
    model = tritonconv.convert(Written(BODIES["plain"][0]).to(device).eval())
    reference = copy.deepcopy(tritonconv.revert(copy.deepcopy(model)))
    x = image(device=device)
    with torch.no_grad():
        expected = reference.double()(x.double())
        # A contiguous image under channels-last weights; gradients; autocast; another size; a compiler.
        for given in (x, x.contiguous(), x[:1], x[..., :4]):
            assert_close(model(given), reference(given.double()), depth=1000)
        with torch.autocast(device, torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16 and (y.double() - expected).abs().max() < 0.1
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected, depth=1000)
    y = model(x)
    assert y.requires_grad
    assert_close(y, expected, depth=1000)
    found = torch.autograd.grad(y.sum(), model.a.weight)[0]
    ref = torch.autograd.grad(reference(x.double()).sum(), reference.a.weight)[0]
    assert_close(found, ref, depth=1000)
    half = tritonconv.convert(Written(BODIES["plain"][0]).to(device).half().eval())
    with torch.no_grad():
        assert half(x.half()).dtype == torch.float16


def test_parts_that_do_not_fit_are_concatenated_by_torch(device: str) -> None:
    join, x = Join((3, 5)), image(2, 3, 4, 4, device=device)
    place = join.memory(0, (2, 3, 4, 4), x.dtype, x.device)
    assert place is not None
    place.copy_(x)
    for other in (image(2, 5, 4, 4, device=device).double(), image(2, 6, 4, 4, device=device)):
        assert torch.equal(joined(join, [place, other]), torch.cat([place, other], 1))
    fits = image(2, 5, 4, 4, device=device)
    whole = joined(join, [place, fits])
    assert whole.data_ptr() == place.data_ptr() and torch.equal(whole, torch.cat([x, fits], 1))


def test_pooling_takes_the_activation_along(device: str) -> None:
    # Convolution, pooling, activation, as many a tutorial has it.
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AvgPool2d(2, 1), nn.SiLU())
    _, launches = compared(model.to(device), image(device=device))
    assert len(launches) == 4 and launches.count("pool_kernel") == 2
    # The convolution has its activation already; what stands before the maximum otherwise is taken behind it.
    body = Written(lambda _, x: F.max_pool2d(F.relu(x + 1), 2) + F.max_pool2d(torch.tanh(x), 2))
    report = tritonconv.explain(tritonconv.convert(body.to(device).eval()), image(device=device)).to_dict()["layers"]
    pools = [(row["reason"], row["fused"]) for row in report if row["kind"] == "max_pool2d"]
    assert pools == [("pool, fused", ["relu"]), ("pool", [])]
    compared(body, image(device=device))


def test_an_activation_in_place_reaches_the_callers_tensor(device: str) -> None:
    model = tritonconv.convert(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)).eval())
    x = image(device=device)
    with torch.no_grad():
        model(x)
    assert (x >= 0).all()


def test_hooks_see_what_they_saw_and_launches_are_shared_again_without_them(device: str) -> None:
    model = EfficientNet().to(device).eval()
    converted = tritonconv.convert(model)
    x = torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad(), record_launches() as launches:
        before = converted(x)
    seen: list[Tensor] = []
    handle = converted.blocks[0].se.gate.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad(), record_launches() as watched:
        y = converted(x)
    assert len(seen) == 1 and len(watched) >= len(launches)
    assert_close(y, before.double(), depth=1000)
    handle.remove()
    with torch.no_grad(), record_launches() as again:
        converted(x)
    assert again == launches
    rows = {row["name"]: row for row in tritonconv.explain(converted, x).to_dict()["layers"]}
    assert rows["head.0"]["fused"] == ["head.1", "head.2", "pool"]
    assert rows["blocks.0.se.conv_reduce"]["reason"].startswith("excite, its first product")
    assert "gated on its way in" in rows["blocks.0.project.0"]["reason"]
    reverted = tritonconv.revert(converted)
    with torch.no_grad(), record_launches() as none:
        reverted(x)
    assert not none


def test_a_whole_network_compiles(device: str) -> None:
    converted = tritonconv.convert(EfficientNet().to(device).eval())
    x = torch.randn(2, 3, 32, 32, device=device)
    with torch.no_grad():
        expected = converted(x)
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected.double(), depth=1000)
