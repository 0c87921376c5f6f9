"""What a text loses against the full model's: the share of its tokens that differ.

Two shares are told apart. *Differing*: place by place against the text that the full model writes
by itself (free running), as CALM (arXiv 2207.07061) takes its textual risk: what a user who had
asked for all layers would have got. One early divergence counts for all that follows, unless the
texts meet again, and a text that says the same one word later differs wholly: it is the strictest
of such measures (the edit distance between two texts, by the longer one's length, is never
greater). *Teacher-forced*: at each place of the text that was written, whether the full model, over
the same prompt and the same tokens before, would have chosen another token. It tells how often the
text departs from the model, not how far it gets; a user is promised the former only through the
latter, so the former is certified and the latter reported.

The end of a text is a token of it, whichever end-of-text token says so. Places that only one of two
texts has differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime.results import GenerationResult

__all__ = ["WrittenText", "differing_shares", "first_difference", "teacher_forced_share"]

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_END = -1  # no token has this id


@dataclass(frozen=True)
class WrittenText:
    """New tokens, and whether the model ended the text with one that is not among them."""

    tokens: tuple[int, ...]
    ended: bool

    @classmethod
    def of(cls, result: GenerationResult) -> WrittenText:
        """What a request wrote, if nothing but the model or the length ended it."""
        return cls(result.tokens, result.finish_reason == "eos")

    @property
    def places(self) -> Int64:
        """`[places]`: the tokens, and -1 for an end."""
        return np.array([*self.tokens, *([_END] if self.ended else [])], np.int64)


def differing_shares(early: WrittenText, full: WrittenText, length: int) -> Float64:
    """`[length]`: of the texts cut to 1, 2 … `length` places, the share at which they differ.

    Places behind the end of both are none: the share stays what it was.

    Args:
        length: at least that of either text, its end included.
    """
    differs = _differs(early, full)
    known: Float64 = np.cumsum(differs) / np.arange(1, len(differs) + 1)
    return np.append(known, np.full(length - len(known), known[-1]))


def first_difference(early: WrittenText, full: WrittenText) -> int | None:
    """The first place (0-based) at which two texts differ; both have it."""
    differs = _differs(early, full)
    return int(differs.argmax()) if differs.any() else None


def teacher_forced_share(
    early: WrittenText, first: int, choices: Sequence[int], eos_token_ids: Sequence[int]
) -> float:
    """Of the places of a text, the share at which the full model would have chosen otherwise.

    Args:
        first: the first place at which the full model's own text differs: so far its choices are
            known, and there they are broken for the first time.
        choices: the full model's tokens at the places behind it, over the text's own prefix.
    """
    places = early.places
    ends = np.isin(choices, eos_token_ids)
    chosen = np.where(ends, _END, np.asarray(choices, np.int64))
    return float(1 + (chosen != places[first + 1 :]).sum()) / len(places)


def _differs(early: WrittenText, full: WrittenText) -> npt.NDArray[np.bool_]:
    """`[places]` of the longer one."""
    mine, own = early.places, full.places
    common = min(len(mine), len(own))
    longer = max(len(mine), len(own))
    return np.append(mine[:common] != own[:common], np.ones(longer - common, np.bool_))
