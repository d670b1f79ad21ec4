"""Convolution forward and data gradient for Hopper: a warp that loads by TMA, warpgroups that multiply, a persistent grid.

M = output pixels, N = output channels of one group, K = filter taps x input channels of one group. A program walks tiles of
BLOCK_M pixels x BLOCK_N channels. A tile's pixels are a box of [N, O, P, Q]; the image under it, seen through one tap, is
the same box shifted, which one TMA copy brings, with zeros where it leaves the image: padding costs nothing, and addresses
are the copy engine's affair, 64 bits wide. Boxes lie in shared memory as wgmma reads its operands, BLOCK_K channels side by
side, so that no value passes through registers on its way in. The loader runs up to STAGES steps ahead, also into the next
tile while this one is finished.

A stride is a set of tensors: every stride-th pixel along each axis, from one of its phases on, is a tensor of its own with
larger strides, of which each tap sees a box of neighbors again. Forward, each tap belongs to one phase of the input. In the
data gradient each phase of the result has its own taps, and is written through such a tensor; the weight, read across its
rows, is turned by wgmma. A transposed convolution is that gradient with an epilogue.

Groups are an axis of their own, so that a box never sees the neighbor's channels: where images have no depth, in its place.

Image boxes are read once per tap and column of tiles, from L2 but for the first time, weights once per row of tiles; each
output is written once.
"""

import triton

from .epilogue import SLICE_N, finish_tile, fold_affine, load_affine
from .gluon import gl, jit, load_box, mbarrier, store_wait
from .pipeline import LOADER_REGISTERS, locate, make_barriers, multiply, next_slot, phases, pick

__all__ = ["configs", "hopper_conv_kernel"]


def configs() -> list[triton.Config]:
    """Every candidate; which of them suit a problem is for tuning to say."""
    return [
        # Compute-bound layers, two warpgroups: the most products for an operand's way from L2.
        tile(128, 256, 64, 8, 3),
        tile(256, 128, 64, 8, 3),
        # Too few tiles to fill the GPU, or too few filters.
        tile(128, 128, 64, 8, 4),
        # Few pixels.
        tile(64, 256, 64, 4, 4),
        # Few filters. Deep steps, or many pixels where there are 64 channels, keep the loop's own instructions small.
        tile(128, 64, 128, 4, 4),
        tile(256, 64, 64, 4, 4),
    ]


def tile(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    return triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8), num_warps=warps, num_stages=stages)


