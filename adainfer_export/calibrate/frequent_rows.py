"""The tokens that a model predicts most often, as the proposals of a shortlist.

Where the vocabulary is large, few of its tokens make up most of what is predicted, and their rows
of the head are all that is read (the idea of FR-Spec, arXiv 2502.14856, for drafts). What the other
tokens may be cannot be known then: their share of the probability is taken to be what it was in the
mean, on other prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph_builder import GraphBuilder, graph_input
from ..lower import Precision
from .head import Head
from .proposals import add_cap, add_norm, best_tokens, product, vocabulary

__all__ = ["FrequentRows", "frequent_rows"]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

_NEVER = -1.0e4  # a logit whose probability is 0
_SAMPLE = 512  # hidden states by which the other tokens' share is measured


@dataclass(frozen=True)
class FrequentRows:
    """Some rows of the head.

    Attributes:
        tokens: `[n]`, ascending.
        covered: the share of the probability that is theirs, in the mean.
    """

    tokens: Int64
    covered: float

    @property
    def form(self) -> dict[str, int]:
        """See `shortlist.Proposer`."""
        return {"tokens": len(self.tokens)}

    def lower(self, head: Head, precision: Precision, rows: int) -> ir.Model:
        """See `shortlist.Proposer`; tokens without a row get a logit of no probability."""
        size, width = len(head.weight), len(head.norm_weight)
        hidden = graph_input("hidden", [1, 1, width])
        graph = GraphBuilder()
        normed = add_norm(graph, head, hidden)
        logits = product(graph, normed, head.rows(self.tokens), precision)
        flat = graph.op("Reshape", logits, graph.ints([len(self.tokens)]))
        if head.bias is not None:
            flat = graph.op("Add", flat, graph.const("bias", head.bias[self.tokens]))
        tokens = graph.index("tokens", self.tokens.tolist())
        # Proposals are ranked before the cap, which may make the largest logits equal.
        candidates = graph.op("Gather", tokens, graph.top(flat, rows), axis=0)
        flat = add_cap(graph, head, flat)
        known = graph.op("ReduceLogSumExp", flat, graph.ints([0]), keepdims=1)
        total = graph.op("Sub", known, graph.number(float(np.log(self.covered))))
        nowhere = graph.const("nowhere", np.full(size, _NEVER, np.float32))
        outputs = [
            graph.output(graph.op("ScatterElements", nowhere, tokens, flat), "logits", [size]),
            graph.output(candidates, "candidates", [rows], ir.DataType.INT64),
            graph.output(total, "log_sum_exp", [1]),
        ]
        return graph.model("shortlist", [hidden], outputs, opset=24)  # of its norm


def frequent_rows(head: Head, hidden: Float32, others: Float32, count: int) -> FrequentRows:
    """The head's own tokens of hidden states `[rows, hidden]`, the most frequent ones; where there
    are fewer, those with the lowest ids, which tokenizers learn first.

    Args:
        others: by which the share of the tokens without a row is measured.
    """
    own = best_tokens(head, head.normed(hidden))
    seen = np.bincount(own, minlength=len(head.weight))
    tokens = np.sort(np.argsort(-seen, kind="stable")[:count])
    sample = others[np.random.default_rng(0).permutation(len(others))[:_SAMPLE]]
    return FrequentRows(tokens, _covered(head, head.normed(sample), tokens))


def _covered(head: Head, normed: Float32, tokens: Int64) -> float:
    parts = [_log_sum_exp(head.logits(normed, rows)) for rows in vocabulary(head)]
    total = np.logaddexp.reduce(parts, axis=0)
    known = _log_sum_exp(head.logits(normed, tokens))
    return float(np.clip(np.exp(known - total).mean(), 1e-6, 1.0))


def _log_sum_exp(logits: Float32) -> npt.NDArray[np.float64]:
    sums: npt.NDArray[np.float64] = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    return sums
