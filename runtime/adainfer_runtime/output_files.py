"""Whether an output can be written: asked before the work whose result it is to hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

__all__ = ["require_writable_file", "require_writable_folder", "writing"]


@contextmanager
def writing(path: Path, remark: str = "") -> Iterator[None]:
    """Says of an OSError in the block that `path` cannot be written.

    Args:
        remark: what follows the reason.

    Raises:
        OutputError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}{remark}") from error


def require_writable_file(path: Path) -> None:
    """Opens a file and leaves it, or its absence, as it was.

    Pipes and devices are not opened: whoever reads a pipe would take that for its end.

    Raises:
        OutputError: the file cannot be written.
    """
    with writing(path):
        there = path.exists()
        if there and not path.is_file() and not path.is_dir():
            return
        path.open("ab").close()
        if not there:
            path.unlink()


def require_writable_folder(folder: Path) -> None:
    """Writes a file in a folder that is there, and removes it.

    Raises:
        OutputError: the folder cannot be written.
    """
    with writing(folder), tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b"\n")
