"""The choice of the backend that runs a call, and the reasons for it."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

__all__ = [
    "FLOATS",
    "HAS_TRITON",
    "PLAIN",
    "Backend",
    "OnTorch",
    "asked",
    "asking_hopper",
    "capability",
    "capture",
    "cast_for_autocast",
    "check_backend",
    "constant_under_compile",
    "current_backend",
    "decide",
    "hopper_asked",
    "interpreting",
    "is_foreign",
    "needs_gradients",
    "set_backend",
    "settings",
    "why_no_views",
    "why_unsupported",
]  # fmt: skip

Backend = Literal["auto", "triton", "hopper", "torch"]
BACKENDS = ("auto", "triton", "hopper", "torch")

Function = TypeVar("Function", bound=Callable[..., Any])


class _Settings:
    """The settings of the process."""

    def __init__(self) -> None:
        self.backend: Backend = "auto"
        # Read once, like TRITON_INTERPRET.
        self.hopper = os.environ.get("TRITONCONV_HOPPER", "0") not in ("", "0")


settings = _Settings()


class set_backend:  # noqa: N801 - a context manager that reads as a function, like torch.set_grad_enabled
    """Choose the backend of our operators, at once for the whole process, or for a `with` block.

    Args:
        backend: "auto" (Triton where it is supported, else torch), "triton" (an error where it is not supported),
            "hopper" (as "triton", with dense convolutions on the kernels for H100 and H200 if these support them; these
            kernels have not run on a GPU yet) or "torch".

    >>> with set_backend("torch"):
    ...     current_backend()
    'torch'
    """

    def __init__(self, backend: Backend) -> None:
        self._previous = settings.backend
        settings.backend = check_backend(backend)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        settings.backend = self._previous


def check_backend(backend: str) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend  # type: ignore[return-value]


def current_backend(override: Backend | None = None) -> Backend:
    """The backend of a layer: the global choice if that is not "auto", else the layer's own (`override`)."""
    return settings.backend if settings.backend != "auto" or override is None else override


class _Asked(threading.local):
    """Whether the layer that runs on this thread asks for Hopper's kernels."""

    # Not a class variable: Dynamo guards which attributes there are, and the first `with` block would add one.
    def __init__(self) -> None:
        self.hopper = False


asked = _Asked()


def hopper_asked() -> bool:
    """Whether Hopper's kernels run the calls that they support: the process, its environment or a layer asks for it."""
    return asked.hopper or settings.backend == "hopper" or (settings.hopper and settings.backend != "torch")


@contextmanager
def asking_hopper(wanted: bool) -> Iterator[None]:
    """Resolve and run calls on this thread with Hopper's kernels if `wanted`; else the outer setting stays."""
    outer, asked.hopper = asked.hopper, asked.hopper or wanted
    try:
        yield
    finally:
        asked.hopper = outer


HAS_TRITON = importlib.util.find_spec("triton") is not None


def constant_under_compile(function: Function) -> Function:
    """Make torch.compile call the function while it traces, and treat the result as a constant.

    torch.compiler.assume_constant_result does the same, but imports all of torch._dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Constants for Dynamo: it cannot trace into triton's and CUDA's bindings, and the results never change.
@constant_under_compile
def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels: the value of TRITON_INTERPRET at the first call."""
    return HAS_TRITON and _interpreting()


