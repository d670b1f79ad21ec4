"""One forward and backward pass of a model, and who computed the gradients of each call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from tritonconv.convert.receptive import tensors_in
from tritonconv.convert.recorder import COPIES, Interpreter, Names, computes
from tritonconv.convert.report import Gradient
from tritonconv.graph.dynamo import fuse_or_warn, keep_checkpoints
from tritonconv.graph.fuse import LAUNCHES
from tritonconv.graph.nodes import members_of
from tritonconv.ops.core.backend import Backend
from tritonconv.ops.core.launch import record_launches

__all__ = ["Gradients"]

LEAF = "torch::autograd::AccumulateGrad"


class Gradients:
    """Runs graphs with gradients, node by node, and notes which autograd nodes belong to which call.

    Args:
        model: gives the rows their names.
        fuses: whether graphs are fused, as those of a converted model are.
        backend: of the functions of torch in the graphs.
    """

    def __init__(self, model: torch.nn.Module, fuses: bool, backend: Backend | None) -> None:
        self._names, self._fuses, self._backend = Names(model), fuses, backend
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._wanted = [p for p in model.parameters() if p.requires_grad]
        held = [t for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided]
        # A storage's address is its own only while it is there.
        self._stored = {t.untyped_storage()._cdata: t.untyped_storage() for t in held}
        self._nodes: dict[Any, Gradient | None] = {}
        """The calls that autograd nodes belong to."""
        self._now: Gradient | None = None
        self._log: list[str] = []
        self._start = 0
        self.rows: list[Gradient] = []
        self.saved = 0

    def trace(self, module: fx.GraphModule, example_inputs: Any) -> Any:  # noqa: ARG002
        """Dynamo's backend of the run."""
        if self._fuses:
            fuse_or_warn(module, self._backend)
        keep_checkpoints(module)
        return lambda *args: Interpreter(module, self).run(*args)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what is saved in the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t):
            yield

    def enter(self, node: fx.Node, args: Any) -> None:
        """A node is going to run, with these arguments."""
        for t in tensors_in(args):
            if t.grad_fn is not None:
                self._nodes.setdefault(t.grad_fn, None)
        members = members_of(node)
        name, kind = self._names.named(members[0], members[0].name)
        self._now = Gradient(name, kind, self._names.fused(name, members))

    def leave(self, node: fx.Node, args: Any, result: Any) -> None:
        """A node has run: what it gave."""
        row, self._now = self._now, None
        outputs = tensors_in(result)
        layer = node.target in LAUNCHES or self._names.layer(members_of(node)[0]) is not None
        shown = layer and node.target not in COPIES and computes(node, tensors_in(args), outputs)
        for output in outputs:
            self._claim(output.grad_fn, row if shown else None)

    def backward(self, result: Any) -> None:
        """Run the backward pass of a model's result; rows are complete after it.

        Raises:
            ValueError: no result depends on a parameter that needs a gradient.
        """
        results = [t for t in tensors_in(result) if t.requires_grad]
        if not results or not self._wanted:
            raise ValueError("explain(training=True): no result of the model needs a gradient")
        for t in results:
            self._claim(t.grad_fn, None)
        # On this thread, whose launches are recorded.
        with torch.autograd.set_multithreading_enabled(False), record_launches() as self._log:
            torch.autograd.grad(results, self._wanted, [torch.ones_like(t) for t in results], allow_unused=True)

    def _save(self, t: Tensor) -> Tensor:
        if t.layout == torch.strided and t.untyped_storage()._cdata not in self._stored:
            storage = t.untyped_storage()
            self._stored[storage._cdata] = storage
            self.saved += storage.nbytes()
            if self._now is not None:
                self._now.saved += storage.nbytes()
        return t

    def _claim(self, node: Any, row: Gradient | None) -> None:
        """Let the autograd nodes that lead to a result, and are nobody's yet, belong to a row."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._nodes or node.name() == LEAF:
                continue
            # What Python code between graphs launched has a row of its own.
            owner = self._nodes[node] = row or Gradient(node.name(), node.name())
            node.register_prehook(lambda *_: self._begin())
            node.register_hook(lambda given, _, node=node, owner=owner, shown=row is not None: self._end(
                node, owner, given, shown))  # fmt: skip
            waiting += [before for before, _ in node.next_functions]

    def _begin(self) -> None:
        self._start = len(self._log)

    def _end(self, node: Any, row: Gradient, given: tuple[Any, ...], shown: bool) -> None:
        launches = [name.removesuffix("_kernel") for name in self._log[self._start :]]
        if not shown and not launches:
            return
        if not any(row is other for other in self.rows):
            self.rows.append(row)
        if launches and row.backend == "torch":
            row.backend, row.reason = "triton", ""
        names = launches or ([node.name()] if row.backend == "torch" else [])
        row.reason = ", ".join(dict.fromkeys([*filter(None, row.reason.split(", ")), *names]))
        of = [self._source(before) for (before, _), g in zip(node.next_functions, given, strict=False) if g is not None]
        row.of = list(dict.fromkeys([*row.of, *of]))

    def _source(self, node: Any) -> str:
        """What a gradient is of: a parameter, if nothing but views and casts of it lie between."""
        while node is not None and node.name() != LEAF and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        leaf = getattr(node, "variable", None)
        return self._parameters.get(id(leaf), "input")
