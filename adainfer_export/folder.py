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
    _require_replaceable(out, force=force)
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written; give another --out")


@contextmanager
def new_folder(out: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well.

    Otherwise it vanishes; with `resume` it stays, if it has a journal, and the next call with
    `resume` goes on in it. It also stays, finished, where `out` came to be during the block and is
    not to be replaced. Exceptions get a note that says what was kept.

    Args:
        force: an engine folder that is there in the end is replaced; else only an empty one is.

    Raises:
        OutputError: the disk is full or cannot be written, or `out` came to be meanwhile.
    """
    out = out.absolute()
    temporary: Path | None = None
    kept = "what is finished was kept for --resume" if resume else "nothing was kept"
    finished = unwanted = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _settle_swaps(out)
        temporary = _new_temporary(out, _claim_remains(out) if resume else None)
        yield temporary
        _sync(temporary)
        try:
            _require_replaceable(out, force=force)  # it may have come to be since `check_output`
        except OutputError as error:
            unwanted = True
            raise OutputError(
                f"{error}; it came to be while this was written, which was kept as "
                f"{_stopped_name(temporary, out)}: rename that before the next export"
            ) from error
        (temporary / JOURNAL_NAME).unlink(missing_ok=True)
        _swap(temporary, out, force=force)
        finished = True
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{out} cannot be written: {reason}; {kept}") from error
    except BaseException as error:
        if not unwanted:
            error.add_note(kept if resume else f"{kept}: --resume keeps what is finished")
        raise
    finally:
        if temporary is not None and temporary.is_dir():
            resumable = resume and not finished and (temporary / JOURNAL_NAME).is_file()
            if resumable or unwanted:
                temporary.rename(_stopped_name(temporary, out))
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


def _stopped_name(temporary: Path, out: Path) -> Path:
    unique = temporary.name.rpartition("-")[2]
    return out.parent / f".{out.name}.{_PARTIAL}-{_STOPPED}-{unique}"


def _require_replaceable(out: Path, *, force: bool) -> None:
    """Raises OutputError for what is neither absent, nor empty, nor, with `force`, an engine."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"{out} exists; give another --out, or --force to replace it")
    if not (out / MANIFEST_NAME).is_file():
        raise OutputError(
            f"{out} exists and is no engine folder: it is not replaced, even with --force"
        )


def _swap(temporary: Path, out: Path, *, force: bool) -> None:
    """Puts a folder in the place of what `_require_replaceable` lets pass."""
    if out.is_symlink() or (force and out.exists()):
        _exchange(temporary, out)
    else:
        temporary.rename(out)  # over an empty folder too; fails if something came to be in it


def _exchange(temporary: Path, out: Path) -> None:
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
