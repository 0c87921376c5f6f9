"""What each candidate exit layer would have answered, and the features of that answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine

from .affine import AffineMap
from .traces import AnswerTraces

__all__ = [
    "LOG_ODDS_CLIP",
    "LOWEST_LOGIT",
    "Predictions",
    "entropy_of",
    "log_odds",
    "predict_candidates",
    "predict_layers",
]

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

LOG_ODDS_CLIP = 1e-4
LOWEST_LOGIT = -1e4  # below the largest; its exponential is 0, and 0 times it too
_BATCH = 64


def log_odds(probability: Float32) -> Float32:
    """Of probabilities cut to `LOG_ODDS_CLIP` … 1 − that: linear models need the ends stretched."""
    clipped = np.clip(probability, LOG_ODDS_CLIP, 1.0 - LOG_ODDS_CLIP)
    odds: Float32 = np.log(clipped / (1.0 - clipped)).astype(np.float32)
    return odds


@dataclass(frozen=True)
class Predictions:
    """Answers of `[prompts]` at `[layers]` candidate exit layers.

    Attributes:
        final: `[prompts]`, the full model's answer.
        token, top_prob, gap: `[prompts, layers]`.
        trust: `[prompts, layers]`, see `trust`; None where it was not fitted.
        entropy: `[prompts, layers]`, of the prediction, in nats; None where it was not asked for.
        check_layers: `[layers]`, time of one check (adapter, probe; of a context exit translator,
            answer rows and probe) in units of one layer over one prompt.
        prompts: `[prompts]`, number of the prompt that each answer is from: the answers of a
            prompt's own examples come before its own, under the same number. None: one each.
        exit_check_layers: `[layers]`, what the check of an exit that is taken costs. An answer
            exit's is the answer's own probe, which the full model pays too: 0.
    """

    layers: tuple[int, ...]
    num_layers: int
    tasks: tuple[str, ...]
    final: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    top_prob: Float32
    gap: Float32
    check_layers: tuple[float, ...]
    exit_check_layers: tuple[float, ...]
    trust: Float32 | None = None
    prompts: npt.NDArray[np.int64] | None = None
    entropy: Float32 | None = None

    def rows(self, chosen: npt.NDArray[np.int64] | Bool) -> Predictions:
        """Only these answers."""
        return replace(
            self,
            tasks=tuple(np.array(self.tasks, object)[chosen]),
            final=self.final[chosen],
            token=self.token[chosen],
            top_prob=self.top_prob[chosen],
            gap=self.gap[chosen],
            trust=None if self.trust is None else self.trust[chosen],
            entropy=None if self.entropy is None else self.entropy[chosen],
            prompts=self.groups[chosen],
        )

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """`[prompts]`: equal numbers must not be parted by cross-validation."""
        return np.arange(len(self.final)) if self.prompts is None else self.prompts

    @property
    def own(self) -> Bool:
        """`[prompts]`, whether an answer is the prompt's own: the last under its number."""
        return np.append(self.groups[1:] != self.groups[:-1], True)

    @property
    def agrees(self) -> Bool:
        """`[prompts, layers]`: the label, 1 where an exit would give the full model's answer."""
        agrees: Bool = self.token == self.final[:, None]
        return agrees

    def at(self, layers: tuple[int, ...]) -> Predictions:
        """Only these exit layers."""
        columns = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            layers=layers,
            token=self.token[:, columns],
            top_prob=self.top_prob[:, columns],
            gap=self.gap[:, columns],
            check_layers=tuple(self.check_layers[column] for column in columns),
            exit_check_layers=tuple(self.exit_check_layers[column] for column in columns),
            trust=None if self.trust is None else self.trust[:, columns],
            entropy=None if self.entropy is None else self.entropy[:, columns],
        )

    @property
    def checks_by_layer(self) -> dict[str, float]:
        """`check_layers`, as reports have them."""
        pairs = zip(self.layers, self.check_layers, strict=True)
        return {str(layer): round(check, 3) for layer, check in pairs}

    def with_trust(self, trust: Float32) -> Predictions:
        """The same with another trust."""
        return replace(self, trust=trust)

    @property
    def known_features(self) -> frozenset[str]:
        """Names that `features` takes here."""
        always = {"top_prob", "gap", "depth", "stability", "log_odds", "rise"}
        return frozenset(always | self._optional.keys())

    @property
    def _optional(self) -> dict[str, Float32]:
        """Features that need not be there."""
        found = {"trust": self.trust, "entropy": self.entropy}
        return {name: values for name, values in found.items() if values is not None}

    def features(self, names: tuple[str, ...]) -> Float32:
        """`[prompts, layers, features]`, in the order of the names.

        `stability` is 1 where the token is that of the exit point before, `rise` the change of
        `log_odds` (of the top prob) since then; both are 0 at the first point.
        """
        prompts, points = self.token.shape
        depth = np.array(self.layers, np.float32) / self.num_layers
        stability = np.zeros((prompts, points), np.float32)
        stability[:, 1:] = self.token[:, 1:] == self.token[:, :-1]
        odds = log_odds(self.top_prob)
        rise = np.zeros((prompts, points), np.float32)
        rise[:, 1:] = odds[:, 1:] - odds[:, :-1]
        table: dict[str, Float32] = {
            **self._optional,
            "log_odds": odds,
            "rise": rise,
            "top_prob": self.top_prob,
            "gap": self.gap,
            "depth": np.tile(depth, (prompts, 1)),
            "stability": stability,
        }
        return np.stack([table[name] for name in names], axis=-1).astype(np.float32)


