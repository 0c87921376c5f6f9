"""Who decides at an exit point. A policy names its exit points and judges the evidence there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from .backends import Backend, ExitEvidence
from .manifest import ClassifierSpec, ExitPoint

__all__ = [
    "ClassifierExit",
    "CombinedExit",
    "ExitCheck",
    "ExitPolicy",
    "FixedExit",
    "NoExit",
    "SomeChecks",
    "first_checks",
    "path_places",
]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExitCheck:
    """One look at the sequence's last position.

    Attributes:
        layer: the boundary (1 … L-1) at which it is taken.
        kind: `answer`: the adapted prediction of that boundary (all positions would stop there);
            `context`: the answer after all layers, over translated K,V (all positions but the last
            few would stop).
    """

    layer: int
    kind: Literal["answer", "context"] = "answer"


class ExitPolicy(Protocol):
    """Judges one position, check after check; `state` starts as zeros each time."""

    @property
    def checks(self) -> tuple[ExitCheck, ...]:
        """What the policy wants to see, ascending by layer."""

    @property
    def state_size(self) -> int:
        """Length of the state vector."""

    @property
    def over_candidates(self) -> bool:
        """Whether, of a choice, it judges features over the candidates' rows alone."""

    @property
    def promised(self) -> float | None:
        """Share of disagreement with the full model that its thresholds were chosen for; None where
        none is promised.
        """

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Whether to stop here, and the state for the next check."""


@dataclass(frozen=True)
class NoExit:
    """Mode `off`: every layer, every time."""

    checks: tuple[ExitCheck, ...] = ()
    state_size: int = 0
    over_candidates: bool = True
    promised: float | None = None

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Never asked: there are no checks."""
        return False, state


@dataclass(frozen=True)
class FixedExit:
    """Stops at the same check every time, whatever is found there (a baseline)."""

    layer: int
    state_size: int = 0
    over_candidates: bool = True
    promised: float | None = None
    kind: Literal["answer", "context"] = "answer"

    @property
    def checks(self) -> tuple[ExitCheck, ...]:
        """The one check."""
        return (ExitCheck(self.layer, self.kind),)

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Always stops."""
        return True, state


@dataclass(frozen=True)
class ClassifierExit:
    """Mode `adaptive` (AdaInfer), or `context`: stops where the classifier's score reaches the
    threshold.
    """

    backend: Backend
    graph: str
    exit_layers: tuple[int, ...]
    depths: Mapping[int, float]
    threshold: float
    state_size: int
    kind: Literal["answer", "context"] = "answer"
    over_candidates: bool = False
    promised: float | None = None

    @property
    def checks(self) -> tuple[ExitCheck, ...]:
        """One at each exit point."""
        return tuple(ExitCheck(layer, self.kind) for layer in self.exit_layers)

    @classmethod
    def of(
        cls,
        backend: Backend,
        points: Sequence[ExitPoint],
        classifier: ClassifierSpec,
        num_layers: int,
        threshold: float,
        *,
        kind: Literal["answer", "context"] = "answer",
        over_candidates: bool = False,
        promised: float | None = None,
    ) -> ClassifierExit:
        """One of the manifest's exit graphs with a threshold."""
        layers = tuple(point.exit_layer for point in points)
        depths = {layer: layer / num_layers for layer in layers}
        return cls(
            backend,
            classifier.graph,
            layers,
            depths,
            threshold,
            classifier.state_size,
            kind,
            over_candidates,
            promised,
        )

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Evaluates the classifier graph."""
        score, state = self.score(check.layer, evidence, state)
        return score >= self.threshold, state

    def score(
        self, exit_layer: int, evidence: ExitEvidence, state: Float32
    ) -> tuple[float, Float32]:
        """The score before it is compared, and the next state."""
        return self.backend.classify(self.graph, evidence, self.depths[exit_layer], state)

    def scores(self, evidence: Mapping[ExitCheck, ExitEvidence]) -> tuple[float, ...]:
        """The scores at every check, had none of them stopped."""
        state = np.zeros(self.state_size, np.float32)
        scores = []
        for check in self.checks:
            score, state = self.score(check.layer, evidence[check], state)
            scores.append(score)
        return tuple(scores)


@dataclass(frozen=True)
class CombinedExit:
    """Mode `combined`: answer exits and context exits in turn, each by its own classifier.

    At the same layer the answer exit is asked first: it costs less and saves more.
    """

    answer: ClassifierExit
    context: ClassifierExit
    over_candidates: bool = False
    promised: float | None = None

    @property
    def checks(self) -> tuple[ExitCheck, ...]:
        """Those of both, ascending by layer."""
        both = (*self.answer.checks, *self.context.checks)
        return tuple(sorted(both, key=lambda check: (check.layer, check.kind != "answer")))

    @property
    def state_size(self) -> int:
        """The answer exits' state, then the context exits'."""
        return self.answer.state_size + self.context.state_size

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """By the classifier that the check belongs to."""
        split = self.answer.state_size
        mine, other = state[:split], state[split:]
        if check.kind == "answer":
            stop, mine = self.answer.decide(check, evidence, mine)
        else:
            stop, other = self.context.decide(check, evidence, other)
        return stop, np.concatenate([mine, other])


@dataclass(frozen=True)
class SomeChecks:
    """Another policy, asked at some of its checks alone.

    Attributes:
        promised: None: thresholds were chosen for all checks together, and a later one may go wrong
            where one that is left out would have stopped in time. Of the first checks alone see
            `first_checks`.
    """

    policy: ExitPolicy
    checks: tuple[ExitCheck, ...]
    promised: float | None = None

    @property
    def state_size(self) -> int:
        """The policy's."""
        return self.policy.state_size

    @property
    def over_candidates(self) -> bool:
        """The policy's."""
        return self.policy.over_candidates

    def decide(
        self, check: ExitCheck, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """The policy's decision."""
        return self.policy.decide(check, evidence, state)


def first_checks(policy: ExitPolicy, count: int) -> ExitPolicy:
    """A policy that gives up after so many checks.

    It either stops where the whole policy stops, knowing the same, or runs the full model: whatever
    the reason for the count, it is wrong on no prompt on which the whole policy is right. So it
    promises what that one promises.
    """
    if count == len(policy.checks):
        return policy
    return SomeChecks(policy, policy.checks[:count], policy.promised)


def path_places(
    scores: npt.NDArray[np.float64], thresholds: Sequence[float]
) -> npt.NDArray[np.float64]:
    """What one graph's scores are worth on a path of falling thresholds: minus the first place at
    which each is accepted, minus infinity where none is. (One scale for two graphs' scores.)
    """
    place = np.searchsorted(-np.array(thresholds), -scores, side="left")
    return np.where(place < len(thresholds), -place.astype(np.float64), -np.inf)
