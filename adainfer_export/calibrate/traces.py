"""Runs prompts through all layers and keeps what fitting needs, never all activations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.choose import first_tokens
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .questions import Questions, positions_to_fit
from .ridge import Moments

__all__ = [
    "AnswerCollector",
    "AnswerTraces",
    "PromptTraces",
    "answer_positions",
    "candidate_layers",
    "candidates_of",
    "fits",
    "trace_answers",
    "trace_contexts",
    "trace_prompts",
]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Answers are what exits are asked for: their positions outweigh the rest of a prompt.
_ANSWER_WEIGHT = 10.0
_OTHER_POSITIONS = 24
_EARLIER_ANSWERS = 6
_HELD_OUT = 10
_MOST_CANDIDATES = 16
_MOST_ANSWER_BYTES = 800e6


@dataclass(frozen=True)
class AnswerTraces:
    """Answer positions of some prompts.

    Attributes:
        layers: candidate exit layers, ascending.
        hidden: `[positions, layers, hidden_size]`, after each candidate layer.
        final: `[positions, hidden_size]`, after all layers.
        token: `[positions]`, the full model's own prediction.
        tasks: name of each position's task.
        prompts: `[positions]`, number of the prompt that each position belongs to.
        candidates: `[positions]`, the different first tokens of the prompt's labels; empty where
            it has none, or one.
        seconds_per_layer: mean time of one layer over one prompt.
    """

    layers: tuple[int, ...]
    hidden: Float32
    final: Float32
    token: Int64
    tasks: tuple[str, ...]
    prompts: Int64
    candidates: tuple[tuple[int, ...], ...]
    seconds_per_layer: float

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """`[positions]`, those of every tenth prompt: forms of adapters are compared on them."""
        return np.asarray(self.prompts % _HELD_OUT == 0)

    @classmethod
    def concatenate(cls, parts: Sequence[AnswerTraces]) -> AnswerTraces:
        """Those of different prompts at the same layers, numbered anew; times are averaged. What
        is `held_out` stays so: moments were summed without it.
        """
        most = [int(part.prompts.max(initial=0)) for part in parts]
        first = np.cumsum([0, *(-(-last // _HELD_OUT) * _HELD_OUT for last in most)])
        return cls(
            parts[0].layers,
            np.concatenate([part.hidden for part in parts]),
            np.concatenate([part.final for part in parts]),
            np.concatenate([part.token for part in parts]),
            tuple(task for part in parts for task in part.tasks),
            np.concatenate([part.prompts + n for part, n in zip(parts, first, strict=False)]),
            tuple(tokens for part in parts for tokens in part.candidates),
            float(np.mean([part.seconds_per_layer for part in parts])),
        )


def candidate_layers(engine: Engine) -> tuple[int, ...]:
    """Boundaries between engines in the upper half of the model, without the last; of a deep model
    every second, third …, for moments and sets of exit points grow with their number.
    """
    manifest = engine.manifest
    half = manifest.model.num_layers // 2
    upper = tuple(layer for layer in manifest.boundaries[:-1] if layer >= half)
    return upper[:: -(-len(upper) // _MOST_CANDIDATES)] if upper else ()


def fits(engine: Engine, example: TaskExample) -> bool:
    """Whether the prompt is not longer than the engine takes."""
    return len(engine.tokenizer.encode(example.prompt)) <= engine.manifest.max_seq_len


def candidates_of(engine: Engine, example: TaskExample) -> tuple[int, ...]:
    """The different first tokens of an example's labels; empty where there is nothing to choose."""
    labels = engine.label_tokens(example.prompt, example.labels or ())
    tokens = tuple(first_tokens([label for label in labels if label]).tolist())
    return tokens if len(tokens) > 1 else ()


def answer_positions(ids: list[int]) -> Int64:
    """Positions whose next token is an answer: the last, and those of a few-shot prompt's examples.

    A few-shot prompt ends like the places before its examples' answers ("… A:"). Earlier places
    with the same last tokens are answers in context too, as good to fit on as the last and free;
    the first two, with hardly an example before them, are left out.
    """
    sequence, last = np.array(ids), len(ids) - 1
    for length in (3, 2, 1):
        if len(ids) <= length:
            continue
        ending = sequence[-length:]
        windows = np.lib.stride_tricks.sliding_window_view(sequence, length)
        matches = np.flatnonzero((windows == ending).all(axis=1)) + length - 1
        earlier = matches[matches < last]
        if len(earlier) >= 2:
            return np.append(earlier[2:][-_EARLIER_ANSWERS:], last).astype(np.int64)
    return np.array([last], np.int64)


