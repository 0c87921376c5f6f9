"""Writing an engine folder all or nothing: a temporary sibling, renamed at the end."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from adainfer_runtime.engine_folder import MANIFEST_NAME

from .errors import OutputError
from .journal import JOURNAL_NAME

__all__ = [
    "check_output",
    "new_folder",
    "remove_others",
    "remove_unnamed",
    "save_hashed",
    "scratch_folder",
]

_HASHED = re.compile(r"[^.]+\.[0-9a-f]{8}\.")
_PARTIAL, _OLD = "partial", "old"  # siblings of the folder: what it becomes, what it was
_STOPPED = "stopped"  # in the place of a process id: nobody is at work there


def check_output(out: Path, *, force: bool) -> None:
    """Refuses before any work what would fail, or destroy something, at the end.

    Raises:
        OutputError: the folder exists (without `force`, or being no engine folder), or its
            parent cannot be written.
    """
    _settle_swaps(out.absolute())
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
def new_folder(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well.

    Otherwise it vanishes; with `resume` it stays, if it has a journal, and the next call with
    `resume` goes on in it.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    out = out.absolute()
    temporary: Path | None = None
    kept = "what is finished was kept for --resume" if resume else "nothing was kept"
    finished = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _settle_swaps(out)
        temporary = _new_temporary(out, _claim_remains(out) if resume else None)
        yield temporary
        (temporary / JOURNAL_NAME).unlink(missing_ok=True)
        _sync(temporary)
        _swap(temporary, out)
        finished = True
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{out} cannot be written: {reason}; {kept}") from error
    finally:
        if temporary is not None and temporary.is_dir():
            if resume and not finished and (temporary / JOURNAL_NAME).is_file():
                _disown(temporary, out)
            else:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `out`, an engine folder that is there."""
    prefix = f".{out.absolute().name}.{_PARTIAL}-{os.getpid()}-"
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out.absolute().parent) as name:
            yield Path(name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{out.parent} cannot be written: {reason}") from error


def remove_others(folder: Path, keep: set[str]) -> None:
    """Removes all but the files and folders named by relative path, empty folders as well."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        relative = path.relative_to(folder)
        named = {relative.as_posix(), *(parent.as_posix() for parent in relative.parents)}
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and not named & keep:
            path.unlink()


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


def remove_unnamed(folder: Path, named: Collection[str]) -> None:
    """Removes what `save_hashed` wrote and no manifest came to name."""
    for path in folder.glob("*/*"):
        relative = path.relative_to(folder).as_posix()
        if _HASHED.match(path.name) and relative not in named:
            path.unlink()


def _new_temporary(out: Path, remains: Path | None) -> Path:
    """An empty folder beside `out`, or the remains under this process's name."""
    prefix = f".{out.name}.{_PARTIAL}-{os.getpid()}-"
    if remains is None:
        _clear_remains(out)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        temporary.chmod(0o755)
        return temporary
    temporary = out.parent / f"{prefix}{remains.name.rpartition('-')[2]}"
    return remains.rename(temporary)


def _claim_remains(out: Path) -> Path | None:
    """What a killed export to the same place left behind, the newest with a journal."""
    found = [path for path in _remains(out) if (path / JOURNAL_NAME).is_file()]
    return max(found, key=lambda path: (path / JOURNAL_NAME).stat().st_mtime, default=None)


def _clear_remains(out: Path) -> None:
    """Removes what killed exports to the same place left behind."""
    for remains in _remains(out):
        shutil.rmtree(remains, ignore_errors=True)


def _settle_swaps(out: Path) -> None:
    """Ends what a kill while `out` was replaced left half done.

    Between its two renames the old folder is all that there is: it goes back to its place. After
    them it is only in the way.
    """
    for old in _remains(out, _OLD):
        with suppress(OSError):  # of a disk that cannot be written the export itself tells
            if not out.exists() and (old / out.name).exists():
                (old / out.name).rename(out)
            shutil.rmtree(old)


def _remains(out: Path, kind: str = _PARTIAL) -> Iterator[Path]:
    for remains in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
        owner = remains.name.rpartition(f".{kind}-")[2].split("-")[0]
        if owner == _STOPPED or (owner.isdigit() and not psutil.pid_exists(int(owner))):
            yield remains


def _disown(temporary: Path, out: Path) -> None:
    unique = temporary.name.rpartition("-")[2]
    temporary.rename(out.parent / f".{out.name}.{_PARTIAL}-{_STOPPED}-{unique}")


def _swap(temporary: Path, out: Path) -> None:
    if not out.exists():
        temporary.rename(out)
        return
    prefix = f".{out.name}.{_OLD}-{os.getpid()}-"
    old = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        out.rename(old / out.name)
        temporary.rename(out)
    finally:
        if not out.exists():  # an error, or an interrupt between the two
            (old / out.name).rename(out)
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
