"""A kernel launch as a value: built by an operator, run here, compiled offline by benchmarks/codegen.py."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.ops.backend import capability, interpreting
from tritonconv.ops.epilogue import Epilogue

__all__ = [
    "DeviceLimits", "Launch", "descriptor", "device_limits", "epilogue_arguments", "forced", "forced_config", "precision",
    "record_launches",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: a jit function, how many programs, its arguments by name, warps and pipeline stages."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options."""
        # Said aloud: Triton 3.10 will fuse multiply and add only where asked.
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of `device`."""
        if _state.log is not None:
            _state.log.append(self.kernel.__name__)
        with _interpreter if interpreting() else torch.cuda.device(device):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


class DeviceLimits(NamedTuple):
    """What a launch must know of a GPU."""

    multiprocessors: int
    shared_memory: int
    """Bytes that one program may have."""
    tma: bool
    """Whether tiles move by descriptor: Hopper and later, and the interpreter."""


class _State(threading.local):
    log: list[str] | None = None
    config: Any = None
    limits: DeviceLimits | None = None


_state = _State()
# The interpreter patches triton.language while it runs a kernel, for all threads.
_interpreter = threading.Lock()


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """The names of the kernels launched on this thread within the block, one for each launch, in order."""
    outer, _state.log = _state.log, []
    log = _state.log
    try:
        yield log
    finally:
        _state.log = outer
        if outer is not None:
            outer.extend(log)


@contextmanager
def forced(*, config: Any = None, limits: DeviceLimits | None = None) -> Iterator[None]:
    """Build every launch on this thread with this triton.Config, or as for a device with these limits."""
    outer = _state.config, _state.limits
    _state.config, _state.limits = config or outer[0], limits or outer[1]
    try:
        yield
    finally:
        _state.config, _state.limits = outer


def forced_config() -> Any:
    """The config that `forced` asks for, or None."""
    return _state.config


def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of a device, or the forced ones."""
    return _state.limits or _device_limits(device)


@functools.cache
def _device_limits(device: torch.device) -> DeviceLimits:
    if interpreting() or device.type != "cuda":
        return DeviceLimits(1, 1 << 30, True)
    properties = torch.cuda.get_device_properties(device)
    # ROCm's torch has no such field: 64 KB of LDS a workgroup on every supported GPU.
    shared = int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024))
    tma = torch.version.hip is None and capability(device) >= (9, 0)
    return DeviceLimits(properties.multi_processor_count, shared, tma)


def descriptor(matrix: Tensor, rows: int, columns: int, row_stride: int, box: tuple[int, int]) -> Any:
    """A TMA descriptor of `rows` x `columns` elements from the start of `matrix`, read in boxes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, [rows, columns], [row_stride, 1], list(box))


def precision(dtype: torch.dtype, kind: Literal["conv", "matmul"]) -> str:
    """How fp32 products are computed, by torch's switches: cudnn's for convolutions, cuda.matmul's for linear layers."""
    # Of AMD's GPUs only some have TF32-like products, and torch does not use them unasked.
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    switch: Any = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def epilogue_arguments(epilogue: Epilogue) -> dict[str, Any]:
    """The epilogue's arguments, the same for every kernel."""
    from tritonconv.kernels import activations

    norm, act = epilogue.batch_norm, epilogue.activation
    function = activations.identity if act is None else activations.ACTIVATIONS[act.name].device
    return dict(
        residual_ptr=epilogue.residual, bias_ptr=epilogue.bias,
        mean_ptr=norm and norm.mean, var_ptr=norm and norm.var, gamma_ptr=norm and norm.weight, beta_ptr=norm and norm.bias,
        EPS=norm.eps if norm else 0.0, ACT=function, ACT_A=act.a if act else 0.0, ACT_B=act.b if act else 0.0,
    )  # fmt: skip
