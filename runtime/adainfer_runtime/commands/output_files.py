"""Files that commands write beside what they print: refused before long work, not after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RequestError

__all__ = ["require_writable", "writing"]


def require_writable(path: Path) -> None:
    """Raises RequestError where the file cannot be written. What it holds is left alone."""
    with writing(path):
        existed = path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails while a file or folder is written is said in one line.

    Raises:
        RequestError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