@dataclass(frozen=True)
class PromptTraces:
    """What adapters are fitted on.

    Attributes:
        moments: of (hidden after layer, final hidden), per candidate layer.
        answers: answer positions of the same prompts, or a sample of them.
        block_influence: per engine of the cut, by its last layer: 1 − mean cosine between what it
            reads and what it writes (ShortGPT, arXiv 2403.03853): how much the engine does.
    """

    moments: Mapping[int, Moments]
    answers: AnswerTraces
    block_influence: Mapping[int, float]

    @classmethod
    def concatenate(cls, parts: Sequence[PromptTraces]) -> PromptTraces:
        """Those of different prompts; influences are averaged."""
        moments = {
            layer: Moments.sum_of([part.moments[layer] for part in parts])
            for layer in parts[0].moments
        }
        influence = {
            layer: float(np.mean([part.block_influence[layer] for part in parts]))
            for layer in parts[0].block_influence
        }
        answers = AnswerTraces.concatenate([part.answers for part in parts])
        return cls(moments, answers, influence)


def trace_prompts(
    engine: Engine,
    examples: Iterable[TaskExample],
    reporter: Reporter,
    seed: int,
    layers: tuple[int, ...] | None = None,
    held_out: Questions = frozenset(),
) -> PromptTraces:
    """Runs prompts through all layers and keeps second moments, and answers.

    Answer positions count ten times as much as a prompt's other positions, of which a sample is
    taken. The answers kept are a sample too, where they would not fit into memory. Every tenth
    prompt (`AnswerTraces.held_out`) is in the answers only: by it forms of adapters are compared.

    Args:
        layers: default: all candidate layers.
        held_out: questions whose answers in a prompt's examples are left out.
    """
    width = engine.manifest.model.hidden_size
    layers = layers or candidate_layers(engine)
    moments = {layer: Moments(width) for layer in layers}
    random = np.random.default_rng(seed)
    examples = list(examples)
    kept = AnswerCollector(engine, layers)
    expected = len(examples) * (_EARLIER_ANSWERS + 1) * (len(layers) + 1) * width * 4
    share = min(1.0, _MOST_ANSWER_BYTES / max(expected, 1))
    similarity: dict[int, list[float]] = {layer: [] for layer in engine.manifest.boundaries}
    for example, ids in zip(examples, _encode(engine, examples, reporter), strict=True):
        every_answer = answer_positions(ids)
        answers = positions_to_fit(engine, example, ids, every_answer, held_out)
        start = time.perf_counter()
        others = np.setdiff1d(np.arange(len(ids)), every_answer)
        others = random.choice(others, min(len(others), _OTHER_POSITIONS), replace=False)
        rows = np.concatenate([others, answers])
        weight = np.ones(len(rows), np.float32)
        weight[len(others) :] = _ANSWER_WEIGHT
        per_layer, final = _run(engine, ids, layers, rows, similarity)
        kept.seconds += time.perf_counter() - start
        if not kept.next_is_held_out:
            for layer, hidden in per_layer.items():
                moments[layer].add(hidden, final, weight)
        chosen = len(others) + np.flatnonzero(random.random(len(answers)) < share)
        kept.add(example, {n: hidden[chosen] for n, hidden in per_layer.items()}, final[chosen])
    influence = {layer: 1.0 - float(np.mean(values)) for layer, values in similarity.items()}
    return PromptTraces(moments, kept.traces(), influence)


def trace_answers(
    engine: Engine,
    examples: Iterable[TaskExample],
    reporter: Reporter,
    *,
    in_context: bool,
    layers: tuple[int, ...] | None = None,
    held_out: Questions = frozenset(),
) -> AnswerTraces:
    """Hidden states of the answer positions at every candidate layer.

    Args:
        in_context: also the answers of a prompt's own examples (to fit on; what is measured or
            chosen on has the prompt as its unit).
        layers: default: all candidate layers.
        held_out: questions whose answers in a prompt's examples are left out.
    """
    examples = list(examples)
    kept = AnswerCollector(engine, layers or candidate_layers(engine))
    for example, ids in zip(examples, _encode(engine, examples, reporter), strict=True):
        rows = np.array([len(ids) - 1], np.int64)
        if in_context:
            rows = positions_to_fit(engine, example, ids, answer_positions(ids), held_out)
        start = time.perf_counter()
        per_layer, final = _run(engine, ids, kept.layers, rows)
        kept.seconds += time.perf_counter() - start
        kept.add(example, per_layer, final)
    return kept.traces()


