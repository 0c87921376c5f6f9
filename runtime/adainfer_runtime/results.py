"""What requests give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "NO_DRAFTS",
    "NO_STATISTICS",
    "ChoiceResult",
    "DraftCount",
    "FinishReason",
    "GenerationResult",
    "RequestStatistics",
    "Span",
    "StreamEvent",
    "TokenLogprob",
]

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class DraftCount:
    """Drafts proposed and accepted, and the passes that verified them. Accepted are those that
    were emitted: of drafts that are confirmed behind the end of a text nothing comes.
    """

    proposed: int = 0
    accepted: int = 0
    passes: int = 0

    def __add__(self, other: DraftCount) -> DraftCount:
        return DraftCount(
            self.proposed + other.proposed,
            self.accepted + other.accepted,
            self.passes + other.passes,
        )


NO_DRAFTS = DraftCount()


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probabilities under the model's own logits: before penalties, temperature and
    truncation.

    Attributes:
        alternatives: the most probable tokens at this place with theirs, in descending order, as
            many as were asked for.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestStatistics:
    """What one text cost. Seconds are of work: waiting for a slow reader of the stream is not in.

    Attributes:
        prompt_tokens: of the whole prompt; `reused_tokens` of them were in the KV cache already.
        time_to_first_token: seconds from the request's arrival, tokenisation included; None
            where no token came. In a batch what passed meanwhile on other texts is in.
        prompt_seconds: up to the first token; `decode_seconds` after it.
        decode_tokens: tokens after the first, with the one that ended the text, if one did: it
            took a step like the others.
        tokens_per_second: `decode_tokens` by `decode_seconds`; 0 where there were none.
        layers_executed: position-layers, prompt and decode together.
        kv_fills: those among them that were made up for earlier positions, whose layers an early
            exit had left out; `kv_filled` those that were given approximate keys and values
            instead of being executed (KV policies `propagate` and `translated`).
        exits: tokens by exit layer.
        stage_seconds: by kind of stage, where the engine was loaded with `profile=True`.
        drafts: proposed and accepted, in mode `verified`.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    time_to_first_token: float | None
    prompt_seconds: float
    decode_seconds: float
    tokens_per_second: float
    layers_executed: int
    kv_fills: int
    exits: Mapping[int, int]
    stage_seconds: Mapping[str, float]
    drafts: DraftCount = NO_DRAFTS
    kv_filled: int = 0
    decode_tokens: int = 0


NO_STATISTICS = RequestStatistics(0, 0, 0, None, 0.0, 0.0, 0.0, 0, 0, {}, {})


@dataclass(frozen=True)
class GenerationResult:
    """Generated text, and what it cost.

    Attributes:
        text: as it continues the prompt, without what ended it; empty where the engine has no
            tokenizer.
        tokens: without the end-of-text or stop token; those of a stop string are in.
        exit_layers: layers executed for each token, 1 … `layers_total`.
        layers_saved: 1 − position-layers executed / dense, prompt and decode together, as
            counted by the runtime; `prompt_layers_saved` and `decode_layers_saved` apart.
        compute_saved: 1 − multiply-adds executed / dense, adapters and probes included.
        finish_reason: `eos`; `stop` by a stop string or token; `length`; or `cancelled`.
        logprobs: one per token, where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    exit_layers: tuple[int, ...]
    layers_total: int
    layers_saved: float
    prompt_layers_saved: float
    decode_layers_saved: float
    compute_saved: float
    seconds: float
    finish_reason: FinishReason
    statistics: RequestStatistics
    logprobs: tuple[TokenLogprob, ...] | None = None


class Span(NamedTuple):
    """Text that came with a token, and the layers that the token took."""

    text: str
    exit_layer: int | None


@dataclass(frozen=True)
class StreamEvent:
    """A step of a text: one token, or the end.

    Attributes:
        text: what is certain now; empty while a character, or what may become a stop string,
            is incomplete. All of them together are the result's text.
        token: None in the last event, which carries `result`.
        spans: `text` by the tokens that it came with: what was held back is of earlier ones.
    """

    text: str
    token: int | None = None
    exit_layer: int | None = None
    logprob: TokenLogprob | None = None
    result: GenerationResult | None = None
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ChoiceResult:
    """The chosen label; `scores` are the labels' log-probabilities among the labels."""

    label: str
    index: int
    scores: tuple[float, ...]
    exit_layer: int
    layers_total: int
    layers_saved: float
    compute_saved: float
    seconds: float
