"""Versions of kernels: a hash of the device code that a kernel is made of."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

__all__ = ["kernel_hash"]


@functools.cache
def kernel_hash(kernel: str) -> str:
    """Hash of a kernel's file and of all device files that it imports.

    >>> len(kernel_hash("matmul"))
    16
    """
    spec = importlib.util.find_spec("tritonconv.kernels")
    if spec is None or spec.origin is None:
        raise RuntimeError("tritonconv.kernels is not installed")
    folder = Path(spec.origin).parent
    found: dict[str, bytes] = {}
    waiting = [kernel]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (folder / f"{name}.py").read_bytes()
            imports = [
                node for node in ast.walk(ast.parse(found[name])) if isinstance(node, ast.ImportFrom) and node.level == 1
            ]
            waiting += [node.module for node in imports if node.module]
    digest = hashlib.sha256()
    for name, source in sorted(found.items()):
        # Line ends differ between checkouts.
        digest.update(name.encode() + b"\0" + source.replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]
