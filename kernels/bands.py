"""How products with bands divide images and filters into blocks: shared by the passes, and asked by the host."""

import math
from typing import NamedTuple

import triton

__all__ = ["Axis", "Bands", "divide", "divide_axis", "fitting"]


class Axis(NamedTuple):
    """How an axis of the result is divided into blocks, and the places of the source that a block depends on."""

    results: int
    """Of a block; behind a stride whole strides."""
    blocks: int
    first: int
    """Where the first block's first place is; may lie before the image."""
    places: int
    step: int
    """From one place to the next."""
    move: int
    """From one block's first place to the next block's."""


class Bands(NamedTuple):
    """How a tile is divided."""

    block_q: int
    block_w: int
    height: Axis
    width: Axis
    rows: int
    """Of M: blocks of all images."""
    steps: int
    """Of a program, for each of the filter's planes: groups of source rows."""

    def vector(self, align: int) -> int:
        """Elements that are read at once, where rows allow `align`."""
        return math.gcd(align, self.block_w, self.width.first, self.width.move if self.width.blocks > 1 else 0)


def divide_axis(
    block: int, result: int, source: int, taps: int, stride: int, pad: int, dilation: int, transposed: bool, align: int,
    rows: bool,
) -> Axis | None:  # fmt: skip
    """An axis in blocks of up to `block` results; None where a block holds no whole stride. `rows` may be skipped."""
    results = block // stride * stride if transposed else block
    if results == 0:
        return None
    blocks = -(-result // results)
    reach = (taps - 1) * dilation
    if transposed:
        first, last, move = -((reach - pad) // stride), (results - 1 + pad) // stride, results // stride
    else:
        first, last, move = -pad, (results - 1) * stride + reach - pad, results * stride
    # A single row of results depends on every dilation-th row.
    step = dilation if rows and results == 1 else 1
    if blocks == 1 and step == 1:
        first, last = max(first, 0), min(last, source - 1)
    first -= first % align
    return Axis(results, blocks, first, max(0, last - first) // step + 1, step, move)


def divide(
    block_m: int, block_n: int, block_k: int, *, batch: int, source: tuple[int, int, int], result: tuple[int, int, int],
    kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int],
    dilation: tuple[int, int, int], transposed: bool, align: int,
) -> Bands | None:  # fmt: skip
    """The cheapest division, None where a block's window is wider than BLOCK_K.

    `align`: elements that may be read at once, so that windows begin at a multiple of them.
    """
    best: tuple[float, Bands] | None = None
    for block_w in (1 << k for k in range(1, block_k.bit_length())):
        # Results are written by vectors, where the image is no narrower.
        least = min(3, (result[2] - 1).bit_length())
        for block_q in (1 << k for k in range(least, block_n.bit_length())):
            height, width = (
                divide_axis(
                    block, result[axis], source[axis], kernel[axis], stride[axis], padding[axis], dilation[axis],
                    transposed, align if axis == 2 else 1, axis == 1,
                )
                for axis, block in ((1, block_n // block_q), (2, block_q))
            )  # fmt: skip
            if height is None or width is None or width.places > block_w:
                continue
            # Taps of the next step are those of this one, a constant further.
            rows = block_k // block_w
            if rows * height.step * (stride[1] if transposed else 1) % dilation[1]:
                continue
            m = batch * result[0] * height.blocks * width.blocks
            steps = -(-height.places // rows)
            bands = Bands(block_q, block_w, height, width, m, steps)
            # Of a tile, in issue slots of a lane: products of a step, image and band; results.
            step = block_m * block_n * block_k / 16 + block_m * block_k / bands.vector(align) * 10 + block_n * block_k * 2
            cost = -(-m // block_m) * (steps * step + block_m * block_n / math.gcd(8, block_q, result[2]) * 10)
            if best is None or cost < best[0]:
                best = cost, bands
    return None if best is None else best[1]


def fitting(
    candidates: list[triton.Config], *, itemsize: int, tensor_cores: bool, shared: int, arch: str = "", **geometry: object
) -> list[triton.Config]:
    """The candidates that suit a geometry, as `divide` takes it: the one statement of what is valid."""
    kept = []
    for config in candidates:
        m, n, k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        bands = divide(m, n, k, **geometry)
        if bands is None:
            continue
        # More than twice as large as the image: mostly zeros are computed. The smallest must do.
        if m > max(128, 2 * bands.rows - 1):
            continue
        # The pipeline's buffers must fit.
        if (m + n) * k * itemsize * config.num_stages > shared:
            continue
        # Plain products hold their operands in registers, and larger tiles spill.
        if not tensor_cores and m * n * k > 64 * 64 * 16:
            continue
        # Places of a large band, and of a deep one beside single elements' addresses and masks: Ampere holds the image's
        # operand in registers, and they spill.
        if arch == "sm_80" and (n * k > 32 * 32 * config.num_warps or (k > 32 and geometry["align"] * itemsize < 16)):
            continue
        if arch == "sm_80" and itemsize == 4 and config.num_warps == 4 and n * k > 32 * 32:
            continue
        kept.append(config)
    return kept
