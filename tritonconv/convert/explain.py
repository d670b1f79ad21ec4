"""One run of a model under observation, written down as a report."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as global_hooks

from tritonconv.convert.fuse import GLOBAL_HOOKS, FusedForward, ignoring_global_hooks
from tritonconv.convert.receptive import Field, FunctionWatcher, Product, tensors_in
from tritonconv.convert.report import Report, Row
from tritonconv.convert.roofline import roofline_us
from tritonconv.convert.swap import TWINS, mark_of
from tritonconv.fused.call import Group, carries_hook, observe_groups
from tritonconv.ops.core.observe import Call, observe

__all__ = ["explain", "restored"]

HOOKED = "carries a hook, so it is not fused"


def explain(model: torch.nn.Module, *example_inputs: Any) -> Report:
    """What every layer of the model costs, who runs it and why, found by one run of it on example inputs.

    The run is without gradients, in the model's mode and the caller's autocast; our operators compute through torch
    meanwhile and say what they would have launched. Buffers and random generators are as before afterwards.

    Args:
        model: any module, converted or not.
        example_inputs: what the model is called with; shapes, dtypes and devices decide the answers.

    Returns:
        A report: `print` gives a table, `.to_dict()` plain data, `.plot(path)` a figure.

    Raises:
        TypeError: `model` is no module.

    >>> row = explain(torch.nn.Conv2d(1, 2, 3), torch.ones(1, 1, 5, 5)).to_dict()["layers"][0]
    >>> row["kind"], row["macs"], row["receptive_field"], row["reason"]
    ('Conv2d', 162, 3, 'not converted')
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    recorder = _Recorder(model)
    with ExitStack() as stack:
        stack.enter_context(restored(model))
        stack.enter_context(torch.no_grad())
        if not any(GLOBAL_HOOKS):
            stack.enter_context(ignoring_global_hooks())
        stack.enter_context(recorder.listening())
        stack.enter_context(observe(recorder.on_call, recorder.on_copy))
        stack.enter_context(observe_groups(recorder.on_group))
        recorder.watcher = stack.enter_context(FunctionWatcher(example_inputs, recorder.on_product))
        model(*example_inputs)
    return Report(type(model).__name__, recorder.finished_rows(), _fusion_of(model))


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Give buffers and random generators back as they were."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None
    ]  # fmt: skip
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    if not buffer.is_meta and not torch.equal(buffer, saved):
                        buffer.copy_(saved)


def _fusion_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        fused, mark = module.__dict__.get("forward"), mark_of(module)
        if isinstance(fused, FusedForward) and fused.program is not None:
            entries.append(dict(root=name, how=fused.program.how, chains=fused.program.chains, reason=""))
        elif mark is not None and mark.untraceable:
            entries.append(dict(root=name, how="not traced", chains=0, reason=mark.untraceable))
    return entries


@dataclass
class _Frame:
    """A module's call that has not returned."""

    module: torch.nn.Module
    row: Row | None
    call: Call | None = None
    copies: int = 0
    """Of its result, to another memory format."""
    product: Product | None = None


