"""Batch norm's sums over the processes of a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonconv.ops.batch_norm.launch import Statistics, combine

__all__ = ["add_over_ranks", "combine_over_ranks"]


def combine_over_ranks(mean: Tensor, var: Tensor, count: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [C], biased variance [C], count [1]) of the union of all processes' pixels, joined in the order of their ranks.

    Args:
        mean, var, count: of this process's pixels, as `combine` gives them; a count of 0 for none.
        group: the process group's name.
    """
    process_group = _group(group)
    local = torch.cat([count, mean, var * count])
    parts = [torch.empty_like(local) for _ in range(process_group.size())]
    torch.distributed.all_gather(parts, local, group=process_group)
    ranks = torch.stack(parts)
    moments = ranks[:, 1:].reshape(len(parts), 2, -1).transpose(0, 1).contiguous()
    return combine(Statistics(ranks[:, 0].contiguous(), moments))


def add_over_ranks(sums: Tensor, group: str) -> Tensor:
    """The sum of all processes' `sums`; these stay as they are."""
    total = sums.clone()
    torch.distributed.all_reduce(total, group=_group(group))
    return total


def _group(name: str) -> torch.distributed.ProcessGroup:
    # As torch's own functional collectives find it.
    c10d: Any = torch.distributed.distributed_c10d
    result: torch.distributed.ProcessGroup = c10d._resolve_process_group(name)
    return result
