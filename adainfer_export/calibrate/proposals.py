"""What the proposers of a shortlist share: the head's norm, cap and own tokens, and products in its
precision.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph_builder import GraphBuilder
from ..lower import Precision
from ..quantise import quantise_blocks
from .head import Head

__all__ = ["NoProposerError", "add_cap", "add_norm", "best_tokens", "product", "vocabulary"]

Float32 = npt.NDArray[np.float32]

_BITS: Literal[8] = 8  # of a quantised proposer's weights
_VOCABULARY_AT_ONCE = 8192


class NoProposerError(Exception):
    """Nothing proposes tokens for this head; the message says why."""


def add_norm(graph: GraphBuilder, head: Head, hidden: ir.Value) -> ir.Value:
    """The final norm of hidden states."""
    kind = "LayerNormalization" if head.centred else "RMSNormalization"
    inputs = [hidden, graph.const("norm", head.norm_weight)]
    if head.norm_bias is not None:
        inputs.append(graph.const("norm_bias", head.norm_bias))
    return graph.op(kind, *inputs, epsilon=head.epsilon)


def add_cap(graph: GraphBuilder, head: Head, logits: ir.Value) -> ir.Value:
    """Within the head's cap, as the exact scores are."""
    if head.cap is None:
        return logits
    cap = graph.number(head.cap)
    return graph.op("Mul", graph.op("Tanh", graph.op("Div", logits, cap)), cap)


def best_tokens(head: Head, normed: Float32) -> npt.NDArray[np.int64]:
    """The head's own token of each row."""
    best = np.full(len(normed), -np.inf, np.float32)
    token = np.zeros(len(normed), np.int64)
    for rows in vocabulary(head):
        logits = head.logits(normed, rows)
        highest = logits.max(axis=1)
        better = highest > best
        best[better], token[better] = highest[better], rows[logits.argmax(axis=1)[better]]
    return token


def vocabulary(head: Head) -> list[npt.NDArray[np.int64]]:
    """All tokens, some at a time."""
    tokens = np.arange(head.weight.shape[0])
    return [
        tokens[start : start + _VOCABULARY_AT_ONCE]
        for start in range(0, len(tokens), _VOCABULARY_AT_ONCE)
    ]


def product(graph: GraphBuilder, inner: ir.Value, up: Float32, precision: Precision) -> ir.Value:
    """`inner @ upᵀ`; in blocks of 8 bits where the head is quantised."""
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
