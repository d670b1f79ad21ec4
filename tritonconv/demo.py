"""The demo: a LeNet-5 for handwritten digits, trained with torch, converted, and run on our kernels."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tritonconv
from tritonconv.ops.core.backend import interpreting
from tritonconv.ops.core.launch import record_launches

__all__ = ["attribute", "digits", "lenet5", "run", "train"]

TEST_IMAGES = 360


def lenet5() -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) for images (N, 1, 32, 32), with rectifiers and max pooling; the paper's layer names."""
    return nn.Sequential(
        OrderedDict(
            c1=nn.Conv2d(1, 6, 5), relu1=nn.ReLU(), s2=nn.MaxPool2d(2),
            c3=nn.Conv2d(6, 16, 5), relu3=nn.ReLU(), s4=nn.MaxPool2d(2),
            c5=nn.Conv2d(16, 120, 5), relu5=nn.ReLU(), flatten=nn.Flatten(),
            f6=nn.Linear(120, 84), relu6=nn.ReLU(), output=nn.Linear(84, 10),
        )
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 scanned digits in a fixed random order: images (N, 1, 32, 32) in [0, 1], and labels (N,)."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.from_numpy(data.images[order] / 16.0).float().unsqueeze(1)
    return nn.functional.interpolate(images, size=32, mode="bilinear"), torch.from_numpy(data.target[order])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Fit the model with Adam on the CPU."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    # Threads gain nothing for so small a network, and on busy cores they mostly wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in convolutions, whoever computes them: results are compared to the last few bits."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def attribute(rows: Sequence[dict[str, Any]], launches: Sequence[str]) -> list[list[str]]:
    """The launches of each row of a report, from the order in which kernels were launched.

    The reason of a row that runs on Triton begins with its kernel.

    Raises:
        RuntimeError: the launches are not those that the rows tell.

    >>> convolution = dict(name="c1", backend="triton", reason="conv_flat, fused by fx")
    >>> pooling = dict(name="s2", backend="torch", reason="no kernel")
    >>> attribute([convolution, pooling], ["conv_flat_kernel"])
    [['conv_flat_kernel'], []]
    """
    left = list(launches)
    found: list[list[str]] = []
    for row in rows:
        if row["backend"] != "triton":
            found.append([])
            continue
        kernel = row["reason"].partition(",")[0] + "_kernel"
        if left[:1] != [kernel]:
            raise RuntimeError(f"layer {row['name']} should have launched {kernel} next, but got {left[:1]}")
        found.append([left.pop(0)])
    if left:
        raise RuntimeError(f"no layer of the report accounts for the launches of {', '.join(left)}")
    return found


def run(picture: Path, epochs: int) -> bool:
    """Train, convert, compare, print, draw; whether every prediction is the unconverted model's."""
    console = Console(soft_wrap=True)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    images, labels = digits()
    model = lenet5()
    start = time.perf_counter()
    train(model, images[TEST_IMAGES:], labels[TEST_IMAGES:], epochs)
    console.print(
        f"LeNet-5 trained with torch on {len(images) - TEST_IMAGES} images of handwritten digits, {epochs} epochs, "
        f"{time.perf_counter() - start:.1f} s."
    )

    model = model.eval().to(device)
    images, labels = images[:TEST_IMAGES].to(device), labels[:TEST_IMAGES].to(device)
    converted = tritonconv.convert(model)
    with torch.no_grad(), full_precision():
        expected = model(images)
        with tritonconv.set_backend("triton"), record_launches() as launches:
            start = time.perf_counter()
            result = converted(images)
            seconds = time.perf_counter() - start
        report = tritonconv.explain(converted, images)
    rows = report.to_dict()["layers"]
    launched = attribute(rows, launches)

    where = "Triton's interpreter, on the CPU" if interpreting() else torch.cuda.get_device_name(device)
    console.print(f"Converted with tritonconv.convert, run on {TEST_IMAGES} unseen images in {where}, {seconds:.1f} s.\n")
    console.print(launch_table(rows, launched))
    print(report)

    predictions = result.argmax(1)
    agreeing = int((predictions == expected.argmax(1)).sum())
    table = Table("", "right of unseen", "accuracy")
    for name, output in (("torch", expected), ("tritonconv", result)):
        right = int((output.argmax(1) == labels).sum())
        table.add_row(name, f"{right} of {TEST_IMAGES}", f"{right / TEST_IMAGES:.2%}")
    console.print(table)
    console.print(
        f"Same prediction for {agreeing} of {TEST_IMAGES} images; outputs differ by {(result - expected).abs().max():.1e} "
        f"at most, of {expected.abs().max():.1f}."
    )
    draw(picture, images.cpu(), labels.cpu(), predictions.cpu(), rows, launched)
    console.print(f"Picture: {picture}")
    return agreeing == TEST_IMAGES


def launch_table(rows: Sequence[dict[str, Any]], launched: Sequence[Sequence[str]]) -> Table:
    """What each layer launched."""
    table = Table("layer", "fused with", "launches", "kernel", "multiply-adds")
    for row, kernels in zip(rows, launched, strict=True):
        table.add_row(
            row["name"], ", ".join(row["fused"]), str(len(kernels)), ", ".join(kernels) or "torch", f"{row['macs']:,}"
        )
    table.add_section()
    table.add_row("all", "", str(sum(map(len, launched))), "", f"{sum(row['macs'] for row in rows):,}")
    return table


def draw(
    path: Path, images: Tensor, labels: Tensor, predictions: Tensor, rows: Sequence[dict[str, Any]],
    launched: Sequence[Sequence[str]],
) -> None:  # fmt: skip
    """Save test images with their predictions, and beside them each layer's multiply-adds and kernel."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    # Images that were misread come first: they are what one wants to see.
    order = (predictions == labels).int().argsort(stable=True)
    left.suptitle("Unseen images and what the kernels read")
    for axis, at in zip(left.subplots(4, 8).flat, order.tolist(), strict=False):
        axis.imshow(images[at, 0].numpy(), cmap="gray_r")
        wrong = predictions[at] != labels[at]
        axis.set_title(
            f"{predictions[at]} ({labels[at]})" if wrong else f"{predictions[at]}", color="tab:red" if wrong else "k"
        )
        axis.axis("off")

    shown = [(row, kernels) for row, kernels in zip(rows, launched, strict=True) if row["macs"]]
    axis = right.subplots()
    names = [row["name"] for row, _ in shown]
    sizes = [row["macs"] for row, _ in shown]
    bars = axis.barh(names, sizes, log=True, color="tab:blue")
    axis.bar_label(bars, [", ".join(kernels) or "torch" for _, kernels in shown], label_type="center", color="white")
    # Room for the shortest bar's label.
    axis.set_xlim(left=min(sizes) / 100)
    axis.invert_yaxis()
    axis.set_xlabel(f"multiply-adds for {len(images)} images")
    right.suptitle("Layers and the kernel that each launched")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
