"""How an exit graph is to be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CalibrationRequest"]


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on, and for what.

    Attributes:
        files: task files; empty for the built-in prompts.
        limit: prompts to use at most, a seeded sample of them.
        target_agreement: share of prompts whose answer must equal the full model's.
        adapters: `ridge` fits an affine map per exit point; `none` reads the hidden state as it
            is, as AdaInfer does.
        classifier: a kind of `classifiers.CLASSIFIERS`, or `auto` for the one that saves most on
            the selection part.
    """

    files: tuple[Path, ...] = ()
    limit: int | None = None
    target_agreement: float = 0.99
    adapters: Literal["ridge", "none"] = "ridge"
    classifier: str = "svm"
    seed: int = 0
