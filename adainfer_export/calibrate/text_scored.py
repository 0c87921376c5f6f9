"""Texts after context exits: what each exit of each prompt would have written.

The context exit decides once, on the prompt: either its positions stop at one of the exit points,
and the rest of the text is decoded by all layers over translated K and V, or they stop nowhere, and
the text is the full model's. So one text per exit point and one without exits say what any
threshold would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine, FixedExit
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.exit_policy import ExitPolicy, NoExit
from adainfer_runtime.generation_options import GenerationOptions
from adainfer_runtime.tasks import TaskExample
from adainfer_runtime.text_request import finish, prepare

from ..progress import Reporter
from .scored import CONTEXT, Scored, observe
from .text_loss import WrittenText, differing_shares, first_difference, teacher_forced_share

__all__ = ["TextScored", "observe_texts", "takes_text"]

Float64 = npt.NDArray[np.float64]


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
    writer = _Writer(engine, max_new_tokens)
    differing = np.zeros((len(scored.numbers), len(policies), max_new_tokens))
    teacher_forced = np.zeros(differing.shape[:2])
    for row, number in enumerate(scored.numbers):
        task = examples[number].task
        prompt = engine.tokenizer.encode(examples[number].prompt)
        full = writer.write(prompt, NoExit())
        reporter.step(task)
        for column, policy in enumerate(policies):
            early = writer.write(prompt, policy)
            differing[row, column] = differing_shares(early, full, max_new_tokens)
            teacher_forced[row, column] = writer.teacher_forced(prompt, early, full)
            reporter.step(task)
    return TextScored(scored, differing, teacher_forced)


@dataclass(frozen=True)
class _Writer:
    """Texts as requests with KV policy `translated` get them."""

    engine: Engine
    max_new_tokens: int

    def write(self, prompt: Sequence[int], policy: ExitPolicy) -> WrittenText:
        options = GenerationOptions(
            max_new_tokens=self.max_new_tokens,
            mode="context",
            decoding=DecodeOptions(kv_policy="translated"),
        )
        request = replace(prepare(self.engine, prompt, options), policy=policy)
        return WrittenText.of(finish(request.run_on_borrowed()))

    def teacher_forced(self, prompt: Sequence[int], early: WrittenText, full: WrittenText) -> float:
        """The share by the full model's choices, in one pass behind the first difference."""
        first = first_difference(early, full)
        if first is None:
            return 0.0
        places = len(early.places)
        choices: list[int] = []
        if first + 1 < places:
            with self.engine.borrow() as session:
                session.extend([*prompt, *early.tokens[: places - 1]])
                choices = session.verify_tokens(len(prompt) + first).tolist()
        eos = self.engine.manifest.model.eos_token_ids
        return teacher_forced_share(early, first, choices, eos)


def _taken(scored: Scored, values: Float64, threshold: float) -> Float64:
    leaving, first = scored.leave(threshold)
    taken: Float64 = values[np.arange(len(first)), first]
    taken[~leaving] = 0.0
    return taken
