"""A kernel launch as a value: built by an operator, run here, compiled offline by benchmarks/codegen.py."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.ops.backend import capability, interpreting
from tritonconv.ops.epilogue import Epilogue
from tritonconv.tuning import INTERPRETER, Device, like

__all__ = [
    "Launch", "descriptor", "device_of", "epilogue_arguments", "forced", "forced_config", "precision", "record_launches",
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


class _State(threading.local):
    log: list[str] | None = None
    config: Any = None
    device: Device | None = None
    tf32: bool | None = None


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
def forced(*, config: Any = None, device: Device | None = None, tf32: bool | None = None) -> Iterator[None]:
    """Build every launch on this thread with this triton.Config, as for this GPU, or with or without TF32 products."""
    outer = _state.config, _state.device, _state.tf32
    _state.config, _state.device = config or outer[0], device or outer[1]
    _state.tf32 = outer[2] if tf32 is None else tf32
    try:
        yield
    finally:
        _state.config, _state.device, _state.tf32 = outer


def forced_config() -> Any:
    """The config that `forced` asks for, or None."""
    return _state.config


def device_of(device: torch.device) -> Device:
    """What is known of a device, or the forced one."""
    return _state.device or _device_of(device)


@functools.cache
def _device_of(device: torch.device) -> Device:
    if interpreting() or device.type != "cuda":
        return INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # ROCm's torch does not tell: 64 KB of LDS a workgroup on every supported GPU.
        arch, shared = properties.gcnArchName.split(":")[0], 64 * 1024
    else:
        arch, shared = "sm_{}{}".format(*capability(device)), properties.shared_memory_per_block_optin
    return like(properties.name, arch, properties.multi_processor_count, shared)


def descriptor(matrix: Tensor, rows: int, columns: int, row_stride: int, box: tuple[int, int]) -> Any:
    """A TMA descriptor of `rows` x `columns` elements from the start of `matrix`, read in boxes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, [rows, columns], [row_stride, 1], list(box))


def precision(dtype: torch.dtype, kind: Literal["conv", "matmul"]) -> str:
    """How fp32 products are computed, by torch's switches: cudnn's for convolutions, cuda.matmul's for linear layers."""
    if _state.tf32 is not None and dtype == torch.float32:
        return "tf32" if _state.tf32 else "ieee"
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
