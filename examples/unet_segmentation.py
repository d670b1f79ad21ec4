"""Train a small U-Net to tell discs from rectangles in noise, with torch's layers or with ours.

    python examples/unet_segmentation.py --picture shapes.png
    python examples/unet_segmentation.py --compare --picture shapes.png

Needs `pip install 'tritonconv[demo]'`. Our kernels run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, where
a step takes seconds; CPU tensors run on torch else. Copy common.py too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import common
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 32
CLASSES = ("ground", "disc", "rectangle")
TRAIN_IMAGES, TEST_IMAGES = 512, 32
SHOWN = 4


def block(channels: int, filters: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU: two operators once `tritonconv.convert` has seen them."""
    return nn.Sequential(
        nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(),
        nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with two steps down and up, from (N, 1, H, W) to logits (N, classes, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.down1, self.down2, self.bottom = block(1, 8), block(8, 16), block(16, 32)
        self.up2, self.merge2 = nn.ConvTranspose2d(32, 16, 2, stride=2), block(32, 16)
        self.up1, self.merge1 = nn.ConvTranspose2d(16, 8, 2, stride=2), block(16, 8)
        self.head = nn.Conv2d(8, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        large = self.down1(x)
        small = self.down2(self.pool(large))
        x = self.bottom(self.pool(small))
        x = self.merge2(torch.cat([self.up2(x), small], 1))
        x = self.merge1(torch.cat([self.up1(x), large], 1))
        return self.head(x)


def shapes(count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Noisy images (N, 1, H, W) of a disc and a rectangle that may hide it, and the classes (N, H, W) of their pixels."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    rows, columns = torch.arange(SIZE).view(-1, 1), torch.arange(SIZE)
    radius = random(4, 9)
    disc = (rows - random(6, 26)) ** 2 + (columns - random(6, 26)) ** 2 < radius**2
    rectangle = ((rows - random(6, 26)).abs() < random(3, 8)) & ((columns - random(6, 26)).abs() < random(3, 8))
    targets = torch.where(rectangle, 2, disc.long())
    images = (targets > 0).float() + 0.4 * torch.randn(count, SIZE, SIZE, generator=generator)
    return images.unsqueeze(1).to(device), targets.to(device)


def overlaps(predictions: Tensor, targets: Tensor) -> list[float]:
    """Intersection over union of each class."""
    pairs = [(predictions == i, targets == i) for i in range(len(CLASSES))]
    return [((a & b).sum() / (a | b).sum()).item() for a, b in pairs]


def draw(losses: dict[str, list[float]], images: Tensor, targets: Tensor, predictions: Tensor) -> Figure:
    """The losses, and beside them images, what is in them, and what was seen in them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    common.draw_losses(left.subplots(), losses)
    grid = right.subplots(3, SHOWN)
    for line, title, pictures in zip(grid, ("image", "target", "seen"), (images[:, 0], targets, predictions), strict=True):
        line[0].set_ylabel(title)
        for axis, picture in zip(line, pictures.cpu().numpy(), strict=False):
            limits = {} if title == "image" else dict(vmin=0, vmax=len(CLASSES) - 1)
            axis.imshow(picture, cmap="gray" if title == "image" else "viridis", **limits)
            axis.set(xticks=[], yticks=[])
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train and report; the losses of each implementation."""
    args = common.options(__doc__, argv, epochs=10, batch_size=16)
    images, targets = shapes(TRAIN_IMAGES, args.seed, args.device)
    unseen, expected = shapes(TEST_IMAGES, args.seed + 1, args.device)
    losses = {}
    for impl in args.impls:
        torch.manual_seed(args.seed)
        model = common.prepare(UNet(), impl, args.device)
        losses[impl] = common.train(model, images, targets, nn.functional.cross_entropy, 0.2, args)
        with torch.no_grad():
            predictions = model.eval()(unseen).argmax(1)
        found = ", ".join(
            f"{name} {value:.2f}" for name, value in zip(CLASSES, overlaps(predictions, expected), strict=True)
        )
        print(f"{len(losses[impl])} steps, loss {losses[impl][-1]:.4f}, IoU in {TEST_IMAGES} unseen images: {found}")
    common.compare(losses)
    if args.picture:
        draw(losses, unseen, expected, predictions).savefig(args.picture, dpi=120)
        print(f"picture: {args.picture}")
    return losses


if __name__ == "__main__":
    main()
