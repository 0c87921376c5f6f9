"""Scores of an exit graph on prompts, with what it would have answered: what thresholds see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.exit_policy import ClassifierExit, ExitPolicy
from adainfer_runtime.session import Observation
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .classifiers import ExitClassifier
from .predictions import Predictions
from .traces import candidates_of

__all__ = ["CHOICE", "CONTEXT", "Scored", "observe", "score_predictions"]

Float64 = npt.NDArray[np.float64]

CHOICE, CONTEXT = "choice", "context"  # names of the graphs beside those of answers


@dataclass(frozen=True)
class Scored:
    """Prompts at the exit points of one frozen exit graph.

    Attributes:
        layers: exit layers, ascending.
        scores: `[prompts, points]`.
        agrees: `[prompts, points]`, whether an exit there gives the full model's answer.
        tasks: name of each prompt's task.
        check_layers: `[points]`, time of one check in units of one layer over one prompt;
            `exit_check_layers` of the one that an exit is taken at, see `Predictions`.
        prompts: `[prompts]`, ascending numbers that name the prompts; None: 0, 1, 2 …
        lengths: `[prompts]`, tokens of each; None where nobody asks.
    """

    layers: tuple[int, ...]
    num_layers: int
    scores: Float64
    agrees: npt.NDArray[np.bool_]
    tasks: tuple[str, ...]
    check_layers: tuple[float, ...]
    exit_check_layers: tuple[float, ...]
    prompts: npt.NDArray[np.int64] | None = None
    lengths: npt.NDArray[np.int64] | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[Scored]) -> Scored:
        """Different prompts at the same exit points."""
        return replace(
            parts[0],
            scores=np.concatenate([part.scores for part in parts]),
            agrees=np.concatenate([part.agrees for part in parts]),
            tasks=tuple(task for part in parts for task in part.tasks),
            prompts=None,
            lengths=None,
        )

    def rows(self, chosen: npt.NDArray[np.bool_]) -> Scored:
        """Only these prompts."""
        return replace(
            self,
            scores=self.scores[chosen],
            agrees=self.agrees[chosen],
            tasks=tuple(np.array(self.tasks, object)[chosen]),
            prompts=self.numbers[chosen],
            lengths=None if self.lengths is None else self.lengths[chosen],
        )

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """`[prompts]`, the names of the prompts."""
        return np.arange(len(self.scores)) if self.prompts is None else self.prompts

    def check_time(self, threshold: float) -> Float64:
        """`[prompts]`, time of the checks that a prompt goes through, in layers."""
        leaving, first = self.leave(threshold)
        passed = np.append(0.0, np.cumsum(self.check_layers))
        before = passed[np.where(leaving, first, len(self.layers))]
        last: Float64 = np.where(leaving, np.array(self.exit_check_layers)[first], 0.0)
        return before + last

    def leave(self, threshold: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which prompts exit, and at which point (the first whose score reaches the threshold)."""
        exits = self.scores >= threshold
        leaving: npt.NDArray[np.bool_] = np.asarray(exits.any(axis=1))
        return leaving, exits.argmax(axis=1)

    def wrong(self, threshold: float) -> npt.NDArray[np.bool_]:
        """`[prompts]`, whether a prompt exits with another answer than the full model's."""
        leaving, first = self.leave(threshold)
        wrong: npt.NDArray[np.bool_] = leaving & ~self.agrees[np.arange(len(first)), first]
        return wrong

    def exit_shares(self, grid: Float64) -> tuple[tuple[float, ...], ...]:
        """Per threshold, the share of prompts that leaves at each point."""
        shares = []
        for threshold in grid:
            leaving, first = self.leave(float(threshold))
            counts = np.bincount(first[leaving], minlength=len(self.layers))
            shares.append(tuple(np.round(counts / max(len(first), 1), 4).tolist()))
        return tuple(shares)

    def task_weights(self) -> Float64:
        """`[prompts]`, summing to 1, the same sum for every task: for means over tasks."""
        _, index, counts = np.unique(self.tasks, return_inverse=True, return_counts=True)
        weights: Float64 = 1.0 / (counts[index] * len(counts))
        return weights


