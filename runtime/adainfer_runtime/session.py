"""One sequence: its tokens, its KV cache and its exit state. Not for use by two threads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .backends import Backend, ExitEvidence, ProbeResult
from .backends.rescore import among
from .chain import Chain
from .errors import PromptTooLongError, RequestError
from .exit_policy import ExitCheck, ExitPolicy
from .kv_fill import KvFiller, KvPolicy, find_filler
from .ledger import KvState, WorkCount
from .lifetime import closed
from .manifest import Manifest

__all__ = [
    "ExitProbe",
    "Observation",
    "Prediction",
    "Session",
    "check_tokens",
    "log_softmax",
    "require_fit",
]

ExitProbe = Literal["full", "shortlist"]


@dataclass(frozen=True)
class Prediction:
    """What follows the last position, and the number of layers that it took (1 … L)."""

    result: ProbeResult
    exit_layer: int


@dataclass(frozen=True)
class Observation:
    """What exits of the last position would have answered, check by check, and the full model's
    answer.
    """

    evidence: Mapping[ExitCheck, ExitEvidence]
    full: ProbeResult


def check_tokens(tokens: Sequence[int], vocabulary: int) -> npt.NDArray[np.int64]:
    """Token ids `[n]`, at least one.

    Raises:
        RequestError: no list of token ids, an empty one, or ids outside the vocabulary.
    """
    if isinstance(tokens, list) and len(tokens) == 1:
        (token,) = tokens
        if type(token) is int and 0 <= token < vocabulary:  # what decoding gives, token by token
            return np.array(tokens, np.int64)
    ids = _as_ids(tokens)
    if ids.size == 0:
        raise RequestError("the prompt holds no tokens: give text or a list of token ids")
    if ids.min() < 0 or ids.max() >= vocabulary:
        bad = ids[(ids < 0) | (ids >= vocabulary)][0]
        raise RequestError(f"token id {bad} is outside the vocabulary of {vocabulary}")
    return ids.astype(np.int64)


def require_fit(total: int, limit: int) -> None:
    """Raises PromptTooLongError for more tokens than a sequence may have."""
    if total > limit:
        raise PromptTooLongError(
            f"{total} tokens do not fit this engine's maximum of {limit}; shorten the prompt, "
            "or export with a larger --max-seq-len"
        )


def _as_ids(tokens: Sequence[int]) -> npt.NDArray[Any]:
    """Integers `[n]`. NumPy would take True for 1, and a list of texts for an array too."""
    if tokens is None or isinstance(tokens, Mapping):
        raise RequestError(
            f"the prompt must be text or a list of token ids, found {type(tokens).__name__}"
        )
    if isinstance(tokens, list | tuple):
        for token in tokens:
            _require_token(token)
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise RequestError(
            f"the prompt must be text or one list of token ids, found values of shape {ids.shape}"
        )
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"token ids must be whole numbers, found values of {ids.dtype}")
    return ids


def _require_token(token: object) -> None:
    if isinstance(token, str):
        raise RequestError(
            "the prompt is a list of texts: give one text, or the list to generate_batch"
        )
    if isinstance(token, Sequence):
        raise RequestError(
            "the prompt is a list of lists: give one list of token ids, or several to "
            "generate_batch"
        )
    if token is None or isinstance(token, bool | float | np.bool_):  # others NumPy tells apart
        raise RequestError(f"token ids must be whole numbers, found {token!r}")


class Session:
    """A conversation of one's own: `extend` it with tokens, ask it to `predict`, go on.

    Skipped layers are handled by the `deferred` policy unless a prediction asks for another: a
    position that stopped early waits, and passes the layers it skipped together with the next
    position that goes deeper. Every KV entry that is used equals the full model's.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        waited: Callable[[], float] = lambda: 0.0,
        texts: int = 1,
    ) -> None:
        """Opens an empty one.

        Args:
            waited: seconds that its passes have spent on other sequences, where it shares them.
            texts: so many sequences share passes, this one among them.
        """
        self.waited = waited
        self.texts = texts
        self._backend = backend
        self._manifest = manifest
        self._chain = Chain(backend, manifest)
        self._vocabulary = manifest.model.vocab_size
        self._depth = manifest.depth
        self._top = manifest.boundaries[-1]
        self._width = manifest.model.hidden_size
        self._probe_cost = manifest.probe.multiply_adds
        self._answer_rows = manifest.context_exit.answer_rows if manifest.context_exit else 1
        self._adapter_costs = {n: p.multiply_adds for n, p in manifest.exit_points.items()}

    @property
    def length(self) -> int:
        """Positions so far."""
        return self._chain.length

    @property
    def depth(self) -> int:
        """Layers of the full model."""
        return self._depth

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids so far."""
        return tuple(int(token) for token in self._chain.tokens)

    @property
    def count(self) -> WorkCount:
        """Work done since the session was opened, against the dense model's."""
        return self._chain.ledger.count

    @property
    def filled(self) -> tuple[int, ...]:
        """Positions with K and V per layer stage; never increases with depth."""
        return self._chain.ledger.filled

    @property
    def exact_length(self) -> int:
        """Positions from the first on that no approximate K and V were made for: what of the
        session may serve a request that wants the full model's.
        """
        return self._chain.ledger.exact_length

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the sequence. Nothing is computed yet beyond their embedding.

        Raises:
            PromptTooLongError: they do not fit the engine's maximum length.
            RequestError: no tokens, or ids outside the vocabulary.
        """
        ids = check_tokens(tokens, self._vocabulary)
        require_fit(self.length + len(ids), self._manifest.max_seq_len)
        self._chain.admit(ids)

    @contextmanager
    def interruptible(self, check: Callable[[], None]) -> Iterator[None]:
        """Calls `check` before every pass of a stage. Where it raises, the session is empty
        afterwards: nothing can be said of passes that were begun.
        """
        self._chain.before_pass = check
        try:
            yield
        except BaseException:
            self.truncate(0)
            raise
        finally:
            self._chain.before_pass = None

    def reuse(self, tokens: Sequence[int]) -> int:
        """Keeps what the session has in common with the beginning of a new sequence.

        The last token is never kept, so that something remains to `extend` with.

        Returns:
            the length that is kept; `extend` with `tokens` from there on.
        """
        self.truncate(self.common(tokens))
        return self.length

    def common(self, tokens: Sequence[int]) -> int:
        """How much `reuse` would keep."""
        common = min(self.exact_length, len(tokens) - 1)
        if common <= 0:
            return 0
        kept, wanted = self._chain.tokens[:common], np.asarray(tokens[:common])
        different = np.flatnonzero(kept != wanted)
        return int(different[0]) if different.size else common

    def predict(
        self,
        policy: ExitPolicy,
        candidates: npt.NDArray[np.int64] | None = None,
        kv_policy: KvPolicy = "deferred",
        exit_probe: ExitProbe = "full",
    ) -> Prediction:
        """The next token after the last position, by as few layers as the policy allows.

        Args:
            kv_policy: what becomes of positions that stopped early, where this one goes deeper.
            exit_probe: `shortlist` looks at an exit point with the cheaper probe first, and
                with the full one where that says "stop": both must agree. Candidates and context
                exits have probes of their own.
            candidates: `[n]` different token ids of which one is wanted; the result's logits are
                then theirs, `[n]`. Default: the whole vocabulary.

        Raises:
            RequestError: the session is empty, or no such KV policy.
            ExitUnavailableError: the folder lacks what the KV policy or the probe needs.
        """
        if self.length == 0:
            raise RequestError("the session is empty: extend it with a prompt first")
        filler = find_filler(kv_policy, self._backend, self._manifest)
        prediction = self._predict(policy, candidates, filler, exit_probe)
        self._chain.ledger.stop()
        return prediction

    def _predict(
        self,
        policy: ExitPolicy,
        candidates: npt.NDArray[np.int64] | None,
        filler: KvFiller | None,
        exit_probe: ExitProbe,
    ) -> Prediction:
        rows = self._probe_cost if candidates is None else len(candidates) * self._width
        self._chain.ledger.record_probe(0, rows)
        found = self._leave(policy, candidates, filler, exit_probe) if policy.checks else None
        if found is not None:
            return found
        self._chain.advance(self._top, filler)
        return Prediction(self._probe(self._chain.last_hidden(), candidates), self._depth)

    def _leave(
        self,
        policy: ExitPolicy,
        candidates: npt.NDArray[np.int64] | None,
        filler: KvFiller | None,
        exit_probe: ExitProbe,
    ) -> Prediction | None:
        """The prediction at the first check where the policy stops; None if it stops at none."""
        state = np.zeros(policy.state_size, np.float32)
        reached = self._chain.depth(self.length - 1)
        for check in policy.checks:
            if check.layer < reached:
                continue  # the position is past this exit point: its hidden state there is gone
            self._chain.advance(check.layer, filler)
            if check.kind == "context" and not self._chain.can_translate(check.layer):
                continue
            among = candidates if policy.over_candidates else None
            evidence = self.look(check, among, self._first_look(check, candidates, exit_probe))
            stop, next_state = policy.decide(check, evidence, state)
            if stop and evidence.shortlisted:
                # By the same threshold: agreement is the full probe's to keep. A first look that
                # had to keep it alone would take exits away (figures: `calibrate.shortlist`).
                evidence = self.look(check)
                stop, next_state = policy.decide(check, evidence, state)
            state = next_state
            if stop:
                return Prediction(_among(evidence.result, candidates), check.layer)
        return None

    @staticmethod
    def _first_look(
        check: ExitCheck, candidates: npt.NDArray[np.int64] | None, wanted: ExitProbe
    ) -> ExitProbe:
        """Candidates and context exits have probes of their own."""
        return wanted if candidates is None and check.kind == "answer" else "full"

    def observe(
        self,
        checks: Iterable[ExitCheck],
        questions: Sequence[npt.NDArray[np.int64] | None] = (None,),
    ) -> tuple[Observation, ...]:
        """Takes every check without stopping: what certificates are made from.

        Args:
            questions: candidates as in `predict`; one observation for each. (Context exits answer
                over the whole vocabulary alone, the same for every question.)

        Raises:
            RequestError: the last position is past the first check, or there is no context for a
                context exit.
        """
        ordered = sorted(checks, key=lambda check: check.layer)
        first = min((check.layer for check in ordered), default=0)
        if self.length == 0 or self._chain.depth(self.length - 1) > first:
            raise RequestError("observe needs a new position: extend the session first")
        context = any(check.kind == "context" for check in ordered)
        if context and (self.length < 2 or self._chain.depth(0) > first):
            raise RequestError("a context exit needs a new session with two positions or more")
        evidence: list[dict[ExitCheck, ExitEvidence]] = [{} for _ in questions]
        for check in ordered:
            self._chain.advance(check.layer)
            if check.kind == "context":
                seen = self.look(check, None)
                for found in evidence:
                    found[check] = seen
                continue
            for found, candidates in zip(evidence, questions, strict=True):
                found[check] = self.look(check, candidates)
        self.complete()
        hidden = self._chain.last_hidden()
        return tuple(
            Observation(found, self._probe(hidden, candidates))
            for found, candidates in zip(evidence, questions, strict=True)
        )

    def look(
        self,
        check: ExitCheck,
        candidates: npt.NDArray[np.int64] | None = None,
        probe: ExitProbe = "full",
    ) -> ExitEvidence:
        """One check of the last position, which must stand at the check's boundary."""
        ledger = self._chain.ledger
        if check.kind == "context":
            (hidden,) = self.answers_over_context(check.layer, (self.length - 1,))
            return ExitEvidence(self._probe(hidden, None), 0.0)
        ledger.record_probe(self._adapter_costs.get(check.layer, 0), 0)
        adapted, trust = self._backend.adapt(check.layer, self._chain.last_hidden())
        if probe == "full":
            return ExitEvidence(self._probe(adapted, candidates), trust)
        spec = self._manifest.shortlist
        ledger.record_probe(spec.multiply_adds if spec else 0, 0)
        return ExitEvidence(self._backend.shortlist(adapted), trust, shortlisted=True)

    def answers_over_context(
        self, exit_layer: int, positions: Sequence[int], kv_policy: KvPolicy = "translated"
    ) -> npt.NDArray[np.float32]:
        """What a context exit makes of some positions: final hidden states `[positions,
        hidden_size]`, each over the context before it. For fitting, and to compare.

        Args:
            positions: ascending, from 1 on.
            kv_policy: where the layers above find the context's K and V.

        Raises:
            RequestError: the folder has no context exit there, or positions are past it.
            ExitUnavailableError: it lacks what the KV policy needs.
        """
        filler = find_filler(kv_policy, self._backend, self._manifest)
        if filler is None or exit_layer not in self._manifest.context_points:
            raise RequestError(f"layer {exit_layer} is no point of a context exit")
        self.advance(exit_layer)
        if not self._chain.can_translate(exit_layer):
            raise RequestError("a context exit needs a new session: positions are past it")
        return self._chain.answers_over_context(exit_layer, positions, self._answer_rows, filler)

    def complete(self) -> None:
        """Brings every waiting position through all layers (pays the exits' debt)."""
        self._chain.advance(self._top)

    def advance(self, exit_layer: int) -> None:
        """Brings every position at least to a layer boundary.

        Raises:
            RequestError: no engine ends there.
        """
        if exit_layer not in self._manifest.boundaries:
            raise RequestError(
                f"layer {exit_layer} is no boundary between engines: "
                f"{', '.join(map(str, self._manifest.boundaries))}"
            )
        self._chain.advance(exit_layer)

    def hidden(self, start: int = 0, end: int | None = None) -> npt.NDArray[np.float32]:
        """Hidden states `[positions, hidden_size]`, each at the boundary it stands at (a view)."""
        return self._chain.hidden(start, self.length if end is None else end)

    def draft(self, exit_layer: int, probe: ExitProbe = "full") -> ProbeResult:
        """What an exit point says of the last position, which waits there then.

        Raises:
            RequestError: no engine ends there, or the position is past it.
            ExitUnavailableError: the folder has no shortlist.
        """
        if self.length == 0 or self._chain.depth(self.length - 1) > exit_layer:
            raise RequestError("a draft needs a new position: extend the session first")
        self.advance(exit_layer)
        return self.look(ExitCheck(exit_layer), probe=probe).result

    def verify_tokens(self, start: int) -> npt.NDArray[np.int64]:
        """The full model's tokens `[positions]` after each position from `start` on."""
        return self._backend.probe_features(self._verified(start))[0]

    def verify_logits(self, start: int) -> npt.NDArray[np.float32]:
        """Its logits `[positions, vocab_size]`."""
        return self._backend.probe_logits(self._verified(start))

    def roll_back(self, length: int) -> None:
        """Takes back positions from `length` on that were guesses, and the predictions after them:
        they count as work that was done, but not as work that was asked for.
        """
        withdrawn = self.length - length
        self._chain.ledger.withdraw(length)
        self._chain.ledger.record_probe(0, -withdrawn * self._probe_cost)

    def log_probs(self, start: int) -> npt.NDArray[np.float32]:
        """Log-probabilities `[positions, vocab_size]` from `start` on, after all layers."""
        self.complete()
        logits = self._backend.probe_logits(self.hidden(start))
        return log_softmax(logits)

    def close(self, what: str = "session") -> None:
        """Gives its memory up; every later call is refused: `what` is closed."""
        self._chain = self._backend = closed(what)

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on."""
        self._chain.truncate(length)

    def kv(self, layer: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """K (after rotary) and V of a layer: `[kv_heads, filled, head_dim]` each."""
        return self._chain.kv(layer)

    def kv_states(self, layer: int) -> tuple[KvState, ...]:
        """Of every position: whether K and V of a layer were computed by it (`exact`), made by a
        KV policy (`propagated`, `translated`), or do not exist yet (`pending`).
        """
        return self._chain.kv_states(layer)

    def _verified(self, start: int) -> npt.NDArray[np.float32]:
        self.complete()
        cost = (self.length - start) * self._probe_cost
        self._chain.ledger.record_probe(cost, cost)
        return self.hidden(start)

    def _probe(
        self, hidden: npt.NDArray[np.float32], candidates: npt.NDArray[np.int64] | None
    ) -> ProbeResult:
        if candidates is None:
            self._chain.ledger.record_probe(self._probe_cost, 0)
            return self._backend.probe(hidden)
        self._chain.ledger.record_probe(len(candidates) * self._width, 0)
        return self._backend.probe_candidates(hidden, candidates)


def _among(result: ProbeResult, candidates: npt.NDArray[np.int64] | None) -> ProbeResult:
    """A result over the vocabulary, cut to the candidates (others are over them already)."""
    if candidates is None or len(result.logits) == len(candidates):
        return result
    return among(candidates, result.logits[candidates])


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    result: npt.NDArray[np.float32] = shifted - total
    return result
