"""The note of an unfinished export: what it was to write, and which files are finished.

JSON lines, each on disk once its file is: the first says which export this is, every
further one names a data file with its size and sha256. A line that a kill cut short is no line.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adainfer_runtime.engine_folder import file_sha256
from adainfer_runtime.manifest import FileRecord

from .errors import OutputError
from .quantisation_report import StoredMatrix

__all__ = ["JOURNAL_NAME", "Journal", "Written"]

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Written:
    """A finished data file: its record, and the matrices in blocks that it holds."""

    record: FileRecord
    matrices: tuple[StoredMatrix, ...]


class Journal:
    """The journal of one folder; one that is there already is continued.

    Args:
        identity: what must be equal for finished files to be good: source, settings, versions.

    Raises:
        OutputError: the folder holds the remains of another export.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._path = folder / JOURNAL_NAME
        self._written: dict[str, Written] = {}
        self._lock = threading.Lock()
        expected = json.loads(json.dumps(identity))
        lines = _lines(self._path)
        if lines:
            _require_same(lines[0], expected)
            for line in lines[1:]:
                self._written[line["file"]] = _parse(line)
        _rewrite(self._path, [expected, *lines[1:]])

    def find(self, file: str, folder: Path) -> Written | None:
        """A finished file, if it is still what was written."""
        written = self._written.get(file)
        path = folder / file
        if written is None or not path.is_file():
            return None
        if path.stat().st_size != written.record.bytes:
            return None
        return written if file_sha256(path) == written.record.sha256 else None

    def note(self, file: str, written: Written) -> None:
        """A file is finished and on disk; one that was found so needs no second line. For several
        threads.
        """
        if self._written.get(file) == written:
            return
        matrices = [asdict(matrix) for matrix in written.matrices]
        line = {"file": file, **written.record.model_dump(), "matrices": matrices}
        with self._lock, self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            self._written[file] = written

    def finished(self) -> frozenset[str]:
        """Files that were noted."""
        return frozenset(self._written)


def _parse(line: Mapping[str, Any]) -> Written:
    matrices = tuple(
        StoredMatrix(**{**matrix, "tensors": tuple(matrix["tensors"])})
        for matrix in line["matrices"]
    )
    return Written(FileRecord(bytes=line["bytes"], sha256=line["sha256"]), matrices)


def _lines(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut short by the kill
    return found


def _rewrite(path: Path, lines: list[Any]) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _require_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if found.get(key) != value:
            what = {"source": "the source's files", "exporter": "the exporter or a library"}
            if key in what:
                difference = f"{what[key]} changed since"
            else:
                difference = f"it had {key} {found.get(key)}, now {value} is asked for"
            raise OutputError(
                f"the interrupted export cannot be resumed: {difference}; "
                "export without --resume to begin anew"
            )
