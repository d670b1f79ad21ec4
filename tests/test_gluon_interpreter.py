"""The interpreter of Gluon kernels: right kernels run right in every order, and planted faults are found in every order."""

import pathlib

import pytest
import torch
import torch.nn.functional as F
import triton
from gluon_interpreter import Fault, Random, Refused, Timed, run
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from tritonconv.kernels.activations import ACTIVATIONS

SEEDS = range(10)

# Triton renamed these, in 3.7 and in 3.8.
cta_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def layout_of(box, dtype=gl.bfloat16):
    return gl.NVMMASharedLayout.get_default_for(box, dtype)


def describe(tensor, box):
    dtype = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[tensor.dtype]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout_of(box, dtype))


def nan(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), dtype=dtype)


@gluon.jit
def make_barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


# A matrix product, y = x @ w^T, by a persistent program with a ring, and the faults that may be planted in it.


@gluon.jit
def load_tiles(x, w, ring, tiles, tiles_n, K, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
               STAGES: gl.constexpr, FAULT: gl.constexpr):  # fmt: skip
    a_bufs, b_bufs, empty, ready = ring
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for k in range(0, K, BLOCK_K):
            slot = step % STAGES
            parity = step // STAGES & 1
            if FAULT == "wrong parity of the loader":
                mbarrier.wait(empty.index(slot), parity)
            elif FAULT != "buffer overwritten":
                mbarrier.wait(empty.index(slot), parity ^ 1)
            nbytes: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes
            if FAULT == "too few bytes":
                mbarrier.expect(ready.index(slot), nbytes // 2)
            elif FAULT == "too many bytes":
                mbarrier.expect(ready.index(slot), nbytes + 8192)
            else:
                mbarrier.expect(ready.index(slot), nbytes)
            a = a_bufs.index(slot)
            if FAULT == "wrong box":
                a = a_bufs.index(slot).slice(0, BLOCK_M // 2)
            if FAULT == "unaligned box":
                load_box(x, [tile // tiles_n * BLOCK_M, k + 1], ready.index(slot), a)
            else:
                load_box(x, [tile // tiles_n * BLOCK_M, k], ready.index(slot), a)
            load_box(w, [tile % tiles_n * BLOCK_N, k], ready.index(slot), b_bufs.index(slot))
            if FAULT == "expected twice":
                mbarrier.expect(ready.index(slot), nbytes)
            step += 1
    if FAULT == "copy in flight at the end":
        mbarrier.wait(empty.index(step % STAGES), (step // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(step % STAGES), x.block_type.nbytes)
        load_box(x, [0, 0], ready.index(step % STAGES), a_bufs.index(step % STAGES))


@gluon.jit
def multiply_tiles(y, ring, staging, tiles, tiles_n, K, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                   BLOCK_K: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr):  # fmt: skip
    a_bufs, b_bufs, empty, ready = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=layout)
        for k in range(0, K, BLOCK_K):
            slot = step % STAGES
            parity = step // STAGES & 1
            if FAULT == "wrong parity of the multiplier":
                mbarrier.wait(ready.index(slot), parity ^ 1)
            elif FAULT != "not waited for a copy":
                mbarrier.wait(ready.index(slot), parity)
            a = a_bufs.index(slot)
            if FAULT == "unfilled buffer":
                a = a_bufs.index(STAGES)
            acc = warpgroup_mma(a, b_bufs.index(slot).permute([1, 0]), acc, is_async=True)
            if FAULT == "freed at once":
                mbarrier.arrive(empty.index(slot), count=1)
            if FAULT == "result used unwaited":
                acc = acc * 2.0
            acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
            if FAULT != "never freed" and FAULT != "freed at once":
                count: gl.constexpr = 2 if FAULT == "arrived twice" else 1
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=count, pred=k > 0)
            step += 1
        finished = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        if FAULT != "result stored unwaited":
            acc = finished
        if FAULT != "never freed" and FAULT != "freed at once":
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if FAULT != "staging reused":
            tma.store_wait(0)
        staging.store(acc.to(gl.bfloat16))
        if FAULT != "no fence":
            fence_async_shared()
        if FAULT != "no barrier of the warps":
            cta_barrier()
        if FAULT == "fence behind the barrier":
            cta_barrier()
            staging.store(acc.to(gl.bfloat16))
            cta_barrier()
            fence_async_shared()
        column = 0 if FAULT == "written twice" else tile % tiles_n * BLOCK_N
        store_box(y, [tile // tiles_n * BLOCK_M, column], staging)
    if FAULT != "store in flight at the end":
        tma.store_wait(0)


@gluon.jit
def matmul_kernel(x, w, y, M, N, K, STAGES: gl.constexpr, FAULT: gl.constexpr):
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_N: gl.constexpr = w.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    spare: gl.constexpr = 1 if FAULT == "unfilled buffer" else 0
    rows: gl.constexpr = 8 if FAULT == "too much shared memory" else 1
    a_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES + spare, rows * BLOCK_M, BLOCK_K], x.layout)
    b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    staging = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N], y.layout)
    empty = make_barriers(STAGES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if FAULT != "not initialized":
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
    if FAULT == "initialized twice":
        mbarrier.init(ready.index(0), count=1)
    if FAULT == "overflow":
        M = M + 2147483600
    if FAULT == "unknown function":
        gl.histogram(M, 4)
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles = gl.cdiv(M, BLOCK_M) * tiles_n
    ring = (a_bufs, b_bufs, empty, ready)
    gl.warp_specialize([
        (multiply_tiles, (y, ring, staging, tiles, tiles_n, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, FAULT)),
        (load_tiles, (x, w, ring, tiles, tiles_n, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, FAULT)),
    ], [1], [24])  # fmt: skip


def matmul(schedule, fault="", num_warps=4, programs=2, stages=3, m=150, n=100, k=200):
    """The error of the kernel, and its trace."""
    torch.manual_seed(0)
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    # A row of a descriptor is a multiple of 16 bytes.
    y = nan(m, -(-n // 8) * 8)[:, :n]
    arguments = dict(
        x=describe(x, [64, 32]), w=describe(w, [64, 32]), y=describe(y, [64, 64]), M=m, N=n, K=k, STAGES=stages
    )
    trace = run(matmul_kernel, programs, {**arguments, "FAULT": fault}, schedule, num_warps=num_warps)
    return (y.float() - x.float() @ w.float().T).abs().max().item(), trace


@pytest.mark.parametrize("seed", SEEDS)
def test_matmul(seed):
    error, trace = matmul(Random(seed))
    assert error < 0.2
    assert trace.products == 6 * 7
    assert trace.bytes_loaded == 6 * 7 * 2 * 64 * 32 * 2
    assert trace.bytes_stored == 150 * 100 * 2


def test_timed():
    error, trace = matmul(Timed())
    assert error < 0.2
    # Six tiles' products alone.
    assert trace.cycles > 6 * 7 * 2 * 64 * 64 * 32 / 4096


def test_orders():
    """A seed gives one order, seeds give different ones, some of them extreme."""
    traces = {seed: matmul(Random(seed))[1].events for seed in SEEDS}
    assert traces[3] == matmul(Random(3))[1].events
    orders = {tuple(event.kind for event in events) for events in traces.values()}
    assert len(orders) >= 8
    waits = [sum(e.end - e.issued for e in events if e.kind == "load") for events in traces.values()]
    assert max(waits) > 3 * min(waits)


FAULTS = {
    "freed at once": r"TMA load of x of load_tiles overwrites a_bufs\[.\], which multiply_tiles may still read in a",
    "buffer overwritten": r"overwrites a_bufs\[.\], which (was filled and never read|a copy in flight fills|multiply_tiles"
    r" may still read)|ready\[0\] is arrived on more often",
    "wrong parity of the loader": r"deadlock: multiply_tiles waits for ready\[0\].*; load_tiles waits for barriers\[0\]",
    "wrong parity of the multiplier": r"reads a_bufs\[0\](, which is unfilled| without having waited)|phase error",
    "too few bytes": r"fewer bytes expected than copied|reads b_bufs\[0\](, which is unfilled| without having waited)",
    "too many bytes": r"deadlock: multiply_tiles waits for ready\[0\].* waits for 0 of 1 arrivals and 8192 more bytes, no"
    r" copy is in flight",
    "never freed": r"deadlock: multiply_tiles waits for ready\[0\] .*; load_tiles waits for barriers\[0\] to complete phase"
    r" 0 \(parity 0; barrier barriers\[0\] in phase 0 waits for 1 of 1 arrivals",
    "expected twice": r"barrier ready\[.\] is arrived on more often than its count of 1: 1 arrivals by load_tiles",
    "not waited for a copy": r"product of multiply_tiles reads a_bufs\[0\](, which is unfilled| without having waited)",
    "unfilled buffer": r"reads a_bufs\[3\], which is unfilled",
    "result used unwaited": "unwaited result",
    "result stored unwaited": "unwaited result",
    "arrived twice": r"barriers\[0\] is arrived on more often than its count of 1",
    "no fence": "TMA store to y reads staging, which multiply_tiles has written without fence_async_shared",
    "no barrier of the warps": "reads staging, which multiply_tiles has written without a barrier behind its fence",
    "fence behind the barrier": "reads staging, which multiply_tiles has written without a barrier behind its fence",
    "staging reused": "smem store of multiply_tiles overwrites staging, which multiply_tiles may still read in a TMA store",
    "store in flight at the end": r"ends with a store in flight: it has not called store_wait\(0\)",
    "copy in flight at the end": r"the kernel ends (with a copy|and barrier ready\[.\])",
    "not initialized": r"barrier ready\[.\] is not initialized",
    "initialized twice": r"barrier ready\[0\] is initialized again",
    "overflow": "int32 overflow",
    "wrong box": r"a_bufs\[0\]\[0:32\] has shape \[32, 32\] of bf16, and boxes of x \[64, 32\]",
    "unaligned box": "the innermost coordinate of .* is no multiple of 16 bytes",
    "written twice": r"written twice: elements of the box at \[.*, 0\] of y",
    "too much shared memory": "bytes of shared memory are more than 232448",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault):
    stages = 8 if fault == "too much shared memory" else 3
    for seed in range(6):
        with pytest.raises(Fault, match=FAULTS[fault]) as caught:
            matmul(Random(seed), fault, stages=stages)
        assert "test_gluon_interpreter.py:" in str(caught.value) or "the kernel ends" in str(caught.value), caught.value


def test_not_a_warpgroup():
    with pytest.raises(Fault, match="by 2 warps, which are no warpgroup"):
        matmul(Random(0), num_warps=2)


def test_unknown_function():
    with pytest.raises(Refused, match=r"gl\.histogram"):
        matmul(Random(0), "unknown function")


# A convolution whose loads are four-dimensional boxes, with bias and activation in registers.


@gluon.jit
def load_windows(x, w, ring, at, C, R: gl.constexpr, S: gl.constexpr, PADDING: gl.constexpr, STAGES: gl.constexpr):
    a_bufs, b_bufs, empty, ready = ring
    n, p, q, k = at
    blocks = gl.cdiv(C, x.block_type.shape[3])
    for i in range(R * S * blocks):
        slot = i % STAGES
        tap = i // blocks
        c = i % blocks * x.block_type.shape[3]
        mbarrier.wait(empty.index(slot), i // STAGES % 2 ^ 1)
        mbarrier.expect(ready.index(slot), x.block_type.nbytes + w.block_type.nbytes)
        load_box(x, [n, p + tap // S - PADDING, q + tap % S - PADDING, c], ready.index(slot), a_bufs.index(slot))
        load_box(w, [k, tap, c], ready.index(slot), b_bufs.index(slot))


@gluon.jit
def multiply_windows(y, bias_ptr, ring, at, C, K, ACT: gl.constexpr, A: gl.constexpr, B: gl.constexpr, TAPS: gl.constexpr,
                     BOX: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    a_bufs, b_bufs, empty, ready = ring
    n, p, q, k = at
    BLOCK_M: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    BLOCK_N: gl.constexpr = BOX[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=layout)
    for i in range(TAPS * gl.cdiv(C, BLOCK_C)):
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), i // STAGES % 2)
        rows = a_bufs.index(slot).reshape([BLOCK_M, BLOCK_C])
        columns = b_bufs.index(slot).reshape([BLOCK_N, BLOCK_C]).permute([1, 0])
        acc = warpgroup_mma(rows, columns, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(empty.index(slot), count=1)
    offs = k + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    acc = ACT(acc + gl.load(bias_ptr + offs, mask=offs < K, other=0.0)[None, :], A, B)
    staging = gl.allocate_shared_memory(gl.bfloat16, BOX, y.layout)
    staging.reshape([BLOCK_M, BLOCK_N]).store(acc.to(gl.bfloat16))
    fence_async_shared()
    cta_barrier()
    store_box(y, [n, p, q, k], staging)
    tma.store_wait(0)


@gluon.jit
def conv_kernel(x, w, y, bias_ptr, C, K, P, Q, ACT: gl.constexpr, A: gl.constexpr, B: gl.constexpr, R: gl.constexpr,
                S: gl.constexpr, PADDING: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    X: gl.constexpr = x.block_type.shape
    Y: gl.constexpr = y.block_type.shape
    a_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, X[0], X[1], X[2], X[3]], x.layout)
    b_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, Y[3], 1, X[3]], w.layout)
    ring = (a_bufs, b_bufs, make_barriers(STAGES), make_barriers(STAGES))
    pid = gl.program_id(0)
    tiles_k = gl.cdiv(K, Y[3])
    tiles_q = gl.cdiv(Q, Y[2])
    tiles_p = gl.cdiv(P, Y[1])
    k = pid % tiles_k * Y[3]
    tile = pid // tiles_k
    at = (tile // (tiles_p * tiles_q) * Y[0], tile // tiles_q % tiles_p * Y[1], tile % tiles_q * Y[2], k)
    gl.warp_specialize([
        (multiply_windows, (y, bias_ptr, ring, at, C, K, ACT, A, B, R * S, Y, X[3], STAGES)),
        (load_windows, (x, w, ring, at, C, R, S, PADDING, STAGES)),
    ], [1], [24])  # fmt: skip


def conv_error(seed, padding=1, shift=0):
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 9, 10, 24).bfloat16(), torch.randn(40, 3, 3, 24).bfloat16() / 8, torch.randn(40)
    P, Q = 7 + 2 * padding, 8 + 2 * padding
    y = nan(2, P, Q, 40)
    arguments = dict(
        x=describe(x, [1, 8, 8, 16]), w=describe(w.view(40, 9, 24), [64, 1, 16]), y=describe(y, [1, 8, 8, 64]),
        bias_ptr=bias, C=24, K=40, P=P, Q=Q, ACT=ACTIVATIONS["silu"].device, A=0.0, B=0.0, R=3, S=3,
        PADDING=padding + shift, STAGES=2,
    )  # fmt: skip
    run(conv_kernel, 2 * -(-P // 8) * -(-Q // 8), arguments, Random(seed), num_warps=4)
    reference = F.conv2d(x.float().permute(0, 3, 1, 2), w.float().permute(0, 3, 1, 2), bias, padding=padding)
    return (y.float() - F.silu(reference).permute(0, 2, 3, 1)).abs().max().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("padding", [0, 1])
def test_convolution(padding, seed):
    assert conv_error(seed, padding) < 0.05


def test_padding_off_by_one():
    assert conv_error(0, shift=1) > 1


# Copies through shared memory, in boxes that leave their tensors.


@gluon.jit
def shift_kernel(x, y, DOWN: gl.constexpr, RIGHT: gl.constexpr, FAULT: gl.constexpr):
    """y[i, j] = x[i - DOWN, j - RIGHT], zero outside."""
    buffer = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    i = gl.program_id(0) * x.block_type.shape[0]
    for j in range(0, y.shape[1], x.block_type.shape[1]):
        mbarrier.expect(bar, x.block_type.nbytes)
        load_box(x, [i - DOWN, j - RIGHT], bar, buffer)
        if FAULT == "invalidated in use":
            mbarrier.invalidate(bar)
        mbarrier.wait(bar, (j // x.block_type.shape[1]) & 1)
        store_box(y, [i, j], buffer)
        if FAULT != "no store_wait":
            tma.store_wait(0)
    mbarrier.invalidate(bar)


@pytest.mark.parametrize("down, right", [(0, 0), (3, 4), (-5, -8), (20, 100)])
def test_boxes(down, right):
    x = torch.randn(13, 72)[:, :68]
    y = nan(19, 80, dtype=torch.float32)
    run(
        shift_kernel,
        3,
        dict(x=describe(x, [8, 32]), y=describe(y, [8, 32]), DOWN=down, RIGHT=right, FAULT=""),
        Random(down),
    )
    padded = F.pad(x, (200, 200, 200, 200))
    assert torch.equal(y, padded[200 - down : 219 - down, 200 - right : 280 - right])


@pytest.mark.parametrize("fault, message", [
    ("invalidated in use", "barrier bar is invalidated while in use"),
    ("no store_wait", "TMA load of x of kernel overwrites buffer, which kernel may still read in a TMA store"),
])  # fmt: skip
def test_faults_of_copies(fault, message):
    for seed in range(4):
        x, y = torch.randn(8, 64), nan(8, 64, dtype=torch.float32)
        with pytest.raises(Fault, match=message):
            run(
                shift_kernel,
                1,
                dict(x=describe(x, [8, 32]), y=describe(y, [8, 32]), DOWN=0, RIGHT=0, FAULT=fault),
                Random(seed),
            )


def test_descriptors():
    """Arbitrary strides of outer dimensions, overlapping and zero ones too, and TMA's limits."""
    base = torch.randn(4096)
    x = TensorDescriptor(base[64:], [6, 3, 16], [8, 0, 1], [2, 1, 8], layout_of([2, 1, 8], gl.float32))
    y = nan(6, 3, 16, dtype=torch.float32)
    run(copy_kernel, 3, dict(x=x, y=describe(y, [2, 1, 8])), Random(1))
    assert torch.equal(y, base[64:].as_strided((6, 3, 16), (8, 0, 1)))
    wide = describe(nan(512, 64), [512, 16])
    with pytest.raises(Fault, match=r"descriptor x: a block dimension of \[512, 16\] is more than 256"):
        run(copy_kernel, 1, dict(x=wide, y=wide), Random(0))
    short = TensorDescriptor(base, [64, 128], [64, 1], [8, 8], layout_of([8, 8], gl.float32))
    with pytest.raises(Fault, match="reaches past its tensor"):
        run(copy_kernel, 1, dict(x=short, y=short), Random(0))


@gluon.jit
def copy_kernel(x, y):
    buffer = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    parity = 0
    for j in range(y.shape[1]):
        for k in range(0, y.shape[2], x.block_type.shape[2]):
            mbarrier.expect(bar, x.block_type.nbytes)
            load_box(x, [gl.program_id(0) * x.block_type.shape[0], j, k], bar, buffer)
            mbarrier.wait(bar, parity)
            store_box(y, [gl.program_id(0) * x.block_type.shape[0], j, k], buffer)
            tma.store_wait(0)
            parity ^= 1


# Buffers that threads read and write themselves.


@gluon.jit
def fill_rows(x, buffers, empty, ready, steps):
    for i in range(steps):
        mbarrier.wait(empty.index(i % 2), i // 2 % 2 ^ 1)
        mbarrier.expect(ready.index(i % 2), x.block_type.nbytes)
        load_box(x, [i * x.block_type.shape[0], 0], ready.index(i % 2), buffers.index(i % 2))


@gluon.jit
def double_rows(y, buffers, empty, ready, steps, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    staging = gl.allocate_shared_memory(y.dtype, [2, y.block_type.shape[0], y.block_type.shape[1]], y.layout)
    for i in range(steps):
        mbarrier.wait(ready.index(i % 2), i // 2 % 2)
        if FAULT == "arrived before reading":
            mbarrier.arrive(empty.index(i % 2), count=1)
        rows = buffers.index(i % 2).load(layout)
        if FAULT != "arrived before reading":
            mbarrier.arrive(empty.index(i % 2), count=1)
        tma.store_wait(1 if FAULT != "waited for too few" else 2)
        # In halves, which are cells of their own.
        left, right = rows.reshape([rows.shape[0], 2, rows.shape[1] // 2]).permute([0, 2, 1]).split()
        half: gl.constexpr = rows.shape[1] // 2
        staging.index(i % 2).slice(0, half, 1).store(left * 2.0)
        if FAULT != "half unfilled":
            staging.index(i % 2).slice(half, half, 1).store(right + right)
        fence_async_shared()
        cta_barrier()
        store_box(y, [i * y.block_type.shape[0], 0], staging.index(i % 2))
    tma.store_wait(0)


@gluon.jit
def double_kernel(x, y, steps, FAULT: gl.constexpr):
    buffers = gl.allocate_shared_memory(x.dtype, [2, x.block_type.shape[0], x.block_type.shape[1]], x.layout)
    empty = make_barriers(2)
    ready = make_barriers(2)
    gl.warp_specialize(
        [(double_rows, (y, buffers, empty, ready, steps, FAULT)), (fill_rows, (x, buffers, empty, ready, steps))], [1], [24]
    )


def double(seed, fault=""):
    x, y = torch.randn(60, 32), nan(60, 32, dtype=torch.float32)
    run(
        double_kernel,
        1,
        dict(x=describe(x, [8, 32]), y=describe(y, [8, 32]), steps=8, FAULT=fault),
        Random(seed),
        num_warps=4,
    )
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_read_and_write(seed):
    double(seed)


@pytest.mark.parametrize("fault, message", [
    ("arrived before reading", r"TMA load of x.* overwrites buffers\[0\], which (double_rows has read|was filled and)"),
    ("waited for too few", r"overwrites staging\[0\].*, which double_rows may still read in a TMA store"),
    ("half unfilled", r"TMA store to y reads staging\[0\], which is unfilled"),
])  # fmt: skip
def test_faults_of_threads(fault, message):
    for seed in range(6):
        with pytest.raises(Fault, match=message):
            double(seed, fault)


# Two partitions that multiply, each half of the rows, and a weight that stays.


@gluon.jit
def load_halves(x, w, a_bufs, b_buf, empty, ready, kept, steps):
    mbarrier.expect(kept, w.block_type.nbytes)
    load_box(w, [0, 0], kept, b_buf)
    for i in range(steps):
        slot = i % 2
        mbarrier.wait(empty.index(slot), i // 2 % 2 ^ 1)
        mbarrier.expect(ready.index(slot), 2 * x.block_type.nbytes)
        load_box(x, [i * 128, 0], ready.index(slot), a_bufs.index(slot).slice(0, 64))
        load_box(x, [i * 128 + 64, 0], ready.index(slot), a_bufs.index(slot).slice(64, 64))


@gluon.jit
def multiply_half(y_ptr, a_bufs, b_buf, empty, ready, kept, steps, HALF: gl.constexpr, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, 32, 16]
    )
    rows = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    mbarrier.wait(kept, 0)
    for i in range(steps):
        slot = i % 2
        mbarrier.wait(ready.index(slot), i // 2 % 2)
        half = HALF
        if FAULT == "another's half":
            half = 1 - HALF
        a = a_bufs.index(slot).slice(half * 64, 64)
        acc = gl.zeros([64, 32], gl.float32, layout=layout)
        acc = warpgroup_mma(a, b_buf.permute([1, 0]), acc, use_acc=False, is_async=False)
        mbarrier.arrive(empty.index(slot), count=1)
        gl.store(y_ptr + (i * 128 + rows[:, None]) * 32 + columns[None, :], acc)


@gluon.jit
def halves_kernel(x, w, y_ptr, steps, FAULT: gl.constexpr):
    a_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 64], x.layout)
    b_buf = gl.allocate_shared_memory(gl.bfloat16, w.block_type.shape, w.layout)
    kept = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(kept, count=1)
    ready = make_barriers(2)
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(empty.index(i), count=1 if FAULT == "count" else 2)
    gl.warp_specialize([
        (multiply_half, (y_ptr, a_bufs, b_buf, empty, ready, kept, steps, 0, FAULT)),
        (multiply_half, (y_ptr, a_bufs, b_buf, empty, ready, kept, steps, 1, FAULT)),
        (load_halves, (x, w, a_bufs, b_buf, empty, ready, kept, steps)),
    ], [4, 1], [200, 24])  # fmt: skip


def halves(seed, fault=""):
    """The error of the kernel."""
    x, w, y = torch.randn(640, 64).bfloat16(), torch.randn(32, 64).bfloat16(), nan(640, 32, dtype=torch.float32)
    run(
        halves_kernel,
        1,
        dict(x=describe(x, [64, 64]), w=describe(w, [32, 64]), y_ptr=y, steps=5, FAULT=fault),
        Random(seed),
        4,
    )
    return (y - x.float() @ w.float().T).abs().max().item()


@pytest.mark.parametrize("seed", SEEDS)
def test_two_multipliers(seed):
    assert halves(seed) < 1e-3


def test_faults_of_two_multipliers():
    """A slot that one of them frees for both."""
    for seed in SEEDS:
        assert halves(seed, "another's half") > 1
        with pytest.raises(Fault, match=r"overwrites a_bufs|phase error|more often than its count"):
            halves(seed, "count")


# Barriers alone.


@gluon.jit
def announce(bar, steps):
    for _ in range(steps):
        mbarrier.arrive(bar, count=1)


@gluon.jit
def follow(bar, steps):
    for i in range(steps):
        mbarrier.wait(bar, i & 1)


@gluon.jit
def overtaking_kernel(steps):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    gl.warp_specialize([(follow, (bar, steps)), (announce, (bar, steps))], [4], [24])


def test_waiter_overtaken():
    """One phase ahead is no harm, the one after it may hang the waiter."""
    for seed in SEEDS:
        run(overtaking_kernel, 1, dict(steps=1), Random(seed))
        with pytest.raises(Fault, match="phase error"):
            run(overtaking_kernel, 1, dict(steps=3), Random(seed))


# What is in registers.


@gluon.jit
def scalars_kernel(out_ptr, a, b, WIDE: gl.constexpr):
    gl.store(out_ptr, a // b)
    gl.store(out_ptr + 1, a % b)
    gl.store(out_ptr + 2, -a // b)
    gl.store(out_ptr + 3, a >> 1)
    gl.store(out_ptr + 4, gl.where(a < b, 1, 2))
    gl.store(out_ptr + 5, min(a, b) + max(a, 3))
    offs = gl.arange(0, 4, layout=gl.AutoLayout()) - 2
    gl.store(out_ptr + 6 + gl.arange(0, 4, layout=gl.AutoLayout()), offs // 2 + 10 * (offs % 2))
    if WIDE:
        gl.store(out_ptr + 10, a.to(gl.int64) * 2000000000)
    else:
        gl.store(out_ptr + 10, a * 2000000000)


def test_integers_are_those_of_c():
    out = torch.full((11,), -1)
    run(scalars_kernel, 1, dict(out_ptr=out, a=-7, b=2, WIDE=True))
    assert out.tolist() == [-3, -1, 3, -4, 1, -4, -1, -10, 0, 10, -14000000000]
    with pytest.raises(Fault, match="int32 overflow: -14000000000"):
        run(scalars_kernel, 1, dict(out_ptr=out, a=-7, b=2, WIDE=False))
    with pytest.raises(Fault, match="division by zero"):
        run(scalars_kernel, 1, dict(out_ptr=out, a=-7, b=0, WIDE=True))
    with pytest.raises(Fault, match=r"out_ptr: offsets 4 to 4 of 4 elements"):
        run(scalars_kernel, 1, dict(out_ptr=out[7:], a=1, b=1, WIDE=True))
    with pytest.raises(Fault, match="written twice: elements of out_ptr"):
        run(scalars_kernel, 2, dict(out_ptr=out, a=1, b=1, WIDE=True))
    run(scalars_kernel, 2, dict(out_ptr=out, a=1, b=1, WIDE=True), overwrites=True)


@gluon.jit
def apply_kernel(x_ptr, y_ptr, FN: gl.constexpr, A: gl.constexpr, B: gl.constexpr, SIZE: gl.constexpr):
    offs = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y_ptr + offs, FN(gl.load(x_ptr + offs), A, B))


@gluon.jit
def apply_gradient_kernel(x_ptr, y_ptr, FN: gl.constexpr, A: gl.constexpr, B: gl.constexpr, SIZE: gl.constexpr):
    offs = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y_ptr + offs, FN(1.0, gl.load(x_ptr + offs), A, B))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Triton's device functions, called by a Gluon kernel, have torch's values and gradients, NaN and infinity included."""
    act = ACTIVATIONS[name]
    x = torch.cat([torch.randn(1020) * 4, torch.tensor([float("nan"), float("inf"), -30.0, 0.5])]).requires_grad_()
    numbers = [value for _, value in act.parameters] + [0.0, 0.0]
    reference = getattr(F, act.function)(x, *[value for _, value in act.parameters], **dict(act.fixed))
    (gradient,) = torch.autograd.grad(reference.sum(), x)
    for kernel, function, expected in (
        (apply_kernel, act.device, reference),
        (apply_gradient_kernel, act.gradient, gradient),
    ):
        y = nan(1024, dtype=torch.float32)
        arguments = dict(x_ptr=x.detach(), y_ptr=y, FN=function, A=numbers[0], B=numbers[1], SIZE=1024)
        run(kernel, 1, arguments)
        finite = torch.isfinite(x)
        assert torch.allclose(y[finite], expected.detach()[finite], rtol=1e-5, atol=2e-6)
        assert y[1020].isnan() or kernel is apply_gradient_kernel


@triton.jit
def largest(x, axis: gl.constexpr):
    return triton.language.max(x, axis)


@gluon.jit
def reduce_kernel(x_ptr, y_ptr, ROWS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    x = gl.load(x_ptr + rows[:, None] * 8 + columns[None, :])
    gl.store(y_ptr + rows, gl.sum(x, axis=1))
    gl.store(y_ptr + ROWS + rows, largest(x, 1))
    gl.store(y_ptr + 2 * ROWS + rows, gl.sum(gl.maximum(x, 0.0), 1))
    gl.store(y_ptr + 3 * ROWS, gl.sum((x > 0.0).to(gl.float32)))


def test_reductions():
    x, y = torch.randn(16, 8), nan(49, dtype=torch.float32)
    x[3, 4] = float("nan")
    run(reduce_kernel, 1, dict(x_ptr=x, y_ptr=y, ROWS=16))
    assert torch.equal(y[:16].isnan(), torch.arange(16) == 3)
    clean = x.nan_to_num(-100.0)
    assert torch.equal(y[16:32], clean.amax(1))
    # A maximum ignores NaN, as it does on the GPU.
    assert torch.allclose(y[32:48], clean.relu().sum(1))
    assert y[48] == (x > 0).sum()


@gluon.jit
def count(n: gl.constexpr):
    return n


@gluon.jit
def constant_kernel(n):
    count(n)


def test_constants():
    with pytest.raises(Fault, match="count: the constexpr n is given a run-time value"):
        run(constant_kernel, 1, dict(n=3))


def test_timeline(tmp_path: pathlib.Path):
    pytest.importorskip("matplotlib")
    from gluon_interpreter.timeline import draw

    _, trace = matmul(Timed())
    draw(trace, tmp_path / "timeline.svg")
    assert (tmp_path / "timeline.svg").read_text().count("a_bufs[2]") == 1
