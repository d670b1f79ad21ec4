"""Weight gradient of a convolution for Hopper: operands by TMA, turned by wgmma, pixels divided among programs.

    dw[k, t, c] = sum over pixels m of dy[m, k] * x[m seen through tap t, c]

M = filters, N = channels of one tap, K = pixels. A program walks tiles of BLOCK_M filters x BLOCK_N channels of one tap,
one group and one range of the pixels. Pixels come by boxes of [N, O, P, Q], BLOCK_K in each, from dy and from the image the
tap sees, with zeros where either ends; both lie in shared memory by pixels, across the reduction, and wgmma turns them.
Ranges leave their sums in a workspace, which conv_wgrad's second kernel adds in their order; a single one writes dw itself.

Strides and groups are conv.py's: an image's phases are tensors of their own, and a group is a place along an axis.

Boxes of dy are read once per tap and column of tiles, boxes of the image once per row of tiles, from L2 but for the first
time, since programs that run together share a range.
"""

import triton

from .epilogue import columns
from .gluon import barrier, fence_async_shared, gl, jit, load_box, store_box, store_wait
from .pipeline import LOADER_REGISTERS, make_barriers, multiply, next_slot, phases, pick

__all__ = ["configs", "hopper_wgrad_kernel"]

# Buffers of a slice of columns, through which results leave.
STAGED = gl.constexpr(2)


def configs() -> list[triton.Config]:
    """Every candidate; which of them suit a problem is for tuning to say."""
    return [
        # Compute-bound layers, two warpgroups: the most products for an operand's way from L2.
        tile(128, 256, 8, 3),
        tile(256, 128, 8, 3),
        tile(128, 128, 8, 4),
        # Few filters.
        tile(64, 256, 4, 4),
        # Few channels and filters: as many pixels a step as keep its own instructions small.
        tile(128, 64, 4, 4, k=128),
        tile(64, 64, 4, 3, k=256),
    ]


def tile(m: int, n: int, warps: int, stages: int, *, k: int = 64) -> triton.Config:
    return triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k), num_warps=warps, num_stages=stages)


