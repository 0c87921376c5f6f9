"""Mode `verified`: tokens of an exit point are drafts, which the deeper layers confirm together.

The positions of drafts wait at the exit point's boundary with their hidden states; one pass takes
them all through the layers above, so that no layer runs twice for a position. Drafts that the full
model does not confirm are taken back, tokens and KV. (Self-speculative decoding, arXiv 2404.16710;
speculative sampling, arXiv 2211.17192.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .decode_costs import DecodeCosts
from .decoding import Emitted, take
from .draft_schedule import (
    Acceptance,
    Adaptive,
    DraftSchedule,
    Fixed,
    default_draft_layer,
)
from .errors import ExitUnavailableError
from .exit_policy import NoExit
from .manifest import Manifest
from .results import DraftCount
from .sampling import Sampler
from .session import ExitProbe, Session

__all__ = [
    "EXPECTED_ACCEPTANCE",
    "Draft",
    "Drafter",
    "ExitDrafter",
    "VerifiedDecoder",
    "check_draft_layer",
    "verified_decoder",
]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Agreement over texts, not over answers: SmolLM2 after 24 of 30 layers.
EXPECTED_ACCEPTANCE = 0.6


@dataclass(frozen=True)
class Draft:
    """A proposed token.

    Attributes:
        layer: that proposed it, 1 … L.
        confidence: the chance that it is right, as far as the proposer knows. It must not
            depend on which token was drawn, or drafts would distort what is sampled.
        distribution: `[vocab_size]` that it was drawn from; None under a plain sampler.
    """

    token: int
    layer: int
    confidence: float = 1.0
    distribution: Float64 | None = None


class Drafter(Protocol):
    """Proposes what follows the last position."""

    def propose(self, session: Session, sampler: Sampler) -> Draft:
        """May bring positions to a boundary below the last; leaves the sequence as it is."""


@dataclass(frozen=True)
class ExitDrafter:
    """Drafts by an exit point's adapter and the probe."""

    layer: int
    probe: ExitProbe = "full"

    def propose(self, session: Session, sampler: Sampler) -> Draft:
        """Every position is brought to the exit point; the last one is read there."""
        result = session.draft(self.layer, self.probe)
        if sampler.plain:
            return Draft(result.token, self.layer, result.top_prob)
        distribution = sampler.probabilities(result.logits, session.tokens)
        return Draft(sampler.draw(distribution), self.layer, 1.0, distribution)


class VerifiedDecoder:
    """Emits what the full model would: its greedy tokens, or tokens of its distribution.

    With a sampler the tokens are not those that mode `off` draws from the same seed.

    Args:
        limit: positions that the session may come to hold.
        with_logits: emit the full model's logits with every token. (With a sampler that draws they
            are there anyway; without one, tokens alone are read.)
    """

    def __init__(
        self,
        session: Session,
        sampler: Sampler,
        drafter: Drafter,
        schedule: DraftSchedule,
        limit: int,
        acceptance: Acceptance | None = None,
        *,
        with_logits: bool = False,
    ) -> None:
        self._with_logits = with_logits
        self._session = session
        self._sampler = sampler
        self._drafter = drafter
        self._schedule = schedule
        self._limit = limit
        self._acceptance = acceptance or Acceptance(EXPECTED_ACCEPTANCE)
        self._ready: deque[Emitted] = deque()
        self._last: int | None = None
        self._count = DraftCount()

    @property
    def drafts(self) -> DraftCount:
        """Of this request so far."""
        return self._count

    def step(self) -> Emitted:
        """Takes from what is confirmed; a round of drafts where nothing is left."""
        if not self._ready:
            self._ready.extend(self._round())
        emitted = self._ready.popleft()
        self._last = emitted.token
        return emitted

    def close(self) -> None:
        """Takes back what was confirmed, but never emitted."""
        if self._ready:
            self._session.roll_back(self._session.length - len(self._ready))
            # All but the last of a round were drafts.
            self._count += DraftCount(accepted=1 - len(self._ready))
            self._ready.clear()

    def _round(self) -> Sequence[Emitted]:
        session = self._session
        if self._last is None:
            return (self._full_step(),)  # the prompt is read as mode off reads it
        session.extend([self._last])
        base = session.length
        drafts, declined = self._propose(base)
        if not drafts:
            if declined:
                self._acceptance.record(1, 0)
            else:
                self._acceptance.record_idle()
            return (self._full_step(),)
        accepted, last, logits = self._judge(drafts, base)
        session.roll_back(base + accepted)
        wrong = accepted < len(drafts)
        self._acceptance.record(accepted + (wrong or declined), accepted)
        self._count += DraftCount(len(drafts), accepted, 1)
        kept = [(draft.token, draft.layer) for draft in drafts[:accepted]]
        tokens = [*kept, (last, session.depth)]
        rows = [None] * len(tokens) if logits is None else logits
        return [Emitted(*token, row) for token, row in zip(tokens, rows, strict=False)]

    def _propose(self, base: int) -> tuple[list[Draft], bool]:
        """Drafts that now stand in the sequence, and whether one was not worth verifying."""
        wanted = min(self._schedule.length(self._acceptance), self._limit - base)
        drafts: list[Draft] = []
        while len(drafts) < wanted:
            draft = self._drafter.propose(self._session, self._sampler)
            if not self._schedule.keeps(draft.confidence, len(drafts)):
                return drafts, True
            self._session.extend([draft.token])
            drafts.append(draft)
        return drafts, False

    def _full_step(self) -> Emitted:
        prediction = self._session.predict(NoExit())
        token = take(self._sampler, prediction.result, self._session)
        return Emitted(token, prediction.exit_layer, prediction.result.logits)

    def _judge(
        self, drafts: Sequence[Draft], base: int
    ) -> tuple[int, int, Sequence[Float32] | None]:
        """How many drafts stand, the full model's token behind them, and its logits
        `[vocab_size]` for each of these places, if any were computed.
        """
        if self._sampler.plain and not self._with_logits:
            tokens = self._session.verify_tokens(base - 1)
            return *_agreed(drafts, tokens), None
        logits = list(self._session.verify_logits(base - 1))
        if self._sampler.plain:
            return *_agreed(drafts, np.argmax(logits, axis=1)), logits
        return *self._draw(drafts, base, logits), logits

    def _draw(
        self, drafts: Sequence[Draft], base: int, logits: Sequence[Float32]
    ) -> tuple[int, int]:
        before = self._session.tokens
        for i, draft in enumerate(drafts):
            full = self._sampler.probabilities(logits[i], before[: base + i])
            token = _accept_or_replace(draft, full, self._sampler)
            if token is not None:
                return i, token
        full = self._sampler.probabilities(logits[len(drafts)], before)
        return len(drafts), self._sampler.draw(full)


