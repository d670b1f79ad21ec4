"""Pixel shuffle, pixel unshuffle and channel shuffle: many small transpositions, moved without looking at the numbers.

Each is an axis M of many elements and an axis F of few (r, r^2, or the groups), of which one lies innermost in the input
and the other in the result, behind four outer axes with strides of their own on either side. A program owns
BLOCK_O x BLOCK_M x BLOCK_F elements at one place of the outer three axes. Where F is a power of two and fills its side
(FLAT), that side is read or written as one run of memory and the other as runs along M: both by vectors, and the
transposition happens in registers and shared memory. Elsewhere that side's elements go singly. F is two axes on the side
where pixels of a square lie in different rows. Everything is read and written once.
"""

import triton
import triton.language as tl

__all__ = ["FLAT_IN", "FLAT_OUT", "STRIDED", "configs", "shuffle_kernel"]

# Which side is one run of memory.
STRIDED, FLAT_IN, FLAT_OUT = range(3)


def tile(size: int) -> triton.Config:
    return triton.Config(dict(BYTES=size), num_warps=4, num_stages=1)


def configs() -> list[triton.Config]:
    """Every candidate; each is right for both memory formats."""
    # 2, 4 and 8 vectors of 16 bytes a thread: more in flight, or more programs.
    return [tile(4096), tile(8192), tile(16384)]


@triton.jit
def shuffle_kernel(
    x_ptr, in_0, in_1, in_2, in_3, in_m, in_i, in_j,
    y_ptr, out_0, out_1, out_2, out_3, out_m, out_i, out_j,
    # sizes of the outer axes behind the first, and of M; F counts i, and J of j within it
    SIZE_1, SIZE_2, SIZE_3, M,
    F: tl.constexpr, J: tl.constexpr,
    # flags; what divides M, and the strides that a side's addresses are made of
    FLAT: tl.constexpr, VEC_M: tl.constexpr, VEC_IN: tl.constexpr, VEC_OUT: tl.constexpr, INDEX_64: tl.constexpr,
    # tiles
    BYTES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    BLOCK_O: tl.constexpr = BYTES * 8 // x_ptr.dtype.element_ty.primitive_bitwidth // (BLOCK_M * BLOCK_F)
    M = M // VEC_M * VEC_M
    tiles_m = tl.cdiv(M, BLOCK_M)
    TILES_F: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    tiles_o = tl.cdiv(SIZE_3, BLOCK_O)
    rest = tl.program_id(0) // TILES_F
    offs_f = tl.program_id(0) % TILES_F * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = rest % tiles_m * BLOCK_M
    offs_m = begin + tl.arange(0, BLOCK_M)
    rest = rest // tiles_m
    offs_o = rest % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    rest = rest // tiles_o
    index_2 = rest % SIZE_2
    rest = rest // SIZE_2
    index_1 = rest % SIZE_1
    index_0 = rest // SIZE_1
    flat = begin * F + tl.arange(0, BLOCK_M * BLOCK_F)
    mask_o = offs_o < SIZE_3
    mask = mask_o[:, None, None] & (offs_f < F)[None, :, None] & (offs_m < M)[None, None, :]
    mask_flat = mask_o[:, None] & (flat < M * F)[None, :]
    outer = offs_o
    many = offs_m
    few = offs_f
    if INDEX_64:
        index_0 = index_0.to(tl.int64)
        index_1 = index_1.to(tl.int64)
        index_2 = index_2.to(tl.int64)
        outer = outer.to(tl.int64)
        many = many.to(tl.int64)
        few = few.to(tl.int64)
    x_ptr += index_0 * (in_0 // VEC_IN * VEC_IN) + index_1 * (in_1 // VEC_IN * VEC_IN)
    x_ptr += index_2 * (in_2 // VEC_IN * VEC_IN)
    y_ptr += index_0 * (out_0 // VEC_OUT * VEC_OUT) + index_1 * (out_1 // VEC_OUT * VEC_OUT)
    y_ptr += index_2 * (out_2 // VEC_OUT * VEC_OUT)
    outer_in = outer * (in_3 // VEC_IN * VEC_IN)
    outer_out = outer * (out_3 // VEC_OUT * VEC_OUT)

    if FLAT == 1:
        x = tl.load(x_ptr + outer_in[:, None] + flat[None, :], mask=mask_flat, other=0)
        x = tl.permute(tl.reshape(x, (BLOCK_O, BLOCK_M, BLOCK_F)), (0, 2, 1))
    else:
        places = few // J * (in_i // VEC_IN * VEC_IN) + few % J * (in_j // VEC_IN * VEC_IN)
        x = tl.load(
            x_ptr + outer_in[:, None, None] + places[None, :, None] + (many * in_m)[None, None, :], mask=mask, other=0
        )
    if FLAT == 2:
        x = tl.reshape(tl.permute(x, (0, 2, 1)), (BLOCK_O, BLOCK_M * BLOCK_F))
        tl.store(y_ptr + outer_out[:, None] + flat[None, :], x, mask=mask_flat)
    else:
        places = few // J * (out_i // VEC_OUT * VEC_OUT) + few % J * (out_j // VEC_OUT * VEC_OUT)
        tl.store(y_ptr + outer_out[:, None, None] + places[None, :, None] + (many * out_m)[None, None, :], x, mask=mask)
