"""Convert a small ResNet of your own, compare it with the original, and see which layer runs where.

    python examples/convert_resnet.py

Runs on the GPU if there is one, else in Triton's interpreter.
"""

import os

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    # Counts when triton is imported, which is why tritonconv comes after it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tritonconv


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride=stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet() -> nn.Sequential:
    """A ResNet for images (N, 3, 32, 32) and ten classes."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = small_resnet().to(device)
    images = torch.randn(4, 3, 32, 32, device=device)
    # A few batches in training mode, so that the batch norms have statistics of their own.
    for _ in range(3):
        model(images + torch.randn_like(images))
    model.eval()

    converted = tritonconv.convert(model)
    with torch.no_grad():
        expected = model(images)
        with tritonconv.set_backend("triton"):
            result = converted(images)
    print(tritonconv.explain(converted, images))
    error = (result - expected).norm() / expected.norm()
    print(f"relative difference {error:.1e}, same predictions: {bool((result.argmax(1) == expected.argmax(1)).all())}")
    # TF32 products, which torch allows for convolutions on a GPU, agree to about three digits.
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)

    # Checkpoints go both ways.
    model.load_state_dict(converted.state_dict())


if __name__ == "__main__":
    main()
