"""What prompts ask, by which the parts of the data are kept apart.

Parts that share no prompt may still share questions: several prompts ask the same one after
different examples, and a few-shot prompt answers other prompts' questions in its examples, whose
answers are fitted on too. What exits are judged on must not be among either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.few_shot import solved_questions
from adainfer_runtime.fitted_on import Question, asked
from adainfer_runtime.tasks import TaskExample

__all__ = [
    "Questions",
    "first_of_each",
    "positions_to_fit",
    "questions_of",
    "solved_by",
]

Int64 = npt.NDArray[np.int64]

Questions = frozenset[Question]


def questions_of(examples: Iterable[TaskExample]) -> Questions:
    """What prompts ask."""
    return frozenset(asked(example) for example in examples)


def solved_by(examples: Iterable[TaskExample]) -> Questions:
    """What the examples in prompts answer."""
    return frozenset(
        (example.task, text) for example in examples for text in solved_questions(example.prompt)
    )


def first_of_each(examples: Iterable[TaskExample]) -> tuple[TaskExample, ...]:
    """One prompt per question: those that share one are not independent."""
    firsts: dict[Question, TaskExample] = {}
    for example in examples:
        firsts.setdefault(asked(example), example)
    return tuple(firsts.values())


def positions_to_fit(
    engine: Engine,
    example: TaskExample,
    ids: Sequence[int],
    answers: Int64,
    held_out: Collection[Question],
) -> Int64:
    """Those of a prompt's answer positions that answer none of the held-out questions.

    Args:
        answers: ascending, the prompt's own last: that one always stays.
    """
    hidden = tuple(text for _, text in solved_by([example]).intersection(held_out))
    if not hidden:
        return answers

    def fits(position: int) -> bool:
        text = engine.tokenizer.decode(list(ids[: position + 1]))
        return not " ".join(text.split()).endswith(hidden)

    kept = [position for position in answers[:-1].tolist() if fits(position)]
    return np.array([*kept, answers[-1]], np.int64)
