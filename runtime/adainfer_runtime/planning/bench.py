"""Measures an engine's stages on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..backends import ExitEvidence
from ..certificate import device_class
from ..devices import find_gpu
from ..exit_policy import ExitCheck, NoExit
from ..kv_fill import KvPolicy, find_filler
from ..plan_spec import FillTimes, Machine, StageTimes
from ..session import Session

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["machine", "measure_times"]

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_CONTEXT_ROWS = (8, 32, 128, 512)
_FILL_ROWS = (1, 2, 4, 8, 16, 64, 256)
_CANDIDATES = 4


def machine(threads: int | None, device: str = "cpu") -> Machine:
    """This machine, and the threads that engines get; of device `cuda` its GPU, which one thread
    feeds.
    """
    name = device_class(device)
    gpu = find_gpu() if device == "cuda" else None
    if gpu is not None:
        return Machine(device_class=name, processor=gpu.name, threads=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(device_class=name, processor=_processor(), threads=threads or cores or 1)


def measure_times(
    engine: Engine,
    *,
    repeats: int = 7,
    most_rows: int | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> StageTimes:
    """Medians over `repeats` runs; what is timed are the calls that requests make, from an idle
    device to an idle device: on a GPU a call alone only asks.

    Args:
        most_rows: positions of the largest pass (large models: decode asks for few).
    """
    bench = _Bench(engine, repeats)
    manifest, most = engine.manifest, min(engine.backend.max_rows, engine.manifest.max_seq_len)
    most = most if most_rows is None else min(most, most_rows)
    rows = _rows(most, manifest.quantisation.wide_rows if manifest.quantisation else None)
    passes = []
    for count in rows:
        passes.append(bench.passes(count))
        on_step(f"{count} positions")
    past = max(1, min(256, manifest.max_seq_len // 2))
    hidden = np.random.default_rng(0).normal(size=manifest.model.hidden_size).astype(np.float32)
    backend = engine.backend
    tokens = np.arange(min(_CANDIDATES, manifest.model.vocab_size), dtype=np.int64)
    context_rows = tuple(n for n in _CONTEXT_ROWS if n <= manifest.max_seq_len)
    context = {
        point: tuple(bench.context(point, count) for count in context_rows)
        for point in manifest.context_points
        if context_rows
    }
    on_step("context exits")
    fills = bench.fills(most)
    on_step("approximate keys and values")
    adapted = next((n for n, p in manifest.exit_points.items() if p.adapter), None)
    return StageTimes(
        rows=rows,
        layer=tuple(seconds.layer for seconds in passes),
        embed=tuple(seconds.embed for seconds in passes),
        pair_one=bench.attention(1, past),
        # Prompts of a pass or less have no past: where there is one it is long.
        pair_many=bench.attention(min(past, most), min(2 * past, manifest.max_seq_len // 2)),
        step=bench.step(past),
        step_past=past,
        probe=passes[0].probe,
        candidates=bench.seconds(lambda: backend.probe_candidates(hidden, tokens)),
        adapter=0.0 if adapted is None else bench.seconds(lambda: backend.adapt(adapted, hidden)),
        classifier=bench.classifier(hidden),
        shortlist=bench.seconds(lambda: backend.shortlist(hidden)) if manifest.shortlist else None,
        context_rows=context_rows if context else (),
        context=context,
        fills=fills,
    )


@dataclass(frozen=True)
class _PassSeconds:
    """Of the embedding, of one layer, and of the last position's probe."""

    embed: float
    layer: float
    probe: float


