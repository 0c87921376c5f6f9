"""The shortlist: a low-rank head that proposes rows of the LM head, which are then scored exactly.

With normed final hidden states h of mean μ and covariance C, and the head W, the affine map of rank
r that changes the logits W h least, in the mean square over h, is W μ + W C^½ V Vᵀ C^-½ (h - μ),
where V are the first r eigenvectors of C^½ Wᵀ W C^½. (A plain SVD of W, blind to what h look like,
is of no use.) Where the head is quantised this one has 8 bits: with 4, the proposals lose 3 to 5
in a hundred of the head's own tokens (SmolLM2), and with half as many columns again still 3. Blocks
share a scale: the columns of W C^½ V are brought to one size, and W μ stays in float32.

A TopK over the whole vocabulary would cost as much as the head. The k best tokens stand in the k
chunks of it with the highest maxima, so that two small ones find them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime import Engine
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.manifest import Manifest, ShortlistSpec
from adainfer_runtime.tasks import TaskExample

from ..cost import multiply_adds
from ..graph_builder import GraphBuilder, graph_input, serialise
from ..lower import Precision, find_target, require_shortlist
from ..progress import Reporter
from ..quantise import quantise_blocks
from .data import Parts
from .exit_files import Files
from .head import Head, read_head

__all__ = ["LowRankHead", "fit_low_rank", "lower_shortlist", "with_shortlist"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_ROWS = 64
_RANKS = (32, 64, 96, 128, 192, 256, 384, 512)
_BITS: Literal[8] = 8
_ENOUGH_RECALL = 0.99
_POSITIONS = 24  # of every prompt
_VOCABULARY_AT_ONCE = 8192
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class LowRankHead:
    """`logits ≈ (normed @ down) @ upᵀ + offset`; down `[hidden, rank]`, up `[vocab, rank]`, offset
    `[vocab]`.
    """

    down: Float32
    up: Float32
    offset: Float32

    @property
    def rank(self) -> int:
        """Columns of both."""
        return int(self.down.shape[1])

    def logits(self, normed: Float32) -> Float32:
        """`[rows, vocab]`."""
        return np.asarray(normed @ self.down @ self.up.T + self.offset, np.float32)


def with_shortlist(files: Files, manifest: Manifest, parts: Parts, reporter: Reporter) -> Manifest:
    """The manifest with a shortlist, where one is much cheaper than the head.

    The rank is the least whose proposals hold the head's own token often enough on prompts that
    it was not fitted on; the recall in the manifest is measured on yet others, by the stage itself.
    """
    target, _, precision = find_target(manifest.target, manifest.precision)
    require_shortlist(target)
    head = read_head(files.folder, manifest)
    if head is None or head.centred or head.norm_bias is not None:
        return manifest  # more than an RMS norm and a matrix
    engine = Engine.of_manifest(files.folder, manifest)
    phases = (parts.adapters, parts.classifier, parts.certification)
    reporter.begin("fitting the shortlist", sum(map(len, phases)))
    fitted_on = _hidden(engine, parts.adapters, reporter)
    tried_on = _hidden(engine, parts.classifier, reporter)
    low_rank = _least_rank(head, fitted_on, tried_on)
    if low_rank is None:
        return manifest
    rows = min(_ROWS, manifest.model.vocab_size)
    model = lower_shortlist(low_rank, head, precision, rows)
    path = files.save("exit/shortlist.onnx", serialise(model))
    spec = ShortlistSpec(
        file=path,
        rank=low_rank.rank,
        rows=rows,
        multiply_adds=multiply_adds(model.graph) + rows * manifest.model.hidden_size,
        recall={},
    )
    record = {path: files.written[path]}
    drafted = manifest.model_copy(
        update={"shortlist": spec, "files": dict(manifest.files) | record}
    )
    recall = _recall_by_layer(files.folder, drafted, parts.certification, reporter)
    finished = spec.model_copy(update={"recall": recall})
    return drafted.model_copy(update={"shortlist": finished})


def fit_low_rank(head: Head, hidden: Float32, rank: int) -> LowRankHead:
    """The head's best low-rank form on hidden states like these `[rows, hidden]`."""
    return _cut(head, _directions(head, hidden), rank)


