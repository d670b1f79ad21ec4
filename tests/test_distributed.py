"""Two processes that train a converted model are what they were for the original, or one process with the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tritonconv
from tritonconv.ops.core.launch import record_launches

Values = dict[str, Tensor]


class Residual(nn.Module):
    """A strided chain, one that ends in a sum and an activation, and its shortcut."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, filters, 3, 2, 1, bias=False), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, 2, bias=False), nn.BatchNorm2d(filters))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        result: Tensor = self.relu(y)
        return result


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(Residual(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def batch(step: int, images: int) -> Tensor:
    return torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def state(net: nn.Module) -> Values:
    """Gradients, parameters and buffers, whoever wraps the model."""
    net = getattr(net, "module", net)
    found = {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.grad is not None} | net.state_dict()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


def assert_same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@dataclass(frozen=True)
class Case:
    """How two processes wrap a model and train it."""

    name: str
    parts: tuple[int, int]
    """Images of each process."""
    wrap: Callable[[nn.Module], nn.Module]
    synced: bool = False
    """Whether batch norms see the whole batch: then one process with all of it does the same."""
    accumulate: bool = False
    original: Callable[[nn.Module], nn.Module] = DistributedDataParallel
    """How torch's model is wrapped."""


def sharded(net: nn.Module) -> nn.Module:
    """Each process keeps a part of each parameter, and gathers those of a block for the block's call."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    for block in [m for m in net if isinstance(m, Residual)]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded_then_converted(net: nn.Module) -> nn.Module:
    return tritonconv.convert(sharded(net), inplace=True)


def converted_then_sharded(net: nn.Module) -> nn.Module:
    # It takes contiguous parameters alone.
    return sharded(tritonconv.convert(net, memory_format=torch.contiguous_format))


def synced_then_converted(net: nn.Module) -> nn.Module:
    return tritonconv.convert(nn.SyncBatchNorm.convert_sync_batchnorm(net))


CASES = [
    Case("own statistics", (3, 2), tritonconv.convert),
    Case("accumulated", (2, 2), tritonconv.convert, accumulate=True),
    Case("synced, then converted", (3, 1), synced_then_converted, synced=True),
    Case("synced and accumulated", (2, 2), synced_then_converted, synced=True, accumulate=True),
    # It takes part in the sums all the same.
    Case("one without images", (3, 0), synced_then_converted, synced=True),
    Case("sharded, then converted", (3, 2), sharded_then_converted, original=sharded),
    Case("converted, then sharded", (3, 2), converted_then_sharded, original=sharded),
]


def train(net: nn.Module, case: Case, rank: int | None, steps: int = 3) -> Values:
    """Steps of SGD on a sum over images: of one process's part of each batch, or of all of it."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    found = {}
    for i in range(steps):
        x = batch(i, sum(case.parts))
        x = x if rank is None else x.split(case.parts)[rank]
        waits = case.accumulate and i % 2 == 1
        with net.no_sync() if waits and isinstance(net, DistributedDataParallel) else nullcontext():
            net(x).square().sum().backward()
        if not waits:
            # Processes average their gradients.
            for p in net.parameters():
                p.grad *= 2 if rank is not None else 1
            found |= {f"{i} {name}": t for name, t in state(net).items()}
            optimizer.step()
            optimizer.zero_grad()
    return found | state(net)


def frozen_and_hooked(rank: int) -> Values:
    """One process runs the parts of a fused layer, since someone looks; the sums of both are joined all the same."""
    net = synced_then_converted(model())
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        conv.requires_grad_(False)
    if rank == 1:
        net[0].bn1.register_forward_hook(lambda *_: None)
    net(batch(0, 4).split((2, 2))[rank]).square().sum().backward()
    return state(net)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # It refuses SyncBatchNorm on CPUs, which torch's own does not run on.
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results: list[Any] = []
    for case in CASES:
        net = case.wrap(model())
        with warnings.catch_warnings():
            # Gradients have the strides that their buckets expect.
            warnings.simplefilter("error")
            # A linear layer's result is a view, as torch's is for some inputs.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            wrapped = net if isinstance(net, FSDPModule) else DistributedDataParallel(net)
            with record_launches() as launches:
                found = train(wrapped, case, rank)
        fused = launches.count("batch_norm_reduce_kernel") and "batch_norm_statistics_kernel" not in launches
        assert fused or not case.parts[rank], (case, sorted(set(launches)))
        original = None if case.synced else train(case.original(model()), case, rank)
        results.append((found, original))
    results.append(frozen_and_hooked(rank))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each process found for every case, and at last for layers that are frozen and hooked."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_as_before(case: Case, ranks: list[list[Any]]) -> None:
    found = [results[CASES.index(case)] for results in ranks]
    expected = train(model(), case, None) if case.synced else None
    for ours, original in found:
        assert_same(ours, expected or original)
    if case.synced:
        assert_same(found[0][0], found[1][0])


def test_processes_may_run_a_layer_differently(ranks: list[list[Any]]) -> None:
    found = [results[-1] for results in ranks]
    whole = model()
    whole(batch(0, 4)).square().sum().backward()
    expected = state(whole)
    for name in found[0]:
        # Gradients are each process's own until someone adds them up.
        ours = found[0][name] + found[1][name] if name.endswith(".grad") else found[0][name]
        torch.testing.assert_close(ours, expected[name], rtol=1e-8, atol=1e-10, msg=name)
