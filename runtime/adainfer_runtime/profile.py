"""Time by kind of stage: a back end around a back end, in use only where it was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import numpy as np
import numpy.typing as npt

from .backends import Backend, ExitEvidence, ProbeResult, SequenceBatch, SequenceBuffers
from .backends.base import Float32

__all__ = ["ProfiledBackend", "StageClock", "measuring"]


class StageClock:
    """Seconds by kind of stage: `embed`, `layers`, `probe`, `shortlist`, `adapter`, `translate`,
    `kv_fill`, `classifier`.

    One clock may serve several threads, and texts that a thread advances by turns: each adds to the
    request that it is working for.
    """

    def __init__(self) -> None:
        self._seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)

    @contextmanager
    def into(self, seconds: dict[str, float]) -> Iterator[None]:
        """What this thread measures meanwhile is added here."""
        token = self._seconds.set(seconds)
        try:
            yield
        finally:
            self._seconds.reset(token)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Adds the time of the block; outside of `into` it is dropped."""
        start = time.perf_counter()
        yield
        self.add(kind, time.perf_counter() - start)

    def add(self, kind: str, seconds: float) -> None:
        """Adds a time that was measured elsewhere, such as a share of a pass of several texts."""
        sums = self._seconds.get()
        if sums is not None:
            sums[kind] = sums.get(kind, 0.0) + seconds


def measuring(clock: StageClock | None, seconds: dict[str, float]) -> AbstractContextManager[None]:
    """`clock.into(seconds)`; nothing where there is no clock."""
    return nullcontext() if clock is None else clock.into(seconds)


class ProfiledBackend:
    """See `backends.Backend`: the same results, with the time that they took."""

    def __init__(self, inner: Backend, clock: StageClock) -> None:
        self._inner = inner
        self._clock = clock

    @property
    def max_rows(self) -> int:
        """The inner one's."""
        return self._inner.max_rows

    def open_sequence(self) -> SequenceBuffers:
        """Buffers that are measured too."""
        return _ProfiledBuffers(self._inner.open_sequence(), self._clock)

    def open_batch(self, slots: int) -> SequenceBatch | None:
        """The inner one's; whoever puts passes together knows whose time they take."""
        return self._inner.open_batch(slots)

    def wait(self) -> None:
        """For the inner one."""
        self._inner.wait()

    def close(self) -> None:
        """The inner one."""
        self._inner.close()

    def probe(self, hidden: Float32) -> ProbeResult:
        """Measured as `probe`."""
        with self._clock.measure("probe"):
            return self._inner.probe(hidden)

    def probe_candidates(self, hidden: Float32, candidates: npt.NDArray[np.int64]) -> ProbeResult:
        """Measured as `probe`."""
        with self._clock.measure("probe"):
            return self._inner.probe_candidates(hidden, candidates)

    def probe_logits(self, hidden: Float32) -> Float32:
        """Measured as `probe`."""
        with self._clock.measure("probe"):
            return self._inner.probe_logits(hidden)

    def probe_features(self, hidden: Float32) -> tuple[npt.NDArray[np.int64], Float32, Float32]:
        """Measured as `probe`."""
        with self._clock.measure("probe"):
            return self._inner.probe_features(hidden)

    def adapt(self, exit_layer: int, hidden: Float32) -> tuple[Float32, float]:
        """Measured as `adapter`."""
        with self._clock.measure("adapter"):
            return self._inner.adapt(exit_layer, hidden)

    def translate(
        self, exit_layer: int, hidden: Float32, start: int
    ) -> Mapping[int, tuple[Float32, Float32]]:
        """Measured as `translate`."""
        with self._clock.measure("translate"):
            return self._inner.translate(exit_layer, hidden, start)

    def shortlist(self, hidden: Float32) -> ProbeResult:
        """Measured as `shortlist`."""
        with self._clock.measure("shortlist"):
            return self._inner.shortlist(hidden)

    def kv_fill(self, layer: int, hidden: Float32, start: int) -> tuple[Float32, Float32]:
        """Measured as `kv_fill`."""
        with self._clock.measure("kv_fill"):
            return self._inner.kv_fill(layer, hidden, start)

    def classify(
        self, graph: str, evidence: ExitEvidence, depth: float, state: Float32
    ) -> tuple[float, Float32]:
        """Measured as `classifier`."""
        with self._clock.measure("classifier"):
            return self._inner.classify(graph, evidence, depth, state)


class _ProfiledBuffers:
    """See `backends.SequenceBuffers`."""

    def __init__(self, inner: SequenceBuffers, clock: StageClock) -> None:
        self._inner = inner
        self._clock = clock
        self.pending = inner.pending
        self.hidden = inner.hidden
        self.write_kv = inner.write_kv
        self.kv = inner.kv

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        with self._clock.measure("embed"):
            self._inner.embed(tokens, start)

    def run_stage(self, index: int, rows: int, past: int) -> None:
        with self._clock.measure("layers"):
            self._inner.run_stage(index, rows, past)
