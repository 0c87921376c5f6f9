"""Carries out the plans of data files: weights streamed by rows, a few at a time in memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
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
from .weights import Blocked, Columns, ErrorSum, Feedbacks, stream

__all__ = ["DataWriter", "default_workers"]

_MOST_WORKERS = 8  # each holds pieces of its own, and disks keep up with few


def default_workers() -> int:
    """As many as this process may use cores, at most 8."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


@dataclass(frozen=True)
class DataWriter:
    """Writes the data files of one engine folder.

    Attributes:
        journal: where finished files are noted, and found by a resumed export.
        stopped: whoever is writing gives its file up.
        feedbacks: of tensors whose rounding errors are made up for.
    """

    root: Path
    checkpoint: Checkpoint
    journal: Journal
    stopped: threading.Event = field(default_factory=threading.Event)
    feedbacks: Feedbacks = field(default_factory=dict)

    def write_all(
        self, plans: Sequence[DataPlan], workers: int, on_file: Callable[[str], None]
    ) -> dict[str, Written]:
        """Every file, several at a time; a file is the same whoever writes it.

        Threads, not processes: quantising, hashing and writing leave Python's lock alone, and a
        process would import all libraries again.

        Args:
            on_file: told of each finished file, in the caller's thread.

        Raises:
            CheckpointError: a tensor is damaged, or another than its shape said; the other files
                are given up, but for finished ones.
        """
        with ThreadPoolExecutor(workers, "adainfer-writer") as pool:
            running = {pool.submit(self._finish, plan): plan.file for plan in plans}
            try:
                for future in as_completed(running):
                    future.result()
                    on_file(running[future])
            except BaseException:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return {file: future.result() for future, file in running.items()}

    def _finish(self, plan: DataPlan) -> Written:
        """Noted by who wrote it, before it begins another one: a kill loses no finished file."""
        written = self._find_or_write(plan)
        self.journal.note(plan.file, written)
        return written

    def _find_or_write(self, plan: DataPlan) -> Written:
        """The file as the plan says, on disk when this returns; kept where it is there already."""
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
        return Written(record, matrices)

    def _write_group(self, file: _DataFile, group: tuple[Any, ...]) -> Iterator[StoredMatrix]:
        errors, current = ErrorSum(), None
        for expr, array in stream(self.checkpoint, group, errors, self.feedbacks):
            if self.stopped.is_set():
                raise _StoppedError
            if expr is not current:
                file.align()
                current = expr
            file.append(array)
        first = group[0]
        if isinstance(first, Blocked | Columns) and not _second_copy(first):
            yield StoredMatrix.of(first, errors)


def _second_copy(expr: Blocked | Columns) -> bool:
    """Of a matrix that is reported as it is stored for single positions."""
    return isinstance(expr, Columns) and expr.codes == "int8"


class _StoppedError(Exception):
    """Of a file that nobody wants any more."""


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