@dataclass(frozen=True)
class _Directions:
    """μ `[hidden]`; `C^-½ V` and `C^½ V`, `[hidden, hidden]` each, the most important columns first
    and of the size that makes those of `W C^½ V` equal.
    """

    mean: Float64
    down: Float64
    back: Float64


def _directions(head: Head, hidden: Float32) -> _Directions:
    normed = _norm(head, hidden).astype(np.float64)
    mean = normed.mean(axis=0)
    centred = normed - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    # Directions that no hidden state has would be blown up by the inverse root.
    values = np.maximum(values, values[-1] * 1e-9)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    gram = np.zeros_like(root)
    for rows in _vocabulary(head):
        block = head.rows(rows).astype(np.float64)
        gram += block.T @ block
    sizes, main = np.linalg.eigh(root @ gram @ root)
    scale = np.sqrt(np.maximum(sizes[::-1], sizes[-1] * 1e-9))
    main = main[:, ::-1]
    return _Directions(mean, (inverse @ main) * scale, (root @ main) / scale)


def _cut(head: Head, directions: _Directions, rank: int) -> LowRankHead:
    down = directions.down[:, :rank]
    columns = directions.back[:, :rank].astype(np.float32)
    beside = (directions.mean - directions.back[:, :rank] @ (directions.mean @ down)).astype(
        np.float32
    )
    rows = [head.rows(rows) for rows in _vocabulary(head)]
    up = np.concatenate([weight @ columns for weight in rows])
    return LowRankHead(
        down.astype(np.float32), up, np.concatenate([weight @ beside for weight in rows])
    )


def _least_rank(head: Head, fitted_on: Float32, tried_on: Float32) -> LowRankHead | None:
    directions = _directions(head, fitted_on)
    normed = _norm(head, tried_on)
    tokens = _best_tokens(head, normed)
    for rank in _RANKS:
        if 2 * rank > head.norm_weight.shape[0]:
            return None
        low_rank = _cut(head, directions, rank)
        if float((_tokens_before(low_rank, normed, tokens) < _ROWS).mean()) >= _ENOUGH_RECALL:
            return low_rank
    return None


