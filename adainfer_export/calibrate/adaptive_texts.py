"""Texts of mode `adaptive`: every token may leave early, by the same threshold.

What follows an early exit depends on all before it, so that a text is written for each threshold;
but one that no score of the text lies between and the last one would write the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.backends import ExitEvidence
from adainfer_runtime.exit_policy import ClassifierExit, ExitCheck, NoExit
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .text_loss import WrittenText, differing_shares
from .text_outcome import TextOutcome
from .text_writer import TextWriter

__all__ = ["AdaptiveTexts"]

Float32 = npt.NDArray[np.float32]


class AdaptiveTexts:
    """Writes them as they are asked for, from safer thresholds to less safe ones.

    Args:
        policy: the frozen answer exits.
        examples: at least one, all of which the engine takes with the new tokens.
        thresholds: how many will be asked for at most.
    """

    def __init__(
        self,
        engine: Engine,
        policy: ClassifierExit,
        examples: Sequence[TaskExample],
        max_new_tokens: int,
        thresholds: int,
        reporter: Reporter,
    ) -> None:
        self.tasks = tuple(example.task for example in examples)
        self._policy, self._reporter = policy, reporter
        self._writer = TextWriter(engine, max_new_tokens, "adaptive", "deferred")
        self._prompts = [engine.tokenizer.encode(example.prompt) for example in examples]
        self._full: list[WrittenText] = []
        self._known: list[_Text] = []
        reporter.begin("writing texts", len(examples))
        for prompt, task in zip(self._prompts, self.tasks, strict=True):
            self._full.append(self._writer.write(prompt, NoExit())[0])
            reporter.step(task)
        reporter.begin("trying thresholds", thresholds)

    def at(self, threshold: float) -> TextOutcome:
        """The texts at a threshold that is no safer than the last one asked for."""
        texts = []
        for row in range(len(self.tasks)):
            known = self._known[row] if self._known else None
            stays = known is not None and known.next_score < threshold
            texts.append(known if known is not None and stays else self._write(row, threshold))
        self._reporter.step()
        self._known = texts
        return TextOutcome(
            threshold,
            np.array([text.differing for text in texts]),
            np.array([text.teacher_forced for text in texts]),
            np.array([text.exits for text in texts]),
            float(np.mean([text.layers_saved for text in texts])),
        )

    def means_something(self, outcome: TextOutcome, level: float, confidence: float) -> bool:
        """Whether any text has exits. (What blind ones would write depends on where they are.)"""
        return bool(outcome.exits.any())

    def _write(self, row: int, threshold: float) -> _Text:
        prompt, full = self._prompts[row], self._full[row]
        watched = _WatchedExit(self._policy, threshold)
        early, result = self._writer.write(prompt, watched)
        return _Text(
            differing_shares(early, full, self._writer.max_new_tokens),
            self._writer.teacher_forced(prompt, early, full),
            watched.exits > 0,
            result.layers_saved,
            watched.next_score,
        )


@dataclass(frozen=True)
class _Text:
    """One text at one threshold, against the full model's.

    Attributes:
        next_score: the largest below the threshold: any threshold above it writes the same text.
    """

    differing: npt.NDArray[np.float64]
    teacher_forced: float
    exits: bool
    layers_saved: float
    next_score: float


class _WatchedExit:
    """A policy at another threshold, which counts exits, and notes scores that were no exits."""

    over_candidates = False
    promised: float | None = None

    def __init__(self, policy: ClassifierExit, threshold: float) -> None:
        self.checks = policy.checks
        self.state_size = policy.state_size
        self.exits = 0
        self.next_score = -math.inf
        self._policy, self._threshold = policy, threshold

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """By the policy's score."""
        score, state = self._policy.score(check.layer, evidence, state)
        stop = score >= self._threshold
        if stop:
            self.exits += 1
        else:
            self.next_score = max(self.next_score, score)
        return stop, state