@jit
def place(tile, K, C, GROUPS, TAPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(range, group, tap, first filter, first channel) of a tile; tiles of a range stand together."""
    tiles_m, tiles_n = gl.cdiv(K, BLOCK_M), gl.cdiv(C, BLOCK_N)
    first_c = tile % tiles_n * BLOCK_N
    first_k = tile // tiles_n % tiles_m * BLOCK_M
    tap = tile // (tiles_n * tiles_m) % TAPS
    part = tile // (tiles_n * tiles_m * TAPS)
    return part // GROUPS, part % GROUPS, tap, first_k, first_c


@jit
def load_pixels(x, dy, ring, step, boxes, sizes, at, BOX: gl.constexpr, STAGES: gl.constexpr):
    """Load a tile's operands for a range of boxes, and return the step after them."""
    first, last = boxes
    O, P, Q = sizes
    on_d, d, h, w, channel, filter = at
    BYTES: gl.constexpr = x.block_type.nbytes + dy.block_type.nbytes
    tiles_o, tiles_p, tiles_q = gl.cdiv(O, BOX[1]), gl.cdiv(P, BOX[2]), gl.cdiv(Q, BOX[3])
    for i in range(first, last):
        q = i % tiles_q * BOX[3]
        p = i // tiles_q % tiles_p * BOX[2]
        o = i // (tiles_q * tiles_p) % tiles_o * BOX[1] + on_d
        n = i // (tiles_q * tiles_p * tiles_o) * BOX[0]
        a, b, bar = next_slot(ring, step, BYTES, STAGES)
        load_box(dy, [n, o, p, q, filter], bar, a)
        load_box(x, [n, o + d, p + h, q + w, channel], bar, b)
        step += 1
    return step


@jit
def load_tiles(x, dy, ring, sizes, TAPS_D: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr,
               PHASES_H: gl.constexpr, PHASES_W: gl.constexpr, GROUPS_ON_D: gl.constexpr, BOX: gl.constexpr,
               BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loader: walks the program's tiles and fills the ring."""
    O, P, Q, C, K, GROUPS, boxes, RANGE, tiles = sizes
    R: gl.constexpr = len(TAPS_H)
    S: gl.constexpr = len(TAPS_W)
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, group, tap, first_k, first_c = place(tile, K, C, GROUPS, len(TAPS_D) * R * S, BLOCK_M, BLOCK_N)
        t, r, s = tap // (R * S), tap // S % R, tap % S
        phase = (pick(TAPS_D, t, 0) * PHASES_H + pick(TAPS_H, r, 0)) * PHASES_W + pick(TAPS_W, s, 0)
        on_d = 0
        if GROUPS_ON_D:
            on_d = group
        else:
            first_c += group * C
            first_k += group * K
        at = (on_d, pick(TAPS_D, t, 1), pick(TAPS_H, r, 1), pick(TAPS_W, s, 1), first_c, first_k)
        span = (part * RANGE, gl.minimum(part * RANGE + RANGE, boxes))
        for i in gl.static_range(len(x)):
            if phase == i:
                step = load_pixels(x[i], dy, ring, step, span, (O, P, Q), at, BOX, STAGES)


@jit
def multiply_tiles(ring, staging, dw, sizes, TAPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                   BLOCK_K: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The multipliers: walk the same tiles, empty the ring, and store each tile's sums."""
    _, _, _, C, K, GROUPS, boxes, RANGE, tiles = sizes
    SLICE: gl.constexpr = dw.block_type.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, group, tap, first_k, first_c = place(tile, K, C, GROUPS, TAPS, BLOCK_M, BLOCK_N)
        steps = gl.minimum(part * RANGE + RANGE, boxes) - part * RANGE
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=layout)
        acc = multiply(acc, ring, step, steps, None, BLOCK_K, STAGES, True, True)
        step += steps
        slices = columns(acc, SLICE)
        for j in gl.static_range(len(slices)):
            buffer = staging.index(j % STAGED)
            # A tile of one slice has its buffer back from the tile before it alone when all stores are done.
            store_wait(min(STAGED, len(slices)) - 1)
            barrier()
            buffer.reshape([BLOCK_M, SLICE]).store(slices[j].to(buffer.dtype))
            fence_async_shared()
            barrier()
            store_box(dw, [part, group, first_k, tap, first_c + j * SLICE], buffer)
    store_wait(0)


@jit
def hopper_wgrad_kernel(
    # the image's phases, [N, D, H, W, C] each, in boxes of BOX pixels x BLOCK_N channels
    x0, x1, x2, x3, x4, x5, x6, x7,
    dy,  # [N, O, P, Q, K] in boxes of BOX x BLOCK_M filters
    dw,  # [ranges, groups, K, taps, C] in boxes of BLOCK_M filters x a slice of channels, 128 bytes of them
    N, O, P, Q, C, K, GROUPS,  # C and K are those of one group
    RANGES, RANGE,  # how many ranges, and boxes of each but the last
    # for each tap along an axis (phase, where it sees the image); phases along H and W
    TAPS_D: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, PHASES_H: gl.constexpr, PHASES_W: gl.constexpr,
    GROUPS_ON_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    x = phases(x0, x1, x2, x3, x4, x5, x6, x7)
    BOX: gl.constexpr = dy.block_type.shape
    TAPS: gl.constexpr = len(TAPS_D) * len(TAPS_H) * len(TAPS_W)
    a = gl.allocate_shared_memory(dy.dtype, [STAGES, BOX[0], BOX[1], BOX[2], BOX[3], BLOCK_M], dy.layout)
    b = gl.allocate_shared_memory(dy.dtype, [STAGES, BOX[0], BOX[1], BOX[2], BOX[3], BLOCK_N], x[0].layout)
    staging = gl.allocate_shared_memory(dw.dtype, [STAGED, 1, 1, BLOCK_M, 1, dw.block_type.shape[4]], dw.layout)
    ring = (a, b, make_barriers(STAGES), make_barriers(STAGES))
    boxes = gl.cdiv(N, BOX[0]) * gl.cdiv(O, BOX[1]) * gl.cdiv(P, BOX[2]) * gl.cdiv(Q, BOX[3])
    tiles = gl.cdiv(K, BLOCK_M) * gl.cdiv(C, BLOCK_N) * TAPS * GROUPS * RANGES
    sizes = (O, P, Q, C, K, GROUPS, boxes, RANGE, tiles)
    gl.warp_specialize(
        [
            (multiply_tiles, (ring, staging, dw, sizes, TAPS, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)),
            (load_tiles, (x, dy, ring, sizes, TAPS_D, TAPS_H, TAPS_W, PHASES_H, PHASES_W, GROUPS_ON_D, BOX, BLOCK_M,
             BLOCK_N, STAGES)),
        ],
        [1], [LOADER_REGISTERS],
    )  # fmt: skip
