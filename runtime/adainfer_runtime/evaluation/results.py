"""What answers add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from .answers import Answer
from .methods import BASELINE
from .statistics import effective_count, paired_difference, wilson_interval

__all__ = ["Evaluation", "MethodResult", "TaskResult", "summarise"]


@dataclass(frozen=True)
class TaskResult:
    """One method on one task, or on all: then shares are means over tasks, counts and seconds sums.

    Attributes:
        accuracy: share of right answers; None where the task file gives none.
        accuracy_difference: against `off` on the same prompts, with its 95% interval.
        agreement: share of prompts with `off`'s answer, with its 95% Wilson interval: of the mean,
            at the number of prompts that tell as much when all weigh the same (Kish 1965).
        minority_examples, minority_agreement: the same over the prompts whose full-model answer
            is not the task's most frequent one: a constant answer must not pass for a good exit.
        mean_layers, layers_deviation: mean and standard deviation of the exit layer.
        layers_saved: 1 − position-layers / those of `off`, as the runtime counted them: the paper's
            pruning ratio. `compute_saved` is the same of multiply-adds, probes included.
        seconds: wall clock over all prompts; `relative_time` is its share of `off`'s.
        exits: prompts per exit layer.
    """

    task: str
    examples: int
    accuracy: float | None
    accuracy_difference: float | None
    accuracy_interval: tuple[float, float] | None
    agreement: float
    agreement_interval: tuple[float, float]
    minority_examples: int
    minority_agreement: float | None
    mean_layers: float
    layers_deviation: float
    layers_saved: float
    compute_saved: float
    seconds: float
    relative_time: float
    exits: Mapping[int, int]


@dataclass(frozen=True)
class MethodResult:
    """One method: per task, and their mean."""

    method: str
    tasks: tuple[TaskResult, ...]
    mean: TaskResult


@dataclass(frozen=True)
class Evaluation:
    """All methods, `off` first."""

    methods: tuple[MethodResult, ...]
    num_layers: int
    labels_only: bool

    def __getitem__(self, method: str) -> MethodResult:
        """The result of a method by its name; KeyError if it was not asked."""
        return {result.method: result for result in self.methods}[method]


@dataclass(frozen=True)
class _Pair:
    off: Answer
    other: Answer

    @property
    def same(self) -> bool:
        return self.off.value == self.other.value

    @property
    def right(self) -> tuple[bool, bool]:
        expected = self.off.expected
        return self.off.value == expected, self.other.value == expected


def summarise(
    answers: Mapping[str, Sequence[Answer]], num_layers: int, *, labels_only: bool
) -> Evaluation:
    """The figures of answers to the same prompts, in the same order, by method."""
    results = []
    for method, given in answers.items():
        by_task: dict[str, list[_Pair]] = {}
        for first, second in zip(answers[BASELINE], given, strict=True):
            by_task.setdefault(first.task, []).append(_Pair(first, second))
        tasks = tuple(_result(task, [pairs]) for task, pairs in by_task.items())
        results.append(MethodResult(method, tasks, _result("mean", list(by_task.values()))))
    return Evaluation(tuple(results), num_layers, labels_only)


def _result(name: str, tasks: Sequence[Sequence[_Pair]]) -> TaskResult:
    pairs = [pair for task in tasks for pair in task]
    minority = [pair.same for task in tasks for pair in _minority(task)]
    judged = [[p.right for p in task if p.off.expected is not None] for task in tasks]
    judged = [task for task in judged if task]
    difference = paired_difference(judged) if judged else None
    layers = [pair.other.exit_layer for pair in pairs]
    seconds = sum(pair.other.seconds for pair in pairs)
    agreement = fmean(fmean(pair.same for pair in task) for task in tasks)
    return TaskResult(
        task=name,
        examples=len(pairs),
        accuracy=fmean(fmean(right for _, right in task) for task in judged) if judged else None,
        accuracy_difference=difference[0] if difference else None,
        accuracy_interval=difference[1:] if difference else None,
        agreement=agreement,
        agreement_interval=wilson_interval(agreement, effective_count([len(t) for t in tasks])),
        minority_examples=len(minority),
        minority_agreement=fmean(minority) if minority else None,
        mean_layers=fmean(fmean(pair.other.exit_layer for pair in task) for task in tasks),
        layers_deviation=pstdev(layers),
        layers_saved=_saved(tasks, lambda answer: answer.executed),
        compute_saved=_saved(tasks, lambda answer: answer.compute),
        seconds=seconds,
        relative_time=seconds / sum(pair.off.seconds for pair in pairs),
        exits=dict(sorted(Counter(layers).items())),
    )


def _minority(task: Sequence[_Pair]) -> list[_Pair]:
    majority = Counter(pair.off.value for pair in task).most_common(1)[0][0]
    return [pair for pair in task if pair.off.value != majority]


def _saved(tasks: Sequence[Sequence[_Pair]], work: Callable[[Answer], int]) -> float:
    return fmean(
        1.0 - sum(work(pair.other) for pair in task) / sum(work(pair.off) for pair in task)
        for task in tasks
    )
