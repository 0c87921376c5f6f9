"""One progress display for long work: what is done, time left, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from adainfer_runtime.commands.progress_bar import ProgressLines

__all__ = ["Progress", "Reporter", "SilentReporter", "peak_memory_bytes", "terminal_reporter"]


class Reporter(Protocol):
    """Told by long work how far it is."""

    def begin(self, what: str, total: int) -> None:
        """A phase of `total` steps begins."""

    def step(self, detail: str = "") -> None:
        """One step of the phase is done."""


class SilentReporter:
    """Says nothing."""

    def begin(self, what: str, total: int) -> None:
        """Ignored."""

    def step(self, detail: str = "") -> None:
        """Ignored."""


class _MemoryColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_memory_in_use(), style="cyan")


class _TerminalReporter:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: int | None = None

    def begin(self, what: str, total: int) -> None:
        self._progress.start()  # not earlier: an error before any work leaves no empty line
        self._task = self._progress.add_task(what, total=total, detail="")

    def step(self, detail: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=1, detail=detail)  # type: ignore[arg-type]


@contextmanager
def terminal_reporter(*, quiet: bool = False) -> Iterator[Reporter]:
    """A bar on standard error, or lines where that is a file or a pipe; silent where `quiet`."""
    if quiet:
        yield SilentReporter()
        return
    progress = _progress(Console(stderr=True))
    try:
        yield _TerminalReporter(progress)
    finally:
        if progress.live.is_started:
            progress.stop()


def _progress(console: Console) -> Progress:
    if not console.is_terminal:
        return ProgressLines(console, extra=_memory_in_use)
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        _MemoryColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    return Progress(*columns, console=console)


def _memory_in_use() -> str:
    return f"{psutil.Process().memory_info().rss / 1e6:,.0f} MB"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
