"""Bytes that blocks of networks move: the table in docs/norms.md, by `python -m benchmarks.traffic_blocks`.

For inference and a training step of eight blocks in bf16, channels-last:

- ours: the tensors of every launch, each once, as they are built for an H200, and those of torch's operators between them;
- eager torch: the tensors of every operator, each once; a norm over pixels reads its input twice forward, and the gradient
  and the input twice backward, as torch's CUDA kernels do;
- torch.compile: inductor's own count for the kernels that it would run (the schedule for CPUs, where nothing is timed).

Caches keep nothing from kernel to kernel, and everything within one. Statistics and partial sums of gradients are left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tritonconv
from benchmarks.markdown import table
from tritonconv.ops.core.launch import captured
from tritonconv.tuning import device_named

__all__ = ["BLOCKS", "eager", "inductor", "ours", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "norms.md"
BEGIN, END = "<!-- bytes -->", "<!-- end of bytes -->"
DTYPE = torch.bfloat16


class Residual(nn.Module):
    """Group norm, SiLU, convolution, twice, and the input: of Stable Diffusion's VAE, and with a time's shift its U-Net."""

    def __init__(self, channels: int, timed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, channels), nn.GroupNorm(32, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(1280, channels) if timed else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            y = y + self.time(F.silu(time))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(y)))


class ConvNeXt(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class NFNet(nn.Module):
    """A bottleneck of a normalizer-free ResNet (A. Brock et al., 2021), its weights standardized elsewhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.conv1, self.conv3 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=inner // 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(x) * 0.9)
        return x + 0.2 * self.conv3(F.relu(self.conv2(F.relu(y))))


class Critic(nn.Module):
    """A stage of StyleGAN2's critic, with an average in place of its filter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return F.avg_pool2d(y, 2) + self.skip(F.avg_pool2d(x, 2))


def volume(channels: int) -> nn.Module:
    """Two layers of nnU-Net, and its head."""
    layers: list[nn.Module] = []
    for _ in range(2):
        norm = nn.InstanceNorm3d(channels, affine=True)
        layers += [nn.Conv3d(channels, channels, 3, padding=1), norm, nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers, nn.Conv3d(channels, 3, 1))


def vgg() -> nn.Module:
    first, second = nn.Conv2d(128, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(True), second, nn.ReLU(True), nn.MaxPool2d(2))


def generator() -> nn.Module:
    up = nn.ConvTranspose2d(256, 128, 4, 2, 1, bias=False)
    return nn.Sequential(up, nn.BatchNorm2d(128), nn.ReLU(True))


# (block, sizes of its inputs)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "U-Net stage (Stable Diffusion)": (lambda: Residual(320, True), ((4, 320, 64, 64), (4, 1280))),
    "VAE res block (Stable Diffusion)": (lambda: Residual(128, False), ((1, 128, 256, 256),)),
    "ConvNeXt block": (lambda: ConvNeXt(96), ((16, 96, 56, 56),)),
    "nnU-Net block": (lambda: volume(32), ((2, 32, 48, 48, 48),)),
    "DCGAN generator stage": (generator, ((32, 256, 16, 16),)),
    "VGG stage": (vgg, ((16, 128, 56, 56),)),
    "NFNet block": (lambda: NFNet(256), ((16, 256, 28, 28),)),
    "StyleGAN critic stage": (lambda: Critic(256), ((8, 256, 64, 64),)),
}


def made(name: str, device: str) -> tuple[nn.Module, list[Tensor]]:
    """A block and its inputs, whose first one needs a gradient in training."""
    make, sizes = BLOCKS[name]
    with torch.device(device):
        inputs = [torch.empty(size, dtype=DTYPE) for size in sizes]
        model = make().to(DTYPE)
    return last(model), [last(x) for x in inputs]


def last(value: Any) -> Any:
    """In channels-last memory."""
    if isinstance(value, nn.Module):
        for p in value.parameters():
            p.data = last(p.data)
        return value
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return value.to(memory_format=formats[value.dim()]) if value.dim() in formats else value


def step(model: nn.Module, inputs: list[Tensor], training: bool) -> None:
    """A call of a model, and in training its gradients."""
    model.train(training)
    with torch.set_grad_enabled(training):
        leaves = [x.detach().requires_grad_(training) for x in inputs]
        y = model(*leaves)
        if training:
            torch.autograd.grad(y, [*leaves, *model.parameters()], torch.empty_like(y))


def size_of(tensors: Any) -> int:
    """Bytes of all tensors, each once; numbers in fp32 are statistics and partial sums."""
    found = {id(t): t for t in pytree.tree_leaves(tensors) if isinstance(t, Tensor) and t.dtype != torch.float32}
    return sum(t.numel() * t.element_size() for t in found.values())


# The kernel that joins sums reads the one pixel by which they were shifted.
READS_LITTLE = {"group_norm_combine_kernel": ("x_ptr",)}
# torch's operators that move nothing.
FREE = (
    "empty", "view", "as_strided", "detach", "permute", "transpose", "reshape", "expand", "slice", "alias", "unsqueeze",
    "squeeze", "select", "result_type", "to", "lift_fresh", "t", "resize_", "set_", "contiguous", "empty_strided",
    "empty_like", "new_empty", "ones_like", "_unsafe_view", "chunk", "split", "narrow",
)  # fmt: skip


def ours(name: str, training: bool) -> int:
    """Bytes of our launches, and of torch's operators between them."""
    model, inputs = made(name, "meta")
    converted = tritonconv.convert(model)
    with captured(device_named("H200")) as launches:
        step(converted, inputs, training)
        launches.clear()
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            step(converted, inputs, training)
    moved = sum(
        size_of([t for key, t in one.arguments.items() if key not in READS_LITTLE.get(one.kernel.__name__, ())])
        for one in launches
    )
    for event in profile.function_events:
        if runs(event) and event.name[6:] not in FREE and not any(map(is_operator, parents(event))):
            shapes = [math.prod(shape) for shape in event.input_shapes if shape]
            moved += (sum(shapes) + max(shapes, default=0)) * DTYPE.itemsize
    return moved


