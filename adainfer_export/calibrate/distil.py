"""Distilled adapters: the ridge solution, moved towards the full model's distribution.

Least squares weighs every direction of the final hidden state alike; the head does not. A few
hundred steps of Adam through the frozen norm and head (`head_network`) move it to where the exit's
distribution is closest to the full model's.

On SmolLM2 (int4, answers of 12 tasks) agreement at layer 23 rises from 0.46 to 0.60, at 25 from
0.75 to 0.78. Prompts that were held out decide per layer whether the ridge solution is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine

from ..progress import Reporter
from .affine import AffineMap
from .distilled import Distilled, KeepLayer, keep_nothing
from .head import Head
from .head_network import HeadNetwork, considered_tokens
from .traces import AnswerTraces

__all__ = ["distil_adapters", "predicted_tokens"]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

_EPOCHS, _BATCH = 20, 256
_FEWEST_STEPS, _MOST_STEPS = 100, 1000
_LEARNING_RATE = 0.01


@dataclass(frozen=True)
class _Lesson:
    """What one adapter learns from: rows of answers, and the full model's distribution there."""

    hidden: Float32
    target: Any  # torch tensors: torch is imported where it is used, for it takes a second
    best: Any


def distil_adapters(
    engine: Engine,
    head: Head,
    traces: AnswerTraces,
    adapters: Mapping[int, AffineMap],
    reporter: Reporter,
    seed: int,
    keep: KeepLayer = keep_nothing,
) -> dict[int, AffineMap]:
    """Per layer the distilled adapter, or the given one where held-out prompts prefer it.

    Every layer draws from random numbers of its own: it comes to the same, whichever layers are
    kept already.
    """
    train, test = np.flatnonzero(~traces.held_out), np.flatnonzero(traces.held_out)
    if len(train) < _BATCH or len(test) == 0:
        return dict(adapters)
    random = np.random.default_rng(seed)
    network = HeadNetwork(head, considered_tokens(engine, traces.final[train], random))
    target, best = network.teach(traces.final[train])

    def distil(layer: int, column: int) -> Distilled:
        lesson = _Lesson(traces.hidden[train, column], target, best)
        start, random = adapters[layer], np.random.default_rng((seed, layer))
        trained = _distil(network, start, lesson, random)
        hidden, token = traces.hidden[test, column], traces.token[test]
        before, after = (
            float((predicted_tokens(engine, adapter.apply(hidden)) == token).mean())
            for adapter in (start, trained)
        )
        return Distilled.better_of(start, trained, before, after)

    better = {}
    reporter.begin("distilling adapters", len(adapters))
    for column, layer in enumerate(traces.layers):
        distilled = keep(layer, partial(distil, layer, column))
        better[layer] = distilled.affine
        reporter.step(f"layer {layer}: {distilled}")
    return better


def predicted_tokens(engine: Engine, hidden: Float32) -> Int64:
    """The probe's tokens `[rows]` for `[rows, hidden]` in the place of final hidden states."""
    parts = [
        engine.backend.probe_features(np.ascontiguousarray(hidden[first : first + 64]))[0]
        for first in range(0, len(hidden), 64)
    ]
    return np.concatenate(parts)


def _distil(
    network: HeadNetwork, start: AffineMap, lesson: _Lesson, random: np.random.Generator
) -> AffineMap:
    """Adam with a falling rate, in coordinates of unit variance."""
    import torch

    scale = torch.from_numpy(lesson.hidden.std(axis=0) + 1e-6)
    matrix = torch.from_numpy(start.matrix)
    delta = torch.zeros_like(matrix, requires_grad=True)
    bias = torch.from_numpy(start.bias.copy()).requires_grad_()
    optimiser = torch.optim.Adam([delta, bias], lr=_LEARNING_RATE)
    steps = int(np.clip(_EPOCHS * len(lesson.hidden) // _BATCH, _FEWEST_STEPS, _MOST_STEPS))
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 - step / steps)
    for _ in range(steps):
        rows = random.choice(len(lesson.hidden), _BATCH, replace=False)
        hidden = torch.from_numpy(lesson.hidden[rows])
        adapted = hidden @ matrix + (hidden / scale) @ delta + bias
        loss = network.loss(adapted, lesson.target[rows], lesson.best[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
    moved = matrix + delta.detach() / scale[:, None]
    return AffineMap(moved.numpy(), bias.detach().numpy())
