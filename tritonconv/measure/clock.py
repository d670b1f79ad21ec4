"""Time on the device: medians with quantiles, the L2 cache cold, the clock settled."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tritonconv.ops.core.backend import interpreting

__all__ = ["Timing", "can_time", "copies_for_cold_cache", "peak_memory", "time_calls"]

Mode = Literal["graph", "eager"]

# Medians of windows in a row that agree within this are a settled clock.
SETTLED = 0.02
SETTLE_SECONDS = 0.5

# A graph holds so many turns that a replay takes about so long: neither the clock's resolution nor the gap before its
# first kernel counts.
LEAST_MS = 1.0
MOST_TURNS = 64
# Cycles that the GPU waits before a replay, so that the host has handed all of it over by then: 0.2 ms.
HEAD_START = 400_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    ms: float
    """Median."""
    low: float
    """20 % of the samples are below; 80 % are below `high`."""
    high: float
    samples: int
    mode: Mode

    def to_dict(self) -> dict[str, Any]:
        return dict(ms=self.ms, ms_20=self.low, ms_80=self.high, samples=self.samples, mode=self.mode)


def can_time() -> bool:
    """Whether kernels run on a GPU here."""
    return torch.cuda.is_available() and not interpreting()


def copies_for_cold_cache(tensors: Sequence[Tensor], l2_bytes: int, limit: int = 64) -> int:
    """How many sets of inputs to rotate, so that the one that comes next has left the L2 cache since its last turn."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return max(1, min(limit, -(-3 * l2_bytes // max(1, size))))


def time_calls(calls: Sequence[Callable[[], Any]], *, mode: Mode = "graph", seconds: float = 0.2) -> Timing:
    """Time of one of these calls, which do the same on different memory and take turns.

    Args:
        calls: already warm: compiled, and cuDNN's benchmark done.
        mode: "graph": the turns are captured in a CUDA graph, and its replays timed, so that what the host does between
            launches does not count; "eager": as a user's program calls them, host and all.
        seconds: how long to sample.

    Raises:
        RuntimeError: there is no GPU, or a call cannot be captured in a graph.
    """
    if not can_time():
        raise RuntimeError("torch sees no GPU: nothing can be timed")
    if mode == "graph":
        turn, turns = _captured(calls)
        sample = functools.partial(_elapsed, turn, HEAD_START)
    else:
        turns, sample = 1, functools.partial(_elapsed, functools.partial(_each, calls))
    samples: list[float] = []
    _warm_up(sample)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(samples) < 5:
        samples.append(sample() / (turns * len(calls)))
    low, high = statistics.quantiles(samples, n=5)[0], statistics.quantiles(samples, n=5)[3]
    return Timing(statistics.median(samples), low, high, len(samples), mode)


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its peak, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _each(calls: Sequence[Callable[[], Any]]) -> None:
    """Call them in turn; no result outlives its call."""
    for call in calls:
        call()


def _captured(calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], int]:
    """What replays these calls as a CUDA graph, and how many turns of them are in it."""
    # Libraries allocate workspaces for each stream: the warm-up must run on the one that captures.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _each(calls)
        turns = max(1, min(MOST_TURNS, math.ceil(LEAST_MS / max(1e-3, _elapsed(functools.partial(_each, calls))))))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(turns):
            _each(calls)
    return graph.replay, turns


def _elapsed(turn: Callable[[], Any], head_start: int = 0) -> float:
    """Milliseconds on the device; with a head start of so many cycles the host's own time does not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if head_start:
        torch.cuda._sleep(head_start)
    start.record()
    turn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _warm_up(sample: Callable[[], float]) -> None:
    """Run until the clock has risen, and no longer than half a second."""
    begin, last = time.perf_counter(), 0.0
    while time.perf_counter() - begin < SETTLE_SECONDS:
        now = statistics.median(sample() for _ in range(5))
        if last and abs(now - last) <= SETTLED * last:
            return
        last = now
