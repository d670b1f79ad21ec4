"""Operators: what torch.compile, export, fake tensors, autograd and dispatch modes see, each declared once.

An operator's forward pass is a function of tensors and numbers that allocates its results and launches kernels. The rest
follows from it and from the other parts of the declaration: `torch.ops.tritonconv.<name>` with its fake, its gradient, its
autocast rule and its count of FLOPs; eager calls, recorded once for each signature; and eager gradients, in a
torch.autograd.Function (the one that torch.library makes takes 56 us for each call).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tritonconv.ops.core.backend import asking_hopper, cast_for_autocast, hopper_asked, needs_gradients
from tritonconv.ops.core.launch import state
from tritonconv.ops.core.recording import Recording, record
from tritonconv.ops.core.signature import Memo, signature_of

__all__ = ["Operator", "differentiate", "gradients_wanted", "is_traced", "mutated"]

_dispatch_modes = torch._C._len_torch_dispatch_stack
_library = torch.library.Library("tritonconv", "FRAGMENT")


def is_traced(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call must use the registered operator: it is compiled, has fake tensors, or a mode intercepts it."""
    if torch.compiler.is_compiling():
        return True
    plain = (Tensor, torch.nn.Parameter)
    return _dispatch_modes() > 0 or any(t is not None and type(t) not in plain for t in tensors)


