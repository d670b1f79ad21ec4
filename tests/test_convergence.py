"""Converted networks learn what the originals learn: twenty steps from the same seed, step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matrix import every, some
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.launch import record_launches

STEPS = 20


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in ResNet-18; the addition and the activations are in place."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        result: Tensor = self.relu(y)
        return result


def three_stages() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Residual(8, 8, 1),
        Residual(8, 16, 2), Residual(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def losses(model: nn.Module, images: Tensor, labels: Tensor, rate: float) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    found = []
    for step in range(STEPS):
        batch = slice(8 * (step % 2), 8 * (step % 2) + 8)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


NETWORKS = [(lenet, (1, 28, 28), 0.1), (three_stages, (3, 8, 8), 0.01)]


@every({"make, size, rate": some(NETWORKS, 1)})
def test_twenty_steps(make: Callable[[], nn.Module], size: tuple[int, ...], rate: float, device: str) -> None:
    original = make().to(device).train()
    converted = tritonconv.convert(original, backend="triton")
    images, labels = torch.randn(16, *size, device=device), torch.randint(10, (16,), device=device)
    expected = losses(original, images, labels, rate)
    with record_launches() as launches:
        found = losses(converted, images, labels, rate)
    assert launches.count("conv_wgrad_kernel") >= 3 * STEPS
    assert found[-1] < 0.9 * found[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
    for name, buffer in original.named_buffers():
        torch.testing.assert_close(converted.get_buffer(name), buffer, rtol=1e-5, atol=1e-5, msg=name)
