"""Long commands that are stopped, by Ctrl-C or SIGTERM: they tidy up, and say what was kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

__all__ = ["stoppable"]

_AFTER_A_SIGNAL = 128  # shells add the signal's number


class _Terminated(KeyboardInterrupt):
    """SIGTERM, where everything that expects Ctrl-C knows what to do."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Ends a command that is stopped with one line: `stopped`, and the interrupt's notes.

    In threads other than the main one, which get no signals, SIGTERM stays what it is.

    Raises:
        typer.Exit: with status 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _sigterm_raises():
            yield
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        print("; ".join(["stopped", *getattr(stop, "__notes__", ())]), file=sys.stderr)
        raise typer.Exit(_AFTER_A_SIGNAL + number) from stop


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)  # a second one does not wait
        raise _Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
