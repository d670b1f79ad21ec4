"""SyncBatchNorm: two processes, each with its part of the batch, are one batch norm over all of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

import tritonconv
from tritonconv.ops.core.launch import record_launches

CHANNELS = 5


@dataclass(frozen=True)
class Case:
    name: str
    parts: tuple[int, int]
    """Images of each process."""
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("uneven", (3, 2)),
    # It takes part in what is gathered all the same.
    Case("one has no images", (4, 0)),
    Case("cumulative average", (1, 2), dict(momentum=None)),
    Case("no parameters", (2, 2), dict(affine=False)),
    Case("no running statistics", (2, 1), dict(track_running_stats=False)),
]


def whole_batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, dy)"""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(sum(case.parts), CHANNELS, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x + 2, dy


def steps(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, Any]:
    """Two training steps, the second without gradients, and where statistics are kept one in eval mode."""
    x = x.clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    found = dict(y=y.detach(), dx=grads[0], affine=grads[1:])
    with torch.no_grad():
        found["again"] = layer(x + 1)
        found["state"] = {name: t.clone() for name, t in layer.state_dict().items()}
        if layer.running_mean is not None:
            found["eval"] = layer.eval()(x)
    return found


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for case in CASES:
        x, dy = (t.split(case.parts)[rank] for t in whole_batch(case))
        layer = tritonconv.nn.SyncBatchNorm(CHANNELS, **case.options).double()
        with tritonconv.set_backend("triton"), record_launches() as launches:
            results.append(steps(layer, x, dy))
        # Once over its own slots, once over the ranks, in each step.
        assert launches.count("batch_norm_combine_kernel") == 4
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, first, second in zip(CASES, *ranks, strict=True):
        expected = steps(torch.nn.BatchNorm2d(CHANNELS, **case.options).double(), *whole_batch(case))
        for key in {"y", "again", "dx", "eval"} & set(expected):
            torch.testing.assert_close(
                torch.cat([first[key], second[key]]), expected[key], msg=lambda m, c=case: f"{c}: {m}"
            )
        # Gradients of weight and bias are each process's own: whoever trains on several adds them up.
        affine = [a + b for a, b in zip(first["affine"], second["affine"], strict=True)]
        torch.testing.assert_close(affine, [*expected["affine"]])
        assert all(rank["state"].keys() == expected["state"].keys() for rank in (first, second))
        for rank in (first, second):
            torch.testing.assert_close(rank["state"], expected["state"])


def test_torchs_own_conversion_takes_our_layers() -> None:
    model = tritonconv.convert(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    ).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is torch.nn.SyncBatchNorm
    torch.testing.assert_close(synced(x), expected)
    assert type(tritonconv.convert(synced, inplace=True)[1]) is tritonconv.nn.SyncBatchNorm
    torch.testing.assert_close(synced(x), expected)
    assert type(tritonconv.revert(synced)[1]) is torch.nn.SyncBatchNorm
