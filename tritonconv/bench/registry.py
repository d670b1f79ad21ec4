"""The one list of what can be benchmarked, checked and tuned: an operation appears everywhere by registering itself."""

from __future__ import annotations

import abc
import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonconv.bench.cases import DTYPES, Case
from tritonconv.geometry import Pass
from tritonconv.ops.core.backend import Backend, set_backend
from tritonconv.ops.core.launch import Launch, captured, forced
from tritonconv.tuning import Device
from tritonconv.tuning.candidates import possible

__all__ = [
    "Operation", "Specimen", "case_launches", "configs_of", "dtype_of", "module_of", "operation_for", "operations",
    "register", "specimens",
]  # fmt: skip


@dataclass(frozen=True)
class Specimen:
    """A layer whose compiled code is kept in benchmarks/codegen.json, and of how many of its candidates."""

    kernel: str
    case: Case
    configs: int | None = None
    function: str = ""
    """Which of the kernel's jit functions, where none of them computes products."""
    targets: tuple[str, ...] = ()
    """The architectures that have the kernel; empty for all."""


class Operation(abc.ABC):
    """One operation of the library: how its layers are made, computed, counted and launched."""

    kind: str
    """The column `kind` of cases.csv."""
    kernels: tuple[str, ...]
    """Modules of tritonconv.kernels that compute it."""
    passes: tuple[Pass, ...]
    """Those that have kernels."""
    backend: Backend = "triton"
    """Which backend its layers ask for."""
    products: bool = True
    """Whether its kernels multiply matrices: what the cost model and the tuner know, and what TF32 changes."""

    @abc.abstractmethod
    def count(self, case: Case) -> tuple[int, int]:
        """(multiply-adds, least bytes) of the case's pass."""

    @abc.abstractmethod
    def tensors(self, case: Case, device: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
        """Random inputs and parameters of a layer."""

    @abc.abstractmethod
    def ours(self, case: Case, *tensors: Tensor) -> Tensor:
        """The layer as a user of tritonconv.functional calls it."""

    @abc.abstractmethod
    def torch(self, case: Case, *tensors: Tensor) -> Tensor:
        """The layer as a user of torch calls it."""

    @abc.abstractmethod
    def depth(self, case: Case) -> int:
        """How many products a result adds up: errors grow with its square root."""

    def reference(self, case: Case, *tensors: Tensor) -> Tensor:
        """What results are compared with, from inputs in fp64."""
        return self.torch(case, *tensors)

    def launches(self, case: Case, device: Device, config: Any = None, channels_last: bool | None = None) -> list[Launch]:
        """The launches that a call of `ours` makes on this device, from meta tensors: nothing runs.

        Args:
            config: the triton.Config to take; None: the one that is chosen.
            channels_last: the layout of all tensors; None: the case's.
        """
        tensors = self.tensors(case, "meta", dtype_of(case), case.channels_last if channels_last is None else channels_last)
        with (
            torch.no_grad(),
            set_backend(self.backend),
            forced(config=config, tf32=case.tf32),
            captured(device) as launches,
        ):
            self.ours(case, *tensors)
        return launches

    @abc.abstractmethod
    def checks(self) -> list[Case]:
        """Small layers on which every candidate config of every kernel is compared with fp64; the first one is quick."""

    @abc.abstractmethod
    def specimens(self) -> list[Specimen]:
        """The layers that show what each kernel must be good at."""


def case_launches(case: Case, config: Any, channels_last: bool, device: Device) -> list[Launch]:
    """The launches of a layer, by a function that a `Compilation` can pickle."""
    return operations()[case.kind].launches(case, device, config, channels_last)


def module_of(launch: Launch) -> str:
    """The file of tritonconv.kernels that a launch's kernel stands in, such as "matmul" or "hopper.conv"."""
    name: str = launch.kernel.fn.__module__
    return name.removeprefix("tritonconv.kernels.")


def configs_of(launch: Launch) -> list[Any]:
    """Every config that the launch may have in place of its own."""
    if launch.problem is not None:
        return possible(launch.problem)
    if launch.config is None or launch.candidates:
        return list(launch.candidates)
    configs = importlib.import_module(f"tritonconv.kernels.{module_of(launch)}").configs()
    return [config for config in configs if config.kwargs.keys() == launch.config.kwargs.keys()]


def dtype_of(case: Case) -> torch.dtype:
    result: torch.dtype = getattr(torch, DTYPES[case.dtype])
    return result


_registered: dict[str, Operation] = {}


def register(operation: type[Operation]) -> type[Operation]:
    """Class decorator: the operation is part of every suite, table and plot from now on."""
    if operation.kind in _registered:
        raise ValueError(f"the operation {operation.kind!r} is registered already")
    _registered[operation.kind] = operation()
    return operation


@functools.cache
def operations() -> dict[str, Operation]:
    """Every operation by its kind: whatever the files of tritonconv.bench.operations register."""
    package = importlib.import_module("tritonconv.bench.operations")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _registered


def operation_for(case: Case) -> Operation | None:
    """The operation of a layer, or None where it is not built."""
    return operations().get(case.kind)


@functools.cache
def specimens() -> list[tuple[Operation, Specimen]]:
    """The layers whose compiled code is inspected, each with its operation."""
    return [(operation, specimen) for operation in operations().values() for specimen in operation.specimens()]
