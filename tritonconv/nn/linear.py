"""torch.nn.Linear on our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonconv.nn.conv import NO_EPILOGUE, member
from tritonconv.ops.conv.call import LINEAR
from tritonconv.ops.core.backend import Backend

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on our kernels: (*, C) to (*, K).

    `backend` ("auto", "triton", "torch") is the choice for this layer; with None, `tritonconv.set_backend` decides.

    >>> Linear(3, 4)(torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """

    backend: Backend | None = None

    def forward(self, input: Tensor) -> Tensor:
        tensors = (input, member(self, "weight"), member(self, "bias"), *NO_EPILOGUE)
        y: Tensor = LINEAR(tensors, ((), "linear", 0.0, None), self.backend)
        return y
