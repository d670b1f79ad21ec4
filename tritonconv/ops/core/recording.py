"""A call is recorded once, on tensors without memory, and replayed on all tensors with the same layout.

A recording is Python code without branches: allocations, views, copies and launches in order, with every number that a
launch needs. The code that makes the decisions (layouts, configs, workspaces) runs once for a signature, and need not be
fast. It may depend on sizes, strides, dtypes, alignment and settings that are part of the signature, and on no value in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritonconv.ops.core.backend import hopper_asked
from tritonconv.ops.core.launch import Described, Launch, Launcher, device_of, forced, launches_at_once, recording_with
from tritonconv.tuning import Problem

__all__ = ["Recording", "record"]

aten = torch.ops.aten
# Functions that do the same as these operators, with less overhead.
SHORTER: dict[Any, Callable[..., Any]] = {
    aten.empty_strided.default: torch.empty_strided, aten.copy_.default: Tensor.copy_, aten.view.default: Tensor.view,
    aten.unsqueeze.default: torch.unsqueeze, aten.squeeze.dim: torch.squeeze, aten.as_strided.default: torch.as_strided,
    aten.permute.default: torch.permute, aten.expand.default: Tensor.expand,
}  # fmt: skip
# Other operators that autocast does not change.
UNCAST = (aten.clone, aten._to_copy, aten.zero_, aten.zeros, aten.empty, aten.new_empty, aten._unsafe_view, aten.slice)
VIEWS = (aten.view, aten.unsqueeze, aten.squeeze, aten.as_strided, aten.permute, aten.expand, aten.alias)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


@dataclass
class Recording:
    """A call without its tensors."""

    run: Callable[..., Any]
    """Takes the tensors, None for those that are not given, and returns the results."""
    launches: list[Launch] = field(default_factory=list)
    """The launches in order; their arguments contain tensors without memory."""
    copies: int = 0
    """The number of tensors that are copied to another memory format."""
    note: str = ""
    """The note on the call, from `launch.note`."""
    result: Any = None
    """The results, without memory."""
    hopper: bool = field(default_factory=hopper_asked)
    """Whether Hopper's kernels were asked for."""

    @property
    def kernel(self) -> str:
        """The name of the first launch; "" if there is none."""
        if not self.launches:
            return ""
        first = self.launches[0]
        return first.problem.kernel if first.problem is not None else str(first.kernel.__name__).removesuffix("_kernel")

    def conditions(self, after: str) -> str:
        """The conditions for a measurement to be valid: what follows in the same kernel, and hidden copies before it."""
        copies = [f"{self.copies} hidden copies"] if self.copies else []
        return "+".join([after] * bool(after) + copies)

    @property
    def problem(self) -> Problem | None:
        """The problem for which the config was chosen."""
        return self.launches[0].problem if self.launches else None


def record(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], device: torch.device, gradients: bool = False
) -> Recording:
    """Record `function(*tensors)`, which may launch kernels on this device. Nothing runs, and no value is read.

    Args:
        gradients: whether to record each operator with its gradient, as one step.

    Raises:
        Exception: any exception of the function.
    """
    stand_ins = [t if t is None else _without_memory(t) for t in tensors]
    recorder = _Recorder(stand_ins, device, gradients)
    with (
        torch.inference_mode(False), torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST),
        forced(device=device_of(device)), recording_with(recorder), recorder,
    ):  # fmt: skip
        result = function(*stand_ins)
    return recorder.finish(result)


def _without_memory(t: Tensor) -> Tensor:
    """A tensor of the same size, strides, dtype and alignment on the meta device."""
    itemsize = t.element_size()
    address = t.storage_offset() * itemsize if t.is_meta else t.data_ptr()
    offset = -(-(address % 16) // itemsize)
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return torch.empty(offset + reach, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), offset)


class _Step:
    """One line of the recording."""

    def __init__(self, text: str, made: Sequence[str], read: set[str], pure: bool, casts: bool = False) -> None:
        self.text, self.made, self.read, self.pure, self.casts = text, made, read, pure, casts


