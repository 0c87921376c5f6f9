"""Mode adaptive against `off`, a flat row per task: for tables and scripts."""

from __future__ import annotations

from dataclasses import dataclass

from .methods import BASELINE
from .results import Evaluation, TaskResult

__all__ = ["SummaryRow", "summary_rows"]

_ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class SummaryRow:
    """Both on one task, or on all; see `TaskResult` for what the figures are."""

    task: str
    examples: int
    accuracy_off: float | None
    accuracy_adaptive: float | None
    agreement: float
    mean_layers: float
    layers_deviation: float
    layers_saved: float
    seconds_off: float
    seconds_adaptive: float


def summary_rows(evaluation: Evaluation) -> tuple[SummaryRow, ...]:
    """A row per task, then the mean; none where `adaptive` is not among the methods."""
    if all(method.method != _ADAPTIVE for method in evaluation.methods):
        return ()
    off, adaptive = evaluation[BASELINE], evaluation[_ADAPTIVE]
    pairs = zip((*off.tasks, off.mean), (*adaptive.tasks, adaptive.mean), strict=True)
    return tuple(_row(*pair) for pair in pairs)


def _row(off: TaskResult, adaptive: TaskResult) -> SummaryRow:
    return SummaryRow(
        task=adaptive.task,
        examples=adaptive.examples,
        accuracy_off=off.accuracy,
        accuracy_adaptive=adaptive.accuracy,
        agreement=adaptive.agreement,
        mean_layers=adaptive.mean_layers,
        layers_deviation=adaptive.layers_deviation,
        layers_saved=adaptive.layers_saved,
        seconds_off=off.seconds,
        seconds_adaptive=adaptive.seconds,
    )
