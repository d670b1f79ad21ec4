"""One run of a model under observation, written down as a report."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from tritonconv.convert.forward import FusedForward, tracing_with
from tritonconv.convert.recorder import Recorder
from tritonconv.convert.report import Report
from tritonconv.convert.swap import mark_of

__all__ = ["explain", "restored"]


def explain(model: torch.nn.Module, *example_inputs: Any, **named_inputs: Any) -> Report:
    """What every layer of the model costs, who runs it and why, found by one run of it on example inputs.

    The run is without gradients, in the model's mode and the caller's autocast. It is traced and fused as the model's calls
    are. Our operators compute through torch meanwhile and say what they would have launched. Buffers and random generators
    are as before afterwards.

    Args:
        model: any module, converted or not.
        example_inputs, named_inputs: what the model is called with; shapes, dtypes and devices decide the answers.

    Returns:
        A report: `print` gives a table, `.to_dict()` plain data, `.plot(path)` a figure.

    Raises:
        TypeError: `model` is no module.

    >>> row = explain(torch.nn.Conv2d(1, 2, 3), torch.ones(1, 1, 5, 5)).to_dict()["layers"][0]
    >>> row["kind"], row["macs"], row["receptive_field"], row["reason"]
    ('Conv2d', 162, 3, 'not converted')
    """
    from tritonconv.graph.dynamo import compiled, is_disabled

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    fused = [module for module in model.modules() if isinstance(module.__dict__.get("forward"), FusedForward)]
    recorder = Recorder(model, converted=bool(fused) or any(mark_of(m) for m in model.modules()))
    tracing = _Tracing(recorder, fused[0].__dict__["forward"].backend if fused else None, bool(fused))
    run = _call if is_disabled() else compiled(_call, tracing.trace)
    recorder.follow((example_inputs, named_inputs))
    with restored(model), torch.no_grad(), tracing_with(tracing.trace):
        if is_disabled():
            tracing.fusion.append(dict(root="", how="not traced", chains=0, reason="TORCHDYNAMO_DISABLE is set"))
            with recorder.recording():
                run(model, example_inputs, named_inputs)
        else:
            run(model, example_inputs, named_inputs)
    return Report(type(model).__name__, recorder.finished(), tracing.fusion)


def _call(model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


class _Tracing:
    """Dynamo's backend of one explained run: graphs are fused as the model's are, and interpreted under observation."""

    def __init__(self, recorder: Recorder, backend: Any, fuses: bool) -> None:
        self.recorder, self.backend, self.fuses = recorder, backend, fuses
        self.fusion: list[dict[str, Any]] = []

    def trace(self, module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:  # noqa: ARG002
        from tritonconv.graph.dynamo import fuse_or_warn

        reason = getattr(module, "compile_subgraph_reason", None)
        if self.fuses:
            done = fuse_or_warn(module, self.backend)
            self.fusion.append(dict(root="", how="graph", chains=done.chains, reason=""))
        if reason is not None and reason.graph_break:
            where = traceback.StackSummary.from_list(reason.user_stack)[-1] if reason.user_stack else None
            at = "" if where is None else f"{where.filename}:{where.lineno}, in {where.name}: "
            text = str(reason.reason).strip().split("\n")[0]
            self.fusion.append(dict(root="", how="graph break", chains=0, reason=at + text))
        return lambda *args: self.recorder.run(module, args)


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
