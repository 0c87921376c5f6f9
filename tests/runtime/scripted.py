"""Stand-ins for what tests want to force: a model of a few tokens, and drafts by script."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adainfer_runtime.backends import ExitEvidence, ProbeResult
from adainfer_runtime.session import Prediction
from adainfer_runtime.verified import Draft


class ScriptedDrafter:
    """The full model's own text as drafts, except where the script wants a wrong token."""

    def __init__(self, layer, text, wrong, vocabulary):
        self.layer, self._text = layer, text
        self._wrong, self._vocabulary = set(wrong), vocabulary

    def propose(self, session, sampler):
        session.advance(self.layer)
        place = session.length
        token = self._text[place] if place < len(self._text) else 0
        if place in self._wrong:
            token = (token + 7) % self._vocabulary
        return Draft(token, self.layer)


@dataclass
class SoftmaxSampler:
    """Plain temperature-1 sampling, by inversion."""

    random: np.random.Generator
    plain: bool = False

    def probabilities(self, logits, tokens):
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        return exponentials / exponentials.sum()

    def draw(self, probabilities):
        place = np.searchsorted(np.cumsum(probabilities), self.random.random(), side="right")
        return min(int(place), len(probabilities) - 1)


class TableSession:
    """A "model" whose next token depends on the last two alone, with an exit that is biased.

    What `VerifiedDecoder` asks of a session, without any layers.
    """

    def __init__(self, vocabulary, seed=0, width=1.0):
        random = np.random.default_rng(seed)
        shape = (vocabulary, vocabulary, vocabulary)
        self.full = random.normal(scale=width, size=shape).astype(np.float32)
        self.early = self.full + random.normal(scale=width, size=shape).astype(np.float32)
        self.depth = 2
        self._tokens = []

    @property
    def length(self):
        return len(self._tokens)

    @property
    def tokens(self):
        return tuple(self._tokens)

    def extend(self, tokens):
        self._tokens += list(tokens)

    def roll_back(self, length):
        del self._tokens[length:]

    def look(self, layer, probe="full"):
        return ExitEvidence(_result(self.early[self._at(self.length - 1)]), 0.0)

    def predict(self, policy):
        return Prediction(_result(self.full[self._at(self.length - 1)]), self.depth)

    def verify_logits(self, start):
        return np.stack([self.full[self._at(place)] for place in range(start, self.length)])

    def _at(self, place):
        return self._tokens[place - 1], self._tokens[place]


def _result(logits):
    return ProbeResult(int(np.argmax(logits)), 0.5, 0.1, logits)
