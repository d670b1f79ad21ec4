"""Max unpooling: every value goes to the position that its index names, and all else is zero; and the way back.

A plane is one channel of one image. unpool_kernel scatters into a result that is zero already; backward gathers. A program
owns BLOCK_P values of BLOCK_C planes: channels-last, values of an image follow each other with their channels side by
side; contiguous, a plane's values do. Values and indices are read once, in whole lines; what is scattered lies where the
indices say. Where two of a plane name one position, which of them stays is the memory's choice, as in torch.

Indices outside the plane are skipped: nothing is written, and their gradient is zero.
"""

import triton
import triton.language as tl

__all__ = ["configs", "unpool_kernel"]


def tile(pixels: int, channels: int) -> triton.Config:
    return triton.Config(dict(BLOCK_P=pixels, BLOCK_C=channels), num_warps=4, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both directions and both memory formats."""
    return [
        # 8 values a thread. Channels-last: whole lines of 64 channels, then fewer.
        tile(16, 64),
        tile(64, 16),
        # Contiguous: the values of a plane.
        tile(256, 4),
        tile(1024, 1),
    ]


@triton.jit
def unpool_kernel(
    small_ptr, index_ptr, large_ptr,  # [N, C, SMALL], [N, C, SMALL], [N, C, LARGE], all dense in one format
    N, C, SMALL, LARGE,
    BACKWARD: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """large[index] = small, or backward: small = large[index]."""
    blocks = tl.cdiv(SMALL, BLOCK_P)
    tiles_c = tl.cdiv(C, BLOCK_C)
    offs_c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(0) // tiles_c // blocks
    offs = tl.program_id(0) // tiles_c % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    if INDEX_64:
        n = n.to(tl.int64)
    # The compiler proves alignment, and so vectors, from a product alone: tl.multiple_of has no effect on arguments.
    if CHANNELS_LAST:
        C = C // VEC * VEC
        near = (n * SMALL + offs)[:, None] * C + offs_c[None, :]
        mask = (offs < SMALL)[:, None] & (offs_c < C)[None, :]
        index = tl.load(index_ptr + near, mask=mask, other=-1)
        far = (n * LARGE + index) * C + offs_c[None, :]
    else:
        SMALL = SMALL // VEC * VEC
        near = (n * C + offs_c)[:, None] * SMALL + offs[None, :]
        mask = (offs_c < C)[:, None] & (offs < SMALL)[None, :]
        index = tl.load(index_ptr + near, mask=mask, other=-1)
        far = (n * C + offs_c)[:, None] * LARGE + index
    inside = mask & (index >= 0) & (index < LARGE)
    if BACKWARD:
        tl.store(small_ptr + near, tl.load(large_ptr + far, mask=inside, other=0.0), mask=mask)
    else:
        tl.store(large_ptr + far, tl.load(small_ptr + near, mask=mask, other=0.0), mask=inside)
