"""Distilled translators: the ridge maps, moved towards the full model's answers.

Ridge regression gives every direction of every layer's K and V the same weight; the answer position
attends to some. So the maps are trained through what follows them: the frozen layers above the exit
point run the answer position over the translated K and V (`torch_stage`, with the weights that the
engine has), and Adam lowers the loss of `head_network` between what comes out and the full model's
distribution. Nothing of the model is changed (SwiftKV, arXiv 2410.03960, trains its K,V weights).

Every answer of a few-shot prompt is a question of its own: it attends to the translated context
before it, to the first token, and to itself. (The few positions before it, which run through the
layers as well when it counts, are translated here: eight times the work, and no better maps.)
Prompts that were held out decide per exit point whether the ridge map is kept.

It takes many prompts. On SmolLM2 (int4, 12 tasks, 400 held-out prompts, a context of 17 of 30
layers) 0.74 of the answers agree by ridge, 0.77 after training on 700 prompts, 0.81 on 2,000; over
8 answer rows 0.76, 0.79 and 0.83. Low-rank updates do as well, larger steps worse.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime import Engine
from adainfer_runtime.manifest import Manifest

from ..progress import Reporter
from .affine import AffineMap
from .distil import predicted_tokens
from .distilled import Distilled, KeepLayer, keep_nothing
from .head import Head
from .head_network import HeadNetwork, considered_tokens
from .torch_stage import AttentionSpec, TorchStage, read_torch_stage
from .translate import ContextLesson, Rotary, Translator, Unrotated

__all__ = ["distil_translators"]

_LOG = logging.getLogger(__name__)
Float32 = npt.NDArray[np.float32]

_EPOCHS, _BATCH = 4, 8
_MOST_STEPS = 1000
_LEARNING_RATE = 2e-4
_FEWEST_PROMPTS = 100
# Maps below are hopeless, above there is nothing to gain: neither is worth the time.
_WORTH_IT = (0.6, 0.98)
_MOST_POINTS = 3
_MOST_WEIGHT_BYTES = 2e9


def distil_translators(
    engine: Engine,
    folder: Path,
    head: Head,
    rotary: Rotary | Unrotated,
    translators: Mapping[int, Translator],
    lessons: Sequence[ContextLesson],
    reporter: Reporter,
    seed: int,
    keep: KeepLayer = keep_nothing,
) -> dict[int, Translator]:
    """Per exit point the distilled map, or the given one where held-out prompts prefer it. Each
    draws from random numbers of its own: it comes to the same, whichever are kept already.

    Points are left as they are where the layers above hold an operator that torch is not taught, or
    too many weights to be held in float32, with a warning; all of them with too few prompts.
    """
    train = [lesson for lesson in lessons if not lesson.held_out]
    test = [lesson for lesson in lessons if lesson.held_out]
    result = dict(translators)
    if len(train) < _FEWEST_PROMPTS:
        return result
    random = np.random.default_rng(seed)
    finals = np.concatenate([lesson.final for lesson in train])
    network = HeadNetwork(head, considered_tokens(engine, finals, random))
    courses, left_out = {}, list[int]()
    for layer, translator in translators.items():
        upper = _read_upper(folder, engine.manifest, layer)
        if upper is None:
            left_out.append(layer)
            continue
        course = _Course(engine, network, _Upper(upper, layer, rotary, engine.manifest))
        agreement = course.agreement(translator, test)
        if _WORTH_IT[0] <= agreement <= _WORTH_IT[1]:
            courses[layer] = (course, agreement)
    if left_out:
        _LOG.warning(
            "context exits after layers %s keep ridge translators: the layers above them, as target"
            " %s has them, cannot be trained through (other operators than are known, sliding "
            "windows, or more than 2 GB)",
            ", ".join(map(str, left_out)),
            engine.manifest.target,
        )
    # What there is to gain: layers that a right answer saves, at the chance of more than half.
    worth = {
        layer: (engine.manifest.model.num_layers - layer) * (2.0 * agreement - 1.0)
        for layer, (_, agreement) in courses.items()
    }
    chosen = sorted(sorted(worth, key=lambda layer: -worth[layer])[:_MOST_POINTS])

    def distil(layer: int) -> Distilled:
        course, before = courses[layer]
        start, random = translators[layer], np.random.default_rng((seed, layer))
        trained = course.train(start, train, random)
        after = course.agreement(trained, test)
        return Distilled.better_of(start.affine, trained.affine, before, after)

    reporter.begin("distilling translators", len(chosen))
    for layer in chosen:
        distilled = keep(layer, partial(distil, layer))
        result[layer] = Translator(layer, distilled.affine)
        reporter.step(f"layer {layer}: {distilled}")
    return result


def _read_upper(folder: Path, manifest: Manifest, layer: int) -> list[TorchStage] | None:
    specs = [stage for stage in manifest.cut if stage.first_layer > layer]
    if 4 * sum(spec.multiply_adds for spec in specs) > _MOST_WEIGHT_BYTES:
        return None
    if manifest.positions is not None and _has_windows(folder / manifest.positions.file):
        return None  # which layer sees how far stands in that stage's masks
    stages = [read_torch_stage(folder / spec.file) for spec in specs]
    known = [stage for stage in stages if stage is not None]
    return known if len(known) == len(stages) else None


def _has_windows(path: Path) -> bool:
    return any(name.startswith("window.") for name in ir.load(path).graph.initializers)


@dataclass(frozen=True)
class _Batch:
    """Some prompts, padded: hidden `[b, t, width]`, answers `[b, a]`, which of them are there and
    the prompt's own, and the first token's K and V `[b, layers above, kv_heads, head_dim]`.
    """

    hidden: Any
    answers: Any
    there: Any
    own: Any
    first_key: Any
    first_value: Any


@dataclass(frozen=True)
class _Upper:
    """The layers above an exit point, over translated K and V."""

    stages: Sequence[TorchStage]
    exit_layer: int
    rotary: Rotary | Unrotated
    manifest: Manifest
    _tables: list[Any] = field(default_factory=list)

    def batch(self, lessons: Sequence[ContextLesson]) -> _Batch:
        """Prompts of different lengths side by side."""
        import torch

        width = self.manifest.model.hidden_size
        kv, above = self.manifest.kv, len(self.stages)
        longest = max(len(lesson.hidden[self.exit_layer]) for lesson in lessons)
        most = max(len(lesson.answers) for lesson in lessons)
        hidden = np.zeros((len(lessons), longest, width), np.float32)
        answers = np.zeros((len(lessons), most), np.int64)
        there, own = (np.zeros((len(lessons), most), np.bool_) for _ in range(2))
        first = np.zeros((2, len(lessons), above, kv.num_heads, kv.head_dim), np.float32)
        for row, lesson in enumerate(lessons):
            states, count = lesson.hidden[self.exit_layer], len(lesson.answers)
            hidden[row, : len(states)] = states
            answers[row, :count], there[row, :count], own[row, count - 1] = lesson.answers, 1, 1
            for index in range(above):
                first[:, row, index] = lesson.first[self.exit_layer + 1 + index]
        parts = (hidden, answers, there, own, first[0], first[1])
        return _Batch(*(torch.from_numpy(part) for part in parts))

    def answer(self, batch: _Batch, factors: Sequence[Any], bias: Any) -> Any:
        """Final hidden states `[answers that are there, width]`, over the context that a map's
        factors (see `AffineMap`) and bias translate.
        """
        import torch

        rows, longest, _ = batch.hidden.shape
        kv, above = self.manifest.kv, len(self.stages)
        flat = batch.hidden
        for factor in factors:
            flat = flat @ factor
        flat = flat + bias
        table = flat.view(rows, longest, above, 2, kv.num_heads, kv.head_dim)
        cos, sin = self._rotary_tables()
        here = (cos[:longest, None, None], sin[:longest, None, None])
        key = torch.cat([batch.first_key[:, None], _rotate(table[:, 1:, :, 0], *_rest(here))], 1)
        value = torch.cat([batch.first_value[:, None], table[:, 1:, :, 1]], 1)
        index = batch.answers[..., None].expand(-1, -1, batch.hidden.shape[2])
        hidden = torch.gather(batch.hidden, 1, index)
        angles = (cos[batch.answers][:, :, None], sin[batch.answers][:, :, None])
        distance = batch.answers[..., None] - torch.arange(longest)
        for number, stage in enumerate(self.stages):
            attend = _Attention(key[:, :, number], value[:, :, number], angles, distance)
            hidden = stage(hidden, attend)
        return hidden[batch.there]

    def _rotary_tables(self) -> list[Any]:
        if not self._tables:
            import torch

            if isinstance(self.rotary, Unrotated):
                shape = (self.manifest.max_seq_len, self.manifest.kv.head_dim // 2)
                self._tables.extend([torch.ones(shape), torch.zeros(shape)])
                return self._tables
            for value in (self.rotary.cos, self.rotary.sin):
                assert value.const_value is not None  # see read_rotary
                self._tables.append(torch.from_numpy(np.array(value.const_value.numpy())))
        return self._tables


def _rest(tables: tuple[Any, Any]) -> tuple[Any, Any]:
    return tables[0][1:], tables[1][1:]


@dataclass(frozen=True)
class _Attention:
    """Attention of answers to a context and to themselves.

    key, value `[b, t, kv_heads, head_dim]` (rotated); angles of the answers `[b, a, 1, d/2]`;
    distance `[b, a, t]` from each answer back to each context position.
    """

    key: Any
    value: Any
    angles: tuple[Any, Any]
    distance: Any

    def __call__(self, spec: AttentionSpec, query: Any, key: Any, value: Any) -> Any:
        import torch

        rows, answers, _ = query.shape
        width = query.shape[-1] // spec.heads
        groups = (rows, answers, spec.kv_heads, spec.heads // spec.kv_heads, width)
        query = _rotate(query.view(rows, answers, spec.heads, width), *self.angles).view(groups)
        key = _rotate(key.view(rows, answers, spec.kv_heads, width), *self.angles)
        value = value.view(rows, answers, spec.kv_heads, 1, width)
        before = torch.einsum("bakgd,btkd->bakgt", query, self.key)
        itself = (query * key[:, :, :, None]).sum(dim=-1, keepdim=True)
        seen = self.distance > 0
        if spec.window is not None:
            seen = seen & (self.distance < spec.window)
        scores = torch.cat([before, itself], dim=-1) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        seen = torch.cat([seen, torch.ones_like(seen[..., :1])], dim=-1)[:, :, None, None]
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        mixed = torch.einsum("bakgt,btkd->bakgd", weights[..., :-1], self.value)
        return (mixed + weights[..., -1:] * value).reshape(rows, answers, -1)


def _rotate(value: Any, cos: Any, sin: Any) -> Any:
    import torch

    first, second = value.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Course:
    """Trains and judges the maps of one exit point."""

    def __init__(self, engine: Engine, network: HeadNetwork, upper: _Upper) -> None:
        self._engine, self._network, self._upper = engine, network, upper

    def agreement(self, translator: Translator, lessons: Sequence[ContextLesson]) -> float:
        """Share of prompts whose own answer is the full model's."""
        import torch

        factors = [torch.from_numpy(factor) for factor in translator.affine.factors]
        bias = torch.from_numpy(translator.affine.bias)
        hits: list[bool] = []
        for first in range(0, len(lessons), _BATCH):
            batch = self._upper.batch(lessons[first : first + _BATCH])
            with torch.no_grad():
                hidden = self._upper.answer(batch, factors, bias)[batch.own[batch.there]]
            found = predicted_tokens(self._engine, hidden.numpy())
            final = np.stack([lesson.final[-1] for lesson in lessons[first : first + _BATCH]])
            hits += (found == predicted_tokens(self._engine, final)).tolist()
        return float(np.mean(hits))

    def train(
        self, start: Translator, lessons: Sequence[ContextLesson], random: np.random.Generator
    ) -> Translator:
        """Adam with a falling rate, in coordinates of unit variance on both sides of a factor."""
        import torch

        layer = self._upper.exit_layer
        sample = np.concatenate([lesson.hidden[layer][1:] for lesson in lessons[:100]])
        scales = _Scales.of(start.affine, sample.astype(np.float32))
        moved = [torch.zeros(f.shape, requires_grad=True) for f in start.affine.factors]
        shift = torch.zeros(start.affine.bias.shape, requires_grad=True)
        optimiser = torch.optim.Adam([*moved, shift], lr=_LEARNING_RATE)
        steps = min(_MOST_STEPS, _EPOCHS * len(lessons) // _BATCH)
        falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 - step / steps)
        for rows in _batches(lessons, steps, random):
            batch = self._upper.batch(rows)
            target, best = self._network.teach(np.concatenate([row.final for row in rows]))
            hidden = self._upper.answer(batch, *scales.apply(moved, shift))
            optimiser.zero_grad()
            self._network.loss(hidden, target, best).backward()
            optimiser.step()
            falling.step()
        with torch.no_grad():
            factors, bias = scales.apply(moved, shift)
        matrix, *up = (factor.numpy() for factor in factors)
        return replace(start, affine=AffineMap(matrix, bias.numpy(), *up))


