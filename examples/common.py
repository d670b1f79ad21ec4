"""What the training examples share: options, where they run, the training loop, and loss curves. No example by itself."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import tritonconv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_STEPS = 10


def options(description: str, argv: Sequence[str] | None, *, epochs: int, batch_size: int) -> argparse.Namespace:
    """The command line's, or `argv`'s."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--impl", choices=("torch", "tritonconv"), default="tritonconv", help="who runs the layers")
    parser.add_argument("--compare", action="store_true", help="train with both from the same seed, whatever --impl says")
    parser.add_argument("--epochs", type=positive, default=epochs)
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="all images, where there are fewer")
    parser.add_argument("--steps", type=positive, help="stop after so many steps")
    parser.add_argument("--picture", type=Path, help="where to draw the loss, such as loss.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install 'tritonconv[demo]'")
    args.impls = ("torch", "tritonconv") if args.compare else (args.impl,)
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text}")
    return number


def prepare(model: nn.Module, impl: str, device: str) -> nn.Module:
    """The model on its device, converted if `impl` says so; tells where it will run."""
    model = model.to(device)
    if impl == "torch":
        print(f"torch: torch's own layers on {device}")
        return model
    if torch.device(device).type == "cuda":
        print(f"tritonconv: our kernels on {torch.cuda.get_device_name(device)}")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        print("tritonconv: our kernels in Triton's interpreter, on the CPU, slowly")
    else:
        print(f"tritonconv: tensors on {device} run on torch; TRITON_INTERPRET=1 interprets our kernels, slowly")
    return tritonconv.convert(model)


def train(
    model: nn.Module, images: Tensor, targets: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], rate: float,
    args: argparse.Namespace,
) -> list[float]:  # fmt: skip
    """Fit the model with SGD on shuffled batches of one size; the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    orders = [torch.randperm(len(images), generator=generator) for _ in range(args.epochs)]
    size = min(args.batch_size, len(images))
    batches = [batch for order in orders for batch in order.split(size) if len(batch) == size]
    losses = []
    model.train()
    for batch in track(batches[: args.steps], "training", console=Console(stderr=True), transient=True):
        chosen = batch.to(images.device)
        optimizer.zero_grad()
        loss = loss_of(model(images[chosen]), targets[chosen])
        loss.backward()
        optimizer.step()
        # Read at the end, so that no step waits for the device.
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare(losses: dict[str, list[float]]) -> None:
    """Print how far the losses of two implementations are apart: first by rounding, later by all that follows from it."""
    if len(losses) > 1:
        differences = [abs(a - b) / abs(b) for a, b in zip(losses["tritonconv"], losses["torch"], strict=True)]
        print(
            f"largest relative difference of the losses: {max(differences[:FIRST_STEPS]):.1e} in the first {FIRST_STEPS} "
            f"steps, {max(differences):.1e} in all"
        )


def draw_losses(axis: Axes, losses: dict[str, list[float]]) -> None:
    """A curve for each implementation; the second one dashed, since it lies on the first."""
    for (impl, values), style in zip(losses.items(), ("-", "--"), strict=False):
        axis.plot(range(1, len(values) + 1), values, style, label=impl)
    axis.set(title="Training loss", xlabel="step", yscale="log")
    axis.legend()
