"""Translators: K and V of the layers above a context exit, from the hidden state at it.

One affine map per exit point gives K before rotary and V of every layer above, fitted by ridge
regression on second moments (training-free kin of SwiftKV, arXiv 2410.03960), in reduced rank where
a full one would cost more than a layer. The first position is
left out: its K and V depend on the token alone, are unlike all others, and are computed exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime import Engine
from adainfer_runtime.backends.host_memory import memory_limit
from adainfer_runtime.manifest import Manifest
from adainfer_runtime.session import Session
from adainfer_runtime.tasks import TaskExample

from ..graph_builder import GraphBuilder, graph_input
from ..lower.graph import remove_dead_inputs
from ..progress import Reporter
from .affine import AffineMap, reduce_rank
from .questions import Questions, positions_to_fit
from .ridge import Moments
from .traces import answer_positions

__all__ = [
    "ContextLesson",
    "Rotary",
    "TracedContexts",
    "Translator",
    "Unrotated",
    "affordable_rank",
    "fit_translators",
    "lower_translator",
    "most_weights",
    "read_rotary",
    "solve_translators",
    "trace_contexts_above",
    "translate_inputs",
    "translator_layers",
]

Float32 = npt.NDArray[np.float32]

_RIDGE = 0.01
_HELD_OUT = 10  # every tenth lesson
_LESSON_SHARE = 8  # of the memory: an eighth
_LEAST_LESSON_BYTES = 800_000_000


@dataclass(frozen=True)
class Rotary:
    """The rotary tables that all layers share, `[max_length, head_dim / 2]` each, as stored.

    With `contrib` keys are rotated by ONNX Runtime's own operator, which counts the rows itself:
    its CUDA provider leaves what is computed from a Shape to the CPU. TensorRT does not have it.
    """

    cos: ir.Value
    sin: ir.Value
    contrib: bool = False

    def undo(self, key: Float32) -> Float32:
        """K `[kv_heads, positions, head_dim]` from position 0 on, before it was rotated."""
        assert self.cos.const_value is not None and self.sin.const_value is not None  # see read
        positions = key.shape[1]
        cos = self.cos.const_value.numpy()[:positions]
        sin = self.sin.const_value.numpy()[:positions]
        first, second = np.split(key, 2, axis=-1)
        return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)

    def rotate(self, graph: GraphBuilder, key: ir.Value, start: ir.Value) -> ir.Value:
        """K `[layers, kv_heads, rows, head_dim]`, rotated for positions from `start` `[1]` on."""
        if self.contrib:
            tables = (graph.cast(graph.shared(stored)) for stored in (self.cos, self.sin))
            return graph.contrib("RotaryEmbedding", key, start, *tables)
        # The range depends on shapes alone, as TensorRT wants it.
        rows = graph.op("Gather", graph.op("Shape", key), graph.scalar(2), axis=0)
        steps = graph.op("Range", graph.scalar(0), rows, graph.scalar(1))
        positions = graph.op("Add", steps, graph.op("Squeeze", start))
        cos, sin = (
            graph.cast(graph.op("Gather", graph.shared(stored), positions, axis=0))
            for stored in (self.cos, self.sin)
        )
        assert self.cos.const_value is not None
        half = int(self.cos.const_value.shape[1])  # type: ignore[arg-type]
        left, right = (
            graph.op("Slice", key, graph.ints([low]), graph.ints([low + half]), graph.ints([-1]))
            for low in (0, half)
        )
        return graph.op(
            "Concat",
            graph.op("Sub", graph.op("Mul", left, cos), graph.op("Mul", right, sin)),
            graph.op("Add", graph.op("Mul", right, cos), graph.op("Mul", left, sin)),
            axis=-1,
        )


class Unrotated:
    """Keys as they are: of models with learned positions."""

    def undo(self, key: Float32) -> Float32:
        """K itself."""
        return key

    def rotate(self, graph: GraphBuilder, key: ir.Value, start: ir.Value) -> ir.Value:
        """K itself."""
        return graph.op("Identity", key)


@dataclass(frozen=True)
class Translator:
    """`affine` gives `[positions, layers above · 2 · kv_heads · head_dim]`: K, then V, layer by
    layer.
    """

    exit_layer: int
    affine: AffineMap


@dataclass(frozen=True)
class ContextLesson:
    """A prompt, as distilling looks at it.

    Attributes:
        hidden: per exit layer `[positions, hidden_size]`, in float16.
        answers: positions whose next token is an answer, the prompt's own last.
        final: `[answers, hidden_size]`, there after all layers.
        first: per layer above the lowest exit layer, K and V `[2, kv_heads, head_dim]` of the first
            position.
        held_out: nothing is fitted to it: forms of translators are compared on it.
    """

    hidden: Mapping[int, npt.NDArray[np.float16]]
    answers: npt.NDArray[np.int64]
    final: Float32
    first: Mapping[int, Float32]
    held_out: bool


@dataclass(frozen=True)
class TracedContexts:
    """Prompts as translators are fitted to them.

    Attributes:
        moments: per exit layer, of (hidden after it, K and V of the layers above).
        lessons: of as many prompts as there was memory for.
    """

    moments: Mapping[int, Moments]
    lessons: tuple[ContextLesson, ...] = ()

    @classmethod
    def concatenate(cls, parts: Sequence[TracedContexts]) -> TracedContexts:
        """Those of different prompts."""
        moments = {
            layer: Moments.sum_of([part.moments[layer] for part in parts])
            for layer in parts[0].moments
        }
        return cls(moments, tuple(lesson for part in parts for lesson in part.lessons))


def read_rotary(folder: Path, manifest: Manifest) -> Rotary | Unrotated | None:
    """What was done to the keys in the cache. None where layers differ in that or in their heads,
    rotate a part of each head, or interleave it.
    """
    if manifest.positions is not None:
        return _read_shared_rotary(folder, manifest)
    nodes = [node for stage in manifest.cut for node in ir.load(folder / stage.file).graph]
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    tables = [(*node.inputs, None, None)[7:9] for node in attentions]
    names = {tuple(table and table.name for table in pair) for pair in tables}
    apart = any(node.op_type == "RotaryEmbedding" for node in nodes)  # parts of heads
    if manifest.kv.layer_heads or apart or len(names) != 1 or any(map(_interleaved, attentions)):
        return None
    cos, sin = tables[0]
    if cos is None or sin is None:
        return Unrotated()
    half = manifest.kv.head_dim // 2
    whole = all(v.const_value is not None and v.const_value.shape[1] == half for v in (cos, sin))
    return Rotary(cos, sin, contrib=True) if whole else None


def _read_shared_rotary(folder: Path, manifest: Manifest) -> Rotary | Unrotated | None:
    """The tables of the stage `positions`, of which layers see one pair, or none."""
    assert manifest.positions is not None  # the caller looked
    graph = ir.load(folder / manifest.positions.file).graph
    tables = [node.inputs[0] for node in graph if node.op_type == "Gather"]
    if not tables and not manifest.kv.layer_heads:
        return Unrotated()
    if len(tables) != 2 or manifest.kv.layer_heads or _interleaves(folder, manifest):
        return None
    by_kind = {kind: t for t in tables for kind in ("cos", "sin") if t and kind in str(t.name)}
    half = manifest.kv.head_dim // 2
    if set(by_kind) != {"cos", "sin"} or any(
        table.const_value is None or table.const_value.shape[1] != half
        for table in by_kind.values()
    ):
        return None
    return Rotary(by_kind["cos"], by_kind["sin"])


def _interleaves(folder: Path, manifest: Manifest) -> bool:
    """Whether heads are rotated in neighbouring pairs (in plain operators: by slices of step 2)."""
    for node in ir.load(folder / manifest.cut[0].file).graph:
        if node.op_type == "RotaryEmbedding" and node.attributes["interleaved"].as_int():
            return True
        step = node.inputs[4] if node.op_type == "Slice" and len(node.inputs) > 4 else None
        if step is not None and step.const_value is not None and step.const_value.numpy()[0] != 1:
            return True
    return False


def _interleaved(attention: ir.Node) -> bool:
    attribute = attention.attributes.get("rotary_interleaved")
    return attribute is not None and bool(attribute.as_int())


def fit_translators(
    engine: Engine,
    rotary: Rotary | Unrotated,
    examples: Sequence[TaskExample],
    layers: Sequence[int],
    reporter: Reporter,
    held_out: Questions = frozenset(),
) -> tuple[dict[int, Translator], tuple[ContextLesson, ...]]:
    """Runs prompts through all layers and fits one translator per exit layer.

    The lessons are of as many prompts as memory is set aside for.

    Args:
        held_out: see `trace_contexts_above`.
    """
    budget = max(_LEAST_LESSON_BYTES, (memory_limit() or 0) // _LESSON_SHARE)
    traced = trace_contexts_above(
        engine, rotary, examples, layers, reporter, lesson_bytes=budget, held_out=held_out
    )
    return solve_translators(engine.manifest, traced.moments), traced.lessons


def trace_contexts_above(
    engine: Engine,
    rotary: Rotary | Unrotated,
    examples: Sequence[TaskExample],
    layers: Sequence[int],
    reporter: Reporter,
    *,
    lesson_bytes: int = 0,
    held_out: Questions = frozenset(),
) -> TracedContexts:
    """Runs prompts through all layers; lessons are kept until their hidden states, in float16,
    take `lesson_bytes`.

    Args:
        held_out: questions whose answers in a prompt's examples are fitted to in no way.
    """
    manifest = engine.manifest
    total, per_layer = manifest.model.num_layers, 2 * manifest.kv.num_heads * manifest.kv.head_dim
    moments = {
        layer: Moments(manifest.model.hidden_size, (total - layer) * per_layer) for layer in layers
    }
    lessons: list[ContextLesson] = []
    for example in examples:
        ids = engine.tokenizer.encode(example.prompt)
        every_answer = answer_positions(ids)
        answers = positions_to_fit(engine, example, ids, every_answer, held_out)
        fitted = np.setdiff1d(np.arange(1, len(ids)), np.setdiff1d(every_answer, answers))
        with engine.borrow() as session:
            session.extend(ids)
            hidden = {}
            for layer in layers:
                session.advance(layer)
                hidden[layer] = session.hidden().copy()
            session.complete()
            kv = {number: session.kv(number) for number in range(min(layers) + 1, total + 1)}
            flat = {
                number: _flatten(rotary.undo(key), value) for number, (key, value) in kv.items()
            }
            lesson_bytes -= sum(states.nbytes // 2 for states in hidden.values())
            is_lesson = lesson_bytes > 0 and len(ids) > 1
            compared_on = is_lesson and len(lessons) % _HELD_OUT == 0
            if is_lesson:
                lessons.append(_lesson(session, answers, hidden, kv, held_out=compared_on))
        reporter.step(example.task)
        if compared_on:
            continue
        for layer in layers:
            target = np.concatenate([flat[n] for n in range(layer + 1, total + 1)], axis=1)
            rows = hidden[layer][fitted]
            moments[layer].add(rows, target[fitted], np.ones(len(rows), np.float32))
    return TracedContexts(moments, tuple(lessons))


def solve_translators(manifest: Manifest, moments: Mapping[int, Moments]) -> dict[int, Translator]:
    """One translator per exit layer, in closed form."""
    affordable = most_weights(manifest)
    return {layer: Translator(layer, _fit(m, affordable)) for layer, m in moments.items()}


def most_weights(manifest: Manifest) -> int:
    """What a translator may cost at a position: the multiply-adds of one layer. Where heads share
    no keys and values, a full one costs several; where they do, as in SmolLM2, less than one.
    """
    return sum(stage.multiply_adds for stage in manifest.cut) // manifest.model.num_layers


def affordable_rank(inputs: int, outputs: int, weights: int) -> int | None:
    """The largest rank of so many weights; None where a full map has no more."""
    if inputs * outputs <= weights:
        return None
    return max(1, weights // (inputs + outputs))


def _fit(moments: Moments, weights: int) -> AffineMap:
    full = moments.regress(_RIDGE)
    inputs, outputs = full.matrix.shape
    rank = affordable_rank(inputs, outputs, weights)
    return full if rank is None else reduce_rank(full, moments.inputs(), (rank,))[0]


def _lesson(
    session: Session,
    answers: npt.NDArray[np.int64],
    hidden: Mapping[int, Float32],
    kv: Mapping[int, tuple[Float32, Float32]],
    *,
    held_out: bool,
) -> ContextLesson:
    return ContextLesson(
        {layer: states.astype(np.float16) for layer, states in hidden.items()},
        answers,
        session.hidden()[answers].copy(),
        {n: np.stack([key[:, 0], value[:, 0]]) for n, (key, value) in kv.items()},
        held_out,
    )


def _flatten(key: Float32, value: Float32) -> Float32:
    """K and V `[kv_heads, positions, head_dim]` to `[positions, 2 · kv_heads · head_dim]`."""
    both = np.stack([key, value]).transpose(2, 0, 1, 3)
    return both.reshape(both.shape[0], -1)


def lower_translator(
    translator: Translator, rotary: Rotary | Unrotated, manifest: Manifest
) -> ir.Model:
    """`hidden [rows, hidden_size]` and, where keys are rotated, `start [1]`, the first row's
    position, to `key` (after rotary) and `value`, `[layers above, kv_heads, rows, head_dim]`.
    """
    heads, width = manifest.kv.num_heads, manifest.kv.head_dim
    above = manifest.model.num_layers - translator.exit_layer
    hidden = graph_input("hidden", ["rows", manifest.model.hidden_size])
    start = graph_input("start", [1], ir.DataType.INT64)
    graph = GraphBuilder()
    affine = translator.affine
    product = graph.op("MatMul", hidden, graph.half("matrix", affine.matrix))
    if affine.up is not None:
        product = graph.op("MatMul", product, graph.half("up", affine.up))
    flat = graph.op("Add", product, graph.const("bias", affine.bias))
    table = graph.op("Reshape", flat, graph.ints([0, above, 2, heads, width]))
    table = graph.transpose(table, [2, 1, 3, 0, 4])
    key, value = (graph.op("Gather", table, graph.scalar(part), axis=0) for part in (0, 1))
    rotated = rotary.rotate(graph, key, start)
    shape: list[int | str] = [above, heads, "rows", width]
    outputs = [
        graph.output(rotated, "key", shape),
        graph.output(graph.op("Identity", value), "value", shape),
    ]
    model = graph.model("translate", [hidden, start], outputs)
    remove_dead_inputs(model.graph)
    return model


def translate_inputs(model: ir.Model) -> tuple[Literal["hidden", "start"], ...]:
    """What the manifest says of a translator's inputs."""
    rotated = any(value.name == "start" for value in model.graph.inputs)
    return ("hidden", "start") if rotated else ("hidden",)


def translator_layers(manifest: Manifest) -> tuple[int, ...]:
    """Candidate exit points: every second boundary between 0.55 and 0.9 of the depth."""
    total = manifest.model.num_layers
    inside = [n for n in manifest.boundaries[:-1] if 0.55 * total <= n <= 0.9 * total]
    return tuple(inside[::2] if len(inside) > 4 else inside)
