"""Runs prompts through all layers and keeps what fitting needs, never all activations."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .ridge import Moments

__all__ = ["AnswerTraces", "candidate_layers", "trace_answers", "trace_moments"]

Float32 = npt.NDArray[np.float32]

_ANSWER_WEIGHT = 10.0  # answer positions matter most, see tools/README.md
_TOKENS_PER_PROMPT = 24


@dataclass(frozen=True)
class AnswerTraces:
    """Answer positions of some prompts.

    Attributes:
        layers: candidate exit layers, ascending.
        hidden: `[prompts, layers, hidden_size]`, after each candidate layer.
        token: `[prompts]`, the full model's own prediction.
        seconds_per_layer: mean time of one layer over one prompt.
        tasks: name of each prompt's task.
    """

    layers: tuple[int, ...]
    hidden: Float32
    token: npt.NDArray[np.int64]
    seconds_per_layer: float
    tasks: tuple[str, ...]


def candidate_layers(engine: Engine) -> tuple[int, ...]:
    """Boundaries between engines in the upper half of the model, without the last."""
    manifest = engine.manifest
    half = manifest.model.num_layers // 2
    return tuple(layer for layer in manifest.boundaries[:-1] if layer >= half)


def trace_moments(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter, seed: int
) -> dict[int, Moments]:
    """Moments of (hidden after layer, final hidden) per candidate layer.

    The answer position counts ten times as much as a prompt's other positions, of which a sample
    is taken.
    """
    width = engine.manifest.model.hidden_size
    layers = candidate_layers(engine)
    moments = {layer: Moments(width) for layer in layers}
    random = np.random.default_rng(seed)
    for ids in _encode(engine, examples, reporter):
        last = len(ids) - 1
        others = random.choice(last, min(last, _TOKENS_PER_PROMPT), replace=False)
        rows = np.append(np.sort(others), last)
        weight = np.ones(len(rows), np.float32)
        weight[-1] = _ANSWER_WEIGHT
        per_layer, final = _run(engine, ids, layers, rows)
        for layer, hidden in per_layer.items():
            moments[layer].add(hidden, final, weight)
    return moments


def trace_answers(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter
) -> AnswerTraces:
    """Hidden states of the answer positions at every candidate layer."""
    layers = candidate_layers(engine)
    hidden, tokens, tasks, seconds, runs = [], [], [], 0.0, 0
    examples = list(examples)
    for example, ids in zip(examples, _encode(engine, examples, reporter), strict=True):
        start = time.perf_counter()
        per_layer, final = _run(engine, ids, layers, np.array([len(ids) - 1]))
        seconds += time.perf_counter() - start
        runs += 1
        hidden.append(np.concatenate([per_layer[layer] for layer in layers]))
        tokens.append(engine.backend.probe(final[0]).token)
        tasks.append(example.task)
    width = engine.manifest.model.hidden_size
    return AnswerTraces(
        layers,
        np.array(hidden, np.float32).reshape(runs, len(layers), width),
        np.array(tokens, np.int64),
        seconds / max(runs, 1) / engine.manifest.model.num_layers,
        tuple(tasks),
    )


def fits(engine: Engine, example: TaskExample) -> bool:
    """Whether the prompt leaves the engine at least one position."""
    return len(engine.tokenizer.encode(example.prompt)) <= engine.manifest.max_seq_len


def _encode(
    engine: Engine, examples: Iterable[TaskExample], reporter: Reporter
) -> Iterable[list[int]]:
    for example in examples:
        yield engine.tokenizer.encode(example.prompt)
        reporter.step(example.task)


def _run(
    engine: Engine, ids: list[int], layers: tuple[int, ...], rows: npt.NDArray[np.int64]
) -> tuple[dict[int, Float32], Float32]:
    with engine.borrow() as session:
        session.extend(ids)
        per_layer = {}
        for layer in layers:
            session.advance(layer)
            per_layer[layer] = session.hidden()[rows].copy()
        session.complete()
        return per_layer, session.hidden()[rows].copy()
