"""Carries out the plans of data files: weights streamed by rows, a few at a time in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime.manifest import FileRecord

from .errors import CheckpointError
from .journal import Journal, Written
from .layout import ALIGNMENT, DataPlan
from .quantisation_report import StoredMatrix
from .sources.checkpoint import Checkpoint
from .weights import Blocked, Columns, ErrorSum, stream

__all__ = ["DataWriter"]


@dataclass(frozen=True)
class DataWriter:
    """Writes the data files of one engine folder.

    Attributes:
        journal: where finished files are noted, and found by a resumed export.
    """

    root: Path
    checkpoint: Checkpoint
    journal: Journal

    def write(self, plan: DataPlan) -> Written:
        """The file as the plan says, on disk when this returns; kept where it is there already.

        Raises:
            CheckpointError: a tensor is damaged, or another than its shape said.
        """
        done = self.journal.find(plan.file, self.root)
        if done is not None:
            return done
        with _DataFile(self.root / plan.file) as file:
            for array in plan.tables:
                file.align()
                file.append(array)
            matrices = tuple(m for group in plan.groups for m in self._write_group(file, group))
            if file.size != plan.bytes:
                raise CheckpointError(
                    f"{plan.file}: {file.size} bytes were written, {plan.bytes} planned: "
                    "the checkpoint changed during the export"
                )
            record = file.finish()
        written = Written(record, matrices)
        self.journal.note(plan.file, written)
        return written

    def _write_group(self, file: _DataFile, group: tuple[Any, ...]) -> Iterator[StoredMatrix]:
        errors, current = ErrorSum(), None
        for expr, array in stream(self.checkpoint, group, errors):
            if expr is not current:
                file.align()
                current = expr
            file.append(array)
        first = group[0]
        if isinstance(first, Blocked | Columns):
            yield StoredMatrix.of(first, errors)


class _DataFile:
    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> _DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def align(self) -> None:
        self._write(b"\0" * (-self.size % ALIGNMENT))

    def append(self, array: npt.NDArray[Any]) -> None:
        self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def finish(self) -> FileRecord:
        """Once this returns, the content survives a power cut."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return FileRecord(bytes=self.size, sha256=self._digest.hexdigest())

    def _write(self, content: bytes | memoryview) -> None:
        self._stream.write(content)
        self._digest.update(content)
        self.size += len(content)
