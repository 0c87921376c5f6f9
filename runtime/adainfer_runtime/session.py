"""One sequence: its tokens, its KV cache and its exit state. Not for use by two threads at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .backends import Backend, ExitEvidence, ProbeResult
from .chain import Chain
from .errors import PromptTooLongError, RequestError
from .exit_policy import ClassifierExit, ExitPolicy
from .ledger import LayerCount
from .manifest import Manifest

__all__ = ["Observation", "ObservedPoint", "Prediction", "Session"]


@dataclass(frozen=True)
class Prediction:
    """What follows the last position, and the number of layers that it took (1 … L)."""

    result: ProbeResult
    exit_layer: int


@dataclass(frozen=True)
class ObservedPoint:
    """What one exit point would have answered, and the classifier's score for it."""

    exit_layer: int
    token: int
    score: float


@dataclass(frozen=True)
class Observation:
    """Every exit point of the last position, and the full model's token."""

    points: tuple[ObservedPoint, ...]
    token: int


class Session:
    """A conversation of one's own: `extend` it with tokens, ask it to `predict`, go on.

    Skipped layers are handled by the `deferred` policy: a position that stopped early waits, and
    passes the layers it skipped together with the next position that goes deeper. Every KV
    entry that is used equals the full model's.
    """

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self._chain = Chain(backend, manifest)

    @property
    def length(self) -> int:
        """Positions so far."""
        return self._chain.length

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids so far."""
        return tuple(int(token) for token in self._chain.tokens)

    @property
    def count(self) -> LayerCount:
        """Position-layers executed since the session was opened, against the dense model's."""
        return self._chain.ledger.count

    @property
    def filled(self) -> tuple[int, ...]:
        """Exact KV positions per layer stage; never increases with depth."""
        return self._chain.ledger.filled

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the sequence. Nothing is computed yet beyond their embedding.

        Raises:
            PromptTooLongError: they do not fit the engine's maximum length.
            RequestError: no tokens, or ids outside the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.size == 0 or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise RequestError("the prompt holds no tokens: give text or a list of token ids")
        vocabulary = self._manifest.model.vocab_size
        if ids.min() < 0 or ids.max() >= vocabulary:
            bad = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise RequestError(f"token id {bad} is outside the vocabulary of {vocabulary}")
        total, limit = self.length + len(ids), self._manifest.max_seq_len
        if total > limit:
            raise PromptTooLongError(
                f"{total} tokens do not fit this engine's maximum of {limit}; shorten the prompt, "
                "or export with a larger --max-seq-len"
            )
        self._chain.admit(ids.astype(np.int64))

    def predict(self, policy: ExitPolicy) -> Prediction:
        """The next token after the last position, by as few layers as the policy allows.

        Raises:
            RequestError: the session is empty.
        """
        if self.length == 0:
            raise RequestError("the session is empty: extend it with a prompt first")
        state = np.zeros(policy.state_size, np.float32)
        reached = self._chain.depth(self.length - 1)
        for layer in policy.exit_layers:
            if layer < reached:
                continue  # the position is past this exit point: its hidden state there is gone
            self._chain.advance(layer)
            evidence = self._evidence(layer)
            stop, state = policy.decide(layer, evidence, state)
            if stop:
                return Prediction(evidence.result, layer)
        self.complete()
        last = self._manifest.model.num_layers
        return Prediction(self._backend.probe(self._chain.last_hidden()), last)

    def observe(self, policy: ClassifierExit) -> Observation:
        """Looks at every exit point and runs all layers: what certificates are made from.

        Raises:
            RequestError: the last position is past the first exit point.
        """
        if self.length == 0 or self._chain.depth(self.length - 1) > policy.exit_layers[0]:
            raise RequestError("observe needs a new position: extend the session first")
        state = np.zeros(policy.state_size, np.float32)
        points = []
        for layer in policy.exit_layers:
            self._chain.advance(layer)
            evidence = self._evidence(layer)
            score, state = policy.score(layer, evidence, state)
            points.append(ObservedPoint(layer, evidence.result.token, score))
        self.complete()
        return Observation(tuple(points), self._backend.probe(self._chain.last_hidden()).token)

    def complete(self) -> None:
        """Brings every waiting position through all layers (pays the exits' debt)."""
        self._chain.advance(self._manifest.model.num_layers)

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

    def log_probs(self, start: int) -> npt.NDArray[np.float32]:
        """Log-probabilities `[positions, vocab_size]` from `start` on, after all layers."""
        self.complete()
        logits = self._backend.probe_logits(self.hidden(start))
        return log_softmax(logits)

    def truncate(self, length: int) -> None:
        """Forgets everything from position `length` on."""
        self._chain.truncate(length)

    def kv(self, layer: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Exact K (after rotary) and V of a layer: `[kv_heads, filled, head_dim]` each."""
        return self._chain.kv(layer)

    def _evidence(self, exit_layer: int) -> ExitEvidence:
        adapted, trust = self._backend.adapt(exit_layer, self._chain.last_hidden())
        return ExitEvidence(self._backend.probe(adapted), trust)


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    result: npt.NDArray[np.float32] = shifted - total
    return result