def entropy_of(logits: Float32) -> Float32:
    """`[rows, tokens]` to `[rows]`: −Σ p log p of the softmax, in nats."""
    shifted = np.maximum(logits - logits.max(axis=-1, keepdims=True), LOWEST_LOGIT)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    entropy: Float32 = np.log(total) - (weights * shifted).sum(axis=-1) / total
    return entropy


def predict_layers(
    engine: Engine,
    traces: AnswerTraces,
    adapters: Mapping[int, AffineMap],
    *,
    entropy: bool = False,
) -> Predictions:
    """Applies adapter (where there is one) and probe to every traced hidden state.

    Args:
        entropy: whether to know that too: all logits are read for it.
    """
    shape = traces.hidden.shape[:2]
    spread = np.empty(shape, np.float32)
    token = np.empty(shape, np.int64)
    top_prob, gap = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for column, layer in enumerate(traces.layers):
        adapter = adapters.get(layer)
        for first in range(0, shape[0], _BATCH):
            rows = slice(first, first + _BATCH)
            hidden = np.ascontiguousarray(traces.hidden[rows, column])
            adapted = adapter.apply(hidden) if adapter else hidden
            features = engine.backend.probe_features(adapted)
            token[rows, column], top_prob[rows, column], gap[rows, column] = features
            if entropy:
                spread[rows, column] = entropy_of(engine.backend.probe_logits(adapted))
    check = _check_seconds(engine, traces, adapters) / traces.seconds_per_layer
    points = len(traces.layers)
    return Predictions(
        traces.layers,
        engine.manifest.model.num_layers,
        traces.tasks,
        traces.token,
        token,
        top_prob,
        gap,
        (check,) * points,
        (0.0,) * points,
        prompts=traces.prompts,
        entropy=spread if entropy else None,
    )


def predict_candidates(
    engine: Engine, traces: AnswerTraces, adapters: Mapping[int, AffineMap], vocabulary: Predictions
) -> Predictions:
    """The same over the rows of each prompt's labels alone; answers without labels are left out.

    Args:
        vocabulary: predictions of the same traces, whose trust is taken over, and whether the
            entropy is wanted.
    """
    rows = np.flatnonzero([bool(candidates) for candidates in traces.candidates])
    shape = (len(rows), len(traces.layers))
    final, token = np.empty(shape[0], np.int64), np.empty(shape, np.int64)
    top_prob, gap, entropy = (np.empty(shape, np.float32) for _ in range(3))
    seconds = []
    for index, row in enumerate(rows):
        candidates = np.array(traces.candidates[row], np.int64)
        final[index] = engine.backend.probe_candidates(traces.final[row], candidates).token
        for column, layer in enumerate(traces.layers):
            start = time.perf_counter()
            hidden = traces.hidden[row, column]
            adapter = adapters.get(layer)
            adapted = adapter.apply(hidden[None])[0] if adapter else hidden
            result = engine.backend.probe_candidates(adapted, candidates)
            seconds.append(time.perf_counter() - start)
            token[index, column] = result.token
            top_prob[index, column], gap[index, column] = result.top_prob, result.gap
            entropy[index, column] = entropy_of(result.logits[None])[0]
    check = float(np.median(seconds)) / traces.seconds_per_layer if seconds else 0.0
    return replace(
        vocabulary.rows(rows),
        final=final,
        token=token,
        top_prob=top_prob,
        gap=gap,
        check_layers=(check,) * len(traces.layers),
        entropy=None if vocabulary.entropy is None else entropy,
    )


def _check_seconds(
    engine: Engine, traces: AnswerTraces, adapters: Mapping[int, AffineMap], repeats: int = 9
) -> float:
    hidden = np.ascontiguousarray(traces.hidden[0, -1])
    adapter = adapters.get(traces.layers[-1])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        engine.backend.probe(adapter.apply(hidden[None])[0] if adapter else hidden)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
