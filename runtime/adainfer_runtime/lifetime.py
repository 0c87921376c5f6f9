"""From the first request to `close`: what runs is finished, what comes later is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import RequestError

__all__ = ["Lifetime", "closed"]


class _Closed:
    """Stands where something was that was given up."""

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal

    def __getattr__(self, name: str) -> Any:
        raise RequestError(self._refusal)


def closed(what: str) -> Any:
    """Something of which every use raises RequestError: `what` is closed."""
    return _Closed(f"this {what} is closed")


def _refusal() -> RequestError:
    return RequestError("this engine is closed")


class Lifetime:
    """Whether an engine is open, and how many are at work on it.

    Whoever closes it does not wait for them: a stream may stand between two tokens for as long as
    its caller likes, in the same thread. The last one to finish lets go.
    """

    def __init__(self) -> None:
        # A stream that is collected as garbage ends inside whatever its thread is doing.
        self._lock = threading.RLock()
        self._workers = 0
        self._closed = False
        self._release: Callable[[], None] | None = None

    @property
    def closed(self) -> bool:
        """Whether new requests are refused."""
        return self._closed

    def check(self) -> None:
        """Raises RequestError for a request that comes after `close`."""
        if self._closed:
            raise _refusal()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Nothing is let go of meanwhile. May be entered again by what has entered it.

        Raises:
            RequestError: everything has been let go of.
        """
        with self._lock:
            if self._closed and not self._workers:
                raise _refusal()
            self._workers += 1
        try:
            yield
        finally:
            with self._lock:
                self._workers -= 1
            self._let_go()

    def close(self, release: Callable[[], None]) -> None:
        """Refuses new requests; `release` is called once, by the last that is at work, or now."""
        with self._lock:
            if self._closed:
                return
            self._closed, self._release = True, release
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            if self._workers or self._release is None:
                return
            release, self._release = self._release, None
        release()
