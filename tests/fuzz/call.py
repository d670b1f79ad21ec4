"""One call of an operator: run on ours and on torch in fp64, and everything compared that a caller can see."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from conftest import poisoning
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonconv
from tritonconv.measure.check import EPS, compare
from tritonconv.ops.core.layout import dense_strides

from .views import LAYOUTS, Input

__all__ = ["Call", "WrongError", "check", "significant"]

REFUSED = "backend 'triton' was asked for, but"


class WrongError(Exception):
    """What is wrong with a result."""


class FarError(WrongError):
    """Its values are off."""


@dataclass
class Call:
    """A drawn call: a function of ours and its reference, which take the same tensors and arguments."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: dict[str, Input | None]
    """By the names of ours; those of None are passed as None."""
    arguments: dict[str, Any] = field(default_factory=dict)
    nd: int = 2
    """Spatial dimensions."""
    exact: bool = True
    """Whether the reference is torch's function of that name, whose errors and strides are ours."""
    kernel: bool = True
    """Whether a kernel takes this call, so that torch must not run it."""
    backend: str = "auto"
    """Drawn by `check`."""
    slack: float = 1.0
    """How many times the bound an error may be, where intermediate results are rounded to the call's type."""
    cancels: float = 1.0
    """How many times more an error of a gradient may be, whose terms take each other away but for a small rest."""
    rounding: tuple[str, ...] = ()
    """Inputs whose gradient is zero but for rounding errors."""

    def describe(self) -> str:
        tensors = ", ".join(
            f"{name}={'None' if i is None else f'{list(i.shape)} {str(i.view.dtype)[6:]} {i.layout} {i.view.stride()}'}"
            for name, i in self.inputs.items()
        )
        return f"{tensors}, {self.arguments}"


Gradients = dict[str, Tensor | None]


