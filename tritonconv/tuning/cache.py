"""The user's own measurements: one file for each GPU and Triton in the platform's cache directory."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from platformdirs import user_cache_path

from tritonconv.tuning.tables import FORMAT, Entry, Table, is_current, slug

__all__ = ["cache_folder", "cache_path", "cached_table", "forget", "read", "remember", "triton_version", "write"]


def cache_folder() -> Path:
    """TRITONCONV_CACHE_DIR, or the platform's cache directory."""
    chosen = os.environ.get("TRITONCONV_CACHE_DIR")
    return Path(os.path.abspath(os.path.expanduser(chosen))) if chosen else user_cache_path("tritonconv")


def triton_version() -> str:
    # Its distribution has other names in torch's nightly builds and for AMD.
    import triton

    return str(triton.__version__)


def cache_path(gpu: str) -> Path:
    """The file of this GPU under the installed Triton."""
    return cache_folder() / f"{slug(gpu)}-triton-{triton_version()}-v{FORMAT}.json"


def cached_table(gpu: str) -> Table | None:
    """What was measured here before; None where nothing was. Read once in a process, until `remember` or `forget`."""
    return _read_once(cache_path(gpu), gpu)


@functools.cache
def _read_once(path: Path, gpu: str) -> Table | None:
    return read(path, gpu)


def read(path: Path, gpu: str) -> Table | None:
    """The table in a file; a corrupt one is ignored with a warning, and so is one of another GPU or Triton."""
    try:
        table = Table.from_json(path.read_text(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"tritonconv: tuning cache ignored: {error}; tritonconv tune writes it anew", stacklevel=2)
        return None
    if (table.gpu, table.triton) != (gpu, triton_version()):
        warnings.warn(
            f"tritonconv: tuning cache ignored: {path} was measured on {table.gpu} with triton {table.triton}, expected "
            f"{gpu} with triton {triton_version()}", stacklevel=2,
        )  # fmt: skip
        return None
    return table


def remember(gpu: str, entries: Iterable[Entry]) -> Path:
    """Add entries to the cache, beside those that other processes put there meanwhile; returns the file.

    The file is replaced in one step, so that a reader, or whoever comes after a crash, finds the old or the new one whole.

    Raises:
        OSError: the folder cannot be written.
    """
    # Few processes write.
    from filelock import FileLock

    path = cache_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        # Whoever was killed while writing left these; no one else writes now.
        for left in path.parent.glob(f"{path.name}*.tmp"):
            left.unlink(missing_ok=True)
        table = Table(gpu, triton_version(), str(path))
        found = read(path, gpu)
        if found is not None:
            # Entries of kernels that have changed since are of no use to anyone.
            table.merge(e for e in found.entries.values() if is_current(e))
        table.merge(entries)
        write(path, table)
    forget()
    return path


def write(path: Path, table: Table) -> None:
    """Replace a file by a table in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(table.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def forget() -> None:
    """Read the cache anew at the next look."""
    _read_once.cache_clear()
