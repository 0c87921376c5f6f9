"""Measures modes `off` and `adaptive` on task files: accuracy, agreement, layers, time."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from .engine import Engine
from .errors import RequestError
from .exit_policy import ExitPolicy
from .tasks import TaskExample

__all__ = ["Answer", "Evaluation", "TaskResult", "evaluate", "wilson_interval"]


@dataclass(frozen=True)
class Answer:
    """One mode's answer to one prompt."""

    value: int
    exit_layer: int
    executed: int
    dense: int
    seconds: float


@dataclass(frozen=True)
class TaskResult:
    """Results of one task, or of all.

    Attributes:
        accuracy_off, accuracy_adaptive: share of right answers; None where the task has none.
        agreement: share of prompts with equal answers in both modes, `agreement_interval` its
            95% Wilson interval.
        minority_examples, minority_agreement: the same over the prompts whose full-model answer
            is not the task's most frequent one: a constant answer must not pass for a good exit.
        mean_layers: mean exit layer.
        layers_saved: 1 − position-layers executed / dense, as the runtime counted them.
        seconds_off, seconds_adaptive: sum of wall-clock time over the prompts.
    """

    task: str
    examples: int
    accuracy_off: float | None
    accuracy_adaptive: float | None
    agreement: float
    agreement_interval: tuple[float, float]
    minority_examples: int
    minority_agreement: float | None
    mean_layers: float
    layers_saved: float
    seconds_off: float
    seconds_adaptive: float


@dataclass(frozen=True)
class Evaluation:
    """Per task, and their mean: shares are means over tasks, counts and seconds are sums.

    The mean's agreement interval is of the pooled prompts.
    """

    tasks: tuple[TaskResult, ...]
    mean: TaskResult
    labels_only: bool


@dataclass(frozen=True)
class _Pair:
    example: TaskExample
    off: Answer
    adaptive: Answer
    expected: int | None


def evaluate(
    engine: Engine,
    examples: Sequence[TaskExample],
    *,
    labels_only: bool = False,
    policy: ExitPolicy | None = None,
    on_example: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Answers every prompt in both modes, in alternating order.

    Args:
        labels_only: choose among the example's labels; else one greedy token over the whole
            vocabulary, right if it is the answer's first token.
        policy: what is compared with `off`; default: mode `adaptive`.

    Raises:
        RequestError: no examples, or `labels_only` with an example that has no labels.
        ExitUnavailableError: the engine has no exit graph.
    """
    if not examples:
        raise RequestError("there are no examples to evaluate")
    off, adaptive = engine.policy("off"), policy or engine.policy("adaptive")
    ask = _choose_label if labels_only else _greedy_token
    ask(engine, examples[0], off)  # loads what is loaded lazily
    by_task: dict[str, list[_Pair]] = defaultdict(list)
    for index, example in enumerate(examples):
        if index % 2:
            second, first = ask(engine, example, adaptive), ask(engine, example, off)
        else:
            first, second = ask(engine, example, off), ask(engine, example, adaptive)
        expected = _expected(engine, example, labels_only)
        by_task[example.task].append(_Pair(example, first, second, expected))
        on_example()
    results = tuple(_summarise(task, pairs) for task, pairs in by_task.items())
    return Evaluation(results, _mean(results), labels_only)


def wilson_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _greedy_token(engine: Engine, example: TaskExample, policy: ExitPolicy) -> Answer:
    ids = engine.tokenizer.encode(example.prompt)
    with engine.borrow() as session:
        before, start = session.count, time.perf_counter()
        session.extend(ids)
        prediction = session.predict(policy)
        seconds = time.perf_counter() - start
        count = session.count - before
    return Answer(
        prediction.result.token, prediction.exit_layer, count.executed, count.dense, seconds
    )


def _choose_label(engine: Engine, example: TaskExample, policy: ExitPolicy) -> Answer:
    if not example.labels:
        raise RequestError(f"task {example.task}: labels_only needs examples with labels")
    done = engine.choose_with(example.prompt, example.labels, policy)
    return Answer(done.index, done.exit_layer, done.count.executed, done.count.dense, done.seconds)


def _expected(engine: Engine, example: TaskExample, labels_only: bool) -> int | None:
    if example.answer is None:
        return None
    if labels_only:
        labels = [label.strip() for label in example.labels or ()]
        answer = example.answer.strip()
        return labels.index(answer) if answer in labels else -1
    tokens = engine.tokenizer.encode_continuation(example.answer)
    return tokens[0] if tokens else None


def _summarise(task: str, pairs: Sequence[_Pair]) -> TaskResult:
    same = [pair.off.value == pair.adaptive.value for pair in pairs]
    majority = Counter(pair.off.value for pair in pairs).most_common(1)[0][0]
    minority = [s for s, pair in zip(same, pairs, strict=True) if pair.off.value != majority]
    judged = [pair for pair in pairs if pair.expected is not None]
    executed = sum(pair.adaptive.executed for pair in pairs)
    dense = sum(pair.adaptive.dense for pair in pairs)
    agreement = fmean(same)
    return TaskResult(
        task=task,
        examples=len(pairs),
        accuracy_off=_share(pair.off.value == pair.expected for pair in judged),
        accuracy_adaptive=_share(pair.adaptive.value == pair.expected for pair in judged),
        agreement=agreement,
        agreement_interval=wilson_interval(agreement, len(pairs)),
        minority_examples=len(minority),
        minority_agreement=_share(minority),
        mean_layers=fmean(pair.adaptive.exit_layer for pair in pairs),
        layers_saved=1.0 - executed / dense,
        seconds_off=sum(pair.off.seconds for pair in pairs),
        seconds_adaptive=sum(pair.adaptive.seconds for pair in pairs),
    )


def _mean(results: Sequence[TaskResult]) -> TaskResult:
    examples = sum(result.examples for result in results)
    pooled = sum(result.agreement * result.examples for result in results) / examples
    minority = sum(result.minority_examples for result in results)
    agreed = sum(
        (result.minority_agreement or 0.0) * result.minority_examples for result in results
    )
    return TaskResult(
        task="mean",
        examples=examples,
        accuracy_off=_mean_of([result.accuracy_off for result in results]),
        accuracy_adaptive=_mean_of([result.accuracy_adaptive for result in results]),
        agreement=fmean(result.agreement for result in results),
        agreement_interval=wilson_interval(pooled, examples),
        minority_examples=minority,
        minority_agreement=agreed / minority if minority else None,
        mean_layers=fmean(result.mean_layers for result in results),
        layers_saved=fmean(result.layers_saved for result in results),
        seconds_off=sum(result.seconds_off for result in results),
        seconds_adaptive=sum(result.seconds_adaptive for result in results),
    )


def _share(values: Iterable[bool]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
