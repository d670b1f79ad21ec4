"""Rows of a report, written while a traced graph is interpreted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from tritonconv.convert.receptive import Field, FunctionWatcher, Product, tensors_in
from tritonconv.convert.report import Row
from tritonconv.convert.roofline import roofline_us
from tritonconv.convert.swap import TWINS
from tritonconv.fused.call import carries_hook
from tritonconv.fused.shared import gated
from tritonconv.graph.dynamo import checkpointed
from tritonconv.graph.formats import as_channels_last, with_strides
from tritonconv.graph.memory import is_writing
from tritonconv.graph.nodes import Member, groups_of, members_of
from tritonconv.nn.format import contiguous
from tritonconv.ops.core.family import call_family
from tritonconv.ops.core.observe import Call, observe, shared

__all__ = ["COPIES", "Interpreter", "Names", "Recorder", "computes"]

OURS = ("tritonconv.nn", "tritonconv.fused")
COPIES = (as_channels_last, with_strides, contiguous)


class Names:
    """Names of the rows of one report.

    Args:
        model: whose modules give them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._root = model
        self._modules = {
            str(id(module)): (name, module)
            for name, module in model.named_modules() if "parametrizations." not in name
        }  # fmt: skip
        self._seen: dict[str, int] = {}
        self.owner = ""
        """The key of the module whose forward a graph is."""

    def layer(self, member: Member) -> tuple[str, str, torch.nn.Module] | None:
        """(key of the call, name, module) of the layer in whose forward a node ran: the innermost that is one."""
        for key in reversed((self.owner, *member.modules)):
            found = self._modules.get(key.partition("@")[0])
            if found is not None and self._is_layer(found[1]):
                return key, *found
        return None

    def _is_layer(self, module: torch.nn.Module) -> bool:
        if isinstance(module, torch.nn.MultiheadAttention):
            return True
        children = [name for name, _ in module.named_children() if name != "parametrizations"]
        # A model without layers is its functional calls.
        home = type(module).__module__
        own = module is self._root and not home.startswith(("torch.nn", *OURS))
        return (not children or home.startswith(OURS)) and not own

    def named(self, member: Member, op: str) -> tuple[str, str]:
        """Name and kind of the row of a call that a node made."""
        found = self.layer(member)
        return (self.numbered(op), op) if found is None else (found[1], type(found[2]).__name__)

    def label(self, member: Member) -> str:
        """A member as the rows of others name it."""
        found = self.layer(member)
        return {"iadd": "add", "imul": "mul"}.get(member.name, member.name.rstrip("_")) if found is None else found[1]

    def fused(self, name: str, members: Sequence[Member]) -> list[str]:
        """What a row of this name names beside its first member."""
        labels = [self.label(member) for member in members[1:]]
        return [label for before, label in zip([name, *labels], labels, strict=False) if label != before]

    def numbered(self, op: str) -> str:
        count = self._seen[op] = self._seen.get(op, -1) + 1
        return f"{op}_{count}" if count else op


