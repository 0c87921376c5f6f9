"""Runs prompts through all layers and keeps what fitting needs, never all activations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .ridge import Moments

__all__ = [
    "AnswerTraces",
    "answer_positions",
    "candidate_layers",
    "fits",
    "trace_answers",
    "trace_moments",
]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Answers are what exits are asked for: their positions outweigh the rest of a prompt.
_ANSWER_WEIGHT = 10.0
_OTHER_POSITIONS = 24
_EARLIER_ANSWERS = 6


@dataclass(frozen=True)
class AnswerTraces:
    """Answer positions of some prompts.

    Attributes:
        layers: candidate exit layers, ascending.
        hidden: `[positions, layers, hidden_size]`, after each candidate layer.
        token: `[positions]`, the full model's own prediction.
        tasks: name of each position's task.
        prompts: `[positions]`, number of the prompt that each position belongs to.
        seconds_per_layer: mean time of one layer over one prompt.
    """

    layers: tuple[int, ...]
    hidden: Float32
    token: Int64
    tasks: tuple[str, ...]
    prompts: Int64
    seconds_per_layer: float


def candidate_layers(engine: Engine) -> tuple[int, ...]:
    """Boundaries between engines in the upper half of the model, without the last."""
    manifest = engine.manifest
    half = manifest.model.num_layers // 2
    return tuple(layer for layer in manifest.boundaries[:-1] if layer >= half)


def fits(engine: Engine, example: TaskExample) -> bool:
    """Whether the prompt is not longer than the engine takes."""
    return len(engine.tokenizer.encode(example.prompt)) <= engine.manifest.max_seq_len


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


def trace_moments(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter, seed: int
) -> dict[int, Moments]:
    """Moments of (hidden after layer, final hidden) per candidate layer.

    Answer positions count ten times as much as a prompt's other positions, of which a sample is
    taken.
    """
    width = engine.manifest.model.hidden_size
    layers = candidate_layers(engine)
    moments = {layer: Moments(width) for layer in layers}
    random = np.random.default_rng(seed)
    for ids in _encode(engine, examples, reporter):
        answers = answer_positions(ids)
        others = np.setdiff1d(np.arange(len(ids)), answers)
        others = random.choice(others, min(len(others), _OTHER_POSITIONS), replace=False)
        rows = np.concatenate([others, answers])
        weight = np.ones(len(rows), np.float32)
        weight[len(others) :] = _ANSWER_WEIGHT
        per_layer, final = _run(engine, ids, layers, rows)
        for layer, hidden in per_layer.items():
            moments[layer].add(hidden, final, weight)
    return moments


def trace_answers(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter, *, in_context: bool
) -> AnswerTraces:
    """Hidden states of the answer positions at every candidate layer.

    Args:
        in_context: also the answers of a prompt's own examples (to fit on; what is measured or
            chosen on has the prompt as its unit).
    """
    layers = candidate_layers(engine)
    hidden: list[Float32] = []
    tokens: list[Int64] = []
    tasks: list[str] = []
    prompts: list[int] = []
    seconds, runs = 0.0, 0
    examples = list(examples)
    for example, ids in zip(examples, _encode(engine, examples, reporter), strict=True):
        rows = answer_positions(ids) if in_context else np.array([len(ids) - 1], np.int64)
        start = time.perf_counter()
        per_layer, final = _run(engine, ids, layers, rows)
        seconds += time.perf_counter() - start
        runs += 1
        hidden.append(np.stack([per_layer[layer] for layer in layers], axis=1))
        tokens.append(engine.backend.probe_features(final)[0])
        tasks += [example.task] * len(rows)
        prompts += [runs] * len(rows)
    return AnswerTraces(
        layers,
        np.concatenate(hidden),
        np.concatenate(tokens),
        tuple(tasks),
        np.array(prompts, np.int64),
        seconds / max(runs, 1) / engine.manifest.model.num_layers,
    )


def _encode(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter
) -> Iterator[list[int]]:
    for example in examples:
        yield engine.tokenizer.encode(example.prompt)
        reporter.step(example.task)


def _run(
    engine: Engine, ids: list[int], layers: tuple[int, ...], rows: Int64
) -> tuple[dict[int, Float32], Float32]:
    with engine.borrow() as session:
        session.extend(ids)
        per_layer = {}
        for layer in layers:
            session.advance(layer)
            per_layer[layer] = session.hidden()[rows].copy()
        session.complete()
        return per_layer, session.hidden()[rows].copy()
