"""Squeeze-excite: the gate of each image's channels from their averages, and the product with it.

    gate = act2(w2 @ act1(w1 @ mean + b1) + b2),    y = act(x * gate + residual)

excite_kernel: a program owns one image. Both products are vectors', read their weights once (from L2 but for the first
image's) and leave nothing between them in memory: one launch where two small convolutions would take most of their time to
start. scale_kernel reads x once and writes y once, a tile of one image's pixels and channels a program;
scale_backward_kernel reads dy and x once, writes dx, and keeps each tile's sums of dy * x, which average_kernel adds up in
order to the gate's gradient.
"""

import triton
import triton.language as tl

from .batch_norm import configs as batch_norm_configs
from .batch_norm import locate, widened
from .epilogue import load_channels

__all__ = ["configs", "excite_kernel", "scale_backward_kernel", "scale_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate of the two kernels of tiles: batch norm's of one tile a program."""
    return [config for config in batch_norm_configs() if config.num_stages == 1]


@triton.jit
def excite_kernel(
    mean_ptr, gate_ptr,  # [N, C]
    w1_ptr, b1_ptr, w2_ptr, b2_ptr,  # [R, C], [R] or None, [C, R], [C] or None
    C, R,
    # activations
    ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    GATE: tl.constexpr, GATE_A: tl.constexpr, GATE_B: tl.constexpr,
    # powers of two up to 16 that divide C and R
    VEC_C: tl.constexpr, VEC_R: tl.constexpr,
    # tiles; BLOCK_R covers R
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    C = C // VEC_C * VEC_C
    R = R // VEC_R * VEC_R
    if mean_ptr.dtype.element_ty == tl.float64:
        wide: tl.constexpr = tl.float64
    else:
        wide: tl.constexpr = tl.float32
    first = tl.program_id(0).to(tl.int64) * C
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    products = tl.zeros((BLOCK_R, BLOCK_C), wide)
    for c in tl.range(0, C, BLOCK_C):
        mask_c = offs_c < C - c
        mean = load_channels(mean_ptr + first + c, offs_c, mask_c, wide)
        ptrs = w1_ptr + c + (offs_r * C)[:, None] + offs_c[None, :]
        w = tl.load(ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)
        products += w.to(wide) * mean[None, :]
    hidden = tl.sum(products, 1)
    if b1_ptr is not None:
        hidden += load_channels(b1_ptr, offs_r, mask_r, wide)
    hidden = tl.where(mask_r, ACT(hidden, ACT_A, ACT_B), 0.0)
    for c in tl.range(0, C, BLOCK_C):
        mask_c = offs_c < C - c
        ptrs = w2_ptr + c * R + (offs_c * R)[:, None] + offs_r[None, :]
        w = tl.load(ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        gate = tl.sum(w.to(wide) * hidden[None, :], 1)
        if b2_ptr is not None:
            gate += load_channels(b2_ptr + c, offs_c, mask_c, wide)
        gate = GATE(gate, GATE_A, GATE_B)
        tl.store(gate_ptr + first + c + offs_c, gate.to(gate_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def scale_kernel(
    x_ptr, gate_ptr, residual_ptr, y_ptr,  # (N, C, *spatial), dense in the same format, but [N, C]; the third may be None
    # sizes
    PIXELS, C,
    # flags
    ACT: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(x * gate + residual)"""
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, mask, _ = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    v = widened(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    gate = load_channels(gate_ptr + block // tl.cdiv(PIXELS, BLOCK_P) * C, offs_c, offs_c < C, v.dtype)
    v = v * tl.expand_dims(gate, axis)
    if residual_ptr is not None:
        v = v + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(v.dtype)
    v = ACT(v, ACT_A, ACT_B)
    tl.store(y_ptr + offsets, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_backward_kernel(
    dy_ptr, x_ptr, gate_ptr, dx_ptr,  # as scale_kernel has them; dx_ptr may be None
    sums_ptr,  # [blocks, C], of dy * x, or None
    # sizes
    PIXELS, C,
    # flags
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dy * gate, and each tile's sums of dy * x over its pixels."""
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    tiles = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) // tiles
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, mask, _ = locate(block, offs_c, PIXELS, C, CHANNELS_LAST, VEC, INDEX_64, BLOCK_P)
    dy = widened(tl.load(dy_ptr + offsets, mask=mask, other=0.0))
    if sums_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(dy.dtype)
        tl.store(sums_ptr + block.to(tl.int64) * C + offs_c, tl.sum(dy * x, axis), mask=offs_c < C)
    if dx_ptr is not None:
        gate = load_channels(gate_ptr + block // tl.cdiv(PIXELS, BLOCK_P) * C, offs_c, offs_c < C, dy.dtype)
        dx = dy * tl.expand_dims(gate, axis)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
