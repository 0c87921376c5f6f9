"""A low-rank head that proposes tokens of a shortlist.

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

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph_builder import GraphBuilder, graph_input
from ..lower import Precision
from .head import Head
from .proposals import NoProposerError, add_cap, add_norm, best_tokens, product, vocabulary

__all__ = ["LowRankHead", "fit_low_rank", "least_rank"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_RANKS = (32, 64, 96, 128, 192, 256, 384, 512)
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class LowRankHead:
    """`logits ≈ (normed @ down) @ upᵀ + offset`, before a cap; down `[hidden, rank]`, up
    `[vocab, rank]`, offset `[vocab]`.
    """

    down: Float32
    up: Float32
    offset: Float32

    @property
    def rank(self) -> int:
        """Columns of both."""
        return int(self.down.shape[1])

    @property
    def form(self) -> dict[str, int]:
        """See `shortlist.Proposer`."""
        return {"rank": self.rank}

    def logits(self, normed: Float32) -> Float32:
        """`[rows, vocab]`."""
        return np.asarray(normed @ self.down @ self.up.T + self.offset, np.float32)

    def lower(self, head: Head, precision: Precision, rows: int) -> ir.Model:
        """`hidden [1, 1, hidden_size]` to its own `logits [vocab]`, their `log_sum_exp [1]`, and
        `candidates [rows]`, the tokens to score exactly.
        """
        size, width = self.up.shape[0], self.down.shape[0]
        chunks, span = _chunks(size, rows)
        hidden = graph_input("hidden", [1, 1, width])
        graph = GraphBuilder()
        normed = add_norm(graph, head, hidden)
        inner = graph.op("MatMul", normed, graph.const("down", self.down))
        logits = product(graph, inner, self.up, precision)
        flat = graph.op("Reshape", logits, graph.ints([size]))
        flat = graph.op("Add", flat, graph.const("offset", self.offset))
        table = flat
        if padding := chunks * span - size:
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
        # Proposals are ranked before the cap, which may make the largest logits equal.
        capped = add_cap(graph, head, flat)
        total = graph.op("ReduceLogSumExp", capped, graph.ints([0]), keepdims=1)
        outputs = [
            graph.output(graph.op("Identity", capped), "logits", [size]),
            graph.output(candidates, "candidates", [rows], ir.DataType.INT64),
            graph.output(total, "log_sum_exp", [1]),
        ]
        return graph.model("shortlist", [hidden], outputs, opset=24)  # of its norm


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
    normed = head.normed(hidden).astype(np.float64)
    mean = normed.mean(axis=0)
    centred = normed - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    # Directions that no hidden state has would be blown up by the inverse root.
    values = np.maximum(values, values[-1] * 1e-9)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    gram = np.zeros_like(root)
    for rows in vocabulary(head):
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
    rows = [head.rows(rows) for rows in vocabulary(head)]
    up = np.concatenate([weight @ columns for weight in rows])
    offset = np.concatenate([weight @ beside for weight in rows])
    if head.bias is not None:
        offset = offset + head.bias
    return LowRankHead(down.astype(np.float32), up, offset)


def least_rank(
    head: Head, fitted_on: Float32, tried_on: Float32, rows: int, recall: float
) -> LowRankHead:
    """The least rank whose `rows` best tokens hold the head's own often enough, on hidden states
    `[rows, hidden]` that it was not fitted on.

    Raises:
        NoProposerError: no rank that is much cheaper than the head does.
    """
    width = head.norm_weight.shape[0]
    ranks = [rank for rank in _RANKS if 2 * rank <= width]
    if not ranks:
        raise NoProposerError(
            f"this model's width of {width} is too small for a low-rank head that is much cheaper "
            "than its own; try --shortlist-tokens"
        )
    directions = _directions(head, fitted_on)
    normed = head.normed(tried_on)
    tokens = best_tokens(head, normed)
    found = 0.0
    for rank in ranks:
        low_rank = _cut(head, directions, rank)
        found = float((_tokens_before(low_rank, normed, tokens) < rows).mean())
        if found >= recall:
            return low_rank
    raise NoProposerError(
        f"the {rows} best tokens of rank {ranks[-1]}, the highest tried, hold the model's own at "
        f"{found:.1%} of held-out positions, {recall:.0%} are needed; try --shortlist-tokens"
    )


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


def _chunks(vocabulary: int, rows: int) -> tuple[int, int]:
    """(chunks, width): sixteen chunks for every row that is scored, if there are enough tokens."""
    width = max(2, vocabulary // (16 * rows))
    return -(-vocabulary // width), width
