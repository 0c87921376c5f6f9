"""How an exit graph is to be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CalibrationRequest", "ShortlistRequest"]


@dataclass(frozen=True)
class ShortlistRequest:
    """What proposes the tokens that the LM head then scores.

    Attributes:
        tokens: so many that the model predicts most often; None: a low-rank head proposes.
    """

    tokens: int | None = None


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on, and for what.

    Attributes:
        files: task files; without any, the built-in prompts are taken.
        builtin: the built-in prompts beside files.
        self_texts: texts that the model writes itself, which only adapters and translators are
            fitted on.
        limit: prompts to use at most, a seeded sample of them.
        target_agreement: share of prompts whose answer must equal the full model's.
        adapters: `ridge` fits an affine map per exit point in closed form, `distilled` then
            trains it on the full model's distribution; `none` reads the hidden state as it is, as
            AdaInfer does.
        classifiers: kinds of `classifiers.CLASSIFIERS`, of which each gives an exit graph, the
            first that pays the default one; or `auto` alone for the one that saves most.
        entropy: whether classifiers are also tried with the entropy of the prediction.
        classifier_file: a classifier of one's own (see `classifiers.own`), which then comes first.
        context_exit: whether to fit a context exit as well.
        translators: of context exits, `ridge` in closed form, `distilled` then trained through the
            layers above.
        shortlist: what proposes tokens to a cheaper probe; None: nothing.
    """

    files: tuple[Path, ...] = ()
    builtin: bool = False
    self_texts: int = 0
    limit: int | None = None
    target_agreement: float = 0.99
    adapters: Literal["distilled", "ridge", "none"] = "distilled"
    classifiers: tuple[str, ...] = ("svm",)
    entropy: bool = False
    classifier_file: Path | None = None
    context_exit: bool = False
    translators: Literal["distilled", "ridge"] = "distilled"
    shortlist: ShortlistRequest | None = None
    seed: int = 0

    @property
    def with_builtin(self) -> bool:
        """Whether the built-in prompts are taken."""
        return self.builtin or not self.files

    @property
    def data(self) -> list[str]:
        """Names of the data, for the manifest."""
        words = {"builtin": self.with_builtin, "self": self.self_texts > 0}
        return [word for word, taken in words.items() if taken] + [f.name for f in self.files]
