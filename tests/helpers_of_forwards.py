"""Functions that forwards of other files call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_a_tensor(x: Any) -> bool:
    return type(x) is Tensor


def flat(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)


def rows_of(conv: torch.nn.Conv2d) -> Tensor:
    return conv.weight.view(conv.out_channels, -1)
