"""What a call costs the host, without a GPU: `python -m benchmarks.host`.

Microseconds of Python from a call to Triton's launcher, which is a stub here, beside those of torch's own modules, and
apart from them what Triton's launcher costs under a driver that does nothing. CPU tensors stand for the GPU's: they are
allocated by another allocator, and asking for the current device is not timed.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

# Kernels decorated for the interpreter have no launcher, and the variable is read when they are imported.
os.environ.pop("TRITON_INTERPRET", None)

import click
import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tritonconv.kernels.conv_fprop import conv_fprop_kernel

import tritonconv
import tritonconv.functional as ours
from tritonconv.measure.offline import IdleDriver
from tritonconv.ops.core import backend, launch
from tritonconv.ops.core.activation import parse_activation
from tritonconv.ops.core.family import call_family
from tritonconv.ops.core.signature import clear_caches
from tritonconv.tuning import Device
from tritonconv.tuning.devices import device_named

__all__ = ["Timing", "counting_launches", "main", "rows", "time_call", "triton_rows"]

KERNEL_INTERFACE = triton.runtime.jit.KernelInterface


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and tenths of many repeats."""

    name: str
    median: float
    low: float
    high: float
    launches: int = 0
    """Kernels that one call launches."""

    @property
    def per_launch(self) -> float | None:
        return self.median / self.launches if self.launches else None


class _Counter:
    """Counts launches; the time of that is in the numbers."""

    launches = 0


@contextmanager
def counting_launches(gpu: Device) -> Iterator[_Counter]:
    """Take CPU tensors for those of a GPU, up to the call of Triton's launcher, which counts and does nothing."""
    counter = _Counter()

    def launch_nothing(*_arguments: Any, **_options: Any) -> None:
        counter.launches += 1

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "why_unsupported_device", lambda _device: None))
        stack.enter_context(mock.patch.object(launch, "described", lambda _device: gpu))
        # The current device is the CPU's, which has no index.
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: None))
        stack.enter_context(mock.patch.object(KERNEL_INTERFACE, "__getitem__", lambda _kernel, _grid: launch_nothing))
        clear_caches()
        try:
            yield counter
        finally:
            clear_caches()


def time_call(
    name: str, function: Callable[[], object], repeats: int, counter: _Counter | None = None, calls: int = 50
) -> Timing:
    """Time `repeats` runs of `calls` calls each, one warm-up before them."""
    for _ in range(3):
        function()
    before = counter.launches if counter else 0
    function()
    launches = counter.launches - before if counter else 0
    spent = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            start = time.perf_counter_ns()
            for _ in range(calls):
                function()
            spent.append((time.perf_counter_ns() - start) / calls / 1000)
    finally:
        if collecting:
            gc.enable()
    tenths = statistics.quantiles(spent, n=10)
    return Timing(name, statistics.median(spent), tenths[0], tenths[-1], launches)


