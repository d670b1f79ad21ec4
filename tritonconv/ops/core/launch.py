"""Kernel launches: everything but the tensors is prepared; a launch runs, or is captured for benchmarks/codegen.py."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonconv.geometry import ConvGeometry, PoolGeometry
from tritonconv.ops.core.activation import ActivationSpec, table
from tritonconv.ops.core.backend import capability, capture, interpreting
from tritonconv.tuning import INTERPRETER, Device, Problem, choose, like

__all__ = [
    "Box",
    "ConvKind",
    "Described",
    "Launch",
    "Launcher",
    "activation_constants",
    "aligned",
    "axis_constants",
    "captured",
    "config_constants",
    "config_for",
    "device_of",
    "forced",
    "forced_config",
    "gradient_constants",
    "is_recording",
    "launch",
    "note",
    "precision",
    "record_launches",
    "recording_with",
    "state",
]  # fmt: skip

ConvKind = Literal["conv", "conv_transpose", "matmul"]
"""The kind of a call: a convolution, a transposed convolution, or a linear layer."""


# The names that kernels give the numbers of ConvGeometry's triples.
AXES = (
    "D", "H", "W", "O", "P", "Q", "T", "R", "S", "STRIDE_D", "STRIDE_H", "STRIDE_W", "PAD_D", "PAD_H", "PAD_W",
    "DIL_D", "DIL_H", "DIL_W",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: a jit function, the number of programs, and the arguments by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    problem: Problem | None
    config: Any
    """The triton.Config that was chosen for the problem, or forced. Problem and config are None without candidates."""
    candidates: tuple[Any, ...] = ()
    """The configs that it may have, where these are neither those of the problem nor all of the kernel's."""

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options."""
        warps, stages = (self.config.num_warps, self.config.num_stages) if self.config else (4, 2)
        # Explicit, because Triton 3.10 will fuse multiply and add only if asked.
        return dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)

    def ordered(self) -> list[Any]:
        """The arguments in the order of the kernel's parameters; Triton's launcher takes longer with names."""
        return [self.arguments[name] for name in _parameters(self.kernel.fn)]


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


class Box:
    """The parameters of a matrix's TMA descriptor: rows, columns, row stride in elements, and the box read at once."""

    def __init__(self, rows: int, columns: int, row_stride: int, shape: tuple[int, int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kind: Any = TensorDescriptor
        self.arguments: tuple[Any, ...] = ([rows, columns], [row_stride, 1], list(shape))
        self.checked: dict[str, Any] | None = None

    def descriptor(self, t: Tensor) -> Any:
        """The descriptor of a tensor that starts on 16 bytes. Triton checks the first; all others have its parameters."""
        if self.checked is None:
            result = self.kind(t, *self.arguments)
            self.checked = {**vars(result), "base": None}
            return result
        result = object.__new__(self.kind)
        result.__dict__.update(self.checked, base=t)
        return result

    def of(self, t: Tensor) -> Described:
        """The tensor as an argument of a launch."""
        return Described(self, t)


class Described(NamedTuple):
    """An argument of a launch: a descriptor of a tensor, which is made at the launch."""

    box: Box
    tensor: Tensor


class Launcher:
    """A launch without its arguments."""

    def __init__(self, one: Launch, device: torch.device) -> None:
        self.one, self.device_index = one, device.index
        self.name = one.kernel.__name__
        self.launch = functools.partial(one.kernel[(one.programs,)], **one.options)
        self.interpreted = interpreting()

    def run(self, *arguments: Any) -> None:
        """Launch on the current stream of the device, or store the launch if `captured` is active."""
        if state.log is not None:
            state.log.append(self.name)
        if state.captured is not None:
            named = dict(zip(_parameters(self.one.kernel.fn), arguments, strict=True))
            state.captured.append(replace(self.one, arguments=named))
        elif self.interpreted:
            with _interpreter:
                self.launch(*arguments)
        elif torch.cuda.current_device() == self.device_index:
            self.launch(*arguments)
        else:
            with torch.cuda.device(self.device_index):
                self.launch(*arguments)


def launches_at_once(device_index: int | None) -> bool:
    """Whether launches on a device are neither captured nor logged, and the device is the current one."""
    return state.log is None and state.captured is None and bool(torch.cuda.current_device() == device_index)


def launch(one: Launch, device: torch.device) -> None:
    """Launch on the current stream of `device`, or record the launch if a call is being recorded."""
    if state.recorder is not None:
        state.recorder.launch(one)
    else:
        Launcher(one, device).run(*(a.box.descriptor(a.tensor) if isinstance(a, Described) else a for a in one.ordered()))


def aligned(t: Tensor) -> bool:
    """Whether a tensor starts on 16 bytes; works for a tensor without memory that replaces another one too."""
    address = t.storage_offset() * t.element_size() if t.is_meta else t.data_ptr()
    return address % 16 == 0


class Forced(NamedTuple):
    """The settings of `forced`; hashable, so that they can be part of a call's signature."""

    config: Any = None
    device: Device | None = None
    tf32: bool | None = None


class _State(threading.local):
    log: list[str] | None = None
    forced: Forced | None = None
    captured: list[Launch] | None = None
    recorder: Any = None
    """The object that records launches (core/recording.py)."""


state = _State()
# While the interpreter runs a kernel it patches triton.language for all threads.
_interpreter = threading.Lock()


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """The names of the kernels launched on this thread within the block, one for each launch, in order."""
    outer, state.log = state.log, []
    log = state.log
    try:
        yield log
    finally:
        state.log = outer
        if outer is not None:
            outer.extend(log)


@contextmanager
def captured(device: Device) -> Iterator[list[Launch]]:
    """The launches that calls on this thread would make on this GPU; nothing runs, and meta tensors are enough."""
    launches: list[Launch] = []
    outer, state.captured, capture.active = state.captured, launches, True
    try:
        with forced(device=device):
            yield launches
    finally:
        state.captured, capture.active = outer, outer is not None


@contextmanager
def forced(*, config: Any = None, device: Device | None = None, tf32: bool | None = None) -> Iterator[None]:
    """Build every launch on this thread with this triton.Config, for this GPU, or with or without TF32 products."""
    outer = state.forced
    before = outer or Forced()
    state.forced = Forced(config or before.config, device or before.device, before.tf32 if tf32 is None else tf32)
    try:
        yield
    finally:
        state.forced = outer


@contextmanager
def recording_with(recorder: Any) -> Iterator[None]:
    """Record launches on this thread with `recorder.launch`."""
    outer, state.recorder = state.recorder, recorder
    try:
        yield
    finally:
        state.recorder = outer


def is_recording() -> bool:
    """Whether a call is being recorded on this thread: tensors have no memory, and operators run their kernels."""
    return state.recorder is not None


def note(text: str) -> None:
    """Add a note to the call that is being recorded, for `explain`."""
    if state.recorder is not None:
        state.recorder.note = text


def device_of(device: torch.device) -> Device:
    """The description of a device, or of the forced one."""
    return (state.forced and state.forced.device) or described(device)


def described(device: torch.device) -> Device:
    """The description of a device."""
    if interpreting() or device.type != "cuda":
        return INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # ROCm's torch does not report it: every supported GPU has 64 KB of LDS for each workgroup.
        arch, shared = properties.gcnArchName.split(":")[0], 64 * 1024
    else:
        arch, shared = "sm_{}{}".format(*capability(device)), properties.shared_memory_per_block_optin
    return like(properties.name, arch, properties.multi_processor_count, shared)


def precision(dtype: torch.dtype, kind: ConvKind) -> str:
    """How fp32 products are computed, by torch's switches: cudnn's for convolutions, cuda.matmul's for linear layers."""
    if dtype != torch.float32:
        return "ieee"
    if state.forced is not None and state.forced.tf32 is not None:
        return "tf32" if state.forced.tf32 else "ieee"
    # Only some of AMD's GPUs have TF32-like products, and torch does not use them by default.
    if torch.version.hip is not None:
        return "ieee"
    switch: Any = torch.backends.cuda.matmul if kind == "matmul" else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def forced_config(constant: str) -> Any:
    """The triton.Config of `forced`, or None if it has no such constant and is for another kernel of the call."""
    config = state.forced and state.forced.config
    return config if config and constant in config.kwargs else None


def config_for(problem: Problem) -> Any:
    """The triton.Config of `forced`, or the chosen one."""
    return forced_config("BLOCK_M") or choose(problem)


def config_constants(config: Any) -> dict[str, Any]:
    """A config's constants for a kernel without operands that are loaded by descriptor."""
    return {name: value for name, value in config.kwargs.items() if name != "USE_TMA"} | dict(STAGES=config.num_stages)


def axis_constants(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    """Sizes and geometry of a convolution or a pooling, with the names that kernels use."""
    return dict(zip(AXES, g.input + g.output + g.kernel + g.stride + g.padding + g.dilation, strict=True))


def activation_constants(act: ActivationSpec | None) -> dict[str, Any]:
    """The kernel arguments of an activation; None: no activation."""
    from tritonconv.kernels import activations

    function = activations.identity if act is None else activations.ACTIVATIONS[act.name].device
    return dict(ACT=function, ACT_A=act.a if act else 0.0, ACT_B=act.b if act else 0.0)


def gradient_constants(act: ActivationSpec | None) -> dict[str, Any]:
    """The kernel arguments of an activation's gradient; None: no activation."""
    if act is None:
        return dict(ACT_GRADIENT=None, ACT_A=0.0, ACT_B=0.0)
    return dict(ACT_GRADIENT=table()[act.name].gradient, ACT_A=act.a, ACT_B=act.b)