class _Recorder(TorchDispatchMode):
    """Records the calls of torch's operators and of our launcher."""

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device, gradients: bool) -> None:
        super().__init__()
        self.device, self.gradients = device, gradients
        self.names: dict[int, str] = {}
        # An id identifies a tensor only while the tensor exists.
        self.alive: list[Any] = []
        self.scope: dict[str, Any] = {}
        self.steps: list[_Step] = []
        self.launches: list[Launch] = []
        self.copies, self.note, self.at_once = 0, "", False
        # Views with the same start address as another tensor, and the dense tensors that were allocated.
        self.starts: dict[str, str] = {}
        self.allocated: dict[str, _Step] = {}
        self.parameters = [f"t{i}" for i in range(len(tensors))]
        for name, t in zip(self.parameters, tensors, strict=True):
            if t is not None:
                self._name(t, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is aten.detach.default:
            # torch detaches tensors that are allocated under a mode; a recording contains no autograd.
            self._name(result, self.names[id(args[0])])
            return result
        # Copies of vectors are too small to count.
        self.copies += func in (aten.copy_.default, aten.clone.default) and args[0].dim() > 1
        packet = func.overloadpacket
        read: set[str] = set()
        arguments = [self._text(a, read) for a in args]
        arguments += [f"{name}={self._text(a, read)}" for name, a in kwargs.items() if name != "pin_memory"]
        call = f"{self._constant(SHORTER.get(func, func), packet.__name__)}({', '.join(arguments)})"
        made = self._made(result)
        target = f"{', '.join(made)} = " if made else ""
        pure = not func._schema.is_mutable
        casts = func not in SHORTER and packet not in UNCAST
        step = _Step(target + call, made, read, pure, casts)
        self.steps.append(step)
        if packet in VIEWS and made and _start_together(args[0], result):
            first = self.names[id(args[0])]
            self.starts[made[0]] = self.starts.get(first, first)
        elif func is aten.empty_strided.default:
            self.allocated[made[0]] = step
        return result

    def launch(self, one: Launch) -> None:
        """Record a launch."""
        self.launches.append(one)
        read: set[str] = set()
        arguments = [self._text(a, read, addressed=True) for a in one.ordered()]
        launcher = Launcher(one, self.device)
        call = self._constant(launcher.run, one.kernel.__name__)
        if not launcher.interpreted:
            call = f"({self._constant(launcher.launch, one.kernel.__name__)} if at_once else {call})"
            self.at_once = True
        self.steps.append(_Step(f"{call}({', '.join(arguments)})", (), read, False))

    def differentiable(self, operator: Any, arguments: Sequence[Any]) -> Any:
        """Record an operator that is called with its gradient, and return its results."""
        count = operator.count
        tensors, numbers = arguments[:count], arguments[count:]
        with self._paused():
            inner = record(lambda *t: operator.forward(*t, *numbers), tensors, self.device)
        self.launches += inner.launches
        self.copies += inner.copies
        self.note = inner.note or self.note
        read: set[str] = set()
        texts = [self._constant(inner, "forward"), *(self._text(a, read) for a in arguments)]
        made = self._made(inner.result)
        call = f"{self._constant(operator.function.apply, operator.name)}({', '.join(texts)})"
        self.steps.append(_Step(f"{', '.join(made)}{',' * (type(inner.result) is tuple)} = {call}", made, read, False))
        return inner.result

    def mutated(self, t: Tensor) -> None:
        """Record that a kernel has written into a tensor, because autograd must know it."""
        read: set[str] = set()
        text = f"{self._constant(torch.autograd.graph.increment_version, 'increment_version')}({self._text(t, read)})"
        self.steps.append(_Step(text, (), read, False))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        with recording_with(None), torch.utils._python_dispatch._disable_current_modes():
            yield

    def _allocated_as(self, result: Any) -> None:
        """If a result is a view of a tensor that was allocated for it, allocate the view's shape and strides."""
        name = self.names[id(result)] if isinstance(result, Tensor) else ""
        step = self.allocated.get(self.starts.get(name, ""))
        if step is None:
            return
        root = step.made[0]
        # Launches use only addresses; if another step depends on the tensor's size, the size stays as it is.
        known = [s for s in self.steps if root in s.read and s.pure]
        if len(known) == 1 and known[0].made == [name]:
            shape, strides = tuple(result.shape), result.stride()
            dtype, device = self._constant(result.dtype, "dtype"), self._constant(self.device, "device")
            allocate = self._constant(torch.empty_strided, "empty_strided")
            step.text = f"{root} = {allocate}({shape}, {strides}, dtype={dtype}, device={device})"
            self.names[id(result)] = root

    def finish(self, result: Any) -> Recording:
        self._allocated_as(result)
        read: set[str] = set()
        casts = False
        lines = [f"return {self._text(result, read)}"]
        for step in reversed(self.steps):
            # Views of which only the strides were used need not be made.
            if not step.pure or any(name in read for name in step.made):
                lines.append(step.text)
                read |= step.read
                casts |= step.casts
        if self.at_once:
            lines.append(f"at_once = {self._constant(launches_at_once, 'launches_at_once')}({self.device.index})")
        body = "\n    ".join(reversed(lines))
        source = f"def replay({', '.join(self.parameters)}):\n    {body}\n"
        exec(compile(source, "<tritonconv: a recorded call>", "exec"), self.scope)
        run: Callable[..., Any] = self.scope["replay"]
        if casts:
            run = _uncast(run)
        return Recording(run, self.launches, self.copies, self.note, result)

    def _made(self, result: Any) -> list[str]:
        if isinstance(result, Tensor):
            # A tensor that is written in place already has a name.
            return [] if id(result) in self.names else [self._name(result, f"v{len(self.names)}")]
        if isinstance(result, (tuple, list)):
            return ["_" if t is None else self._name(t, f"v{len(self.names)}") for t in result]
        return []

    def _name(self, t: Tensor, name: str) -> str:
        self.alive.append(t)
        self.names[id(t)] = name
        return name

    def _text(self, value: Any, read: set[str], addressed: bool = False) -> str:
        """Source code of a value; `addressed`: any tensor with the same start address can be used instead."""
        if isinstance(value, Tensor):
            name = self.names[id(value)]
            name = self.starts.get(name, name) if addressed else name
            read.add(name)
            return name
        if isinstance(value, Described):
            return f"{self._constant(value.box.descriptor, 'box')}({self._text(value.tensor, read, addressed)})"
        if isinstance(value, (tuple, list)):
            parts = ", ".join(self._text(v, read) for v in value)
            return f"[{parts}]" if isinstance(value, list) else f"({parts},)" if len(value) == 1 else f"({parts})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, torch.device):
            value = self.device
        return self._constant(value, type(value).__name__)

    def _constant(self, value: Any, name: str) -> str:
        found = f"{name}_{len(self.scope)}"
        self.scope[found] = value
        return found


def _start_together(t: Tensor, view: Tensor) -> bool:
    return t.dtype == view.dtype and t.storage_offset() == view.storage_offset()


def _uncast(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without autocast, because the recording already contains the casts."""

    def replay(*tensors: Tensor | None) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return run(*tensors)

    return replay