class Operator:
    """An operator that runs only on our kernels.

    Args:
        name: its name in torch.ops.tritonconv.
        forward: makes the launches, with the annotations that torch.library requires: first tensors, where those after
            the first one may be `Tensor | None`, then numbers. A result that the call does not have is None (empty for
            tracers).
        outputs: the results without their contents, from the same arguments; also for fake tensors and symbolic sizes.
        save: (ctx, inputs, output): saves what `backward` needs; `ctx.needs` says which inputs need gradients.
        backward: (ctx, *gradients): the gradients of the tensors among the inputs, None for those without. It calls
            operators that have gradients themselves, or `differentiate` for second derivatives. A gradient may be None.
        differentiable: how many of the results, from the first, have gradients.
        flops: (*sizes and numbers), as for `register_flop_formula`.
        cast: names of the tensors that autocast casts to its dtype.
        mutates: names of the tensors that are written.
        collective: says whether a call waits for other processes, so that it cannot be recorded.
    """

    def __init__(
        self, name: str, forward: Callable[..., Any], outputs: Callable[..., Any], *,
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Sequence[Tensor | None]] | None = None, differentiable: int = 1,
        flops: Callable[..., int] | None = None, cast: Sequence[str] = (), mutates: Sequence[str] = (),
        collective: Callable[..., bool] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.forward, self.outputs, self.collective = name, forward, outputs, collective
        self.save, self.backward, self.differentiable = save, backward, differentiable
        parameters = inspect.signature(forward).parameters
        self.tensors = [p for p, declared in parameters.items() if str(declared.annotation).startswith("Tensor")]
        assert list(parameters)[: len(self.tensors)] == self.tensors, f"{name}: tensors come first"
        self.count, self.numbers = len(self.tensors), len(parameters) - len(self.tensors)
        self.defaults = tuple(p.default for p in parameters.values())
        self.signature = signature_of(name, self.tensors, packed=False)
        self.recordings = Memo()
        self.function = _eager_function(self)
        self._register(cast, mutates, flops)

    def __call__(self, *arguments: Any) -> Any:
        """The results for tensors that the kernels support, followed by all numbers, which must be hashable."""
        if torch.compiler.is_compiling():
            return self.registered(*arguments)
        recorder = state.recorder
        if recorder is not None:
            if recorder.gradients and self.backward is not None:
                return recorder.differentiable(self, arguments)
            return self.forward(*arguments)
        if is_traced(arguments[: self.count]):
            return self.registered(*arguments)
        recording = self.resolve(*arguments)
        if self.backward is not None and needs_gradients(arguments[: self.count]):
            return self.function.apply(recording, *arguments)
        return recording.run(*arguments[: self.count])

    def resolve(self, *arguments: Any) -> Recording:
        """The recording for tensors like these (sizes, strides, dtypes) with these numbers."""
        if self.collective is not None and self.collective(*arguments):
            return Recording(lambda *tensors: self.forward(*tensors, *arguments[self.count :]))
        signature = self.signature(*arguments)
        found = self.recordings.get(signature)
        if found is None:
            tensors, numbers = arguments[: self.count], arguments[self.count :]
            found = record(lambda *t: self.forward(*t, *numbers), tensors, tensors[0].device)
            self.recordings.remember(signature, found)
        result: Recording = found
        return result

    def gradients(self, ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs."""
        missing = (None,) * self.numbers
        if self.backward is None or all(g is None for g in gradients[: self.differentiable]):
            return (*(None,) * self.count, *missing)
        with asking_hopper(ctx.hopper):
            found = self.backward(ctx, *gradients[: self.differentiable])
        wanted = [g if need else None for g, need in zip(found, ctx.needs, strict=False)]
        return (*wanted, *(None,) * (self.count - len(wanted)), *missing)

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any, needs: Sequence[bool], hopper: bool) -> None:
        """Prepare the gradient of a call; `hopper`: whether Hopper's kernels were asked for, in both passes."""
        assert self.save is not None
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.hopper = needs[: self.count], hopper
        if type(output) is tuple and len(output) > self.differentiable:
            ctx.mark_non_differentiable(*filter(torch.is_tensor, output[self.differentiable :]))
        self.save(ctx, inputs, output)

    def _register(self, cast: Sequence[str], mutates: Sequence[str], flops: Callable[..., int] | None) -> None:
        def run(*arguments: Any) -> Any:
            settled: Any = self._whole(arguments)
            found = self.resolve(*settled).run(*settled[: self.count])
            return _without_none(found, settled[0])

        def fake(*arguments: Any) -> Any:
            return _without_none(self.outputs(*self._whole(arguments)), arguments[0])

        schema = torch.library.infer_schema(self.forward, mutates_args=tuple(mutates))
        operator = torch.library.custom_op(f"tritonconv::{self.name}", run, mutates_args=tuple(mutates), schema=schema)
        operator.register_fake(fake)
        if self.backward is not None:
            operator.register_autograd(
                lambda ctx, *gradients: self.gradients(ctx, gradients),
                setup_context=lambda ctx, inputs, output: self.setup(
                    ctx, self._whole(inputs), output, ctx.needs_input_grad, hopper_asked()
                ),
            )
        self.registered = getattr(torch.ops.tritonconv, self.name)
        if flops is not None:
            register_flop_formula(self.registered)(lambda *sizes, **named: flops(*sizes, *_unnamed(named)))
        if cast:
            for device in ("cuda", "cpu"):
                self._cast_on(device, [name in cast for name in self.tensors])

    def _whole(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments of torch.library, made hashable, with defaults for the last ones."""
        settled = tuple(tuple(a) if type(a) is list else a for a in arguments)
        return settled + self.defaults[len(settled) :]

    def _cast_on(self, device: str, which: list[bool]) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def autocast(*arguments: Any, **named: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            tensors = [cast_for_autocast(t, dtype) if c else t for t, c in zip(arguments, which, strict=False)]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.registered(*tensors, *arguments[len(which) :], **named)

        _library.impl(self.name, autocast, f"Autocast{device.upper()}")


def gradients_wanted(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call must save what its gradients need; also while it is recorded."""
    if state.recorder is not None:
        wanted: bool = state.recorder.gradients
        return wanted
    return needs_gradients(tensors)


def mutated(t: Tensor) -> None:
    """Tell autograd that a kernel has written into a tensor: a backward pass that saved it before must raise an error."""
    if state.recorder is not None:
        state.recorder.mutated(t)
    elif not t.is_inference():
        torch.autograd.graph.increment_version(t)


def _unnamed(named: dict[str, Any]) -> list[Any]:
    """The values of named arguments, in their order."""
    return [value for name, value in named.items() if name != "out_shape"]


def _without_none(output: Any, x: Tensor) -> Any:
    """Results in the form of registered operators: empty tensors instead of None."""
    if not isinstance(output, tuple):
        return output
    return tuple(x.new_empty(0) if t is None else t for t in output)


def _eager_function(operator: Operator) -> type[torch.autograd.Function]:
    """The operator's gradient for eager calls."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, recording: Recording, *arguments: Any) -> Any:
            output = recording.run(*arguments[: operator.count])
            operator.setup(ctx, arguments, output, ctx.needs_input_grad[1:], recording.hopper)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return (None, *operator.gradients(ctx, gradients))

    Eager.__name__ = Eager.__qualname__ = operator.name
    # As autograd's graph shows it.
    Eager._backward_cls.__name__ = f"{operator.name}_backward"
    return Eager


def differentiate(
    form: Callable[..., Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool], *gradients: Tensor | None
) -> list[Tensor | None]:
    """Gradients by torch, for second derivatives without a kernel; in grad mode they can be differentiated again.

    Args:
        form: the same computation by torch's operators.
        tensors: the arguments of `form`, None for those that are not given.
        needs: for each of them, whether it needs a gradient.
        gradients: the gradients of the results of `form`.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the gradient of one tensor does not pass through another one that was computed from it.
        inputs = [
            t if t is None else t.view_as(t) if again else t.detach().requires_grad_(bool(need))
            for t, need in zip(tensors, needs, strict=True)
        ]
        output = form(*inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    outputs = output if isinstance(output, tuple) else (output,)
    pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=False) if dy is not None]
    found = iter(torch.autograd.grad(
        [y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=again, allow_unused=True
    ))  # fmt: skip
    return [next(found) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
