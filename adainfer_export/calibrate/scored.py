"""Scores of an exit graph on prompts, with what it would have answered: what thresholds see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.exit_policy import ClassifierExit
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .classifiers import ExitClassifier, score_all
from .predictions import Predictions

__all__ = ["Scored", "observe", "score_predictions"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Prompts at the exit points of one frozen exit graph.

    Attributes:
        layers: exit layers, ascending.
        scores: `[prompts, points]`.
        agrees: `[prompts, points]`, whether an exit there gives the full model's answer.
        tasks: name of each prompt's task.
        check_layers: time of one check in units of one layer over one prompt.
    """

    layers: tuple[int, ...]
    num_layers: int
    scores: Float64
    agrees: npt.NDArray[np.bool_]
    tasks: tuple[str, ...]
    check_layers: float

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
        score_all(classifier, chosen),
        chosen.agrees,
        chosen.tasks,
        chosen.check_layers,
    )


def observe(
    engine: Engine, examples: Iterable[TaskExample], check_layers: float, reporter: Reporter
) -> dict[str, Scored]:
    """The exit graphs as they run, by kind: every exit point of every prompt, and the full model.

    Raises:
        ExitUnavailableError: the engine has no exit graph.
    """
    policies = {
        kind: engine.policy("adaptive", classifier=kind) for kind in engine.manifest.exit_graphs
    }
    layers = tuple(engine.manifest.exit_points)
    scores: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in policies}
    agrees: list[list[bool]] = []
    tasks: list[str] = []
    for example in examples:
        with engine.borrow() as session:
            session.extend(engine.tokenizer.encode(example.prompt))
            seen = session.observe(layers)
        for kind, policy in policies.items():
            assert isinstance(policy, ClassifierExit)  # exit graphs have a classifier
            scores[kind].append(policy.scores(seen.evidence))
        agrees.append([seen.evidence[n].result.token == seen.full.token for n in layers])
        tasks.append(example.task)
        reporter.step(example.task)
    agreement = np.array(agrees, np.bool_).reshape(len(tasks), len(layers))
    return {
        kind: Scored(
            policy.exit_layers,
            engine.manifest.model.num_layers,
            np.array(scores[kind], np.float64).reshape(len(tasks), -1),
            agreement[:, [layers.index(layer) for layer in policy.exit_layers]],
            tuple(tasks),
            check_layers,
        )
        for kind, policy in policies.items()
    }
