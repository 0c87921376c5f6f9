"""How far a command is: a bar on a terminal, a line now and then where nothing is redrawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["ProgressLines", "progress_bar"]

_SECONDS_BETWEEN_LINES = 30.0
_SPEED_OVER_SECONDS = 600.0  # a step may take longer than Rich's half minute


def progress_bar(console: Console) -> Progress:
    """A bar with its count and time left, gone at the end; tasks have a field `detail`, shown
    behind it. Lines, where the console is a file or a pipe.
    """
    if not console.is_terminal:
        return ProgressLines(console)
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    return Progress(*columns, console=console, transient=True)


class ProgressLines(Progress):
    """For logs: a line after every half minute of work, `evaluating: 40 of 300, sst2, 2 min left`.

    What takes less than that says nothing, as a bar that is gone at the end.

    Args:
        extra: what ends every line, such as the memory in use.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        console: Console,
        *,
        extra: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            console=console, disable=True, get_time=clock, speed_estimate_period=_SPEED_OVER_SECONDS
        )
        self._extra, self._clock = extra, clock
        self._last_line = clock()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `Progress.update`."""
        super().update(task_id, **changes)
        self._report(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `Progress.advance`."""
        super().advance(task_id, advance)
        self._report(task_id)

    def _report(self, task_id: TaskID) -> None:
        now = self._clock()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        task = self._tasks[task_id]
        parts = [f"{task.completed:,.0f} of {task.total or 0:,.0f}"]
        if detail := task.fields.get("detail"):
            parts.append(detail)
        if task.time_remaining is not None:
            parts.append(_time_left(task.time_remaining))
        if self._extra is not None:
            parts.append(self._extra())
        line = f"{task.description}: {', '.join(parts)}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _time_left(seconds: float) -> str:
    return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
