"""A kernel launch: a recipe of everything but its tensors, run here, or captured as a value for benchmarks/codegen.py."""

from __future__ import annotations

import abc
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
from tritonconv.ops.core.activation import ActivationSpec
from tritonconv.ops.core.backend import capability, capture, interpreting
from tritonconv.ops.core.epilogue import Epilogue
from tritonconv.tuning import INTERPRETER, Device, Problem, choose, like

__all__ = [
    "NO_NORM", "NO_STATISTICS", "Box", "Kind", "Launch", "PlainRecipe", "Recipe", "Slots", "activation_constants",
    "axis_constants", "captured", "config_constants", "config_for", "device_of", "epilogue_constants", "forced",
    "forced_config", "forcing", "launch", "precision", "record_launches",
]  # fmt: skip

Kind = Literal["conv", "conv_transpose", "matmul"]
"""What a call is: a convolution, a transposed one, or a linear layer."""


@dataclass(frozen=True)
class Launch:
    """One launch: a jit function, how many programs, and its arguments by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    problem: Problem | None
    config: Any
    """The triton.Config that was chosen for the problem, or forced; both are None for a kernel without candidates."""

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options."""
        warps, stages = (self.config.num_warps, self.config.num_stages) if self.config else (4, 2)
        # Said aloud: Triton 3.10 will fuse multiply and add only where asked.
        return dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)


