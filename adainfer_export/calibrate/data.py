"""Calibration prompts: read, sampled, and cut into parts by task that share no question."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adainfer_runtime.fitted_on import Question, asked
from adainfer_runtime.tasks import TaskExample, read_tasks

from ..errors import CalibrationError
from .builtin import builtin_examples
from .questions import Questions, first_of_each, questions_of
from .request import CalibrationRequest

__all__ = ["PARTS", "Parts", "check_examples", "load_examples", "split_parts"]

_LOG = logging.getLogger(__name__)

# Share of the prompts that each part gets, within every task.
PARTS = {"adapters": 0.35, "classifier": 0.25, "selection": 0.15, "certification": 0.25}
_LEAST = 60


@dataclass(frozen=True)
class Parts:
    """Prompts of which those in different parts ask different questions; in `certification` all do.

    The examples in few-shot prompts may answer questions of another part: see `held_out`.
    """

    adapters: tuple[TaskExample, ...]
    classifier: tuple[TaskExample, ...]
    selection: tuple[TaskExample, ...]
    certification: tuple[TaskExample, ...]

    @property
    def held_out(self) -> Questions:
        """What exits are judged on, and so must not be fitted on where it is an example."""
        return questions_of((*self.selection, *self.certification))


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
    again = len(chosen) - len(questions_of(chosen))
    if again and not request.with_builtin:  # nobody can mend the built-in ones
        _LOG.warning(
            "%d of %d prompts ask what another one asks: those stay in one part of the data, and "
            "one of them at most certifies",
            again,
            len(chosen),
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
    chosen = [unique[index] for index in order]
    if len(chosen) < _LEAST:
        raise CalibrationError(
            f"{len(chosen)} different prompts are too few to calibrate: at least {_LEAST} are "
            "needed, a few hundred are better"
        )
    questions = len(questions_of(chosen))
    if questions < _LEAST:
        raise CalibrationError(
            f"{len(chosen)} prompts ask {questions} different questions, which are too few to "
            f"calibrate: at least {_LEAST} are needed, a few hundred are better"
        )
    return chosen, len(examples) - len(unique)


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
    """Cuts each task's prompts in the proportions of `PARTS`, in their (shuffled) order; those
    that ask the same come into one part, and only one of them into the certifying one.
    """
    by_task: dict[str, list[TaskExample]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    parts: dict[str, list[TaskExample]] = {name: [] for name in PARTS}
    for group in by_task.values():
        for name, cut in zip(PARTS, _cut(group), strict=True):
            parts[name] += cut
    parts["certification"] = list(first_of_each(parts["certification"]))
    return Parts(**{name: tuple(group) for name, group in parts.items()})


def _cut(group: Sequence[TaskExample]) -> list[list[TaskExample]]:
    """One task's prompts, per part; no edge between parts lies within a question."""
    by_question: dict[Question, list[TaskExample]] = defaultdict(list)
    for example in group:
        by_question[asked(example)].append(example)
    ordered = [example for same in by_question.values() for example in same]
    ends = np.cumsum([0, *(len(same) for same in by_question.values())])
    edges = np.rint(np.cumsum([0.0, *PARTS.values()]) * len(ordered))
    cuts = [int(ends[np.abs(ends - edge).argmin()]) for edge in edges]
    return [ordered[first:last] for first, last in pairwise(cuts)]
