"""wgmma: products of shared memory, issued in order and executed later, whose results are tokens until waited for."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl

from .errors import Fault, Refused
from .memory import View, read_async
from .scheduler import Operation, Thread, machine
from .tensors import Tensor, Token

__all__ = ["warpgroup_mma", "warpgroup_mma_init", "warpgroup_mma_wait"]


# Elements along K of one instruction, 32 bytes of them.
K_STEP = {"bf16": 16, "fp16": 16, "fp32": 8}


def check_shapes(a: Any, b: Any, acc: Any, num_warps: int) -> tuple[int, int, int]:
    if len(a.shape) != 2 or len(b.shape) != 2 or len(acc.shape) != 2:
        raise Fault(f"warpgroup_mma of {a.shape} and {b.shape} into {acc.shape}: not matrices")
    (m, k), (k_b, n) = a.shape, b.shape
    if k != k_b or list(acc.shape) != [m, n]:
        raise Fault(f"warpgroup_mma of {a.shape} and {b.shape} into {acc.shape}: shapes do not match")
    if str(a.dtype) not in K_STEP or a.dtype != b.dtype or acc.dtype != gl.float32:
        raise Refused(f"warpgroup_mma of {a.dtype} and {b.dtype} into {acc.dtype}")
    if m % 64 or n % 8 or k % K_STEP[str(a.dtype)]:
        raise Fault(f"warpgroup_mma of {m}x{n}x{k}: multiples of 64, 8 and {K_STEP[str(a.dtype)]} are needed")
    if num_warps % 4:
        raise Fault(f"warpgroup_mma by {num_warps} warps, which are no warpgroup")
    return m, n, k


def warpgroup_mma(
    a: Any, b: Any, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Any:  # fmt: skip
    """acc + a @ b in fp32; operands are read when it executes."""
    del precision, max_num_imprecise_acc
    machine_ = machine()
    machine_.switch()
    me = machine_.current
    if not isinstance(b, View) or not isinstance(a, View | Tensor) or not isinstance(acc, Tensor | Token):
        raise Fault("warpgroup_mma takes shared memory, and a tensor or another product's result as accumulator")
    m, n, k = check_shapes(a, b, acc, me.num_warps)
    if isinstance(acc, Token) and acc.operation.thread is not me:
        raise Fault("warpgroup_mma: the accumulator is another partition's")
    me.issued["product"] += 1
    views = [operand for operand in (a, b) if isinstance(operand, View)]
    product = Operation("product", me, me.issued["product"], f"{m}x{n}x{k}", [view.name for view in views])
    for view in views:
        read_async(view, me, "product", product.number, f"product of {me.name}")

    def complete() -> None:
        # Conversions copy, so that a register operand is read at the same time: it cannot change.
        x = (a.data if isinstance(a, View) else a.value).float()
        base = acc.operation.value if isinstance(acc, Token) else acc.value
        product.value = torch.addmm(base, x, b.data.float()) if use_acc else x @ b.data.float()
        machine_.trace.products += 1

    product.complete = complete
    machine_.issue(product, 2.0 * m * n * k)
    token = Token(product, [m, n], acc.dtype, acc.layout)
    return token if is_async else warpgroup_mma_wait(0, [token])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    """Wait until at most so many of this thread's products are in flight: a result that may be stays a token."""
    if deps is None:
        raise Fault("warpgroup_mma_wait without deps")
    m = machine()
    me = m.current
    last = me.issued["product"] - int(num_outstanding)
    m.wait(lambda: me.executed >= last, f"its products but {int(num_outstanding)}")
    me.wait_for_own("product", int(num_outstanding))
    results = tuple(arrived(dep, me, last) for dep in deps)
    return results[0] if len(results) == 1 else results


def arrived(dep: Any, thread: Thread, last: int) -> Any:
    if not isinstance(dep, Token):
        return dep
    if dep.operation.thread is not thread:
        raise Fault("warpgroup_mma_wait for another partition's product")
    return dep.tensor() if dep.operation.number <= last else dep


def warpgroup_mma_init(value: Tensor) -> Tensor:
    return value
