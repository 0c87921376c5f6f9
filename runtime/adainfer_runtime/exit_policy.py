"""Who decides at an exit point. A policy names its exit points and judges the evidence there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .backends import Backend, ExitEvidence
from .manifest import ClassifierSpec, ExitPoint

__all__ = ["ClassifierExit", "ExitPolicy", "FixedExit", "NoExit"]

Float32 = npt.NDArray[np.float32]


class ExitPolicy(Protocol):
    """Judges one position, exit point after exit point; `state` starts as zeros each time."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Boundaries at which the policy wants to be asked, ascending."""

    @property
    def state_size(self) -> int:
        """Length of the state vector."""

    @property
    def translates(self) -> bool:
        """Whether it judges a context exit: the last position's answer over translated K,V."""

    @property
    def over_candidates(self) -> bool:
        """Whether, of a choice, it judges features over the candidates' rows alone."""

    def decide(
        self, exit_layer: int, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Whether to stop here, and the state for the next exit point."""


@dataclass(frozen=True)
class NoExit:
    """Mode `off`: every layer, every time."""

    exit_layers: tuple[int, ...] = ()
    state_size: int = 0
    over_candidates: bool = True
    translates: bool = False

    def decide(
        self, exit_layer: int, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Never asked: there are no exit points."""
        return False, state


@dataclass(frozen=True)
class FixedExit:
    """Stops at the same layer every time, whatever is found there (a baseline)."""

    layer: int
    state_size: int = 0
    over_candidates: bool = True
    translates: bool = False

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    def decide(
        self, exit_layer: int, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Always stops."""
        return True, state


@dataclass(frozen=True)
class ClassifierExit:
    """Mode `adaptive` (AdaInfer): stops where the classifier's score reaches the threshold.

    `promised` is the share of disagreement with the full model that the threshold was chosen for;
    None for one that promises none.
    """

    backend: Backend
    graph: str
    exit_layers: tuple[int, ...]
    depths: Mapping[int, float]
    threshold: float
    state_size: int
    over_candidates: bool = False
    translates: bool = False
    promised: float | None = None

    @classmethod
    def of(
        cls,
        backend: Backend,
        points: Sequence[ExitPoint],
        classifier: ClassifierSpec,
        num_layers: int,
        threshold: float,
        *,
        over_candidates: bool = False,
        translates: bool = False,
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
            over_candidates,
            translates,
            promised,
        )

    def decide(
        self, exit_layer: int, evidence: ExitEvidence, state: Float32
    ) -> tuple[bool, Float32]:
        """Evaluates the classifier graph."""
        score, state = self.score(exit_layer, evidence, state)
        return score >= self.threshold, state

    def score(
        self, exit_layer: int, evidence: ExitEvidence, state: Float32
    ) -> tuple[float, Float32]:
        """The score before it is compared, and the next state."""
        return self.backend.classify(self.graph, evidence, self.depths[exit_layer], state)

    def scores(self, evidence: Mapping[int, ExitEvidence]) -> tuple[float, ...]:
        """The scores at every exit point, had none of them stopped."""
        state = np.zeros(self.state_size, np.float32)
        scores = []
        for layer in self.exit_layers:
            score, state = self.score(layer, evidence[layer], state)
            scores.append(score)
        return tuple(scores)
