"""Runs methods over examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import RequestError
from ..tasks import PlacedExample, TaskExample
from .answer_log import AnswerLog
from .answers import Answer, ask, prompt_key
from .check import check_examples
from .methods import BASELINE, Method
from .results import Evaluation, summarise

__all__ = ["evaluate"]


def evaluate(
    methods: Sequence[Method],
    examples: Sequence[TaskExample],
    *,
    labels_only: bool = False,
    log: AnswerLog | None = None,
    places: Sequence[str] | None = None,
    on_example: Callable[[TaskExample], None] = lambda example: None,
) -> Evaluation:
    """Asks every method about every prompt, each in its turn first.

    Args:
        methods: the first is `off`, which the others are compared with.
        labels_only: choose among the example's labels; else one greedy token over the whole
            vocabulary, right if it is the answer's first token.
        log: answers that it holds are not asked for again.
        places: what errors call each example; default: its number and task.

    Raises:
        RequestError: no examples, or no baseline; see `check_examples` for examples that cannot be
            asked about.
    """
    if not examples:
        raise RequestError("there are no examples to evaluate")
    if not methods or methods[0].name != BASELINE:
        raise RequestError(f"the first method must be {BASELINE!r}: it is what others agree with")
    where = _numbered(examples) if places is None else places
    placed = map(PlacedExample, where, examples)
    check_examples(methods[0].engine, placed, labels_only=labels_only)
    log = log or AnswerLog()
    answers: dict[str, list[Answer]] = {method.name: [] for method in methods}
    warm: set[str] = set()
    for index, example in enumerate(examples):
        turn = index % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            answer = log.find(method.name, prompt_key(example))
            if answer is None:
                if method.name not in warm:  # what is loaded lazily is not timed
                    ask(method, example, labels_only=labels_only)
                    warm.add(method.name)
                answer = ask(method, example, labels_only=labels_only)
                log.add(answer)
            answers[method.name].append(answer)
        on_example(example)
    return summarise(answers, methods[0].engine.manifest.model.num_layers, labels_only=labels_only)


def _numbered(examples: Sequence[TaskExample]) -> list[str]:
    return [
        f"example {number}, of task {example.task or 'without a name'}"
        for number, example in enumerate(examples, start=1)
    ]
