"""Tiles: candidate configs, which of them suit a problem, which tile a program owns, and what of it is padding."""

import triton
import triton.language as tl

__all__ = ["REMADE", "fitting", "grouped_tile", "not_finite", "tap_bits", "taps_outside", "tile", "window_origins"]


def tile(m: int, n: int, k: int, warps: int, stages: int, *, tma: bool = True) -> triton.Config:
    """A candidate of BLOCK_M x BLOCK_N outputs, BLOCK_K deep; `tma`: use descriptors where they are possible."""
    blocks = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, USE_TMA=tma)
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def fitting(
    candidates: list[triton.Config], *, m: int, n: int, k: int, itemsize: int, tensor_cores: bool, shared: int,
    even: bool = False, vectors: bool = True, turned: bool = False, computed: bool = False, scattered: bool = False,
    statistics: bool = False, arch: str = "",
) -> list[triton.Config]:  # fmt: skip
    """The candidates that suit an M x N output with a reduction in runs of K elements of `itemsize` bytes.

    `tensor_cores`: not for fp64 and IEEE fp32. `shared` is the shared memory of a program in bytes; `even` asks for blocks
    that divide K; `vectors`: whether the image is read by vectors; `turned`: operands lie across the reduction; `computed`:
    the operand of rows is made of two tensors on its way in; `scattered`: results go to one phase of a stride; `statistics`
    of the results are taken. This is the one statement of what is valid; the choice of a
    config and the tuner both call it.
    """
    kept = []
    for config in candidates:
        m_, n_, k_ = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        # More than twice as large as the output or the reduction: mostly zeros are computed.
        if m_ > max(64, 2 * m - 1) or n_ > max(64 if computed else 16, 2 * n - 1) or k_ > max(16, 2 * k - 1):
            continue
        if even and k % k_:
            continue
        # The pipeline's buffers must fit.
        if (m_ + n_) * k_ * itemsize * config.num_stages > shared:
            continue
        # Plain products hold their operands in registers, and larger tiles spill.
        if not tensor_cores and m_ * n_ * k_ > (64 * 64 * 16 if itemsize == 4 else 64 * 16 * 16):
            continue
        # TF32 operands that are turned in registers want 8 warps there. With 16 bits 4 do better, and Triton 3.6 serializes
        # wgmma with 8.
        if turned and tensor_cores and 64 * 128 <= m_ * n_ <= 128 * 128 and config.num_warps != (8 if itemsize == 4 else 4):
            continue
        # Its columns are wgmma's rows (conv_dgrad): less than 64 would be computed without.
        if computed and not turned and tensor_cores and n_ < 64:
            continue
        # A thread holds two tiles of such an operand in fp32 at once, and more than 16 elements of each would spill.
        if computed and (m_ * k_ > 16 * 32 * config.num_warps or (k_ > 32 and not turned)):
            continue
        # Registers are handed out differently there, and a few bytes would spill.
        if arch == "sm_100" and (
            (scattered and m_ * n_ > 128 * 128) or (statistics and config.num_warps == 4 and n_ in (64, 256))
        ):
            continue
        # So they would here, where the compiler cannot see that 16 divides the pixels.
        if arch == "sm_80" and turned and k % 16 and m_ * n_ > 128 * 128:
            continue
        # Steps of 32 pixels are for single elements; of vectors a product takes 64.
        if turned and tensor_cores and vectors and k_ == 32:
            continue
        # Deep steps of single elements spill too, each with an address and a mask of its own.
        if not vectors and (k_ > 32 or m_ > 128):
            continue
        kept.append(config)
    return kept


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) in an order that walks GROUP_M rows of tiles before the next column.

    Programs in flight then share image rows and weights in L2 instead of streaming either one.
    """
    band = GROUP_M * tiles_n
    first = pid // band * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % band % rows, pid % band // rows


@triton.jit
def window_origins(
    offs_m, M, O, P, Q,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
):  # fmt: skip
    """(n, d, h, w) of the first tap of each output pixel's window; negative inside the padding.

    Pixels past the end repeat the last one: their loads are valid and their results are not stored.
    """
    row = tl.minimum(offs_m, M - 1)
    d0 = row // (P * Q) % O * STRIDE_D - PAD_D
    h0 = row // Q % P * STRIDE_H - PAD_H
    w0 = row % Q * STRIDE_W - PAD_W
    return row // (O * P * Q), d0, h0, w0


# Padding is tested with one 32-bit word per pixel: a bit for each of the T + R + S filter positions along the axes, set
# where that position lies outside the image. A tap is outside if one of its three bits is set, which is one instruction.


@triton.jit
def axis_outside(x0, X, TAPS: tl.constexpr, DIL: tl.constexpr, FIRST: tl.constexpr):
    """Bits FIRST to FIRST + TAPS - 1: whether x0 + tap * DIL lies outside [0, X)."""
    word = tl.zeros(x0.shape, tl.int32)
    for tap in tl.static_range(TAPS):
        outside = (x0 + tap * DIL < 0) | (x0 + tap * DIL >= X)
        word = word | (outside.to(tl.int32) << (FIRST + tap))
    return word


@triton.jit
def taps_outside(
    d0, h0, w0, D, H, W, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """One word per pixel for filters of T + R + S <= 31; without HAS_D the depth is known to be inside."""
    word = axis_outside(w0, W, S, DIL_W, 0) | axis_outside(h0, H, R, DIL_H, S)
    if HAS_D:
        word = word | axis_outside(d0, D, T, DIL_D, S + R)
    return word


@triton.jit
def tap_bits(t, r, s, R: tl.constexpr, S: tl.constexpr, HAS_D: tl.constexpr):
    """The bits of a tap: it lies inside where none of them is set."""
    one = tl.full((), 1, tl.int32)
    bits = (one << s) | (one << (S + r))
    if HAS_D:
        bits = bits | (one << (S + R + t))
    return bits


# Groups that share a tile (PACK) meet each other's values times zero, which is NaN for a NaN or an infinity. Both leave
# their mark in the sums, so that it is enough to look at these: an instruction a result, and a branch a tile that is never
# taken elsewhere. There, so few columns are made anew at a time that they need no more registers than the rest.
REMADE = tl.constexpr(4)


@triton.jit
def not_finite(acc):
    """Whether some element of a tile is NaN or infinite."""
    # Over all elements at once: Triton 3.7.1 fails for sm_100 where accumulators are added up along one axis.
    return tl.sum(acc * 0.0) != 0.0