class Recorder:
    """Interprets graphs, and writes a row for each call of a family and each layer that torch runs.

    Args:
        model: whose modules give the rows their names.
        converted: whether its layers were converted.
    """

    def __init__(self, model: torch.nn.Module, converted: bool) -> None:
        self._names, self._converted = Names(model), converted
        self._rows: list[Row] = []
        self._layers: dict[str, Row] = {}
        """Rows of layers that torch runs, by the key of their call."""
        self._counted: set[int] = set()
        self._node: fx.Node | None = None
        self._calls = self._early_copies = 0
        self._row: Row | None = None
        self._watcher: FunctionWatcher | None = None

    def follow(self, inputs: Any) -> None:
        """Follow receptive fields from these inputs on, and products that torch computes."""
        self._watcher = FunctionWatcher(inputs, self._on_product)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write rows of what runs in the block."""
        assert self._watcher is not None
        with observe(self._on_call, self._on_copy), self._watcher:
            yield

    def run(self, module: fx.GraphModule, args: Sequence[Any], owner: Any = None) -> Any:
        """The results of a graph, with rows of its nodes; `owner`: the module whose forward was traced."""
        self._names.owner = str(id(owner))
        with self.recording():
            return Interpreter(module, self).run(*args)

    def finished(self) -> list[Row]:
        """All rows."""
        return self._rows

    def enter(self, node: fx.Node, args: Any) -> None:  # noqa: ARG002
        self._node, self._calls, self._row = node, 0, None

    def leave(self, node: fx.Node, args: Any, result: Any) -> None:
        """A node has run: what it gave."""
        self._node = None
        outputs = tensors_in(result)
        if self._calls and self._row is not None:
            self._row.params += self._count([t for t in tensors_in(args) if isinstance(t, torch.nn.Parameter)])
            if self._row.receptive_field is None and outputs:
                self._row.receptive_field = self._field(outputs[0])
            return
        found = self._names.layer(members_of(node)[0])
        # They are counted by themselves.
        copies = node.target in COPIES
        # A batch norm's counter is no result.
        counts = bool(outputs) and not (outputs[0].is_floating_point() or outputs[0].is_complex())
        # What a layer of ours does around its calls is theirs.
        own = found is not None and type(found[2]).__module__.startswith(OURS) and bool(list(found[2].children()))
        if found is None or own or copies or counts or not outputs or not computes(node, tensors_in(args), outputs):
            return
        key, name, layer = found
        row = self._layers.get(key)
        if row is None:
            row = self._layers[key] = Row(name, type(layer).__name__, reason=self._why_torch(layer))
            self._rows.append(row)
            parameters = list(layer.parameters())
            row.params = self._count(parameters)
            row.bytes = _size([t for t in tensors_in(args) if not isinstance(t, torch.nn.Parameter)]) + _size(parameters)
        row.bytes += _size(outputs)
        row.receptive_field = self._field(outputs[0])
        kind = "matmul" if isinstance(layer, torch.nn.Linear) else "conv"
        row.roofline_us = roofline_us(row.macs, row.bytes, outputs[0].dtype, kind)  # type: ignore[arg-type]

    def _on_call(self, call: Call) -> None:
        """A family was called, alone or as a part of a launch that does more."""
        groups = () if self._node is None else groups_of(self._node)
        share = shared()
        # In one launch with all, or each its own.
        whole = share is not None and bool(share.members)
        if self._node is not None and self._node.target is gated and not whole:
            # The product runs first.
            groups = groups[::-1]
        members = (
            [m for g in groups for m in g] if whole else list(groups[self._calls]) if self._calls < len(groups) else []
        )
        self._calls += 1
        row = Row(*(self._names.named(members[0], call.op) if members else (self._names.numbered(call.op), call.op)))
        row.backend, row.reason = call.decision.backend, call.decision.reason
        row.copies, self._early_copies = call.decision.copies + self._early_copies, 0
        row.macs, row.bytes = call.macs, call.bytes
        kind = "matmul" if call.op == "linear" else "conv"
        row.roofline_us = roofline_us(row.macs, row.bytes, call.dtype, kind)  # type: ignore[arg-type]
        row.fused = self._names.fused(row.name, members)
        if row.fused:
            row.reason += ", fused"
        elif any(self._is_hooked(member) for member in members):
            row.reason += ", carries a hook"
        self._rows.append(row)
        self._row = row

    def _on_copy(self) -> None:
        """A value is copied to another memory format: for the next call, or after the last one."""
        if self._node is not None and self._node.target is as_channels_last:
            self._early_copies += 1
        elif self._rows:
            self._rows[-1].copies += 1

    def _on_product(self, product: Product, field: Field | None) -> None:
        """Torch computes a convolution or linear layer: for one of our families, for a layer, or as a function."""
        row = self._row
        if row is not None:
            row.receptive_field = field.size if field is not None else None
            return
        found = self._names.layer(members_of(self._node)[0]) if self._node is not None else None
        tensors = [t for t in (product.input, product.weight, product.bias, product.output) if t is not None]
        row = Row(self._names.numbered(product.op), product.op, reason="not converted")
        if found is not None:
            key, name, layer = found
            row = Row(name, type(layer).__name__, reason=self._why_torch(layer))
            # A layer that pads first has a row already.
            if key in self._layers:
                row = self._layers[key]
                self._rows.remove(row)
            self._layers[key] = row
        row.macs, row.bytes = product.macs, _size([t for t in tensors if t is not product.output or found is None])
        kind = "matmul" if product.op == "linear" else "conv"
        row.roofline_us = roofline_us(row.macs, row.bytes, product.output.dtype, kind)  # type: ignore[arg-type]
        row.receptive_field = field.size if field is not None else None
        row.params += self._count([t for t in tensors if isinstance(t, torch.nn.Parameter)])
        self._rows.append(row)

    def _is_hooked(self, member: Member) -> bool:
        found = self._names.layer(member)
        return found is not None and carries_hook(found[2])

    def _count(self, parameters: Sequence[Tensor]) -> int:
        """Elements of those that no row has counted yet."""
        new = {id(p): p for p in parameters if id(p) not in self._counted}
        self._counted.update(new)
        return sum(p.numel() for p in new.values())

    def _field(self, output: Tensor) -> int | list[int] | None:
        found = self._watcher.field(output) if self._watcher is not None else None
        return found.size if found is not None else None

    def _why_torch(self, layer: torch.nn.Module) -> str:
        if not self._converted or type(layer) in TWINS:
            return "not converted"
        return f"{type(layer).__name__} has no kernel of its own"


class Watcher(Protocol):
    """Who is told of each call of an interpreted graph."""

    def enter(self, node: fx.Node, args: Any) -> None:
        """A node is going to run, with these arguments."""

    def leave(self, node: fx.Node, args: Any, result: Any) -> None:
        """A node has run: what it gave."""


class Interpreter(fx.Interpreter):
    """Runs a graph node by node."""

    def __init__(self, module: fx.GraphModule, watcher: Watcher) -> None:
        super().__init__(module)
        self.watcher = watcher

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            found = super().run_node(n)
            if n.op != "get_attr" or not all(user.target is checkpointed for user in n.users):
                return found
            # Regions of a graph are run node by node too.
            return lambda *args: Interpreter(found, self.watcher).run(*args)
        args = self.fetch_args_kwargs_from_env(n)
        self.watcher.enter(n, args)
        result = super().run_node(n)
        self.watcher.leave(n, args, result)
        return result


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def computes(node: fx.Node, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether a node is more than a view of what it is given."""
    if node.target is call_family or is_writing(node):
        return True
    held = {t.untyped_storage()._cdata for t in inputs if t.layout == torch.strided}
    return any(t.untyped_storage()._cdata not in held for t in outputs if t.layout == torch.strided)