class _Recorder:
    """Listens to modules, to our operators and to torch's functions, and writes rows in the order of execution."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.watcher: FunctionWatcher | None = None
        self._names: dict[torch.nn.Module, str] = {}
        for name, module in model.named_modules():
            if "parametrizations." not in name:
                self._names[module] = name
        self._root = model
        self._converted = any(mark_of(m) or isinstance(m.__dict__.get("forward"), FusedForward) for m in self._names)
        self._thread = threading.get_ident()
        self._frames: list[_Frame] = []
        self._rows: list[Row] = []
        self._loose: list[tuple[Row, _Frame | None]] = []
        self._expected: Row | None = None
        self._counted: set[int] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Global hooks: a hook on a module itself would keep it out of its chain."""
        handles = [
            global_hooks.register_module_forward_pre_hook(self._enter),
            global_hooks.register_module_forward_hook(self._leave, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
                # torch's handle leaves this entry behind.
                global_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)

    def finished_rows(self) -> list[Row]:
        """All rows; functional calls get the names that their nodes have in a traced graph."""
        names: dict[int, Iterator[str]] = {}
        seen: dict[str, int] = {}
        for row, frame in self._loose:
            fused = frame.module.__dict__.get("forward") if frame is not None else None
            if isinstance(fused, FusedForward) and fused.program is not None:
                name = next(names.setdefault(id(frame), iter(fused.program.functional)), row.kind)
            else:
                count = seen[row.kind] = seen.get(row.kind, -1) + 1
                name = f"{row.kind}_{count}" if count else row.kind
            row.name = name
        return self._rows

    def _enter(self, module: torch.nn.Module, args: Any) -> None:  # noqa: ARG002
        if module in self._names and threading.get_ident() == self._thread:
            row = Row(self._names[module], type(module).__name__) if self._is_layer(module) else None
            self._frames.append(_Frame(module, row))

    def _leave(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._frames or self._frames[-1].module is not module or threading.get_ident() != self._thread:
            return
        frame = self._frames.pop()
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
        row = frame.row
        if row is None or not inputs or not outputs:
            return
        kind = "matmul" if isinstance(module, torch.nn.Linear) else "conv"
        parameters = [p for p in module.parameters() if p is not None]
        row.params = self._count(parameters)
        if frame.call is not None:
            self._take_call(row, frame.call)
            row.copies += frame.copies
            if carries_hook(module):
                row.reason += f", {HOOKED}"
        else:
            row.macs = frame.product.macs if frame.product is not None else 0
            row.bytes = sum(t.numel() * t.element_size() for t in (*inputs, *outputs, *parameters))
            row.reason = self._why_torch(module)
            row.roofline_us = roofline_us(row.macs, row.bytes, outputs[0].dtype, kind)  # type: ignore[arg-type]
        row.receptive_field = self._field(outputs[0])
        self._rows.append(row)

    def on_call(self, call: Call) -> None:
        """One of our operators was called: by a layer of ours, by a group, or as a function."""
        frame = self._frames[-1] if self._frames else None
        if frame is not None and frame.row is not None:
            frame.call, self._expected = call, frame.row
            return
        row = Row("", call.op)
        self._take_call(row, call)
        self._loose.append((row, frame))
        self._rows.append(row)
        self._expected = row

    def on_copy(self) -> None:
        """A result is copied to the format that torch gives it: by the layer that is called, or behind the last one."""
        if self._frames and self._frames[-1].row is not None:
            self._frames[-1].copies += 1
        elif self._rows:
            self._rows[-1].copies += 1

    def on_group(self, group: Group) -> None:
        """The call before was a group's: name its members."""
        if not self._loose:
            return
        row, frame = self._loose.pop()
        row.name, row.kind = self._names.get(group.layer, ""), type(group.layer).__name__
        modules = [group.layer]
        if group.norm is not None:
            modules.append(group.norm)
            row.fused.append(self._names.get(group.norm, ""))
        if group.residual is not None:
            row.fused.append("add")
        if isinstance(group.activation, torch.nn.Module):
            modules.append(group.activation)
            row.fused.append(self._names.get(group.activation, ""))
        elif group.activation is not None:
            row.fused.append(group.activation.name)
        for member in group.more:
            row.fused.append(self._names.get(member, "") if isinstance(member, torch.nn.Module) else member)
        # The product has counted the layer's own.
        row.params += self._count([p for module in modules for p in module.parameters()])
        row.receptive_field = self._field(group.output)
        if not row.fused:
            return
        forward = frame.module.__dict__.get("forward") if frame is not None else None
        if isinstance(forward, FusedForward) and forward.program is not None:
            row.reason += f", fused by {forward.program.how}"
        elif frame is not None:
            row.reason += f", fused by {type(frame.module).__name__}"

    def on_product(self, product: Product, field: Field | None) -> None:
        """Torch computes a convolution or linear layer: for one of our operators, for a layer, or as a function."""
        row, self._expected = self._expected, None
        frame = self._frames[-1] if self._frames else None
        if row is None and frame is not None and frame.row is not None:
            frame.product = product
            return
        if row is None:
            row = Row("", product.op, reason=self._why_function(), macs=product.macs)
            tensors = [product.input, product.weight, product.output] + ([product.bias] if product.bias is not None else [])
            row.bytes = sum(t.numel() * t.element_size() for t in tensors)
            kind = "matmul" if product.op == "linear" else "conv"
            row.roofline_us = roofline_us(row.macs, row.bytes, product.output.dtype, kind)  # type: ignore[arg-type]
            self._loose.append((row, frame))
            self._rows.append(row)
        if frame is None or frame.row is not row:
            row.receptive_field = field.size if field is not None else None
            row.params = self._count([t for t in (product.weight, product.bias) if isinstance(t, torch.nn.Parameter)])

    def _take_call(self, row: Row, call: Call) -> None:
        row.backend, row.reason, row.copies = call.decision.backend, call.decision.reason, call.decision.copies
        row.macs, row.bytes = call.macs, call.bytes
        kind = "matmul" if call.op == "linear" else "conv"
        row.roofline_us = roofline_us(row.macs, row.bytes, call.dtype, kind)  # type: ignore[arg-type]

    def _is_layer(self, module: torch.nn.Module) -> bool:
        if isinstance(module, torch.nn.MultiheadAttention):
            return True
        children = [name for name, _ in module.named_children() if name != "parametrizations"]
        # A model without layers is its functional calls.
        own = module is self._root and not type(module).__module__.startswith(("torch.nn", "tritonconv."))
        return not children and not own

    def _count(self, parameters: Sequence[Tensor]) -> int:
        """Elements of those that no row has counted yet."""
        new = {id(p): p for p in parameters if id(p) not in self._counted}
        self._counted.update(new)
        return sum(p.numel() for p in new.values())

    def _field(self, output: Tensor) -> int | list[int] | None:
        found = self.watcher.field(output) if self.watcher is not None else None
        return found.size if found is not None else None

    def _why_torch(self, module: torch.nn.Module) -> str:
        if not self._converted:
            return "not converted"
        known = next((kind.__name__ for kind in type(module).__mro__[1:] if kind in TWINS), None)
        if known is not None and type(module) not in TWINS:
            return (
                f"{type(module).__name__} is a subclass of {known} with a forward of its own, which may compute something "
                "else: it is left alone, and nothing is fused with it"
            )
        if carries_hook(module):
            return HOOKED
        return f"{type(module).__name__} has no kernel of its own"

    def _why_function(self) -> str:
        return "a functional call in a forward that was not traced" if self._converted else "not converted"
