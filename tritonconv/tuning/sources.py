"""Versions of kernels: a hash of the device code that a kernel is made of."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path

__all__ = ["device_code", "kernel_hash"]


@functools.cache
def kernel_hash(kernel: str) -> str:
    """Hash of a kernel's device code and of all device files that it imports.

    >>> len(kernel_hash("matmul"))
    16
    """
    spec = importlib.util.find_spec("tritonconv.kernels")
    if spec is None or spec.origin is None:
        raise RuntimeError("tritonconv.kernels is not installed")
    folder = Path(spec.origin).parent
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        name = waiting.pop()
        if name not in found:
            tree = ast.parse((folder / f"{name.replace('.', '/')}.py").read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level > 0 and node.module:
                    waiting.append(".".join([*name.split(".")[: -node.level], node.module]))
            found[name] = device_code(tree)
    digest = hashlib.sha256("\0".join(f"{name}\0{code}" for name, code in sorted(found.items())).encode())
    return digest.hexdigest()[:16]


def device_code(tree: ast.Module) -> str:
    """What of a file changes how fast a config is: neither comments, nor docstrings, nor which configs there are.

    >>> device_code(ast.parse("def configs():\\n    return [1]\\ndef kernel(x):\\n    'Says.'\\n    return x  # why"))
    'def kernel(x):\\n    return x'
    """
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "configs")]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None and len(node.body) > 1:
            node.body = node.body[1:]
    return ast.unparse(tree)
