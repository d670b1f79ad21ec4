"""The ring of buffers between the warp that loads and the warps that multiply, and which tile a program does when.

A slot of the ring has two barriers. `ready` completes a phase when the slot's boxes have arrived, `empty` when its products
are done. A barrier's phases alternate between parity 0 and 1; the loader waits for `empty` one phase behind, so that a
fresh ring lets it pass.
"""

from ..tiles import grouped_tile
from .gluon import fence_async_shared, gl, jit, mbarrier, store_wait, warpgroup_mma, warpgroup_mma_wait

__all__ = ["LOADER_REGISTERS", "locate", "make_barriers", "multiply", "next_slot", "phases", "pick"]

# What a thread of the loader's warp keeps; the multipliers get the rest.
LOADER_REGISTERS = gl.constexpr(40)


@jit
def make_barriers(COUNT: gl.constexpr):
    """Barriers of a single arrival, which all partitions may use from the next warp_specialize on."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    fence_async_shared()
    return barriers


@jit
def phases(d0, d1, d2, d3, d4, d5, d6, d7):
    """The descriptors of a tensor's phases that there are. Triton before 3.8 launches none inside a tuple."""
    found = ()
    if d0 is not None:
        found = found + (d0,)
    if d1 is not None:
        found = found + (d1,)
    if d2 is not None:
        found = found + (d2,)
    if d3 is not None:
        found = found + (d3,)
    if d4 is not None:
        found = found + (d4,)
    if d5 is not None:
        found = found + (d5,)
    if d6 is not None:
        found = found + (d6,)
    if d7 is not None:
        found = found + (d7,)
    return found


@jit
def slot_of(step, STAGES: gl.constexpr):
    """(slot, parity) of a step."""
    # Steps are never negative: as unsigned numbers they are divided by two instructions, not by five.
    step = step.to(gl.uint32)
    return (step % STAGES).to(gl.int32), (step // STAGES & 1).to(gl.int32)


@jit
def next_slot(ring, step, nbytes: gl.constexpr, STAGES: gl.constexpr):
    """Wait for a step's slot to be empty and announce so many bytes: its buffers, and the barrier of their arrival."""
    a, b, ready, empty = ring
    slot, parity = slot_of(step, STAGES)
    mbarrier.wait(empty.index(slot), parity ^ 1)
    bar = ready.index(slot)
    mbarrier.expect(bar, nbytes)
    return a.index(slot), b.index(slot), bar


@jit
def product(acc, ring, step, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, A_TURNED: gl.constexpr,
            B_TURNED: gl.constexpr):  # fmt: skip
    """acc + a step's a [BLOCK_M, BLOCK_K] times b, begun when the step before it is done; and its slot."""
    a, b, ready, _ = ring
    BLOCK_M: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    slot, parity = slot_of(step, STAGES)
    mbarrier.wait(ready.index(slot), parity)
    if A_TURNED:
        rows = a.index(slot).reshape([BLOCK_K, BLOCK_M]).permute([1, 0])
    else:
        rows = a.index(slot).reshape([BLOCK_M, BLOCK_K])
    if B_TURNED:
        columns = b.index(slot).reshape([BLOCK_K, BLOCK_N])
    else:
        columns = b.index(slot).reshape([BLOCK_N, BLOCK_K]).permute([1, 0])
    acc = warpgroup_mma(rows, columns, acc, is_async=True)
    return warpgroup_mma_wait(num_outstanding=1, deps=[acc]), slot


@jit
def multiply(acc, ring, step, steps, left, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, A_TURNED: gl.constexpr,
             B_TURNED: gl.constexpr):  # fmt: skip
    """acc + the sum of at least one step's products.

    Operands lie in shared memory along the reduction, or, where turned, across it. One product stays in flight while the
    next slot is waited for, and the slot before it is handed back. While the first one runs, the buffers that the tile
    before it leaves by are handed back too, to the barrier `left` if there is one.
    """
    _, _, _, empty = ring
    acc, before = product(acc, ring, step, BLOCK_K, STAGES, A_TURNED, B_TURNED)
    if left is not None:
        store_wait(0)
        mbarrier.arrive(left.index(0), count=1)
    for i in range(step + 1, step + steps):
        acc, slot = product(acc, ring, i, BLOCK_K, STAGES, A_TURNED, B_TURNED)
        mbarrier.arrive(empty.index(before), count=1)
        before = slot
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(empty.index(before), count=1)
    return acc


@jit
def locate(tile, O, P, Q, N, K, BOX: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """(part, row of tiles, n, o, p, q, first column) of a tile: BOX pixels of [N, O, P, Q] by BLOCK_N of K columns.

    Tiles of a part stand together, GROUP_M rows of them before the next column, so that programs in flight share images and
    weights in L2.
    """
    tiles_o, tiles_p, tiles_q = gl.cdiv(O, BOX[1]), gl.cdiv(P, BOX[2]), gl.cdiv(Q, BOX[3])
    tiles_m = gl.cdiv(N, BOX[0]) * tiles_o * tiles_p * tiles_q
    tiles_n = gl.cdiv(K, BLOCK_N)
    part = tile // (tiles_m * tiles_n)
    pid_m, pid_n = grouped_tile(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    q = pid_m % tiles_q * BOX[3]
    p = pid_m // tiles_q % tiles_p * BOX[2]
    o = pid_m // (tiles_q * tiles_p) % tiles_o * BOX[1]
    n = pid_m // (tiles_q * tiles_p * tiles_o) * BOX[0]
    return part, pid_m, n, o, p, q, pid_n * BLOCK_N


@jit
def pick(table, index, FIELD: gl.constexpr):
    """table[index][FIELD] of a constant table."""
    value = gl.to_tensor(table[0][FIELD])
    for i in gl.static_range(1, len(table)):
        if index == i:
            value = gl.to_tensor(table[i][FIELD])
    return value