@dataclass
class Outcome:
    """What a run gave."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]
    written: dict[str, Tensor]
    error: Exception | None = None


def check(call: Call, r: Random, dtype: torch.dtype) -> None:
    """Run a call on both sides.

    Raises:
        WrongError: they differ.
    """
    for given in call.inputs.values():
        if given is not None:
            given.make(r, dtype)
    floating = [n for n, i in call.inputs.items() if i is not None and i.differentiable and i.view.is_floating_point()]
    wanted = [name for name in floating if r.random() < 0.6] if r.random() < 0.5 else []
    call.backend = r.choice(("triton", "auto")) if call.kernel else "auto"
    layouts = [r.choice(LAYOUTS) for _ in range(4)]
    seed = r.getrandbits(32)

    def run(function: Callable[..., Any], tensors: dict[str, Tensor | None], wide: bool) -> Outcome:
        torch.manual_seed(seed)
        return _run(call, function, tensors, wanted, layouts, Random(seed), wide)

    expected = run(call.reference, {n: None if i is None else i.dense() for n, i in call.inputs.items()}, True)
    before = {n: i.memory.clone() for n, i in call.inputs.items() if i is not None}
    with warnings.catch_warnings(), tritonconv.set_backend(call.backend), poisoning():
        warnings.simplefilter("ignore")
        got = run(call.ours, {n: None if i is None else i.view for n, i in call.inputs.items()}, False)
    if got.error is None or not _is_torchs(call, got.error):
        _compare_errors(call, got, expected)
    _compare_memory(call, before, failed=got.error is not None)
    if expected.error is got.error is None:
        try:
            _compare_values(call, got, expected, dtype)
        except FarError:
            # Where terms cancel, as in a filter's gradient before a batch norm, torch's own error says how much is left.
            same = {n: None if i is None else i.copied(i.view.dtype) for n, i in call.inputs.items()}
            narrow = run(call.reference, same, True)
            if call.exact or not _as_near(*(_by_name(outcome) for outcome in (got, expected, narrow))):
                raise
        _compare_strides(call, got, wanted)


def _run(
    call: Call, function: Callable[..., Any], tensors: dict[str, Tensor | None], wanted: list[str], layouts: list[str],
    r: Random, wide: bool,
) -> Outcome:  # fmt: skip
    leaves = {n: t.detach().requires_grad_() if t is not None and n in wanted else t for n, t in tensors.items()}
    written = {n: t for n, t in leaves.items() if t is not None and call.inputs[n].written}  # type: ignore[union-attr]
    try:
        outputs = _results(call, function, leaves)
        return Outcome(outputs, _gradients(outputs, {n: leaves[n] for n in wanted}, layouts, r, wide), written)
    except Exception as error:
        return Outcome((), {}, written, error)


def _gradients(
    outputs: tuple[Tensor, ...], leaves: dict[str, Any], layouts: list[str], r: Random, wide: bool
) -> dict[str, Tensor | None]:
    pairs = [(y, layout) for y, layout in zip(outputs, layouts, strict=False) if y.requires_grad]
    if not pairs:
        return {}
    dys = [_gradient(y, layout, r, wide) for y, layout in pairs]
    found = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), dys, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _gradient(y: Tensor, layout: str, r: Random, wide: bool) -> Tensor:
    """A gradient of y: of multiples of 1/16 that every type holds."""
    torch.manual_seed(r.getrandbits(32))
    dy = Input(tuple(y.shape), layout, values="sixteenths")
    dy.make(r, y.dtype)
    return dy.dense() if wide else dy.view


def _is_torchs(call: Call, error: Exception) -> bool:
    """Whether torch raises the same for these very types: some of its CPU functions have no half precision."""
    if not call.exact:
        return False
    tensors = {n: None if i is None else i.copied(i.view.dtype) for n, i in call.inputs.items()}
    try:
        _results(call, call.reference, tensors)
    except Exception as theirs:
        return type(theirs) is type(error)
    return False


def _compare_errors(call: Call, got: Outcome, expected: Outcome) -> None:
    ours, theirs = got.error, expected.error
    if ours is None and theirs is None:
        return
    if ours is None:
        raise WrongError(f"torch raises {type(theirs).__name__} ({theirs}), and ours does not")
    if theirs is None:
        raise WrongError(f"ours raises {type(ours).__name__}: {ours}") from ours
    if call.exact and type(ours) is not type(theirs):
        raise WrongError(f"ours raises {type(ours).__name__} ({ours}), torch {type(theirs).__name__} ({theirs})") from ours


def _compare_memory(call: Call, before: dict[str, Tensor], failed: bool) -> None:
    """Nothing may be written but what the call is to write."""
    for name, memory in before.items():
        given = call.inputs[name]
        assert given is not None
        after = given.memory
        if given.written and not failed:
            after = after.clone()
            view, old = (
                t.as_strided(given.view.shape, given.view.stride(), given.view.storage_offset()) for t in (after, memory)
            )
            view.copy_(old)
        if not torch.equal(after.nan_to_num(123.0), memory.nan_to_num(123.0)):
            raise WrongError(f"{name} was written{' though the call failed' if failed else ''}")


def _compare_values(call: Call, got: Outcome, expected: Outcome, dtype: torch.dtype) -> None:
    if len(got.outputs) != len(expected.outputs):
        raise WrongError(f"{len(got.outputs)} results, expected {len(expected.outputs)}")
    depth = max(1, *(i.view.numel() for i in call.inputs.values() if i is not None))
    for k, (out, ref) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        type_ = dtype if ref.is_floating_point() else ref.dtype
        if call.exact and out.dtype != type_:
            raise WrongError(f"result {k} has {out.dtype}, expected {type_}")
        if out.requires_grad != ref.requires_grad:
            raise WrongError(f"result {k}: requires_grad is {out.requires_grad}, expected {ref.requires_grad}")
        _close(f"result {k}", out.detach(), ref.detach(), depth, call, dtype)
    for name, ref in expected.written.items():
        _close(f"{name} afterwards", got.written[name], ref, depth, call, dtype)
    for name, ref in expected.gradients.items():
        out = got.gradients[name]
        if (out is None) != (ref is None):
            raise WrongError(f"gradient of {name} is {out}, expected {ref}")
        if out is not None and ref is not None:
            _compare_gradient(call, name, out, ref, depth, dtype)


def _by_name(outcome: Outcome) -> Gradients:
    return {f"result {k}": y.detach() for k, y in enumerate(outcome.outputs)} | outcome.gradients


def _as_near(ours: Gradients, truth: Gradients, theirs: Gradients) -> bool:
    """Whether nothing of ours is off by more than four times what torch's of the same type is off.

    Twice, and twice that since the interpreter cuts bfloat16 off where it should round.
    """
    for name, ref in truth.items():
        out, narrow = ours.get(name), theirs.get(name)
        if (out is None) != (ref is None) or (narrow is None) != (ref is None):
            return False
        if out is not None and ref is not None and narrow is not None:
            error, limit = ((t.double() - ref.double()).abs() for t in (out, narrow))
            if not error.sum() <= 4 * limit.sum():
                return False
    return True


def _compare_gradient(call: Call, name: str, out: Tensor, ref: Tensor, depth: int, dtype: torch.dtype) -> None:
    given = call.inputs[name]
    assert given is not None
    if out.dtype != given.view.dtype or out.shape != given.view.shape:
        raise WrongError(f"gradient of {name} has {out.dtype} and {list(out.shape)}")
    if name in call.rounding:
        if not torch.isfinite(out).all():
            raise WrongError(f"gradient of {name} is not finite")
        return
    _close(f"gradient of {name}", out, ref, depth, call, dtype, call.cancels)


def _close(what: str, out: Tensor, ref: Tensor, depth: int, call: Call, dtype: torch.dtype, more: float = 1.0) -> None:
    if not ref.is_floating_point():
        if out.dtype != ref.dtype or not torch.equal(out, ref):
            raise WrongError(f"{what}: {out.flatten()[:8].tolist()}, expected {ref.flatten()[:8].tolist()}")
        return
    slack = call.slack * more
    if slack != 1 and out.shape == ref.shape and torch.isfinite(ref).all() and torch.isfinite(out).all():
        out = (ref + (out.double() - ref) / slack).to(dtype)
    if ref.numel() and ref.abs().amax() < 1e-12:
        # Nothing but rounding errors: a sum that cancels.
        ref = torch.zeros_like(ref)
        out = torch.where(out.abs() <= 16 * slack * EPS[dtype], 0, out)
    complaint = compare(out, ref, depth=depth).complaint
    if complaint is not None:
        raise FarError(f"{what}: {complaint}")


def _compare_strides(call: Call, got: Outcome, wanted: list[str]) -> None:
    """Strides are those of fake tensors always, and of two dimensions torch's, where its CPU and meta functions agree.

    Of one and three dimensions torch knows channels-last only here and there (on CUDA max_pool3d and conv3d, neither
    avg_pool3d nor conv1d); ours are channels-last wherever an input is.
    """
    found = [significant(y) for y in got.outputs]
    if call.exact:
        for k, (y, theirs) in enumerate(zip(got.outputs, _torchs(call), strict=False)):
            if found[k] != theirs and (call.nd == 2 or found[k] != _channels_last(y, call.nd)):
                raise WrongError(f"result {k}: strides {found[k]}, torch's {theirs}")
    if call.backend == "triton":
        fakes = [significant(y) for y in _faked(call, wanted)]
        if fakes != found:
            raise WrongError(f"strides {found}, of fake tensors {fakes}")


def _torchs(call: Call) -> list[tuple[int, ...]]:
    """Strides of torch's results, where its CPU and meta functions agree; nothing elsewhere.

    In fp32: of other types some CPU functions have no channels-last form.
    """
    narrow = {n: None if i is None else i.copied(torch.float32) for n, i in call.inputs.items()}
    metas = {n: None if t is None else _empty(t, "meta") for n, t in narrow.items()}
    with torch.no_grad():
        try:
            cpu, meta = ([significant(y) for y in _results(call, call.reference, t)] for t in (narrow, metas))
        except RuntimeError:
            # Of 5-d pixel shuffles, and others on the one device or the other.
            return []
    return cpu if cpu == meta else []


def _channels_last(y: Tensor, nd: int) -> tuple[int, ...]:
    """Strides of a channels-last image of that size, with or without a batch."""
    shape = (*(1,) * (nd + 2 - y.dim()), *y.shape)
    return significant(y.new_empty_strided(shape, dense_strides(shape, True)))[-y.dim() :]


def _faked(call: Call, wanted: list[str]) -> tuple[Tensor, ...]:
    """Ours for fake tensors."""
    with FakeTensorMode(), tritonconv.set_backend("triton"):
        fakes = {n: None if i is None else _empty(i.view, "cpu") for n, i in call.inputs.items()}
        leaves = {n: t.requires_grad_() if t is not None and n in wanted else t for n, t in fakes.items()}
        return _results(call, call.ours, leaves)


def _empty(t: Tensor, device: str) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def _results(call: Call, function: Callable[..., Any], tensors: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    return _as_tuple(function(**tensors, **call.arguments))


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def significant(y: Tensor) -> tuple[int, ...]:
    """Strides, but of axes that have one element, or in a tensor that has none."""
    return tuple(0 if n == 1 or y.numel() == 0 else s for n, s in zip(y.shape, y.stride(), strict=True))
