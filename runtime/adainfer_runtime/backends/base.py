"""The protocol between the chain and whatever executes stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Backend", "ExitEvidence", "ProbeResult", "SequenceBatch", "SequenceBuffers"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 prediction of one position, with AdaInfer's two features.

    Attributes:
        token: id of the most probable token.
        top_prob: its softmax probability.
        gap: `top_prob` minus the second most probable token's probability.
        logits: `[vocab_size]`; of candidate rows `[candidates]`.
    """

    token: int
    top_prob: float
    gap: float
    logits: Float32


@dataclass(frozen=True)
class ExitEvidence:
    """What an exit point knows: the adapted prediction, and the adapter's trust in it.

    `shortlisted`: the prediction is of the cheaper probe, which has no last word.
    """

    result: ProbeResult
    trust: float
    shortlisted: bool = False


class SequenceBuffers(Protocol):
    """One sequence's device memory: KV, two hidden buffers, and the bindings onto them.

    Hidden states are float32 rows `[rows, hidden_size]` that behave like numpy arrays under
    slicing, assignment and `copy`; of back ends in device memory they stay there (`DeviceRows`).
    """

    @property
    def pending(self) -> Float32:
        """Rows `[max_seq_len, hidden_size]` where the chain keeps positions that wait."""

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        """Writes the hidden states of `[rows]` token ids into the first stage's input; the first
        one stands at position `start`, which matters to models with learned positions.
        """

    def run_stage(self, index: int, rows: int, past: int) -> None:
        """Runs layer stage `index` on the first `rows` rows of its input; `past` positions of
        these layers are already in the KV cache. Its output is the next stage's input.
        """

    def hidden(self, index: int, rows: int) -> Float32:
        """View `[rows, hidden_size]` of the input of layer stage `index` (the last stage's
        output for `index` equal to the number of stages).
        """

    def write_kv(self, layer: int, start: int, key: Float32, value: Float32) -> None:
        """Puts K (after rotary) and V `[kv_heads, rows, head_dim]` of a layer at positions from
        `start` on.
        """

    def kv(self, layer: int, length: int) -> tuple[Float32, Float32]:
        """Views of K and V of a layer (1-based), `[kv_heads, length, head_dim]`: the first
        positions of its cache.
        """


class SequenceBatch(Protocol):
    """Several sequences, each in a slot, whose passes of one position may be put together."""

    def sequence(self, slot: int) -> SequenceBuffers:
        """The sequence in a slot, for passes of its own."""

    def run_stage(self, index: int, first: int, pasts: Sequence[int]) -> None:
        """Runs layer stage `index` on row 0 of its input, for the sequences in the slots from
        `first` on, one for each of `pasts`: positions that these layers already have in its cache.
        """

    def probe(self, hidden: Float32) -> list[ProbeResult]:
        """The probe of every row `[rows, hidden_size]`."""

    def move(self, source: int, target: int, length: int) -> None:
        """Puts the sequence of one slot, `length` positions long, into another one; the sequence
        that was there takes its place, and must be begun anew.
        """


class Backend(Protocol):
    """A folder's stages, loaded; immutable and shared by all sequences."""

    @property
    def max_rows(self) -> int:
        """Positions that one pass may carry."""

    def open_sequence(self) -> SequenceBuffers:
        """Memory for one sequence."""

    def open_batch(self, slots: int) -> SequenceBatch | None:
        """Memory for several, or None where every pass is of one sequence."""

    def wait(self) -> None:
        """Returns once everything that was asked for is done: what a clock has to wait for."""

    def close(self) -> None:
        """Gives up what sequences share; nothing can be run afterwards."""

    def probe(self, hidden: Float32) -> ProbeResult:
        """Final norm, LM head and features of one position's hidden state `[hidden_size]`."""

    def probe_candidates(self, hidden: Float32, candidates: npt.NDArray[np.int64]) -> ProbeResult:
        """The same over `[candidates]` token ids alone: probabilities are among them."""

    def shortlist(self, hidden: Float32) -> ProbeResult:
        """The probe of a position, from tokens that a low-rank head proposes and the LM head scores
        exactly; other logits, and the sum behind probabilities, are the low-rank head's.
        """

    def probe_logits(self, hidden: Float32) -> Float32:
        """Logits `[rows, vocab_size]` of hidden states `[rows, hidden_size]`."""

    def probe_features(self, hidden: Float32) -> tuple[npt.NDArray[np.int64], Float32, Float32]:
        """token, top_prob and gap `[rows]` each, of hidden states `[rows, hidden_size]`."""

    def adapt(self, exit_layer: int, hidden: Float32) -> tuple[Float32, float]:
        """The exit point's adapter applied to `[hidden_size]`, and its trust: an affine read-out of
        the same hidden state. Without an adapter, the input and 0.
        """

    def translate(
        self, exit_layer: int, hidden: Float32, start: int
    ) -> Mapping[int, tuple[Float32, Float32]]:
        """K (after rotary) and V `[kv_heads, rows, head_dim]` of every layer above a context exit
        point, guessed from hidden states `[rows, hidden_size]` of positions from `start` on.
        """

    def kv_fill(self, layer: int, hidden: Float32, start: int) -> tuple[Float32, Float32]:
        """K (after rotary) and V `[kv_heads, rows, head_dim]` that a layer's own norm and weights
        make of hidden states `[rows, hidden_size]` that are not its input; positions from `start`.
        """

    def classify(
        self, graph: str, evidence: ExitEvidence, depth: float, state: Float32
    ) -> tuple[float, Float32]:
        """Score of an exit graph's classifier, and its next state `[state_size]`.

        Args:
            graph: file of one of the manifest's classifiers.
            depth: exit layer divided by the number of layers.
            state: zeros at the first exit point, then what the last call returned.
        """
