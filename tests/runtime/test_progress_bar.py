"""Progress where nothing can be redrawn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from adainfer_export.progress import terminal_reporter
from adainfer_runtime.commands.progress_bar import ProgressLines, progress_bar


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _lines(extra: str | None = None) -> tuple[ProgressLines, _Clock, io.StringIO]:
    clock, stream = _Clock(), io.StringIO()
    console = Console(file=stream, width=20)  # narrower than a line
    progress = ProgressLines(console, extra=None if extra is None else lambda: extra, clock=clock)
    return progress, clock, stream


def test_a_line_every_half_minute_with_detail_and_time_left() -> None:
    progress, clock, stream = _lines()
    with progress:
        task = progress.add_task("evaluating", total=1200, detail="")
        for _ in range(100):
            clock.now += 1.0
            progress.update(task, advance=1, detail="[sst2]")
    assert stream.getvalue().splitlines() == [
        "evaluating: 30 of 1,200, [sst2], 20 min left",
        "evaluating: 60 of 1,200, [sst2], 19 min left",
        "evaluating: 90 of 1,200, [sst2], 18 min left",
    ]


def test_lines_end_with_what_the_caller_adds() -> None:
    progress, clock, stream = _lines("12 MB")
    with progress:
        task = progress.add_task("layers [30]", total=31)
        clock.now += 31.0
        progress.advance(task)
        clock.now += 31.0
        progress.advance(task, 28)
    assert stream.getvalue().splitlines()[1] == "layers [30]: 29 of 31, 3 s left, 12 MB"


def test_short_work_says_nothing() -> None:
    progress, clock, stream = _lines()
    with progress:
        task = progress.add_task("evaluating", total=3, detail="")
        for _ in range(3):
            clock.now += 9.0
            progress.update(task, advance=1)
    assert stream.getvalue() == ""


def test_bars_are_for_terminals() -> None:
    assert isinstance(progress_bar(Console(file=io.StringIO())), ProgressLines)
    bar = progress_bar(Console(file=io.StringIO(), force_terminal=True))
    assert not isinstance(bar, ProgressLines)


def test_exports_draw_nothing_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_reporter() as reporter:
        reporter.begin("layers", 2)
        reporter.step("first")
    assert capsys.readouterr().err == ""
