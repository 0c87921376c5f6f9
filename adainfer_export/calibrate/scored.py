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

__all__ = ["CHOICE", "CONTEXT", "Scored", "observe", "observe_context", "score_predictions"]

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
        check_layers: time of one check in units of one layer over one prompt;
            `exit_check_layers` of the one that an exit is taken at, see `Predictions`.
    """

    layers: tuple[int, ...]
    num_layers: int
    scores: Float64
    agrees: npt.NDArray[np.bool_]
    tasks: tuple[str, ...]
    check_layers: float
    exit_check_layers: float = 0.0

    @classmethod
    def concatenate(cls, parts: Sequence[Scored]) -> Scored:
        """Different prompts at the same exit points."""
        return replace(
            parts[0],
            scores=np.concatenate([part.scores for part in parts]),
            agrees=np.concatenate([part.agrees for part in parts]),
            tasks=tuple(task for part in parts for task in part.tasks),
        )

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
    )


def observe(
    engine: Engine,
    examples: Iterable[TaskExample],
    check_layers: Mapping[str, float],
    reporter: Reporter,
    against: Literal["model", "gold"] = "model",
) -> dict[str, Scored]:
    """The exit graphs as they run, by name: every exit point of every prompt, and the full model.

    The graph for choices sees the prompts that have labels.

    Args:
        check_layers: of each graph, see `Scored`; graphs without one get 0.
        against: with `gold` an exit agrees unless it spoils an answer that the full model has
            right; every example must have an answer.

    Raises:
        ExitUnavailableError: the engine has no exit graph.
    """
    manifest = engine.manifest
    policies: dict[str, ExitPolicy] = {
        kind: engine.policy("adaptive", classifier=kind) for kind in manifest.exit_graphs
    }
    if manifest.choice_exit is not None and manifest.choice_exit.classifier is not None:
        policies[CHOICE] = engine.choice_policy("adaptive")
    watches = {name: _Watch(policy) for name, policy in policies.items()}
    for example in examples:
        candidates = candidates_of(engine, example)
        questions = [None, np.array(candidates, np.int64)] if candidates else [None]
        with engine.borrow() as session:
            session.extend(engine.tokenizer.encode(example.prompt))
            seen = session.observe(manifest.exit_points, questions)
        gold = _first_token(engine, example) if against == "gold" else None
        for name, watch in watches.items():
            if name != CHOICE or candidates:
                watch.add(example.task, seen[-1 if name == CHOICE else 0], gold)
        reporter.step(example.task)
    layers = manifest.model.num_layers
    return {
        name: watch.scored(layers, check_layers.get(name, 0.0)) for name, watch in watches.items()
    }


def observe_context(
    engine: Engine,
    examples: Iterable[TaskExample],
    check_layers: float,
    reporter: Reporter,
    against: Literal["model", "gold"] = "model",
) -> Scored:
    """The same of the context exit; prompts of one token have no context and are left out.

    Raises:
        ExitUnavailableError: the engine has no context exit.
    """
    watch = _Watch(engine.policy("context"))
    for example in examples:
        ids = engine.tokenizer.encode(example.prompt)
        reporter.step(example.task)
        if len(ids) < 2:
            continue
        with engine.borrow() as session:
            session.extend(ids)
            seen = session.observe_context(engine.manifest.context_points)
        gold = _first_token(engine, example) if against == "gold" else None
        watch.add(example.task, seen, gold)
    scored = watch.scored(engine.manifest.model.num_layers, check_layers)
    return replace(scored, exit_check_layers=check_layers)


class _Watch:
    """One exit graph, prompt after prompt."""

    def __init__(self, policy: ExitPolicy) -> None:
        assert isinstance(policy, ClassifierExit)  # it has an exit graph
        self._policy = policy
        self._scores: list[tuple[float, ...]] = []
        self._agrees: list[list[bool]] = []
        self._tasks: list[str] = []

    def add(self, task: str, seen: Observation, gold: int | None) -> None:
        harmless = gold is not None and seen.full.token != gold
        tokens = [seen.evidence[layer].result.token for layer in self._policy.exit_layers]
        self._scores.append(self._policy.scores(seen.evidence))
        self._agrees.append([harmless or token == seen.full.token for token in tokens])
        self._tasks.append(task)

    def scored(self, num_layers: int, check_layers: float) -> Scored:
        layers = self._policy.exit_layers
        shape = (len(self._tasks), len(layers))
        return Scored(
            layers,
            num_layers,
            np.array(self._scores, np.float64).reshape(shape),
            np.array(self._agrees, np.bool_).reshape(shape),
            tuple(self._tasks),
            check_layers,
        )


def _first_token(engine: Engine, example: TaskExample) -> int:
    assert example.answer is not None  # callers leave others out
    (tokens,) = engine.label_tokens(example.prompt, [example.answer])
    return int(tokens[0])
