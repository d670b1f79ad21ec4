"""Torch's own switches, as measurements and their references want them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tritonconv.measure.clock import can_time

__all__ = ["prepare_torch", "set_tf32", "without_cudnn_search", "without_tf32"]


def prepare_torch() -> str:
    """Set cuDNN's search, gradients and threads as peers are measured; returns the device that layers run on here."""
    torch.backends.cudnn.benchmark = True
    torch.set_grad_enabled(False)
    if can_time():
        return "cuda"
    torch.set_num_threads(1)
    return "cpu"


def set_tf32(on: bool) -> None:
    """The same TF32 setting for torch and for us.

    By the older switches, which set the newer `fp32_precision` too: torch.compile reads either (up to torch 2.13 at least),
    and fails where they contradict each other.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on


@contextmanager
def without_cudnn_search() -> Iterator[None]:
    """For what runs once: a search among cuDNN's algorithms takes longer than any of them."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def without_tf32() -> Iterator[None]:
    """For references in fp32, which run once: no TF32, and no search among algorithms."""
    # Only the newer switches can be read whatever was set before.
    convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul.fp32_precision == "tf32"
    set_tf32(False)
    try:
        with without_cudnn_search():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