class Box:
    """A TMA descriptor to be made of an operand: rows, columns and row stride in elements, and the box read at once."""

    def __init__(self, rows: int, columns: int, row_stride: int, shape: tuple[int, int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kind: Any = TensorDescriptor
        self.arguments = ([rows, columns], [row_stride, 1], list(shape))
        self.checked: dict[str, Any] | None = None

    def descriptor(self, matrix: Tensor) -> Any:
        """The descriptor of a matrix that starts on 16 bytes. Triton checks the first; all others are like it."""
        if self.checked is None:
            result = self.kind(matrix, *self.arguments)
            self.checked = {**vars(result), "base": None}
            return result
        result = object.__new__(self.kind)
        result.__dict__.update(self.checked, base=matrix)
        return result


# The tensors behind image and weight, side by side in every kernel.
RESULT_AND_EPILOGUE = (
    "y_ptr", "residual_ptr", "bias_ptr", "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr", "counts_ptr", "moments_ptr",
)  # fmt: skip
NO_NORM = (None,) * 4
Slots = tuple[Tensor, Tensor] | tuple[None, Tensor] | tuple[None, None]
"""Where statistics go: counts [slots] and moments [2, slots, channels]; or sums alone, [slots, images, channels]."""
NO_STATISTICS: Slots = (None, None)
# Of ConvGeometry's triples, each by the names that kernels give its numbers.
AXES = (
    "D", "H", "W", "O", "P", "Q", "T", "R", "S", "STRIDE_D", "STRIDE_H", "STRIDE_W", "PAD_D", "PAD_H", "PAD_W",
    "DIL_D", "DIL_H", "DIL_W",
)  # fmt: skip


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


class Recipe(abc.ABC):
    """All of a launch but its tensors.

    Args:
        kernel: a jit function.
        config: tiles, warps and stages.
        problem: what the config was chosen for.
        slots: tiles of pixels, each with statistics of its own where they are asked for.
        sums: (units of a tile, units of an image, images that a tile may touch) where sums for a global average are: a unit
            is a pixel, or a tile.
    """

    def __init__(
        self, kernel: Any, programs: int, config: Any, problem: Problem, slots: int,
        sums: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        self.names, self.problem, self.slots, self.sums = _parameters(kernel.fn), problem, slots, sums
        self.empty = Launch(kernel, programs, {}, problem, config)
        self.name, self.options = kernel.__name__, self.empty.options
        self.launcher: Callable[..., Any] = kernel[(programs,)]
        self.interpreted = interpreting()

    @abc.abstractmethod
    def arguments(
        self, x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, statistics: Slots = NO_STATISTICS,
        gate: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The kernel's arguments in order."""

    def run(
        self, x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, device: torch.device,
        statistics: Slots = NO_STATISTICS, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch on the current stream of `device`, or keep the launch where `captured` asks for it.

        Args:
            gate: [N, C], for a recipe whose kernel has `gate_ptr` behind its image.
        """
        arguments = self.arguments(x, weight, y, epilogue, statistics, gate)
        if _state.log is not None:
            _state.log.append(self.name)
        if _state.captured is not None:
            _state.captured.append(replace(self.empty, arguments=dict(zip(self.names, arguments, strict=True))))
        elif self.interpreted:
            with _interpreter:
                self.launcher(*arguments, **self.options)
        elif torch.cuda.current_device() == device.index:
            self.launcher(*arguments, **self.options)
        else:
            with torch.cuda.device(device):
                self.launcher(*arguments, **self.options)


class PlainRecipe(Recipe):
    """Of a kernel that is given its tensors as they are, or a descriptor of one.

    Args:
        kernel: a jit function with parameters in this order: an image, ..., `w`, ..., `RESULT_AND_EPILOGUE`, ...
        constants: every other argument by name.
        x_box, w_box: where the operand goes by descriptor.
    """

    def __init__(
        self, kernel: Any, programs: int, constants: dict[str, Any], x_box: Box | None, w_box: Box | None, config: Any,
        problem: Problem, slots: int, sums: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kernel, programs, config, problem, slots, sums)
        names = self.names
        w, y = names.index("w"), names.index("y_ptr")
        end = y + len(RESULT_AND_EPILOGUE)
        assert names[y:end] == RESULT_AND_EPILOGUE, names
        # By position, which costs Triton's launcher less than by name.
        self.behind_x = tuple(constants[name] for name in names[1:w])
        self.behind_w = tuple(constants[name] for name in names[w + 1 : y])
        self.behind_all = tuple(constants[name] for name in names[end:])
        self.x_box, self.w_box = x_box, w_box

    def arguments(
        self, x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, statistics: Slots = NO_STATISTICS,
        gate: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The kernel's arguments in order."""
        bias, norm, residual, _ = epilogue
        behind_x = self.behind_x if gate is None else (gate, *self.behind_x[1:])
        return (
            x if self.x_box is None else self.x_box.descriptor(x), *behind_x,
            weight if self.w_box is None else self.w_box.descriptor(weight), *self.behind_w,
            y, residual, bias, *(NO_NORM if norm is None else norm[:4]), *statistics, *self.behind_all,
        )  # fmt: skip


def launch(one: Launch, device: torch.device) -> None:
    """Launch on the current stream of `device`, or keep the launch where `captured` asks for it."""
    if _state.log is not None:
        _state.log.append(one.kernel.__name__)
    if _state.captured is not None:
        _state.captured.append(one)
        return
    launcher = functools.partial(one.kernel[(one.programs,)], **one.arguments, **one.options)
    if interpreting():
        with _interpreter:
            launcher()
    elif torch.cuda.current_device() == device.index:
        launcher()
    else:
        with torch.cuda.device(device):
            launcher()


class Forced(NamedTuple):
    """What `forced` asks for; hashable, so that it can be part of a call's signature."""

    config: Any = None
    device: Device | None = None
    tf32: bool | None = None


class _State(threading.local):
    log: list[str] | None = None
    forced: Forced | None = None
    captured: list[Launch] | None = None


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
def captured(device: Device) -> Iterator[list[Launch]]:
    """The launches that calls on this thread would make on this GPU; nothing runs, and meta tensors will do."""
    launches: list[Launch] = []
    outer, _state.captured, capture.active = _state.captured, launches, True
    try:
        with forced(device=device):
            yield launches
    finally:
        _state.captured, capture.active = outer, outer is not None


@contextmanager
def forced(*, config: Any = None, device: Device | None = None, tf32: bool | None = None) -> Iterator[None]:
    """Build every launch on this thread with this triton.Config, as for this GPU, or with or without TF32 products."""
    outer = _state.forced
    before = outer or Forced()
    _state.forced = Forced(config or before.config, device or before.device, before.tf32 if tf32 is None else tf32)
    try:
        yield
    finally:
        _state.forced = outer


def forcing() -> Forced | None:
    """What `forced` asks for on this thread."""
    return _state.forced


def device_of(device: torch.device) -> Device:
    """What is known of a device, or the forced one."""
    return (_state.forced and _state.forced.device) or described(device)


def described(device: torch.device) -> Device:
    """What is known of a device."""
    if interpreting() or device.type != "cuda":
        return INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        # ROCm's torch does not tell: 64 KB of LDS a workgroup on every supported GPU.
        arch, shared = properties.gcnArchName.split(":")[0], 64 * 1024
    else:
        arch, shared = "sm_{}{}".format(*capability(device)), properties.shared_memory_per_block_optin
    return like(properties.name, arch, properties.multi_processor_count, shared)


def precision(dtype: torch.dtype, kind: Kind) -> str:
    """How fp32 products are computed, by torch's switches: cudnn's for convolutions, cuda.matmul's for linear layers."""
    if dtype != torch.float32:
        return "ieee"
    if _state.forced is not None and _state.forced.tf32 is not None:
        return "tf32" if _state.forced.tf32 else "ieee"
    # Of AMD's GPUs only some have TF32-like products, and torch does not use them unasked.
    if torch.version.hip is not None:
        return "ieee"
    switch: Any = torch.backends.cuda.matmul if kind == "matmul" else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def forced_config(constant: str) -> Any:
    """The triton.Config that `forced` asks for, or None if it has no such constant: it is another kernel's of the call."""
    config = _state.forced and _state.forced.config
    return config if config and constant in config.kwargs else None


def config_for(problem: Problem) -> Any:
    """The triton.Config that `forced` asks for, or the chosen one."""
    return forced_config("BLOCK_M") or choose(problem)


def config_constants(config: Any) -> dict[str, Any]:
    """A config's constants for a kernel of which no operand comes by descriptor."""
    return {name: value for name, value in config.kwargs.items() if name != "USE_TMA"} | dict(STAGES=config.num_stages)


def axis_constants(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    """Sizes and geometry of a convolution or a pooling by the names that kernels give them."""
    return dict(zip(AXES, g.input + g.output + g.kernel + g.stride + g.padding + g.dilation, strict=True))


def epilogue_constants(epilogue: Epilogue) -> dict[str, Any]:
    """The epilogue's arguments that are no tensors, the same for every kernel."""
    norm = epilogue.batch_norm
    return dict(EPS=float(norm.eps) if norm else 0.0, **activation_constants(epilogue.activation))


def activation_constants(act: ActivationSpec | None) -> dict[str, Any]:
    """An activation's arguments; None stands for none."""
    from tritonconv.kernels import activations

    function = activations.identity if act is None else activations.ACTIVATIONS[act.name].device
    return dict(ACT=function, ACT_A=act.a if act else 0.0, ACT_B=act.b if act else 0.0)