def score_predictions(classifier: ExitClassifier, predictions: Predictions) -> Scored:
    """The fitted classifier on traced predictions."""
    chosen = predictions.at(classifier.layers)
    return Scored(
        classifier.layers,
        chosen.num_layers,
        classifier.scores(predictions),
        chosen.agrees,
        chosen.tasks,
        chosen.check_layers,
        chosen.exit_check_layers,
        chosen.groups,
    )


def observe(
    engine: Engine,
    examples: Iterable[TaskExample],
    check_layers: Mapping[str, tuple[float, ...]],
    reporter: Reporter,
    against: Literal["model", "gold"] = "model",
) -> dict[str, Scored]:
    """The exit graphs as they run, by name: every check of every prompt, and the full model.

    The graph for choices sees the prompts that have labels, context exits those of two tokens or
    more.

    Args:
        check_layers: of each graph's checks, see `Scored`; of graphs that are not in it 0.
        against: with `gold` an exit agrees unless it spoils an answer that the full model has
            right; every example must have an answer.
    """
    watches = {
        name: _Watch(policy, check_layers.get(name, (0.0,) * len(policy.checks)))
        for name, policy in _policies(engine)
    }
    checks = {check for watch in watches.values() for check in watch.policy.checks}
    answers = {check for check in checks if check.kind == "answer"}
    for number, example in enumerate(examples):
        candidates = candidates_of(engine, example)
        questions = [None, np.array(candidates, np.int64)] if candidates else [None]
        ids = engine.tokenizer.encode(example.prompt)
        has_context = len(ids) > 1
        with engine.borrow() as session:
            session.extend(ids)
            seen = session.observe(checks if has_context else answers, questions)
        gold = _first_token(engine, example) if against == "gold" else None
        for name, watch in watches.items():
            if (name != CHOICE or candidates) and (name != CONTEXT or has_context):
                watch.add(number, example.task, len(ids), seen[-1 if name == CHOICE else 0], gold)
        reporter.step(example.task)
    layers = engine.manifest.model.num_layers
    return {name: watch.scored(layers) for name, watch in watches.items()}


def _policies(engine: Engine) -> Iterable[tuple[str, ExitPolicy]]:
    manifest = engine.manifest
    for kind in manifest.exit_graphs:
        yield kind, engine.policy("adaptive", classifier=kind)
    if manifest.choice_exit is not None and manifest.choice_exit.classifier is not None:
        yield CHOICE, engine.choice_policy("adaptive")
    if manifest.context_exit is not None:
        yield CONTEXT, engine.policy("context")


class _Watch:
    """One exit graph, prompt after prompt."""

    def __init__(self, policy: ExitPolicy, check_layers: tuple[float, ...]) -> None:
        assert isinstance(policy, ClassifierExit)  # it has an exit graph
        self.policy = policy
        self._check_layers = check_layers
        self._scores: list[tuple[float, ...]] = []
        self._agrees: list[list[bool]] = []
        self._tasks: list[str] = []
        self._prompts: list[int] = []
        self._lengths: list[int] = []

    def add(self, number: int, task: str, length: int, seen: Observation, gold: int | None) -> None:
        harmless = gold is not None and seen.full.token != gold
        tokens = [seen.evidence[check].result.token for check in self.policy.checks]
        self._scores.append(self.policy.scores(seen.evidence))
        self._agrees.append([harmless or token == seen.full.token for token in tokens])
        self._tasks.append(task)
        self._prompts.append(number)
        self._lengths.append(length)

    def scored(self, num_layers: int) -> Scored:
        layers = self.policy.exit_layers
        # An answer exit's own check is the answer's probe, which the full model pays too.
        pays_twice = any(check.kind == "context" for check in self.policy.checks)
        shape = (len(self._tasks), len(layers))
        return Scored(
            layers,
            num_layers,
            np.array(self._scores, np.float64).reshape(shape),
            np.array(self._agrees, np.bool_).reshape(shape),
            tuple(self._tasks),
            self._check_layers,
            self._check_layers if pays_twice else (0.0,) * len(layers),
            np.array(self._prompts, np.int64),
            np.array(self._lengths, np.int64),
        )


def _first_token(engine: Engine, example: TaskExample) -> int:
    assert example.answer is not None  # callers leave others out
    (tokens,) = engine.label_tokens(example.prompt, [example.answer])
    return int(tokens[0])