def trace_contexts(
    engine: Engine,
    examples: Iterable[TaskExample],
    layers: tuple[int, ...],
    reporter: Reporter,
    *,
    in_context: bool,
    held_out: Questions = frozenset(),
) -> AnswerTraces:
    """The same of context exits: `hidden` is what the answer positions come to after all layers,
    over a context that stopped at each of `layers`. Prompts without a context are left out.

    Args:
        engine: with a context exit that has these points.
        in_context, held_out: see `trace_answers`; the first position is no answer over a context.
    """
    examples = list(examples)
    kept = AnswerCollector(engine, layers)
    for example, ids in zip(examples, _encode(engine, examples, reporter), strict=True):
        rows = answer_positions(ids)
        rows = positions_to_fit(engine, example, ids, rows, held_out) if in_context else rows[-1:]
        rows = rows[rows > 0]
        if not rows.size:
            kept.skip()
            continue
        start = time.perf_counter()
        with engine.borrow() as session:
            session.extend(ids)
            positions = rows.tolist()
            per_layer = {n: session.answers_over_context(n, positions) for n in layers}
            session.complete()
            final = session.hidden()[rows].copy()
        kept.seconds += time.perf_counter() - start
        kept.add(example, per_layer, final)
    return kept.traces()


class AnswerCollector:
    """Puts answers of prompt after prompt together."""

    def __init__(self, engine: Engine, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.seconds = 0.0
        self._engine = engine
        self._hidden: list[Float32] = []
        self._final: list[Float32] = []
        self._tasks: list[str] = []
        self._prompts: list[int] = []
        self._candidates: list[tuple[int, ...]] = []
        self._runs = 0

    def add(self, example: TaskExample, per_layer: Mapping[int, Float32], final: Float32) -> None:
        """One prompt's answers: `[answers, hidden_size]` per layer, and after all layers."""
        self._runs += 1
        self._hidden.append(np.stack([per_layer[layer] for layer in self.layers], axis=1))
        self._final.append(final)
        self._tasks += [example.task] * len(final)
        self._prompts += [self._runs] * len(final)
        self._candidates += [candidates_of(self._engine, example)] * len(final)

    def skip(self) -> None:
        """A prompt without answers: the numbers of the others go on."""
        self._runs += 1

    @property
    def next_is_held_out(self) -> bool:
        """Whether the next prompt's answers will be in `AnswerTraces.held_out`."""
        return (self._runs + 1) % _HELD_OUT == 0

    def traces(self) -> AnswerTraces:
        """All of them, with the full model's tokens."""
        num_layers = self._engine.manifest.model.num_layers
        features = [self._engine.backend.probe_features(final) for final in self._final]
        return AnswerTraces(
            self.layers,
            np.concatenate(self._hidden),
            np.concatenate(self._final),
            np.concatenate([token for token, _, _ in features]),
            tuple(self._tasks),
            np.array(self._prompts, np.int64),
            tuple(self._candidates),
            self.seconds / max(self._runs, 1) / num_layers,
        )


def _encode(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter
) -> Iterator[list[int]]:
    for example in examples:
        yield engine.tokenizer.encode(example.prompt)
        reporter.step(example.task)


def _run(
    engine: Engine,
    ids: list[int],
    layers: tuple[int, ...],
    rows: Int64,
    similarity: Mapping[int, list[float]] | None = None,
) -> tuple[dict[int, Float32], Float32]:
    """Hidden states of some rows after some layers, and after the last.

    Args:
        similarity: takes, at every boundary, the rows' mean cosine with the boundary before.
    """
    with engine.borrow() as session:
        session.extend(ids)
        per_layer = {}
        before = session.hidden()[rows].copy()
        for layer in engine.manifest.boundaries if similarity is not None else layers:
            session.advance(layer)
            hidden = session.hidden()[rows].copy()
            if layer in layers:
                per_layer[layer] = hidden
            if similarity is not None:
                similarity[layer].append(_mean_cosine(before, hidden))
                before = hidden
        session.complete()
        return per_layer, session.hidden()[rows].copy()


def _mean_cosine(a: Float32, b: Float32) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-12)).mean())
