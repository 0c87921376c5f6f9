"""What certificates over texts need to know of texts at a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["TextOutcome", "Texts", "largest_sum"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TextOutcome:
    """Texts as they are written at one threshold; shares as in `text_loss`.

    Attributes:
        differing: `[texts, lengths]`, for lengths from 1 to that of the texts.
        teacher_forced: `[texts]`, of whole texts.
        exits: `[texts]`, whether anything stopped early.
        layers_saved: mean share of layers, see `TextCertificateLevel`.
    """

    threshold: float
    differing: Float64
    teacher_forced: Float64
    exits: npt.NDArray[np.bool_]
    layers_saved: float

    @property
    def largest(self) -> float:
        """The largest sum of differing shares over texts, among the lengths."""
        return largest_sum(self.differing)


class Texts(Protocol):
    """The texts of some prompts under one frozen exit graph."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Name of each text's task."""

    def at(self, threshold: float) -> TextOutcome:
        """The texts at a threshold."""

    def means_something(self, outcome: TextOutcome, level: float, confidence: float) -> bool:
        """Whether exits, not their absence, are what keeps the level."""


def largest_sum(differing: Float64) -> float:
    """Of `[texts, lengths]`, the largest sum over texts among the lengths."""
    return float(differing.sum(axis=0).max())
