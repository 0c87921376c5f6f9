"""How the next token is taken from logits. A sampler belongs to one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import RequestError
from .logits import (
    add_bias,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_occurrences,
    penalise_repetition,
    softmax,
)
from .sampling_options import SamplingOptions

__all__ = ["Drawn", "Greedy", "MinimumLength", "Sampler", "make_sampler"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class Sampler(Protocol):
    """Turns logits into a distribution, and a distribution into a token."""

    @property
    def plain(self) -> bool:
        """Whether it takes the largest of the unchanged logits: the probe's own token then is the
        answer, and nobody needs the logits.
        """

    def probabilities(self, logits: Float32, tokens: Sequence[int]) -> Float64:
        """The distribution `[vocab_size]` that the next token is drawn from.

        Args:
            logits: `[vocab_size]`, as the probe gives them; not changed.
            tokens: the sequence so far, prompt included (penalties look at it).
        """

    def draw(self, probabilities: Float64) -> int:
        """One token; advances the sampler's random generator."""


class Greedy:
    """The most probable token."""

    plain = True

    def probabilities(self, logits: Float32, tokens: Sequence[int]) -> Float64:
        """All of it on the largest logit."""
        return _all_on_largest(logits)

    def draw(self, probabilities: Float64) -> int:
        """The largest."""
        return int(np.argmax(probabilities))


@dataclass(frozen=True)
class MinimumLength:
    """Forbids tokens that end a text until it has `tokens` tokens."""

    tokens: int = 0
    ends: frozenset[int] = frozenset()


_NO_MINIMUM = MinimumLength()


class Drawn:
    """`SamplingOptions` at work: changed logits, a distribution, and a seeded draw from it.

    Args:
        prompt_length: tokens of the sequence that frequency and presence do not count.

    Token ids in the options must be within the vocabulary.
    """

    plain = False

    def __init__(
        self,
        options: SamplingOptions,
        prompt_length: int,
        minimum: MinimumLength = _NO_MINIMUM,
    ) -> None:
        self._options = options
        self._prompt_length = prompt_length
        self._minimum = minimum
        self._random = np.random.default_rng(options.seed)

    def probabilities(self, logits: Float32, tokens: Sequence[int]) -> Float64:
        """See `SamplingOptions` for the order."""
        options = self._options
        scores = self._scores(logits, tokens)
        if options.greedy:
            return _all_on_largest(scores)
        # From the largest down: however small the temperature, the largest stays 0 and the others
        # fall to minus infinity.
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / options.temperature
        scores = keep_top_k(scores, options.top_k)
        scores = keep_top_p(scores, options.top_p)
        scores = keep_min_p(scores, options.min_p)
        return softmax(scores)

    def draw(self, probabilities: Float64) -> int:
        """A token of probability above 0; the distribution need not sum to 1."""
        if self._options.greedy:
            return int(np.argmax(probabilities))
        cumulative = np.cumsum(probabilities)
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], "right"))
        # Rounding may put the draw on the sum itself: then it is the last token that adds to it.
        last = int(np.searchsorted(cumulative, cumulative[-1], "left"))
        return min(place, last)

    def _scores(self, logits: Float32, tokens: Sequence[int]) -> Float64:
        options, text = self._options, tokens[self._prompt_length :]
        scores = add_bias(logits.astype(np.float64), options.logit_bias)
        scores = penalise_repetition(scores, tokens, options.repetition_penalty)
        scores = penalise_occurrences(
            scores, text, options.frequency_penalty, options.presence_penalty
        )
        if len(text) < self._minimum.tokens and self._minimum.ends:
            scores[sorted(self._minimum.ends)] = -np.inf
        largest = scores.max()
        if largest == -np.inf:
            raise RequestError("logit_bias and min_new_tokens forbid every token")
        if not np.isfinite(largest):
            raise RequestError("logit_bias is too large for the penalties: logits are infinite")
        return scores


def make_sampler(
    options: SamplingOptions,
    prompt_length: int,
    minimum: MinimumLength = _NO_MINIMUM,
) -> Sampler:
    """The sampler of a request: `Greedy` where nothing is drawn and nothing changed."""
    if options.greedy and not options.changes_logits and not minimum.tokens:
        return Greedy()
    return Drawn(options, prompt_length, minimum)


def _all_on_largest(scores: npt.NDArray[np.floating]) -> Float64:
    distribution = np.zeros(len(scores), np.float64)
    distribution[int(np.argmax(scores))] = 1.0
    return distribution
