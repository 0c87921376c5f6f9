"""Calibration prompts: read, sampled, and cut into disjoint parts by task."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from adainfer_runtime.tasks import TaskExample, read_tasks

from ..errors import CalibrationError
from .builtin import builtin_examples
from .request import CalibrationRequest

__all__ = ["PARTS", "Parts", "check_examples", "load_examples", "prompt_hash", "split_parts"]

_LOG = logging.getLogger(__name__)

# Share of the prompts that each part gets, within every task.
PARTS = {"adapters": 0.35, "classifier": 0.25, "selection": 0.15, "certification": 0.25}
_LEAST = 60


@dataclass(frozen=True)
class Parts:
    """Disjoint prompts: what one part was fitted on, no other part has seen."""

    adapters: tuple[TaskExample, ...]
    classifier: tuple[TaskExample, ...]
    selection: tuple[TaskExample, ...]
    certification: tuple[TaskExample, ...]


def load_examples(request: CalibrationRequest) -> list[TaskExample]:
    """The request's prompts without duplicates, at most `limit` of them, shared out among tasks.

    Raises:
        TaskFileError: a file cannot be read.
        CalibrationError: too few prompts.
    """
    examples = _read(request)
    chosen, twice = _choose(examples, request)
    if twice:
        _LOG.warning(
            "%d of %d prompts are there twice: each is used once, in one part of the data",
            twice,
            len(examples),
        )
    return chosen


def check_examples(request: CalibrationRequest) -> None:
    """Raises what `load_examples` would raise, before the work that comes before it."""
    _choose(_read(request), request)


def _read(request: CalibrationRequest) -> list[TaskExample]:
    examples = builtin_examples(request.seed) if request.with_builtin else []
    if request.files:
        examples += read_tasks(request.files)
    return examples


def _choose(
    examples: list[TaskExample], request: CalibrationRequest
) -> tuple[list[TaskExample], int]:
    """The prompts to use, and how many were left out for being there twice."""
    unique = list({example.prompt: example for example in examples}.values())
    order = _sample([example.task for example in unique], request.limit, request.seed)
    if len(order) < _LEAST:
        raise CalibrationError(
            f"{len(order)} different prompts are too few to calibrate: at least {_LEAST} are "
            "needed, a few hundred are better"
        )
    return [unique[index] for index in order], len(examples) - len(unique)


def prompt_hash(prompt: str) -> str:
    """What a report keeps of a prompt: enough to find it again, nothing to read."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _sample(tasks: list[str], limit: int | None, seed: int) -> list[int]:
    """Shuffled indices; a limit is shared out equally, what small tasks leave goes to the rest."""
    order: list[int] = np.random.default_rng(seed).permutation(len(tasks)).tolist()
    if limit is None or limit >= len(order):
        return order
    place: dict[str, int] = defaultdict(int)
    turns = []
    for index in order:
        turns.append(place[tasks[index]])
        place[tasks[index]] += 1
    # The first of every task, then the second of every task …: a stable sort keeps the shuffle.
    chosen = sorted(range(len(order)), key=turns.__getitem__)[:limit]
    return [order[index] for index in sorted(chosen)]


def split_parts(examples: Iterable[TaskExample]) -> Parts:
    """Cuts each task's prompts in the proportions of `PARTS`, in their (shuffled) order."""
    by_task: dict[str, list[TaskExample]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    parts: dict[str, list[TaskExample]] = {name: [] for name in PARTS}
    edges = np.cumsum([0.0, *PARTS.values()])
    for group in by_task.values():
        cuts = np.rint(edges * len(group)).astype(int)
        for name, first, last in zip(PARTS, cuts[:-1], cuts[1:], strict=True):
            parts[name] += group[first:last]
    return Parts(**{name: tuple(group) for name, group in parts.items()})
