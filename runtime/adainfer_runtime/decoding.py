"""Where new tokens come from: a decoder per way of running the chain, one token a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .backends import ProbeResult
from .confidence import ExitSchedule
from .exit_looks import Always, Looks
from .exit_policy import ExitPolicy, NoExit
from .kv_fill import KvPolicy
from .sampling import Sampler
from .session import ExitProbe, Session

__all__ = ["Decoder", "Emitted", "PolicyDecoder", "take"]

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


def take(sampler: Sampler, result: ProbeResult, session: Session) -> int:
    """The sampler's token after the session's last position."""
    if sampler.plain:
        return result.token
    return sampler.draw(sampler.probabilities(result.logits, session.tokens))


class PolicyDecoder:
    """One prediction a token, under an exit policy (all modes but `verified`).

    Args:
        schedule: in place of the policy, another one for every token.
        looks: at which exit points tokens after the first look.
    """

    def __init__(
        self,
        session: Session,
        policy: ExitPolicy,
        sampler: Sampler,
        kv_policy: KvPolicy = "deferred",
        schedule: ExitSchedule | None = None,
        exit_probe: ExitProbe = "full",
        looks: Looks | None = None,
    ) -> None:
        self._looks = looks or Always()
        self._exit_probe: ExitProbe = exit_probe
        self._kv_policy: KvPolicy = kv_policy
        self._schedule = schedule
        self._steps = 0
        self._session = session
        self._policy = policy
        self._sampler = sampler
        self._last: int | None = None

    def step(self) -> Emitted:
        """Predicts after the last position."""
        policy = self._schedule.at(self._steps) if self._schedule else self._policy
        self._steps += 1
        if self._last is not None:
            self._session.extend([self._last])
            policy = self._after_first(policy)
        prediction = self._session.predict(
            policy, kv_policy=self._kv_policy, exit_probe=self._exit_probe
        )
        # The first token looks anyhow: what it finds tells of those that follow.
        self._looks.record(prediction.exit_layer if policy.checks else None)
        self._last = take(self._sampler, prediction.result, self._session)
        return Emitted(self._last, prediction.exit_layer, prediction.result.logits)

    def _after_first(self, policy: ExitPolicy) -> ExitPolicy:
        # Translated K,V answer one question; the KV policy says what follows is over.
        if any(check.kind == "context" for check in policy.checks):
            return NoExit()
        return self._looks.narrow(policy)

    def close(self) -> None:
        """Nothing to take back."""
