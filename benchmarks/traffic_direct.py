"""Bytes that the memory-bound layers move, forward: the table in docs/depthwise.md, by `python -m benchmarks.traffic`.

For every depthwise, grouped and 1-d layer of cases.csv, and depthwise-separable blocks, three numbers beside the floor:
what memory gives if each byte crosses once (L2 is free), what programs ask of L2 (each program's own elements once: L1 is
free), and what lanes load and store. They follow from the launch as it is built for an H200.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tritonconv.kernels.patches import BAND

from benchmarks.markdown import table
from tritonconv.bench.cases import Case, load_cases
from tritonconv.bench.operations.convolution import layer
from tritonconv.bench.registry import Operation, dtype_of, operation_for
from tritonconv.ops.core.launch import Launch
from tritonconv.tuning import device_named
from tritonconv.tuning.configs import name_of

__all__ = ["FAMILIES", "Bytes", "bytes_of", "cases", "page"]

PAGE = Path(__file__).parents[1] / "docs" / "depthwise.md"
FAMILIES = ("depthwise", "depthwise-large-kernel", "grouped", "conv1d")
# Programs that are looked at, from the middle of the launch.
SAMPLE = 16


class Bytes(NamedTuple):
    """Of one layer's forward pass."""

    kernel: str
    config: str
    floor: int
    memory: int
    """Every tensor of the launches once, and hidden copies."""
    l2: int | None
    """What programs ask for, each its own elements once; None where the kernel multiplies matrices."""
    lanes: int | None
    """What lanes load and store."""


def cases() -> list[Case]:
    """The table's layers."""
    blocks = [(32, 64, 112, 1), (128, 128, 56, 1), (128, 256, 56, 2), (256, 256, 28, 1), (96, 24, 56, 1), (144, 32, 28, 1)]
    pairs = [
        layer(f"separable_{c}_{k}_{size}{'_s2' if stride == 2 else ''}", (256, c, size, size), (k, 1, 3, 3), stride=stride,
              padding=1, kind="separable")
        for c, k, size, stride in blocks
    ]  # fmt: skip
    return [case for case in load_cases() if case.family in FAMILIES] + pairs


def bytes_of(case: Case) -> Bytes:
    """By construction of the launches that a call makes on an H200."""
    operation = operation_for(case)
    assert operation is not None
    launches = operation.launches(case, device_named("H200"))
    size = dtype_of(case).itemsize
    main = max(launches, key=lambda one: one.programs)
    floor = operation.count(case)[1]
    kernel = main.kernel.__name__.removesuffix("_kernel")
    memory = floor + _copied(operation, case, launches)
    if kernel not in ("depthwise", "separable"):
        return Bytes(kernel, name_of(main.config), floor, memory, None, None)
    l2, lanes = _asked(main)
    return Bytes(kernel, name_of(main.config), floor, memory, l2 * size, lanes * size)


def _copied(operation: Operation, case: Case, launches: list[Launch]) -> int:
    """Hidden copies of the image, and of the result if it has that format too: each is read and written once more."""
    image = operation.tensors(case, "meta", dtype_of(case), case.channels_last)[0]
    seen = [t for one in launches for t in one.arguments.values() if isinstance(t, Tensor) and t.shape == image.shape]
    if not seen or any(t.stride() == image.stride() for t in seen):
        return 0
    # Depthwise layers, whose images and results are of one format.
    return (
        2 * (image.numel() + seen[-1].numel()) * image.element_size()
        if len(seen) > 1
        else 2 * image.numel() * image.element_size()
    )


def _asked(launch: Launch) -> tuple[int, int]:
    """Elements of image, weight and result that programs ask of L2, and that lanes load and store."""
    a = launch.arguments
    separable = "STEPS" in a
    p, q = (2, 2) if separable else (a["PATCH_P"], a["PATCH_Q"])
    block_t = a["BLOCK_M"] // 4 if separable else a["BLOCK_T"]
    planes, t = a.get("O", 1), a.get("T", 1)
    down, across = -(-a["P"] // p), -(-a["Q"] // q)
    patches = a["N"] * planes * down * across
    channels, block_c = a["C"], a.get("BLOCK_C", a["C"])
    programs = -(-patches // block_t)
    middle = max(0, min(programs - SAMPLE, programs // 2))
    own = loads = stores = 0
    sample = range(middle, min(programs, middle + SAMPLE))
    for program in sample:
        touched: set[tuple[int, ...]] = set()
        for index in range(program * block_t, min(patches, (program + 1) * block_t)):
            plane, row, column = _place(index, down, across, a.get("CHANNELS_LAST", True))
            for pixel in _window(a, plane % planes, row * p, column * q, p, q):
                touched.add((plane // planes, *pixel))
                loads += 1
            stores += min(p, a["P"] - row * p) * min(q, a["Q"] - column * q)
        own += len(touched)
    scale = programs / len(sample)
    taps = t * a["R"] * a["S"]
    weights = programs * -(-channels // block_c) * block_c * taps
    columns = 1
    results = stores * channels
    if separable:
        columns = -(-a["K"] // a["BLOCK_N"])
        weights = programs * columns * channels * (taps + min(a["K"], a["BLOCK_N"]))
        results = stores * a["K"]
    return (
        math.ceil(scale * (own * channels * columns + results) + weights),
        math.ceil(scale * (loads * channels * columns + results) + weights),
    )


def _place(index: int, down: int, across: int, channels_last: bool) -> tuple[int, int, int]:
    """(plane, row, column) of a patch, as kernels/patches.py numbers them."""
    plane, rest = divmod(index, down * across)
    if not channels_last:
        return plane, *divmod(rest, across)
    first = rest // (BAND.value * across) * BAND.value
    column, row = divmod(rest - first * across, min(BAND.value, down - first))
    return plane, first + row, column


def _window(a: dict[str, int], o: int, p0: int, q0: int, p: int, q: int) -> Iterator[tuple[int, int, int]]:
    """Elements (d, h, w) that a patch loads, one after the other."""
    whole = a["STEP_R"] == a["R"] and a.get("STEP_S", a["S"]) == a["S"]
    rows = [[i * a["STRIDE_H"] + r * a["DIL_H"] for i in range(p)] for r in range(a["R"])]
    steps = [sorted({h for row in rows for h in row})] if whole else [sorted(set(row)) for row in rows]
    step = a.get("STEP_S", a["S"])
    for t in range(a.get("T", 1)):
        d = o * a.get("STRIDE_D", 1) - a.get("PAD_D", 0) + t * a.get("DIL_D", 1)
        for heights in steps:
            for h in heights:
                for s0 in range(0, a["S"], step):
                    taps = range(s0, min(a["S"], s0 + step))
                    for w in sorted({j * a["STRIDE_W"] + s * a["DIL_W"] for j in range(q) for s in taps}):
                        y, x = p0 * a["STRIDE_H"] - a["PAD_H"] + h, q0 * a["STRIDE_W"] - a["PAD_W"] + w
                        if 0 <= d < a.get("D", 1) and 0 <= y < a["H"] and 0 <= x < a["W"]:
                            yield d, y, x


def page() -> str:
    """The table."""
    rows = []
    for case in cases():
        found = bytes_of(case)
        ratios = [None if n is None else f"{n / found.floor:.2f}" for n in (found.memory, found.l2, found.lanes)]
        rows.append((case.id, found.kernel, found.config, f"{found.floor / 1e6:.1f}", *ratios))
    return table("layer, kernel, config, floor MB, memory by floor, L2 by floor, lanes by floor", rows)
