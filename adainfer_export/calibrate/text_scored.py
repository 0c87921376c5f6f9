"""Texts after context exits: what each exit of each prompt would have written.

The context exit decides once, on the prompt: either its positions stop at one of the exit points,
and the rest of the text is decoded by all layers over translated K and V, or they stop nowhere, and
the text is the full model's. So one text per exit point and one without exits say what any
threshold would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine, FixedExit
from adainfer_runtime.exit_policy import NoExit
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .hoeffding_bentkus import p_value
from .scored import CONTEXT, Scored, observe
from .select import evaluate
from .text_loss import differing_shares
from .text_outcome import TextOutcome
from .text_writer import TextWriter

__all__ = ["TextScored", "observe_texts", "takes_text"]

Float64 = npt.NDArray[np.float64]

_CERTAIN = 1.0 - 1e-9


@dataclass(frozen=True)
class TextScored:
    """Texts at the exit points of one frozen context exit; shares as in `text_loss`.

    Attributes:
        scored: the prompts, and what the first tokens are.
        differing: `[texts, points, lengths]`, for lengths from 1 to that of the texts.
        teacher_forced: `[texts, points]`, of whole texts.
    """

    scored: Scored
    differing: Float64
    teacher_forced: Float64

    @property
    def tasks(self) -> tuple[str, ...]:
        """Name of each text's task."""
        return self.scored.tasks

    def at(self, threshold: float) -> TextOutcome:
        """The texts at a threshold."""
        leaving, _ = self.scored.leave(threshold)
        return TextOutcome(
            threshold,
            self.differing_at(threshold),
            self.teacher_forced_at(threshold),
            leaving,
            evaluate(self.scored, threshold).layers_saved,
        )

    def means_something(self, outcome: TextOutcome, level: float, confidence: float) -> bool:
        """Whether texts that exit differ less than if all did, by whole texts."""
        leaving, first = self.scored.leave(outcome.threshold)
        if not leaving.any():
            return False
        whole = self.differing[:, :, -1]
        blind = float(whole.mean(axis=0)[first[leaving]].mean())
        if blind <= level:
            return True
        total = float(whole[leaving, first[leaving]].sum())
        tested = p_value(total, int(leaving.sum()), min(blind, _CERTAIN))
        return bool(tested <= 1.0 - confidence)

    def differing_at(self, threshold: float) -> Float64:
        """`[texts, lengths]`; 0 of texts whose prompt does not exit: they are the full model's."""
        return _taken(self.scored, self.differing, threshold)

    def teacher_forced_at(self, threshold: float) -> Float64:
        """`[texts]`, likewise."""
        return _taken(self.scored, self.teacher_forced, threshold)


def takes_text(engine: Engine, example: TaskExample, max_new_tokens: int) -> bool:
    """Whether the prompt has a context, and fits the engine together with the new tokens."""
    tokens = len(engine.tokenizer.encode(example.prompt))
    return 1 < tokens <= engine.manifest.max_seq_len - max_new_tokens + 1


def observe_texts(
    engine: Engine, examples: Sequence[TaskExample], max_new_tokens: int, reporter: Reporter
) -> TextScored:
    """Writes one text per prompt without exits, and one per prompt and exit point.

    Args:
        engine: with a context exit that has points.
        examples: at least one, all of which it takes (`takes_text`).
    """
    reporter.begin("looking at exits", len(examples))
    scored = observe(engine, examples, {}, reporter)[CONTEXT]
    policies = [FixedExit(layer, kind="context") for layer in scored.layers]
    reporter.begin("writing texts", len(scored.numbers) * (1 + len(policies)))
    writer = TextWriter(engine, max_new_tokens, "context", "translated")
    differing = np.zeros((len(scored.numbers), len(policies), max_new_tokens))
    teacher_forced = np.zeros(differing.shape[:2])
    for row, number in enumerate(scored.numbers):
        task = examples[number].task
        prompt = engine.tokenizer.encode(examples[number].prompt)
        full, _ = writer.write(prompt, NoExit())
        reporter.step(task)
        for column, policy in enumerate(policies):
            early, _ = writer.write(prompt, policy)
            differing[row, column] = differing_shares(early, full, max_new_tokens)
            teacher_forced[row, column] = writer.teacher_forced(prompt, early, full)
            reporter.step(task)
    return TextScored(scored, differing, teacher_forced)


def _taken(scored: Scored, values: Float64, threshold: float) -> Float64:
    leaving, first = scored.leave(threshold)
    taken: Float64 = values[np.arange(len(first)), first]
    taken[~leaving] = 0.0
    return taken
