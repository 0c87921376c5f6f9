"""Where new tokens come from: a decoder per way of running the chain, one token a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .exit_policy import ExitPolicy, NoExit
from .sampling import Sampler
from .session import Session

__all__ = ["Decoder", "Emitted", "PolicyDecoder"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Emitted:
    """A token that is final, and the layers (1 … L) that it took.

    Attributes:
        logits: `[vocab_size]` that the token was taken from, before penalties and temperature;
            None from a decoder that has none (log-probabilities are then refused).
    """

    token: int
    exit_layer: int
    logits: Float32 | None = None


class Decoder(Protocol):
    """Continues one session. Nothing that it has emitted is ever taken back."""

    def step(self) -> Emitted:
        """The next token. The one before it becomes part of the sequence only now: the last token
        of a text needs no position.
        """

    def close(self) -> None:
        """Leaves the session with the prompt and all emitted tokens but the last."""


class PolicyDecoder:
    """One prediction a token, under an exit policy."""

    def __init__(self, session: Session, policy: ExitPolicy, sampler: Sampler) -> None:
        self._session = session
        self._policy = policy
        self._sampler = sampler
        self._last: int | None = None

    def step(self) -> Emitted:
        """Predicts after the last position."""
        policy = self._policy
        if self._last is not None:
            self._session.extend([self._last])
            if any(check.kind == "context" for check in policy.checks):
                # Translated K,V answer one question; what follows is computed over exact ones.
                policy = NoExit()
        prediction = self._session.predict(policy)
        result = prediction.result
        if self._sampler.plain:
            self._last = result.token
        else:
            tokens = self._session.tokens
            self._last = self._sampler.draw(self._sampler.probabilities(result.logits, tokens))
        return Emitted(self._last, prediction.exit_layer, result.logits)

    def close(self) -> None:
        """Nothing to take back."""
