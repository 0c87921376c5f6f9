"""Writing an engine folder all or nothing: a temporary sibling, renamed at the end."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from adainfer_runtime.engine_folder import MANIFEST_NAME

from .errors import OutputError

__all__ = ["check_output", "new_folder", "save_hashed"]


def check_output(out: Path, *, force: bool) -> None:
    """Refuses before any work what would fail, or destroy something, at the end.

    Raises:
        OutputError: the folder exists (without `force`, or being no engine folder), or its
            parent cannot be written.
    """
    if out.exists() or out.is_symlink():
        is_engine = out.is_dir() and (out / MANIFEST_NAME).is_file()
        is_empty = out.is_dir() and not any(out.iterdir())
        if not is_empty and not force:
            raise OutputError(f"{out} exists; give another --out, or --force to replace it")
        if not is_empty and not is_engine:
            raise OutputError(
                f"{out} exists and is no engine folder: it is not replaced, even with --force"
            )
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written; give another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    out = out.absolute()
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(out)
        prefix = f".{out.name}.partial-{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        _sync(temporary)
        _swap(temporary, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{out} cannot be written: {reason}; nothing was kept") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def save_hashed(folder: Path, name: str, content: bytes) -> str:
    """Writes `stem.HASH.suffix` for `stem.suffix`: an engine that is in use keeps its own file.

    Returns:
        the path relative to the folder.
    """
    stem, _, suffix = name.partition(".")
    relative = f"{stem}.{hashlib.sha256(content).hexdigest()[:8]}.{suffix}"
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return relative


def _clear_remains(out: Path) -> None:
    """Removes what killed exports to the same place left behind."""
    for remains in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        owner = remains.name.rpartition(".partial-")[2].split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(remains, ignore_errors=True)


def _swap(temporary: Path, out: Path) -> None:
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        temporary.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent
