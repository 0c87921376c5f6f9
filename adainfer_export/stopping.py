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

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AFTER_A_SIGNAL = 128  # shells add the signal's number


@contextmanager
def stoppable() -> Iterator[None]:
    """Either signal is a KeyboardInterrupt in the block, and ends the command with one line:
    `stopped`, and the notes of the exception.

    In threads other than the main one, which get no signals, nothing is changed.

    Raises:
        typer.Exit: with status 130 after Ctrl-C, 143 after SIGTERM.
    """
    received: list[int] = []
    try:
        with _interrupting(received):
            yield
    except BaseException as stop:
        # Not KeyboardInterrupt alone: an import that it ends, of a compiled module, fails with
        # another exception.
        if not received:
            raise
        print("; ".join(["stopped", *getattr(stop, "__notes__", ())]), file=sys.stderr)
        raise typer.Exit(_AFTER_A_SIGNAL + received[0]) from stop


@contextmanager
def _interrupting(received: list[int]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()  # a second signal does not wait
        received.append(number)
        raise KeyboardInterrupt

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