@jit
def pick_axes(phase, TAPS_D: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, FIELD: gl.constexpr):
    """A field of a phase's taps along three axes."""
    d = pick(TAPS_D, phase // (len(TAPS_H) * len(TAPS_W)), FIELD)
    h = pick(TAPS_H, phase // len(TAPS_W) % len(TAPS_H), FIELD)
    return d, h, pick(TAPS_W, phase % len(TAPS_W), FIELD)


@jit
def taps_of(phase, TAPS_D: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr):
    """A phase's taps along three axes: the first ones, how many, and where the image is seen through the first."""
    first = pick_axes(phase, TAPS_D, TAPS_H, TAPS_W, 0)
    count = pick_axes(phase, TAPS_D, TAPS_H, TAPS_W, 1)
    return first, count, pick_axes(phase, TAPS_D, TAPS_H, TAPS_W, 2)


@jit
def load_taps(x, w, ring, step, at, taps, C, R: gl.constexpr, S: gl.constexpr, STEP: gl.constexpr,
              HOP: gl.constexpr, TURNED: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Load a tile's operands for all channels of some taps, and return the step after them."""
    n, d, h, width, channel, group, first_n = at
    first, count, shift = taps
    BYTES: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes
    for t in range(count[0]):
        for r in range(count[1]):
            for s in range(count[2]):
                tap = ((first[0] + t * STEP[0]) * R + first[1] + r * STEP[1]) * S + first[2] + s * STEP[2]
                at_d = d + shift[0] + t * HOP[0]
                at_h = h + shift[1] + r * HOP[1]
                at_w = width + shift[2] + s * HOP[2]
                for c in range(0, C, BLOCK_K):
                    a, b, bar = next_slot(ring, step, BYTES, STAGES)
                    load_box(x, [n, at_d, at_h, at_w, channel + c], bar, a)
                    if TURNED:
                        load_box(w, [group, c, tap, first_n], bar, b)
                    else:
                        load_box(w, [group, first_n, tap, c], bar, b)
                    step += 1
    return step


@jit
def load_tiles(x, w, ring, sizes, TAPS_D: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, R: gl.constexpr,
               S: gl.constexpr, STEP: gl.constexpr, HOP: gl.constexpr, GROUPS_ON_D: gl.constexpr, TURNED: gl.constexpr,
               BOX: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """The loader: walks the program's tiles and fills the ring."""
    N, O, P, Q, C, K, GROUPS, tiles = sizes
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, _, n, o, p, q, first_n = locate(tile, O, P, Q, N, K, BOX, BLOCK_N, GROUP_M)
        phase = part // GROUPS
        group = part % GROUPS
        channel = 0
        if GROUPS_ON_D:
            o = group
        else:
            channel = group * C
        at = (n, o, p, q, channel, group, first_n)
        if TURNED:
            taps = taps_of(phase, TAPS_D, TAPS_H, TAPS_W)
            if taps[1][0] * taps[1][1] * taps[1][2] == 0:
                # No tap sees these pixels: a step of zeros, from behind the last image and the last group.
                a, b, bar = next_slot(ring, step, x[0].block_type.nbytes + w.block_type.nbytes, STAGES)
                load_box(x[0], [N, 0, 0, 0, 0], bar, a)
                load_box(w, [GROUPS, 0, 0, 0], bar, b)
                step += 1
            step = load_taps(x[0], w, ring, step, at, taps, C, R, S, STEP, HOP, TURNED, BLOCK_K, STAGES)
        else:
            for i in gl.static_range(len(x)):
                taps = taps_of(i, TAPS_D, TAPS_H, TAPS_W)
                step = load_taps(x[i], w, ring, step, at, taps, C, R, S, STEP, HOP, TURNED, BLOCK_K, STAGES)


@jit
def load_residuals(residual, staging, passing, sizes, GROUPS_ON_D: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr,
                   GROUP_M: gl.constexpr):  # fmt: skip
    """A loader that waits for no operand: each tile's residual, as soon as the tile before it has left its buffers."""
    if len(residual) > 0:
        N, O, P, Q, _, K, GROUPS, tiles = sizes
        here, left = passing
        turn = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            part, _, n, o, p, q, first_n = locate(tile, O, P, Q, N, K, BOX, BLOCK_N, GROUP_M)
            phase = part // GROUPS
            if GROUPS_ON_D:
                o = part % GROUPS
            else:
                first_n += part % GROUPS * K
            mbarrier.wait(left.index(0), turn)
            for j in gl.static_range(BLOCK_N // SLICE_N):
                bar = here.index(j)
                mbarrier.expect(bar, residual[0].block_type.nbytes)
                for i in gl.static_range(len(residual)):
                    if phase == i:
                        load_box(residual[i], [n, o, p, q, first_n + j * SLICE_N], bar, staging.index(j))
            turn ^= 1


@jit
def multiply_tiles(ring, folded, staging, passing, y, tensors, sizes, TAPS_D: gl.constexpr, TAPS_H: gl.constexpr,
                   TAPS_W: gl.constexpr, TAPS: gl.constexpr, GROUPS_ON_D: gl.constexpr, TURNED: gl.constexpr,
                   EPS: gl.constexpr, ACT: gl.constexpr, ACT_A: gl.constexpr, ACT_B: gl.constexpr, BOX: gl.constexpr,
                   BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """The multipliers: walk the same tiles, empty the ring, and finish each tile."""
    N, O, P, Q, C, K, GROUPS, tiles = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    blocks_c = gl.cdiv(C, BLOCK_K)
    step = gl.to_tensor(0)
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, pid_m, n, o, p, q, first_n = locate(tile, O, P, Q, N, K, BOX, BLOCK_N, GROUP_M)
        phase = part // GROUPS
        group = part % GROUPS
        first_y = first_n
        steps = TAPS * blocks_c
        if TURNED:
            counts = pick_axes(phase, TAPS_D, TAPS_H, TAPS_W, 1)
            # Where no tap sees a phase's pixels there is a step of zeros.
            steps = gl.maximum(counts[0] * counts[1] * counts[2] * blocks_c, 1)
        if GROUPS_ON_D:
            o = group
        else:
            first_y = group * K + first_n
        vectors = load_affine(first_n, group, K, tensors, BLOCK_N)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=layout)
        acc = multiply(acc, ring, step, steps, passing[1], BLOCK_K, STAGES, False, TURNED)
        step += steps

        tiles_m = gl.cdiv(N, BOX[0]) * gl.cdiv(O, BOX[1]) * gl.cdiv(P, BOX[2]) * gl.cdiv(Q, BOX[3])
        where = (phase, n, o, p, q, first_n, first_y, K, group, phase * tiles_m + pid_m, len(y) * tiles_m, GROUPS * K, turn)
        fold_affine(folded, vectors, tensors, EPS)
        finish_tile(acc, where, tensors, folded, staging, y, passing[0], ACT, ACT_A, ACT_B)
        turn ^= 1
    store_wait(0)


@jit
def hopper_conv_kernel(
    # the input's phases, [N, D, H, W, C] each, in boxes of BOX pixels x BLOCK_K channels
    x0, x1, x2, x3, x4, x5, x6, x7,
    w,  # [groups, K, taps, C] in boxes of BLOCK_N x BLOCK_K; TURNED: [groups, C, taps, K] in boxes of BLOCK_K x BLOCK_N
    # the output's phases, [N, O, P, Q, K] each, in boxes of BOX x SLICE_N; the residual's likewise, or None
    y0, y1, y2, y3, y4, y5, y6, y7,
    r0, r1, r2, r3, r4, r5, r6, r7,
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr,
    N, O, P, Q, C, K, GROUPS,
    TAPS_D: gl.constexpr, TAPS_H: gl.constexpr, TAPS_W: gl.constexpr,
    T: gl.constexpr, R: gl.constexpr, S: gl.constexpr, STEP: gl.constexpr, HOP: gl.constexpr,
    GROUPS_ON_D: gl.constexpr, TURNED: gl.constexpr,
    EPS: gl.constexpr, ACT: gl.constexpr, ACT_A: gl.constexpr, ACT_B: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    x = phases(x0, x1, x2, x3, x4, x5, x6, x7)
    y = phases(y0, y1, y2, y3, y4, y5, y6, y7)
    residual = phases(r0, r1, r2, r3, r4, r5, r6, r7)
    BOX: gl.constexpr = x[0].block_type.shape
    SLICES: gl.constexpr = BLOCK_N // SLICE_N
    dtype: gl.constexpr = x[0].dtype
    W_BOX: gl.constexpr = w.block_type.shape
    a = gl.allocate_shared_memory(dtype, [STAGES, BOX[0], BOX[1], BOX[2], BOX[3], BLOCK_K], x[0].layout)
    b = gl.allocate_shared_memory(dtype, [STAGES, 1, W_BOX[1], 1, W_BOX[3]], w.layout)
    staging = gl.allocate_shared_memory(dtype, [SLICES, BOX[0], BOX[1], BOX[2], BOX[3], SLICE_N], y[0].layout)
    scale = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    shift = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring = (a, b, make_barriers(STAGES), make_barriers(STAGES))
    # Of a residual: its slices are here, and the tile before it has left their buffers.
    passing = (None, None)
    if len(residual) > 0:
        passing = (make_barriers(SLICES), make_barriers(1))
    tiles_m = gl.cdiv(N, BOX[0]) * gl.cdiv(O, BOX[1]) * gl.cdiv(P, BOX[2]) * gl.cdiv(Q, BOX[3])
    sizes = (N, O, P, Q, C, K, GROUPS, tiles_m * gl.cdiv(K, BLOCK_N) * GROUPS * len(y))
    tensors = (bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, counts_ptr, moments_ptr)
    affine = (scale, shift)
    gl.warp_specialize(
        [
            (multiply_tiles, (ring, affine, staging, passing, y, tensors, sizes, TAPS_D, TAPS_H, TAPS_W, T * R * S,
             GROUPS_ON_D, TURNED, EPS, ACT, ACT_A, ACT_B, BOX, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
            (load_tiles, (x, w, ring, sizes, TAPS_D, TAPS_H, TAPS_W, R, S, STEP, HOP, GROUPS_ON_D, TURNED, BOX, BLOCK_N,
             BLOCK_K, GROUP_M, STAGES)),
            (load_residuals, (residual, staging, passing, sizes, GROUPS_ON_D, BOX, BLOCK_N, GROUP_M)),
        ],
        [1, 1], [LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