class _Block(nn.Module):
    """ResNet-18's, as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """(N, 3, H, W) to (N, 10), 21 layers with weights; `width` channels in the first stage."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [width << stage for stage in (0, 0, 1, 2, 3)]
        for stage, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            blocks = _Block(inputs, outputs, 1 if stage == 1 else 2), _Block(outputs, outputs, 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(sizes[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """An image, a 3x3 filter, a residual and a batch norm's vectors, channels-last as convert() has them."""
    sizes = (1, 128, 4, 4), (128, 128, 3, 3), (1, 128, 4, 4)
    x, w, r = (torch.ones(size, dtype=dtype).contiguous(memory_format=torch.channels_last) for size in sizes)
    return x, w, r, tuple(torch.ones(128, dtype=dtype) for _ in range(4))


def our_rows(repeats: int, gpu: Device, dtype: torch.dtype = torch.bfloat16) -> list[Timing]:
    """Our calls, launches stubbed."""
    x, w, r, norm = _tensors(dtype)
    conv = tritonconv.nn.Conv2d(128, 128, 3, padding=1, bias=False, dtype=dtype)
    block = tritonconv.nn.ConvBNAct2d(128, 128, 3, padding=1, dtype=dtype).eval()
    # As convert() stores them.
    for layer in (conv, block.conv):
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    of_graph = ((2, (1, 1), (1, 1), (1, 1), 1), "conv2d_bn_act", 1e-5, parse_activation("relu"))
    rows_, square = x.flatten(1)[:, :128].contiguous(), w[:, :, 0, 0].contiguous()
    dense = tritonconv.nn.Linear(128, 128).to(dtype)
    resnet = tritonconv.convert(ResNet18(16).eval()).to(dtype)
    image = torch.empty(1, 3, 32, 32, dtype=dtype)
    numbers = dict(
        stride=[1, 1], padding=[1, 1], padding_name="", dilation=[1, 1], groups=1, eps=1e-5, activation="relu", a=0.0,
        b=0.0, kind="conv",
    )  # fmt: skip
    operator = torch.ops.tritonconv.conv
    # fp32 takes a look at one switch more.
    x32, w32, _, _ = _tensors(torch.float32)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("functional.conv2d", lambda: ours.conv2d(x, w, None, 1, 1)),
        ("functional.conv2d, fp32", lambda: ours.conv2d(x32, w32, None, 1, 1)),
        ("nn.Conv2d", lambda: conv(x)),
        ("functional.linear", lambda: ours.linear(rows_, square)),
        ("nn.Linear", lambda: dense(rows_)),
        ("functional.conv2d_bn_act, ReLU", lambda: ours.conv2d_bn_act(x, w, None, *norm, padding=1, activation="relu")),
        ("nn.ConvBNAct2d, ReLU", lambda: block(x)),
        ("nn.ConvBNAct2d, residual, ReLU", lambda: block(x, r)),
        ("call of a fused graph", lambda: call_family("conv", (x, w, None, *norm, r), of_graph, "auto")),
        ("ResNet-18, converted", lambda: resnet(image)),
        ("torch.ops.tritonconv.conv, BN, ReLU", lambda: operator(x, w, None, *norm, None, **numbers)),
        *_other_families(x, w, norm),
    ]
    with counting_launches(gpu) as counter:
        launcher, arguments = conv_fprop_kernel[(1,)], (None,) * 52
        calls.append(("what stands in the launcher's place", lambda: launcher(*arguments, num_warps=4, num_stages=3)))
        return [_timed(name, call, repeats, counter) for name, call in calls]


def _other_families(x: Tensor, w: Tensor, norm: tuple[Tensor, ...]) -> list[tuple[str, Callable[[], object]]]:
    """A call of each other family, and forward passes of training."""
    sequence, taps = torch.ones(1, 128, 16, dtype=x.dtype), torch.ones(128, 4, dtype=x.dtype)
    offset = torch.zeros(1, 18, 4, 4, dtype=x.dtype)
    image, block = x.clone().requires_grad_(), tritonconv.nn.ConvBNAct2d(128, 128, 3, padding=1, dtype=x.dtype)
    block.conv.weight.data = block.conv.weight.data.contiguous(memory_format=torch.channels_last)

    def training(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                return call()

        return run

    return [
        ("functional.max_pool2d", lambda: ours.max_pool2d(x, 2)),
        ("functional.adaptive_avg_pool2d", lambda: ours.adaptive_avg_pool2d(x, 1)),
        ("functional.batch_norm", lambda: ours.batch_norm(x, norm[0], norm[1], norm[2], norm[3])),
        ("functional.interpolate", lambda: ours.interpolate(x, scale_factor=2)),
        ("functional.pixel_shuffle", lambda: ours.pixel_shuffle(x, 2)),
        ("functional.causal_conv1d", lambda: ours.causal_conv1d(sequence, taps)),
        ("functional.deform_conv2d", lambda: ours.deform_conv2d(x, offset, w, padding=1)),
        ("functional.conv2d, training", training(lambda: ours.conv2d(image, w, None, 1, 1))),
        ("nn.ConvBNAct2d, training", training(lambda: block(image))),
    ]


def torch_rows(repeats: int) -> list[Timing]:
    """torch's own calls, their arithmetic included: on meta tensors Python takes the time that CUDA would not."""
    x = torch.ones(1, 8, 4, 4)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    chain, dense, resnet = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()).eval(), nn.Linear(8, 8), ResNet18(8).eval()
    image, vector, empty = torch.ones(1, 3, 32, 32), x[0, 0, :2].flatten(), _Empty()
    calls: list[tuple[str, Callable[[], object]]] = [
        ("an empty module", lambda: empty(x)),
        ("torch.nn.functional.conv2d", lambda: nn.functional.conv2d(x, conv.weight, None, 1, 1)),
        ("torch.nn.Conv2d", lambda: conv(x)),
        ("torch.nn.Linear", lambda: dense(vector)),
        ("torch.nn.Conv2d, BatchNorm2d, ReLU", lambda: chain(x)),
        ("ResNet-18", lambda: resnet(image)),
    ]
    return [_timed(name, call, repeats, None) for name, call in calls]


def _timed(name: str, call: Callable[[], object], repeats: int, counter: _Counter | None) -> Timing:
    return time_call(name, call, repeats, counter, calls=5 if "ResNet" in name else 50)


def triton_rows(repeats: int, gpu: Device, dtype: torch.dtype = torch.bfloat16) -> list[Timing]:
    """Triton's own launcher up to the driver, for what a fused 3x3 and a fused 1x1 convolution launch on this GPU.

    Compiles both. The driver that does nothing stays Triton's active one in this process.
    """
    x, w, r, norm = _tensors(dtype)
    seen: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: seen.append((kernel, grid, arguments, options))

    with counting_launches(gpu), mock.patch.object(KERNEL_INTERFACE, "__getitem__", record), torch.no_grad():
        for filters, padding in ((w, 1), (w[:, :, :1, :1].contiguous(), 0)):
            ours.conv2d_bn_act(x, filters, None, *norm, padding=padding, activation="relu", residual=r)
    triton.runtime.driver.set_active(IdleDriver(gpu, 0))
    timings = []
    for kernel, grid, arguments, options in seen:
        named = dict(zip(kernel.arg_names, arguments, strict=True)) | options
        whole = (*grid, 1, 1)
        launcher, compiled = kernel[grid], kernel[grid](*arguments, **options)[whole]
        calls: dict[str, Callable[[], object]] = {
            "by position": partial(launcher, *arguments, **options),
            "by name": partial(launcher, **named),
            "the compiled kernel itself": partial(compiled, *arguments),
        }
        what = f"{kernel.__name__}, {len(arguments)} arguments"
        timings += [time_call(f"{what}, {how}", call, repeats) for how, call in calls.items()]
    return timings


def rows(repeats: int, gpu: Device, *, with_triton: bool = True) -> dict[str, list[Timing]]:
    """All timings by their section; sets torch to one thread, without gradients, while it runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            sections = {
                "ours, up to Triton's launcher": our_rows(repeats, gpu),
                "torch, on tiny CPU tensors": torch_rows(repeats),
            }
            if with_triton:
                sections["Triton's launcher, up to the driver"] = triton_rows(repeats, gpu)
            return sections
    finally:
        torch.set_num_threads(threads)


@click.command(help=__doc__)
@click.option("--gpu", default="H200", show_default=True, help="Which described GPU the launches are built for.")
@click.option("--repeats", default=100, show_default=True, help="Runs of 50 calls each (5 of ResNet-18).")
@click.option("--triton/--no-triton", "with_triton", default=True, help="Also time Triton's own launcher (compiles).")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers to this file too.")
def main(gpu: str, repeats: int, with_triton: bool, path: Path | None) -> None:
    sections = rows(repeats, device_named(gpu), with_triton=with_triton)
    console = Console()
    for title, timings in sections.items():
        table = Table("call", "median", "10 %", "90 %", "launches", "per launch", title=f"{title}: microseconds")
        for t in timings:
            each = "" if t.per_launch is None else f"{t.per_launch:.1f}"
            table.add_row(t.name, f"{t.median:.1f}", f"{t.low:.1f}", f"{t.high:.1f}", str(t.launches or ""), each)
        console.print(table)
    if path is not None:
        path.write_text(json.dumps({title: [asdict(t) for t in timings] for title, timings in sections.items()}, indent=1))


if __name__ == "__main__":
    main()
