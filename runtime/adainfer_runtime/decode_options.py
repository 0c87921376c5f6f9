"""Which decoder serves a request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from .confidence import ConfidenceDecay, DecayingExit
from .decode_costs import DecodeCosts
from .decoding import Decoder, PolicyDecoder
from .draft_schedule import DraftSchedule
from .errors import ExitUnavailableError, RequestError
from .exit_looks import Always, ExitCosts, Looks, Paying
from .exit_policy import ClassifierExit, ExitPolicy
from .kv_fill import KvPolicy
from .manifest import ExitSpec, Manifest
from .planning.choose import shares_at
from .results import NO_DRAFTS, DraftCount
from .sampling import Sampler
from .session import ExitProbe, Session
from .values import require_methods, require_number, require_one_of, require_whole
from .verified import EXPECTED_ACCEPTANCE, VerifiedDecoder, verified_decoder

__all__ = ["DEFAULT_OPTIONS", "DecodeOptions", "ExitLooks", "drafts_of", "make_decoder"]


ExitLooks = Literal["paying", "always"]
_SCHEDULES = ("length", "keeps")  # what they do


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
        exit_looks: at which exit points a token of mode `adaptive` after the first looks: `paying`
            where that is expected to save time, `always` at each (so it is at a certified level).
        costs: that drafts and looks are judged by; default: the plan's measured times where they
            are of this machine, else multiply-adds.
        acceptance: share of drafts expected to be right before any was judged.

    Raises:
        RequestError: a value of the wrong kind or outside its range.
    """

    kv_policy: KvPolicy = "deferred"
    confidence: ConfidenceDecay | None = None
    probe: ExitProbe = "full"
    draft_layer: int | None = None
    draft_schedule: DraftSchedule | None = None
    exit_looks: ExitLooks = "paying"
    costs: DecodeCosts | None = None
    acceptance: float = EXPECTED_ACCEPTANCE

    def __post_init__(self) -> None:
        require_one_of("kv_policy", self.kv_policy, get_args(KvPolicy))
        require_one_of("probe", self.probe, get_args(ExitProbe))
        require_one_of("exit_looks", self.exit_looks, get_args(ExitLooks))
        if self.draft_layer is not None:
            require_whole("draft_layer", self.draft_layer)
        self._check_kinds()
        require_number("acceptance", self.acceptance)
        if not 0 <= self.acceptance <= 1:
            raise RequestError(f"acceptance must be between 0 and 1, found {self.acceptance}")

    def _check_kinds(self) -> None:
        if self.draft_schedule is not None:
            require_methods("draft_schedule", self.draft_schedule, _SCHEDULES, "Fixed(2)")
        for name, kind in (("confidence", ConfidenceDecay), ("costs", DecodeCosts)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise RequestError(f"{name} must be {kind.__name__}, found {value!r}")

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the fields that are not at their defaults."""
        named = (field.name for field in fields(self))
        return tuple(n for n in named if getattr(self, n) != getattr(DEFAULT_OPTIONS, n))


DEFAULT_OPTIONS = DecodeOptions()


def make_decoder(
    session: Session,
    manifest: Manifest,
    policy: ExitPolicy,
    sampler: Sampler,
    limit: int,
    options: DecodeOptions,
    costs: DecodeCosts,
    *,
    verified: bool,
    with_logits: bool = False,
) -> Decoder:
    """A decoder on a session.

    Args:
        limit: positions that the session may come to hold: prompt and new tokens but the last.
        costs: of this engine with the options' probe, where the options have none.
        with_logits: every token is wanted with the logits that it was taken from.

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
        looks = _looks(policy, manifest, options, options.costs or costs)
        return PolicyDecoder(
            session, policy, sampler, options.kv_policy, schedule, options.probe, looks
        )
    return verified_decoder(
        session,
        manifest,
        sampler,
        limit,
        options.costs or costs,
        draft_layer=options.draft_layer,
        schedule=options.draft_schedule,
        probe=options.probe,
        acceptance=options.acceptance,
        with_logits=with_logits,
    )


def _schedule(
    policy: ExitPolicy, manifest: Manifest, decay: ConfidenceDecay | None
) -> DecayingExit | None:
    if decay is None or not isinstance(policy, ClassifierExit):
        return None  # nothing exits, or always at the same layer
    spec = _spec_of(policy, manifest)
    return DecayingExit.of(policy, decay, spec.thresholds if spec else ())


def _looks(
    policy: ExitPolicy, manifest: Manifest, options: DecodeOptions, costs: DecodeCosts
) -> Looks:
    if options.exit_looks == "always" or not isinstance(policy, ClassifierExit):
        return Always()
    spec = _spec_of(policy, manifest)
    if spec is None or policy.kind == "context":
        return Always()
    layers = tuple(check.layer for check in policy.checks)
    shares = shares_at(spec, policy.threshold) if spec.exit_shares else (0.0,) * len(layers)
    exits = ExitCosts(
        costs,
        layers,
        kv_policy=options.kv_policy,
        confirmed=options.probe == "shortlist",
    )
    return Paying(exits, shares)


def _spec_of(policy: ClassifierExit, manifest: Manifest) -> ExitSpec | None:
    specs = manifest.named_exits.values()
    return next((s for s in specs if s.classifier and s.classifier.graph == policy.graph), None)


def drafts_of(decoder: Decoder) -> DraftCount:
    """Drafts that a decoder proposed and had accepted; none outside of mode `verified`."""
    return decoder.drafts if isinstance(decoder, VerifiedDecoder) else NO_DRAFTS