def is_operator(event: Any) -> bool:
    return event.name.startswith("aten::")


def runs(event: Any) -> bool:
    """Whether torch computes something: a call under a mode is one that is recorded."""
    return is_operator(event) and all(child.name != "PythonDispatchMode" for child in event.cpu_children)


def parents(event: Any) -> Iterator[Any]:
    """Events within which an event lies."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


class Counting(TorchDispatchMode):
    """Bytes of every operator of torch's."""

    # Norms over pixels read twice what one pass cannot hold.
    TWICE = ("native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in FREE or func.is_view:
            return result
        self.moved += size_of((args, kwargs, result))
        if name.removesuffix("_backward") in self.TWICE:
            self.moved += size_of(args[:2] if name.endswith("_backward") else args[:1])
        if name == "native_layer_norm_backward":
            self.moved += size_of(args[:2])
        if name == "convolution_backward":
            # dy for the filter's gradient, and for the bias's.
            self.moved += size_of(args[:1]) * (int(args[-1][1]) + int(args[-1][2]))
        return result


def eager(name: str, training: bool) -> int:
    """Bytes of torch's operators."""
    model, inputs = made(name, "meta")
    with Counting() as counting:
        step(model, inputs, training)
    return counting.moved


def inductor(name: str, training: bool) -> int:
    """Bytes by inductor's count."""
    from torch._inductor import compile_fx, config, metrics

    torch._dynamo.reset()
    metrics.reset()
    model, inputs = made(name, "cpu")
    log = compile_fx.inductor_metrics_log
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with config.patch(force_disable_caches=True):
            step(torch.compile(model), inputs, training)  # type: ignore[arg-type]
    finally:
        log.setLevel(level)
    return metrics.num_bytes_accessed


def page() -> str:
    """The table."""
    rows = []
    for name in BLOCKS:
        cells = []
        for training in (False, True):
            mine, torchs, compiled = (count(name, training) for count in (ours, eager, inductor))
            cells += [f"{n / 1e6:.0f}" for n in (mine, compiled, torchs)]
        rows.append((name, *cells))
        print(*rows[-1], sep="\t", flush=True)
    return table("block, inference: ours, torch.compile, eager, training step: ours, torch.compile, eager", rows)


def main() -> None:
    text = page()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