@dataclass(frozen=True)
class _Scales:
    """A map, and the spread of what goes into each of its factors, and out of the last."""

    factors: Sequence[Any]
    bias: Any
    spreads: Sequence[Any]

    @classmethod
    def of(cls, affine: AffineMap, sample: Float32) -> _Scales:
        """Args: sample: rows `[n, inputs]` that the map reads."""
        import torch

        passed, spreads = sample, [sample.std(axis=0)]
        for factor in affine.factors:
            passed = passed @ factor
            spreads.append(passed.std(axis=0))
        return cls(
            [torch.from_numpy(factor) for factor in affine.factors],
            torch.from_numpy(affine.bias),
            [torch.from_numpy(spread + 1e-6) for spread in spreads],
        )

    def apply(self, moved: Sequence[Any], shift: Any) -> tuple[list[Any], Any]:
        """The map's factors and bias, moved by so much in the scaled coordinates."""
        ends = zip(self.spreads, self.spreads[1:], strict=False)
        factors = [
            factor + move / before[:, None] * after
            for factor, move, (before, after) in zip(self.factors, moved, ends, strict=True)
        ]
        return factors, self.bias + shift * self.spreads[-1]


def _batches(
    lessons: Sequence[ContextLesson], steps: int, random: np.random.Generator
) -> list[list[ContextLesson]]:
    """Random batches of prompts of about the same length (padding is computed for nothing)."""
    batches: list[list[ContextLesson]] = []
    lengths = np.array([lesson.answers[-1] for lesson in lessons])
    while len(batches) < steps:
        order = random.permutation(len(lessons))
        for first in range(0, len(order), 8 * _BATCH):
            block = order[first : first + 8 * _BATCH]
            block = block[np.argsort(lengths[block], kind="stable")]
            groups = [block[start : start + _BATCH] for start in range(0, len(block), _BATCH)]
            batches += [
                [lessons[index] for index in groups[k]] for k in random.permutation(len(groups))
            ]
    return [batches[index] for index in random.permutation(steps)]
