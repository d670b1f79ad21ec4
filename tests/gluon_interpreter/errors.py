"""What a run may end with, and where in the kernel it was."""

import sys
from types import CodeType

__all__ = ["Abandoned", "Fault", "Refused", "place"]

# Copies of device functions carry this name among their globals.
MARK = "__interpreted__"


def place() -> tuple[CodeType, int] | None:
    """The innermost line of device code on this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if MARK in frame.f_globals:
            return frame.f_code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def located(message: str, where: tuple[CodeType, int] | None) -> str:
    if where is None:
        return message
    code, line = where
    return f"{message} ({code.co_filename}:{line}, in {code.co_name})"


class Fault(Exception):  # noqa: N818
    """The program would hang, race or read garbage on a GPU.

    Args:
        message: what is wrong.
        where: the line of device code it comes from; by default the one that runs now.
    """

    def __init__(self, message: str, where: tuple[CodeType, int] | None = None) -> None:
        super().__init__(located(message, where or place()))


class Refused(Exception):  # noqa: N818
    """The interpreter does not know what was asked."""

    def __init__(self, message: str) -> None:
        super().__init__(located(message, place()))


class Abandoned(BaseException):
    """Unwinds the other partitions after one has failed."""