def _tokens_before(
    low_rank: LowRankHead, normed: Float32, tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """How many tokens the low-rank head prefers to each row's own; some rows at a time, for logits
    of all would take gigabytes.
    """
    before = []
    for first in range(0, len(normed), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        logits = low_rank.logits(normed[rows])
        own = np.take_along_axis(logits, tokens[rows, None], axis=1)
        before.append((logits > own).sum(axis=1))
    return np.concatenate(before)


def lower_shortlist(low_rank: LowRankHead, head: Head, precision: Precision, rows: int) -> ir.Model:
    """`hidden [1, 1, hidden_size]` to `logits [vocab]` by the low-rank head, their
    `log_sum_exp [1]`, and `candidates [rows]`, the tokens to score exactly.
    """
    vocabulary, width = low_rank.up.shape[0], low_rank.down.shape[0]
    chunks, span = _chunks(vocabulary)
    hidden = graph_input("hidden", [1, 1, width])
    graph = GraphBuilder()
    normed = graph.op(
        "RMSNormalization", hidden, graph.const("norm", head.norm_weight), epsilon=head.epsilon
    )
    inner = graph.op("MatMul", normed, graph.const("down", low_rank.down))
    logits = _product(graph, inner, low_rank.up, precision)
    flat = graph.op("Reshape", logits, graph.ints([vocabulary]))
    flat = graph.op("Add", flat, graph.const("offset", low_rank.offset))
    table = flat
    if padding := chunks * span - vocabulary:
        lowest = graph.row(graph.number(-3.0e38))
        table = graph.op("Pad", flat, graph.ints([0, padding]), lowest)
    table = graph.op("Reshape", table, graph.ints([chunks, span]))
    maxima = graph.op("ReduceMax", table, graph.ints([-1]), keepdims=0)
    best = graph.top(maxima, min(rows, chunks))
    among = graph.op("Reshape", graph.op("Gather", table, best, axis=0), graph.ints([-1]))
    place = graph.top(among, rows)
    chunk = graph.op("Gather", best, graph.op("Div", place, graph.ints([span])), axis=0)
    inside = graph.op("Mod", place, graph.ints([span]))
    candidates = graph.op("Add", graph.op("Mul", chunk, graph.ints([span])), inside)
    total = graph.op("ReduceLogSumExp", flat, graph.ints([0]), keepdims=1)
    outputs = [
        graph.output(graph.op("Identity", flat), "logits", [vocabulary]),
        graph.output(candidates, "candidates", [rows], ir.DataType.INT64),
        graph.output(total, "log_sum_exp", [1]),
    ]
    return graph.model("shortlist", [hidden], outputs, opset=24)  # of its norm


def _product(graph: GraphBuilder, inner: ir.Value, up: Float32, precision: Precision) -> ir.Value:
    if precision.bits is None:
        return graph.op("MatMul", inner, graph.const("up", np.ascontiguousarray(up.T)))
    stored = quantise_blocks(up, _BITS, precision.block_size)
    return graph.contrib(
        "MatMulNBits",
        inner,
        graph.codes("up_packed", stored.packed),
        graph.const("up_scales", stored.scales),
        K=up.shape[1],
        N=up.shape[0],
        bits=_BITS,
        block_size=precision.block_size,
        accuracy_level=precision.accuracy_level,
    )


def _recall_by_layer(
    folder: Path, manifest: Manifest, examples: tuple[TaskExample, ...], reporter: Reporter
) -> dict[str, float]:
    """Share of positions at which the head's token is among the proposed, by exit layer: adapted
    hidden states there, and final ones under the number of layers.
    """
    assert manifest.shortlist is not None
    engine = Engine.of_manifest(folder, manifest)
    stage = open_session(folder / manifest.shortlist.file)
    held: dict[int, list[bool]] = {}
    for rows in _hidden_by_layer(engine, examples, reporter):
        for layer, hidden in rows.items():
            tokens = engine.backend.probe_features(hidden)[0]
            for row, token in zip(hidden, tokens, strict=True):
                (proposed,) = stage.run(["candidates"], {"hidden": row.reshape(1, 1, -1)})
                held.setdefault(layer, []).append(bool(np.isin(token, proposed)))
    return {str(layer): round(float(np.mean(hits)), 4) for layer, hits in sorted(held.items())}


def _hidden(engine: Engine, examples: tuple[TaskExample, ...], reporter: Reporter) -> Float32:
    found = _hidden_by_layer(engine, examples, reporter)
    return np.concatenate([hidden for rows in found for hidden in rows.values()])


def _hidden_by_layer(
    engine: Engine, examples: tuple[TaskExample, ...], reporter: Reporter
) -> Iterator[dict[int, Float32]]:
    """Of some positions of every prompt: what the probe reads, by exit layer and at the end."""
    random = np.random.default_rng(0)
    for example in examples:
        ids = engine.tokenizer.encode(example.prompt)
        at = np.sort(random.permutation(len(ids))[:_POSITIONS])
        with engine.borrow() as session:
            session.extend(ids)
            rows = {}
            for layer in engine.manifest.exit_points:
                session.advance(layer)
                hidden = session.hidden()[at]
                rows[layer] = np.stack([engine.backend.adapt(layer, row)[0] for row in hidden])
            session.complete()
            rows[engine.manifest.depth] = session.hidden()[at].copy()
        reporter.step(example.task)
        yield rows


def _norm(head: Head, hidden: Float32) -> Float32:
    scale = np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + head.epsilon)
    normed: Float32 = hidden / scale * head.norm_weight
    return normed


def _best_tokens(head: Head, normed: Float32) -> npt.NDArray[np.int64]:
    """The head's own token of each row."""
    best = np.full(len(normed), -np.inf, np.float32)
    token = np.zeros(len(normed), np.int64)
    for rows in _vocabulary(head):
        logits = normed @ head.rows(rows).T
        highest = logits.max(axis=1)
        better = highest > best
        best[better], token[better] = highest[better], rows[logits.argmax(axis=1)[better]]
    return token


def _vocabulary(head: Head) -> list[npt.NDArray[np.int64]]:
    tokens = np.arange(head.weight.shape[0])
    return [
        tokens[start : start + _VOCABULARY_AT_ONCE]
        for start in range(0, len(tokens), _VOCABULARY_AT_ONCE)
    ]


def _chunks(vocabulary: int) -> tuple[int, int]:
    """(chunks, width): sixteen chunks for every row that is scored, if there are enough tokens."""
    width = max(2, vocabulary // (16 * _ROWS))
    return -(-vocabulary // width), width
