"""Which decoder serves a request."""

from __future__ import annotations

from dataclasses import dataclass

from .confidence import ConfidenceDecay, DecayingExit
from .decoding import Decoder, PolicyDecoder
from .draft_schedule import DecodeCosts, DraftSchedule
from .errors import ExitUnavailableError
from .exit_policy import ClassifierExit, ExitPolicy
from .kv_fill import KvPolicy
from .manifest import Manifest
from .results import NO_DRAFTS, DraftCount
from .sampling import Sampler
from .session import ExitProbe, Session
from .verified import EXPECTED_ACCEPTANCE, VerifiedDecoder, verified_decoder

__all__ = ["DEFAULT_OPTIONS", "DecodeOptions", "drafts_of", "make_decoder"]


@dataclass(frozen=True)
class DecodeOptions:
    """How modes decode, where their defaults are not wanted.

    Attributes:
        kv_policy: what becomes of positions that stopped early, in modes `adaptive` and `context`:
            `deferred` is exact.
        confidence: lets the threshold of mode `adaptive` fall over the text; default: it does not.
        probe: of exit points in mode `adaptive`, and of drafts in mode `verified`; `shortlist` is
            cheaper, and never has the last word.
        draft_layer: exit point that drafts in mode `verified`; default: by expected cost.
        draft_schedule: how many drafts; default: by their acceptance so far and their cost.
        costs: measured costs for that choice; default: by multiply-adds.
        acceptance: share of drafts expected to be right before any was judged.
    """

    kv_policy: KvPolicy = "deferred"
    confidence: ConfidenceDecay | None = None
    probe: ExitProbe = "full"
    draft_layer: int | None = None
    draft_schedule: DraftSchedule | None = None
    costs: DecodeCosts | None = None
    acceptance: float = EXPECTED_ACCEPTANCE


DEFAULT_OPTIONS = DecodeOptions()


def make_decoder(
    session: Session,
    manifest: Manifest,
    policy: ExitPolicy,
    sampler: Sampler,
    limit: int,
    options: DecodeOptions,
    *,
    verified: bool,
) -> Decoder:
    """A decoder on a session.

    Args:
        limit: positions that the session may come to hold: prompt and new tokens but the last.

    Raises:
        ExitUnavailableError: mode `verified` has nothing to draft with, or there is no shortlist.
        RequestError: the exit graph's thresholds have no range to fall over.
    """
    if options.probe == "shortlist" and manifest.shortlist is None:
        raise ExitUnavailableError(
            "this engine has no shortlist: run `adainfer calibrate DIR --shortlist`"
        )
    if not verified:
        schedule = _schedule(policy, manifest, options.confidence)
        return PolicyDecoder(session, policy, sampler, options.kv_policy, schedule, options.probe)
    return verified_decoder(
        session,
        manifest,
        sampler,
        limit,
        draft_layer=options.draft_layer,
        schedule=options.draft_schedule,
        costs=options.costs,
        probe=options.probe,
        acceptance=options.acceptance,
    )


def _schedule(
    policy: ExitPolicy, manifest: Manifest, decay: ConfidenceDecay | None
) -> DecayingExit | None:
    if decay is None or not isinstance(policy, ClassifierExit):
        return None  # nothing exits, or always at the same layer
    specs = manifest.named_exits.values()
    grids = {spec.classifier.graph: spec.thresholds for spec in specs if spec.classifier}
    return DecayingExit.of(policy, decay, grids.get(policy.graph, ()))


def drafts_of(decoder: Decoder) -> DraftCount:
    """Drafts that a decoder proposed and had accepted; none outside of mode `verified`."""
    return decoder.drafts if isinstance(decoder, VerifiedDecoder) else NO_DRAFTS