@functools.cache
def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@constant_under_compile
def capability(device: torch.device) -> tuple[int, int]:
    return _capability(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class _Capture(threading.local):
    """Whether launches on this thread are built from meta tensors and stored, not run (ops/core/launch.py: captured)."""

    active = False


capture = _Capture()


def why_unsupported_device(device: torch.device) -> str | None:
    """Why no kernel runs on this device; None if kernels do."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()) and not capture.active:
        return f"tensors on {device.type} run on torch (TRITON_INTERPRET=1 interprets the kernels on CPU tensors)"
    if device.type == "cuda" and not interpreting() and torch.version.hip is None and capability(device) < (8, 0):
        return f"compute capability {capability(device)} is below 8.0"
    return None


def needs_gradients(tensors: Sequence[torch.Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


PLAIN = (torch.Tensor, torch.nn.Parameter)
OWN_FUNCTIONS = tuple(getattr(f, "__func__", f) for f in (kind.__torch_function__ for kind in PLAIN))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_unsupported(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] | None = FLOATS) -> str | None:
    """Why a Triton kernel cannot take these tensors; None if it can.

    Every property that is checked here must be part of a call's signature (core/signature.py), or a call with it must get
    no signature (`is_watched`).

    Args:
        tensors: the image first.
        dtypes: the dtypes of the image that the kernels take; None: any.
    """
    x = tensors[0]
    reason = why_unsupported_device(x.device)
    if reason is not None:
        return reason
    if dtypes is not None and x.dtype not in dtypes:
        return f"{x.dtype} has no kernel"
    reason = why_no_views(tensors)
    if reason is not None or torch.compiler.is_compiling():
        return reason
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators alone"
    if any(t.is_neg() for t in tensors):
        return "a tensor is a negated view (torch.resolve_neg makes it plain)"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is inside a torch.func transform"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "forward-mode derivatives are needed, and have no kernel"
    if any(t._is_zerotensor() or (type(t) in PLAIN and t.data_ptr() == 0 and t.numel() > 0) for t in tensors):
        return None if capture.active else "a tensor has no memory"
    return None


def why_no_views(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why no views of these tensors can be made for a kernel; None if they can."""
    if any(t.layout != torch.strided for t in tensors):
        return "a tensor is not strided"
    if torch.compiler.is_compiling():
        return None
    if any(t.is_nested for t in tensors):
        return "a tensor is nested"
    foreign = next((type(t).__name__ for t in tensors if is_foreign(t)), None)
    return foreign and f"{foreign} is a class of tensors with rules of its own for torch's operators"


def is_foreign(t: torch.Tensor) -> bool:
    """Whether a tensor's class itself defines what operators do; it may not know our operators."""
    kind = type(t)
    # torch's own classes for compilers, export and fake tensors take any operator.
    if kind in PLAIN or kind.__module__.startswith("torch._subclasses."):
        return False
    function, dispatch = kind.__torch_function__, kind.__torch_dispatch__
    return getattr(function, "__func__", function) not in OWN_FUNCTIONS or dispatch is not torch.Tensor.__torch_dispatch__


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts tensors on `x`'s device; None if it is off."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def cast_for_autocast(t: Any, dtype: torch.dtype) -> Any:
    """An argument of a convolution as torch's autocast casts it."""
    return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t


class OnTorch(NamedTuple):
    """Why torch runs a call."""

    reason: str
    described: str | None = None
    """The call, if a warning must name it."""
    conditions: str | None = None
    """If our kernel could run the call and torch is preferred: the conditions for a measurement to be valid for it."""

    def warn(self) -> None:
        """Give a warning, once for each call and reason."""
        if self.described is not None and (self.described, self.reason) not in _warned:
            _warned.add((self.described, self.reason))
            warnings.warn(f"tritonconv: {self.described} runs on torch: {self.reason}", stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The stack level of the first frame outside of this library and torch, as `warnings.warn` counts from the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    return level


INSIDE = (
    *(str(Path(module.__file__ or "").parent) + os.sep for module in (sys.modules["tritonconv"], torch)),
    "<tritonconv",
)
_warned: set[tuple[str, str]] = set()


def decide(
    tensors: Sequence[torch.Tensor], backend: Backend | None, describe: Callable[[], str], reason: str | None = None,
    dtypes: Sequence[torch.dtype] | None = FLOATS,
) -> OnTorch | None:  # fmt: skip
    """None if the call runs on Triton, else the reason why torch runs it.

    Args:
        tensors: all tensors that the kernel would read.
        backend: the layer's own choice; the global choice has priority unless it is "auto".
        describe: describes the call, for the error and the warning.
        reason: why there is no kernel for the call, if this is already known.
        dtypes: the dtypes of the first tensor that the kernels take; None: any.

    Raises:
        RuntimeError: backend "triton" or "hopper" was asked for and the call is not supported.
    """
    chosen = current_backend(backend)
    if chosen == "torch":
        return OnTorch("the torch backend was chosen")
    reason = reason or why_unsupported(tensors, dtypes)
    if reason is None:
        return None
    if chosen in ("triton", "hopper"):
        raise RuntimeError(f"backend '{chosen}' was asked for, but {reason}: {describe()}")
    # What is traced gives no warning: it may run elsewhere, or never.
    traced = torch.compiler.is_compiling() or type(tensors[0]) not in PLAIN
    if traced or not (tensors[0].is_cuda or interpreting()):
        return OnTorch(reason)
    verdict = OnTorch(reason, describe())
    verdict.warn()
    return verdict
