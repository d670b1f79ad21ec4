"""Train a LeNet-5 on scikit-learn's scanned digits, with torch's layers or with ours.

    python examples/lenet_digits.py --picture loss.png
    python examples/lenet_digits.py --compare --picture loss.png

Needs `pip install 'tritonconv[demo]'`. Our kernels run on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, where
a step takes seconds; CPU tensors run on torch else. Copy common.py too.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

TEST_IMAGES = 360


def lenet() -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) for images (N, 1, 8, 8), with batch norms.

    `tritonconv.convert` makes one operator of each convolution, its batch norm and its rectifier, in training too.
    """
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 2, bias=False), nn.BatchNorm2d(120), nn.ReLU(), nn.Flatten(),
        nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def digits(device: str) -> tuple[Tensor, Tensor]:
    """1797 images (N, 1, 8, 8) in [0, 1] in a fixed random order, and their labels (N,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order].unsqueeze(1) / 16
    return images.to(device), torch.from_numpy(data.target)[order].to(device)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are read right. In eval mode a convolution and what follows it are one kernel."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train and report; the losses of each implementation."""
    args = common.options(__doc__, argv, epochs=10, batch_size=64)
    images, labels = digits(args.device)
    losses = {}
    for impl in args.impls:
        torch.manual_seed(args.seed)
        model = common.prepare(lenet(), impl, args.device)
        losses[impl] = common.train(
            model, images[TEST_IMAGES:], labels[TEST_IMAGES:], nn.functional.cross_entropy, 0.02, args
        )
        right = accuracy(model, images[:TEST_IMAGES], labels[:TEST_IMAGES])
        print(
            f"{len(losses[impl])} steps, loss {losses[impl][-1]:.4f}, {right:.1%} of {TEST_IMAGES} unseen images read right"
        )
    common.compare(losses)
    if args.picture:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        common.draw_losses(figure.subplots(), losses)
        figure.savefig(args.picture, dpi=120)
        print(f"picture: {args.picture}")
    return losses


if __name__ == "__main__":
    main()