def _agreed(drafts: Sequence[Draft], tokens: npt.NDArray[np.int64]) -> tuple[int, int]:
    wrong = (i for i, draft in enumerate(drafts) if draft.token != tokens[i])
    accepted = next(wrong, len(drafts))
    return accepted, int(tokens[accepted])


def _accept_or_replace(draft: Draft, full: Float64, sampler: Sampler) -> int | None:
    """None where the draft stands; else what takes its place. Either way `full` is what the
    emitted token is distributed by (arXiv 2211.17192, theorem 1).
    """
    assert draft.distribution is not None  # drafters give it to samplers that draw
    proposed = float(draft.distribution[draft.token])
    accept = min(1.0, float(full[draft.token]) / proposed) if proposed > 0.0 else 0.0
    if sampler.draw(np.array([1.0 - accept, accept])) == 1:
        return None
    rest = np.maximum(full - draft.distribution, 0.0)
    total = float(rest.sum())
    # Equal distributions reject by rounding alone.
    return sampler.draw(rest / total if total > 0.0 else full)


def check_draft_layer(manifest: Manifest, draft_layer: int) -> None:
    """Raises ExitUnavailableError where no engine ends at it, or the last one does."""
    inner = manifest.boundaries[:-1]
    if draft_layer not in inner:
        raise ExitUnavailableError(
            f"draft_layer {draft_layer} is no boundary between engines: "
            f"{', '.join(map(str, inner)) or 'none'}"
        )


def verified_decoder(
    session: Session,
    manifest: Manifest,
    sampler: Sampler,
    limit: int,
    costs: DecodeCosts,
    *,
    draft_layer: int | None = None,
    schedule: DraftSchedule | None = None,
    probe: ExitProbe = "full",
    acceptance: float = EXPECTED_ACCEPTANCE,
    with_logits: bool = False,
) -> VerifiedDecoder:
    """The decoder of a request in mode `verified`.

    Args:
        draft_layer: where drafts are made; default: the exit point expected to cost least. A folder
            whose calibration said "do not exit" drafts nothing.
        schedule: default: `Adaptive`.
        probe: that drafts are made with.
        acceptance: share of drafts that are expected to be right before any was judged.

    Raises:
        ExitUnavailableError: nothing to draft with, or no engine ends at `draft_layer`.
    """
    if draft_layer is None:
        draft_layer = default_draft_layer(manifest, costs, probe)
        if draft_layer is None and manifest.exit is None:
            raise ExitUnavailableError(
                "this engine has no exit point to draft at: run `adainfer calibrate DIR`, or give "
                "draft_layer"
            )
    else:
        check_draft_layer(manifest, draft_layer)
    if draft_layer is None:
        draft_layer, schedule = manifest.depth, Fixed(0)
    return VerifiedDecoder(
        session,
        sampler,
        ExitDrafter(draft_layer, probe),
        schedule or Adaptive(costs, draft_layer),
        limit,
        Acceptance(acceptance),
        with_logits=with_logits,
    )
