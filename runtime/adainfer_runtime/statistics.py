"""What an engine has done since it was loaded. Counted per request, added up under a lock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .ledger import WorkCount
from .results import NO_DRAFTS, DraftCount, RequestStatistics

__all__ = ["EngineStatistics", "StatisticsRecorder"]


@dataclass(frozen=True)
class EngineStatistics:
    """Sums over all requests that have ended.

    Attributes:
        texts: requests for text by how they ended: a finish reason, `failed`, or `closed` where
            the stream was closed before its end. What these two did until then is in all figures;
            of a step that they did not finish, what was not executed is no saving.
        choices: answered choices among labels; `choice_seconds` the time they took.
        prompt_tokens: of whole prompts, also of those that were not read to their end.
        tokens_per_second: `decode_tokens` of `RequestStatistics` by the seconds of decode; 0
            without any.
        exits: tokens and choices by exit layer.
        layers_executed: position-layers, `layers_dense` those of the dense model for the same.
        kv_fills, kv_filled, drafts, stage_seconds: see `RequestStatistics`.
    """

    texts: Mapping[str, int]
    choices: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_seconds: float
    choice_seconds: float
    tokens_per_second: float
    layers_executed: int
    layers_dense: int
    kv_fills: int
    kv_filled: int
    drafts: DraftCount
    exits: Mapping[int, int]
    stage_seconds: Mapping[str, float]

    @property
    def layers_saved(self) -> float:
        """1 − executed / dense."""
        return WorkCount(self.layers_executed, self.layers_dense).layers_saved


class StatisticsRecorder:
    """Adds up; may be shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: Counter[str] = Counter()
        self._exits: Counter[int] = Counter()
        self._sums: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._stage_seconds: dict[str, float] = {}
        self._work = WorkCount(0, 0)
        self._drafts = NO_DRAFTS

    def text(self, reason: str, done: RequestStatistics, work: WorkCount) -> None:
        """A text that has come to its end, or (reasons `failed` and `closed`) was left before."""
        with self._lock:
            self._ends[reason] += 1
            self._sums["prompt_tokens"] += done.prompt_tokens
            self._sums["reused_tokens"] += done.reused_tokens
            self._sums["new_tokens"] += done.new_tokens
            self._sums["decode_tokens"] += done.decode_tokens
            self._add_seconds("prompt", done.prompt_seconds)
            self._add_seconds("decode", done.decode_seconds)
            self._exits.update(done.exits)
            self._work += work
            self._drafts += done.drafts
            self._add_stages(done.stage_seconds)

    def choice(
        self, exit_layer: int, seconds: float, work: WorkCount, stages: Mapping[str, float]
    ) -> None:
        """An answered choice."""
        with self._lock:
            self._sums["choices"] += 1
            self._add_seconds("choice", seconds)
            self._exits[exit_layer] += 1
            self._work += work
            self._add_stages(stages)

    def snapshot(self) -> EngineStatistics:
        """The sums so far."""
        with self._lock:
            decode = self._seconds.get("decode", 0.0)
            return EngineStatistics(
                texts=dict(self._ends),
                choices=self._sums["choices"],
                prompt_tokens=self._sums["prompt_tokens"],
                reused_tokens=self._sums["reused_tokens"],
                new_tokens=self._sums["new_tokens"],
                prompt_seconds=self._seconds.get("prompt", 0.0),
                decode_seconds=decode,
                choice_seconds=self._seconds.get("choice", 0.0),
                tokens_per_second=self._sums["decode_tokens"] / decode if decode else 0.0,
                layers_executed=self._work.executed,
                layers_dense=self._work.dense,
                kv_fills=self._work.deferred,
                kv_filled=self._work.filled,
                drafts=self._drafts,
                exits=dict(sorted(self._exits.items())),
                stage_seconds=dict(self._stage_seconds),
            )

    def _add_seconds(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _add_stages(self, stages: Mapping[str, float]) -> None:
        for kind, seconds in stages.items():
            self._stage_seconds[kind] = self._stage_seconds.get(kind, 0.0) + seconds