class _Bench:
    def __init__(self, engine: Engine, repeats: int) -> None:
        self._engine, self._repeats = engine, repeats
        vocabulary = engine.manifest.model.vocab_size
        length = engine.manifest.max_seq_len
        self._ids = np.random.default_rng(1).integers(0, vocabulary, length).tolist()

    def seconds(self, call: Callable[[], object]) -> float:
        """Of a call that leaves nothing behind, after one that warms up."""
        call()
        return float(np.median([self._timed(call) for _ in range(self._repeats)]))

    def passes(self, rows: int, past: int = 0) -> _PassSeconds:
        """A prediction over so many new positions that follow others, part by part.

        Every part is timed in its turn: each pushes the others' weights out of the caches.
        """
        taken: list[_PassSeconds] = []
        with self._engine.borrow() as session:
            if past:
                session.extend(self._ids[:past])
                session.complete()
            for _ in range(self._repeats + 1):
                session.truncate(past)
                embed = self._timed(lambda: session.extend(self._ids[past : past + rows]))
                layers = self._timed(session.complete)
                probe = self._timed(lambda: self._probe_of(session))
                taken.append(_PassSeconds(embed, layers / self._engine.manifest.depth, probe))
        medians = np.median([(t.embed, t.layer, t.probe) for t in taken[1:]], axis=0)
        return _PassSeconds(*map(float, medians))

    def step(self, past: int) -> float:
        """Seconds of a token in mode off: what parts alone leave out is in it."""
        taken = []
        with self._engine.borrow() as session:
            session.extend(self._ids[:past])
            session.complete()
            for token in self._ids[past : past + 4 * self._repeats]:
                taken.append(self._timed(partial(_step, session, token)))
        return float(np.median(taken))

    def attention(self, rows: int, past: int) -> float:
        """Seconds of one layer that a past adds, per new position and position of the past."""
        more = self.passes(rows, past).layer - self.passes(rows).layer
        return max(0.0, more) / (rows * past)

    def context(self, exit_layer: int, rows: int) -> float:
        """Seconds of a context exit's check over a prompt, the probe and the classifier aside."""
        check, taken = ExitCheck(exit_layer, "context"), []
        with self._engine.borrow() as session:
            session.extend(self._ids[:rows])
            session.advance(exit_layer)
            for _ in range(self._repeats + 1):
                taken.append(self._timed(lambda: session.look(check)))
        probe = self.seconds(lambda: self._probe_of(session))
        return max(0.0, float(np.median(taken[1:])) - probe)

    def fills(self, most: int) -> FillTimes | None:
        """Of the KV policies that the folder has stages for, over `most` positions at most; None
        where it has none.
        """
        manifest = self._engine.manifest
        rows = tuple(n for n in _FILL_ROWS if n <= most)
        propagate: tuple[float, ...] = ()
        if manifest.kv_fills:
            # All layers in turn: of one alone the weights would stay in the caches.
            depth = manifest.model.num_layers
            propagate = tuple(self._fill("propagate", 0, count) / depth for count in rows)
        translated = {
            point: tuple(self._fill("translated", point, count) for count in rows)
            for point in manifest.context_points
        }
        if not propagate and not translated:
            return None
        return FillTimes(rows=rows, propagate=propagate, translated=translated)

    def classifier(self, hidden: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
        """Seconds of one classifier; the folder's first."""
        backend, known = self._engine.backend, self._engine.manifest.classifiers
        if not known:
            return 0.0
        evidence = ExitEvidence(backend.probe(hidden), 0.0)
        state = np.zeros(known[0].state_size, np.float32)
        return self.seconds(lambda: backend.classify(known[0].graph, evidence, 0.5, state))

    def _fill(self, policy: KvPolicy, exit_layer: int, rows: int) -> float:
        """Seconds of all layers above an exit layer, for so many positions."""
        backend, manifest = self._engine.backend, self._engine.manifest
        filler = find_filler(policy, backend, manifest)
        assert filler is not None  # policy `deferred` alone has none
        above = range(exit_layer + 1, manifest.model.num_layers + 1)
        shape = (rows, manifest.model.hidden_size)
        hidden = np.random.default_rng(2).normal(size=shape).astype(np.float32)
        buffers = backend.open_sequence()

        def fill() -> None:
            found, _ = filler.fill(exit_layer, above, hidden, 0)
            for layer, (key, value) in found.items():
                buffers.write_kv(layer, 0, key, value)

        return self.seconds(fill)

    def _probe_of(self, session: Session) -> object:
        hidden = session.hidden()
        return self._engine.backend.probe(hidden[len(hidden) - 1])

    def _timed(self, call: Callable[[], object]) -> float:
        self._engine.backend.wait()
        start = time.perf_counter()
        call()
        self._engine.backend.wait()
        return time.perf_counter() - start


def _rows(most: int, wide_rows: int | None) -> tuple[int, ...]:
    """Where the wide graphs take over, the time of a layer jumps."""
    edges = (wide_rows - 1, wide_rows) if wide_rows else ()
    return tuple(sorted({n for n in (*_ROWS, *edges, most) if 1 <= n <= most}))


def _step(session: Session, token: int) -> int:
    """A token of a text, read as texts need it."""
    session.extend([token])
    return session.predict(NoExit()).result.token


def _processor() -> str:
    """As Linux names it; elsewhere what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
