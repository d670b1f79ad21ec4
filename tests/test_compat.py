"""Every kernel once, on small layers in both layouts: what CI runs under the oldest and the newest supported Triton."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import triton
from matrix import every, some
from reference import assert_close

import tritonconv.functional as F
from tritonconv import kernels
from tritonconv.bench import layers
from tritonconv.bench.cases import Case
from tritonconv.bench.registry import operations
from tritonconv.ops.core.launch import device_of, forced, record_launches
from tritonconv.tuning import device_named

H200 = device_named("H200")


@dataclass(frozen=True)
class Choice:
    """A small layer of the benchmarks, and the kernels for which it was chosen."""

    case: Case
    channels_last: bool
    kernels: frozenset[str]

    def __str__(self) -> str:
        return f"{self.case.id} {self.case.pass_} {'CL' if self.channels_last else 'C'}".replace(" ", "-")


@functools.cache
def choices() -> list[Choice]:
    """In each layout the first layers that launch each kernel."""
    device = device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = []
    for channels_last in (True, False):
        seen: set[str] = set()
        for operation in operations().values():
            for pass_ in operation.passes:
                for check in operation.checks():
                    # Of the types that tensor cores take, which some kernels want.
                    case = replace(check, dtype="fp16", pass_=pass_)
                    launches = operation.launches(case, device, None, channels_last)
                    new = {launch.kernel.__name__ for launch in launches} - seen
                    seen |= new
                    if new and operation.backend != "hopper":
                        chosen.append(Choice(case, channels_last, frozenset(new)))
    return chosen


# Under one Triton each kernel has tests of its own besides.
@every(choice=some(choices(), 16))
def test_small_layers_are_right(choice: Choice, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    # Settings of the process stay as they are.
    monkeypatch.setattr(layers, "prepare_torch", lambda: device)
    monkeypatch.setattr(layers, "set_tf32", lambda _: None)
    with torch.no_grad(), record_launches() as launches:
        found = layers.check_layer(choice.case, None, choice.channels_last)
    assert found["status"] == "ok", found["reason"]
    assert choice.kernels <= set(launches)


def decode(device: str) -> None:
    x, state, weight = (torch.randn(shape, device=device) for shape in ((2, 5, 3), (2, 5, 4), (5, 4)))
    known = torch.cat((state, x), 2).double()
    expected = torch.nn.functional.conv1d(known[:, :, 1:], weight.double().unsqueeze(1), groups=5)
    assert_close(F.causal_conv1d_update(x, state, weight), expected)
    assert torch.equal(state.double(), known[:, :, 3:])


def average_in_parts(device: str) -> None:
    x = torch.randn(1, 6, 63, 65, device=device)
    assert_close(F.adaptive_avg_pool2d(x, 1), x.double().mean((-2, -1), keepdim=True))


def add_weight_gradients(device: str) -> None:
    x, dy = torch.randn(2, 16, 40, 32, device=device), torch.randn(2, 24, 40, 32, device=device)
    weight = torch.randn(24, 16, 3, 3, device=device, requires_grad=True)
    with forced(config=importlib.import_module("tritonconv.kernels.conv_wgrad").configs()[6]):
        (found,) = torch.autograd.grad(F.conv2d(x, weight, padding=1), weight, dy)
    wide = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.conv2d(x.double(), wide, padding=1), wide, dy.double())
    assert_close(found, expected, depth=2560)


# Kernels that no small layer launches here: two of them want a GPU with many multiprocessors.
OTHERS: dict[str, Callable[[str], None]] = {
    "causal_update_kernel": decode,
    "global_join_kernel": average_in_parts,
    "wgrad_reduce_kernel": add_weight_gradients,
}


@pytest.mark.parametrize("kernel", OTHERS)
def test_others_are_right(kernel: str, device: str) -> None:
    with torch.enable_grad() if kernel == "wgrad_reduce_kernel" else torch.no_grad():  # noqa: SIM117
        with forced(device=H200), record_launches() as launches:
            OTHERS[kernel](device)
    assert kernel in launches


def test_every_kernel_is_among_them() -> None:
    """Of the folder itself: those for H100 and H200 need Gluon's own interpreter (test_hopper.py)."""
    entries = set()
    for file in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{file.name}")
        functions = {name: getattr(value, "fn", None) for name, value in vars(module).items() if name.endswith("_kernel")}
        entries |= {n for n, fn in functions.items() if getattr(fn, "__module__", None) == module.__name__}
    assert entries == OTHERS.keys() | {kernel for choice in choices() for kernel in choice.kernels}


def test_masks_that_are_not_boolean_are_refused() -> None:
    """The fixture of conftest.py watches every interpreted access of every test."""
    if torch.cuda.is_available():
        pytest.skip("nothing is interpreted")
    from masked import copy_kernel

    x, y = torch.ones(4), torch.zeros(4)
    copy_kernel[(1,)](x, y, 3, True)
    assert y.tolist() == [1, 1, 1, 0]
    with pytest.raises(triton.runtime.errors.InterpreterError, match="mask of int32: combine it with scalars"):
        copy_kernel[(1,)](x, y, 3, False)
