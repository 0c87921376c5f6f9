"""Results that are still on the device: read when asked for, or together with an exit's score."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from .base import Float32
from .device_blocks import BlockPool
from .device_memory import DeviceDriver, DeviceRows

__all__ = ["AdaptedRow", "DeviceProbe", "DeviceTrust", "ResultReader"]

Values = Mapping[str, npt.NDArray[Any]]


class ResultReader(Protocol):
    """Where results lie. Whoever looks at them holds the lock: another thread's exit look may be
    about to take their places.
    """

    @property
    def lock(self) -> threading.RLock:
        """The device's."""

    @property
    def kept_logits(self) -> BlockPool:
        """Places for logits that the next probe would overwrite."""

    def read_block(self) -> Values:
        """Waits for the stream, and gives every small result of the last exit point."""

    def read_logits(self, count: int, place: int | None = None) -> Float32:
        """The last probe's logits, or those that were kept of an earlier one."""

    def keep_logits(self, count: int) -> int:
        """Copies the last probe's logits out of the next one's way; on the device."""


class _Read(NamedTuple):
    token: int
    top_prob: float
    gap: float


class DeviceProbe:
    """A `ProbeResult` that is read when asked for."""

    def __init__(self, reader: ResultReader, vocabulary: int) -> None:
        self._reader = reader
        self._vocabulary = vocabulary
        self._read: _Read | None = None
        self._logits: Float32 | None = None
        self._kept: int | None = None

    def __del__(self) -> None:
        if self._kept is not None:
            self._reader.kept_logits.give(self._kept)

    @property
    def token(self) -> int:
        """Id of the most probable token."""
        return self._values().token

    @property
    def top_prob(self) -> float:
        """Its probability."""
        return self._values().top_prob

    @property
    def gap(self) -> float:
        """Less that of the second."""
        return self._values().gap

    @property
    def logits(self) -> Float32:
        """`[vocab_size]`, copied from the device at the first use."""
        with self._reader.lock:
            if self._logits is None:
                self._logits = self._reader.read_logits(self._vocabulary, self._kept)
            return self._logits

    def settle(self, values: Values) -> None:
        """Keeps what was read together with a score."""
        token, top_prob, gap = (values[name][0] for name in _Read._fields)
        self._read = _Read(int(token), float(top_prob), float(gap))

    def settle_all(self) -> None:
        """Keeps everything: the buffers are about to be used again."""
        self._values()
        if self._logits is None and self._kept is None:
            self._kept = self._reader.keep_logits(self._vocabulary)

    def _values(self) -> _Read:
        with self._reader.lock:
            if self._read is None:
                self.settle(self._reader.read_block())
            assert self._read is not None  # settled just now
            return self._read


class DeviceTrust:
    """The adapter's trust, read when asked for."""

    def __init__(self, reader: ResultReader) -> None:
        self._reader = reader
        self._value: float | None = None

    def settle(self, values: Values) -> None:
        """Keeps what was read together with a score."""
        self._value = float(values["trust"][0])

    def __float__(self) -> float:
        with self._reader.lock:
            if self._value is None:
                self.settle(self._reader.read_block())
            assert self._value is not None  # settled just now
            return self._value


class AdaptedRow(DeviceRows):
    """An adapter's output, in a place of its own as long as somebody holds it: sequences take turns
    between adapter and probe.
    """

    def __init__(self, driver: DeviceDriver, pool: BlockPool, width: int) -> None:
        super().__init__(driver, pool.take(), 1, width)
        self._pool = pool

    def __del__(self) -> None:
        if hasattr(self, "_pool"):  # not where there was no memory for it
            self._pool.give(self.address)
